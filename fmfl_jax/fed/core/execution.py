"""How the clients of a device are executed: side by side, one after another, or step by step from Python.

vmap: all clients of a device in one pass, each step as long as any of them has one left. For accelerators.
scan: one client after another in the compiled round, a loop over exactly its own steps. For CPUs.
steps: one compiled local step, called from Python for every step of every client; the finished updates then go through
    the same compiled round as all others. For convolutions on CPUs: XLA's CPU backend runs them on one slow path inside
    of loops, and under vmap as grouped convolutions.

All three are one round by one definition and agree to rounding. `fed_opt`'s algorithms (FedAvg, FedOpt, FedProx) run
either way, with any uplink, attack and aggregator; an algorithm whose client does more than local steps of one
optimizer from the server's parameters (SCAFFOLD, Ditto, APFL) has no step to take apart: it runs as "vmap" or "scan",
which are `Delivery.clients_per_pass` None or 1, and pmap_round.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmfl_jax.fed.algorithms.fed_opt import fed_opt, with_server
from fmfl_jax.fed.core.client import toward
from fmfl_jax.fed.core.cohort import pmap_round
from fmfl_jax.fed.core.types import AXIS, ClientResult, Cohort, Delivery, FederatedAlgorithm, ServerState
from fmfl_jax.optimize import optimizer_step

MODES = ("vmap", "scan", "steps")


class Execution(NamedTuple):
    """algorithm: its init and what else the host needs. round(state, frozen, cohort [devices, C, ...]) -> (state,
    metrics, ClientReport), as `pmap_round` gives it. clients_per_pass: what the cohort must be laid out for
    (`shard_cohort`)."""

    algorithm: FederatedAlgorithm
    round: Callable
    clients_per_pass: int | None


def default_mode(grad_fn: Callable, params, frozen, batch) -> str:
    """On CPUs "steps" where the gradient has a convolution, else "scan"; on accelerators "vmap".

    The CPU's part is what launch/benchmark_cross_device.py measured (BUILD_NOTES.md, small models): scan is 2 to 4
    times as fast as the others on a linear and a text model, steps 8 times as fast as scan on a CNN. The accelerators'
    part is not measured: kernels of small models are bound by their launches there, which vmap shares between clients.
    A rule and not a trial at run time, so that the same command gives the same bits.

    batch: one local step's. All arguments may be shapes only.
    """
    if jax.default_backend() != "cpu":
        return "vmap"
    key = jax.eval_shape(lambda: jax.random.key(0))
    return "steps" if "conv_general_dilated" in str(jax.make_jaxpr(grad_fn)(params, frozen, batch, key)) else "scan"


def execute_fed_opt(
    mode: str,
    grad_fn: Callable,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    proximal: float = 0.0,
    delivery: Delivery = Delivery(),
) -> Execution:
    """FedAvg, FedOpt or FedProx (see `fed_opt`) in one of MODES; delivery.clients_per_pass is the mode's own.

    Raises ValueError for another mode, and for what "steps" does not serve: several processes, and an aggregator that
    compares with the server's own data.
    """
    if mode not in MODES:
        raise ValueError(f"execution is {mode!r}: expected one of {', '.join(MODES)}")
    clients_per_pass = 1 if mode == "scan" else None
    delivery = dataclasses.replace(delivery, clients_per_pass=clients_per_pass)
    if mode != "steps":
        algorithm = fed_opt(grad_fn, client_optimizer, server_optimizer, proximal=proximal, delivery=delivery)
        return Execution(algorithm, pmap_round(algorithm), clients_per_pass)
    if jax.process_count() > 1:
        raise ValueError("execution 'steps' is driven by one process: with several use 'scan' or 'vmap'")
    if delivery.aggregator.needs_reference:
        raise ValueError(
            "execution 'steps' does not train on the server's own data, which this aggregator compares "
            "with: use 'scan' or 'vmap'"
        )
    algorithm = with_server(_finished, server_optimizer, delivery=delivery)
    aggregate, train = pmap_round(algorithm), _stepped_clients(grad_fn, client_optimizer, proximal)

    def round(state: ServerState, frozen, cohort: Cohort):
        return aggregate(state, (), cohort._replace(batches=train(state, frozen, cohort)))

    return Execution(algorithm, round, clients_per_pass)


class _Work(NamedTuple):
    """What clients did before the compiled round, in place of its batches. delta: pytree [..., ...]; loss: float32."""

    delta: Any
    loss: jax.Array


def _finished(state, frozen, own: Cohort, key) -> ClientResult:
    del state, frozen, key
    return ClientResult(own.batches.delta, {"loss": own.batches.loss})


class _Running(NamedTuple):
    """A client at work. step: int32 scalar. total: float32, sum of the steps' losses."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array
    total: jax.Array


def _stepped_clients(grad_fn: Callable, optimizer: optax.GradientTransformation, proximal: float) -> Callable:
    """train(state, frozen, cohort [devices, C, ...]) -> _Work [devices, C, ...], by the calls of `local_update` and
    with its keys. Each device trains its own clients, all devices at a time."""

    @jax.jit
    def begin(state: ServerState, client_id):
        round_key = jax.random.fold_in(jax.random.key(state.seed), state.round)
        params = jax.tree.map(jnp.copy, state.params)
        return _Running(
            params, optimizer.init(params), jax.random.fold_in(round_key, client_id), jnp.int32(0), jnp.float32(0)
        )

    def step(running: _Running, start, frozen, batch):
        loss, grad = grad_fn(running.params, frozen, batch, jax.random.fold_in(running.key, running.step))
        if proximal:
            grad = toward(start, proximal)(grad, running.params)
        params, opt_state = optimizer_step(optimizer, grad, running.opt_state, running.params)
        return _Running(params, opt_state, running.key, running.step + 1, running.total + loss.astype(jnp.float32))

    step = jax.jit(step, donate_argnums=0)

    @jax.jit
    def end(start, clients: list[_Running]):
        """_Work [1, C, ...] of a device."""
        delta = jax.tree.map(
            lambda w, *local: jnp.stack([w - x for x in local])[None], start, *(client.params for client in clients)
        )
        loss = [client.total / jnp.maximum(client.step, 1).astype(jnp.float32) for client in clients]
        return _Work(delta, jnp.stack(loss)[None])

    def train(state: ServerState, frozen, cohort: Cohort) -> _Work:
        cohort = jax.tree.map(np.asarray, cohort)
        num_devices, num_clients = cohort.client_ids.shape
        batches = cohort.batches
        num_steps = cohort.extras.get("num_steps")
        if num_steps is None:
            num_steps = np.full((num_devices, num_clients), jax.tree.leaves(batches)[0].shape[2], np.int32)
        on_device = [jax.tree.map(lambda x: x.addressable_shards[d].data, (state, frozen)) for d in range(num_devices)]
        running = [[begin(s, client_id) for client_id in ids] for (s, _), ids in zip(on_device, cohort.client_ids)]
        for c in range(num_clients):
            for i in range(num_steps[:, c].max(initial=0)):
                for d in np.flatnonzero(num_steps[:, c] > i):
                    s, f = on_device[d]
                    batch = jax.tree.map(lambda x: x[d, c, i], batches)
                    running[d][c] = step(running[d][c], s.params, f, batch)
        sharding = NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), PartitionSpec(AXIS))
        parts = [end(s.params, clients) for (s, _), clients in zip(on_device, running)]

        def joined(*shards):
            shape = (num_devices, *shards[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))

        return jax.tree.map(joined, *parts)

    return train
