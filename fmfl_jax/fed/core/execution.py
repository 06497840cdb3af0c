"""How the clients of a device are run: side by side, one after another, or step by step from Python.

vmap: all clients of a device in one pass, each step as long as any of them has one left. For accelerators.
scan: one client after another in the compiled round, a loop over exactly its steps. For CPUs.
steps: one compiled local step, called from Python for every step of every client; the finished updates then go through
    the same compiled round as all others. For convolutions on CPUs: XLA's CPU backend runs them on one slow path inside
    of loops, and under vmap as grouped convolutions.

All three run the same begin, phases and finish with the same keys, for every algorithm, and agree to rounding.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fmfl_jax.fed.core.client import phase_key, run_client
from fmfl_jax.fed.core.round import ClientReport, Round, client_context, server_context
from fmfl_jax.fed.core.types import (
    ClientContext,
    ClientResult,
    Cohort,
    Execution,
    FederatedAlgorithm,
    GradFn,
    Metrics,
    ServerState,
    Tree,
)
from fmfl_jax.parallel import AXIS, device_sharding

MODES = ("vmap", "scan", "steps")


class RoundFn(Protocol):
    """round(state, frozen, cohort [devices, C, ...]) -> (state, metrics, ClientReport [devices, C, ...]). state and
    frozen are replicated (`parallel.replicate`); the old state's memory is given to the new one."""

    def __call__(
        self, state: ServerState, frozen: Tree, cohort: Cohort, /
    ) -> tuple[ServerState, Metrics, ClientReport]: ...


def execution_of(mode: str) -> Execution:
    """The execution of one of MODES. Raises ValueError for another."""
    match mode:
        case "vmap":
            return Execution()
        case "scan":
            return Execution(clients_per_pass=1)
        case "steps":
            return Execution(stepwise=True)
    raise ValueError(f"execution is {mode!r}: expected one of {', '.join(MODES)}")


def default_mode(grad_fn: GradFn, params: Tree, frozen: Tree, batch: Tree) -> str:
    """On CPUs "steps" where the gradient has a convolution, else "scan"; on accelerators "vmap".

    The CPU's part is what launch/benchmark_cross_device.py measured (docs/results): scan is 2 to 4 times as fast as
    the others on a linear and a text model, steps 8 times as fast as scan on a CNN. The accelerators' part is not
    measured: kernels of small models are bound by their launches there, which vmap shares between clients. A rule and
    not a trial at run time, so that the same command gives the same bits.

    batch: one local step's. All arguments may be shapes only.
    """
    if jax.default_backend() != "cpu":
        return "vmap"
    key = jax.eval_shape(lambda: jax.random.key(0))
    return "steps" if "conv_general_dilated" in str(jax.make_jaxpr(grad_fn)(params, frozen, batch, key)) else "scan"


def default_clients_per_pass() -> int | None:
    """1 on a CPU, None (all) elsewhere, for models that fill the machine.

    One client's step already fills a CPU's cores, and its activations stay in the cache: 20 at once take 1.3 times the
    time per token and 20 times the memory (docs/results/rounds.md). An accelerator wants the large products.
    """
    return 1 if jax.default_backend() == "cpu" else None


def pmap_round(parts: Round, *, trained: bool = False):
    """`Round.spmd` as one program over all devices. trained: see there."""

    def spmd(state, frozen, cohort):
        return parts.spmd(state, frozen, cohort, trained=trained)

    return jax.pmap(spmd, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, None, 0), donate_argnums=0)


def round_program(parts: Round, frozen: Tree):
    """The round as one program, for arguments that lie as parts.execution says. frozen: for where its arrays lie."""
    mesh = parts.execution.mesh
    if mesh is None:
        return pmap_round(parts)
    return shard_map_round(parts, mesh, jax.tree.map(lambda x: x.sharding.spec, frozen))


def shard_map_round(parts: Round, mesh: Mesh, frozen_specs: Tree):
    """`Round.spmd` over a mesh ("clients", "model"), whose loss sums over "model" by itself (peft/tensor_parallel.py).

    Called as `pmap_round`'s, with the cohort laid out for the mesh's "clients". frozen_specs: the PartitionSpecs of
    frozen, or of its upper levels.
    """

    def spmd(state, frozen, cohort):
        state, metrics, report = parts.spmd(state, frozen, jax.tree.map(lambda x: x[0], cohort))
        return state, metrics, jax.tree.map(lambda x: x[None], report)

    everywhere, by_clients = PartitionSpec(), PartitionSpec(AXIS)
    in_specs, out_specs = (everywhere, frozen_specs, by_clients), (everywhere, everywhere, by_clients)
    # check_vma would need every kernel's own rule; replicated results are so by psum over both axes.
    return jax.jit(
        jax.shard_map(spmd, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False), donate_argnums=0
    )


def stepwise_round(parts: Round) -> RoundFn:
    """The round with its local steps called from Python. Raises ValueError with several processes."""
    if jax.process_count() > 1:
        raise ValueError("execution 'steps' is driven by one process: with several use 'scan' or 'vmap'")
    join, train = pmap_round(parts, trained=True), _trainer(parts)

    def run(state: ServerState, frozen: Tree, cohort: Cohort, /):
        return join(state, (), train(state, frozen, cohort))

    return run


def client_program(parts: Round) -> Callable[[ClientContext, Tree], ClientResult]:
    """run(context, batches [S, ...]) -> ClientResult of a single client, compiled as the execution of the round says:
    for clients that stand elsewhere (fmfl_jax/deploy)."""
    client = parts.algorithm.client
    if not parts.execution.stepwise:
        return jax.jit(functools.partial(run_client, client))
    begin, loop = jax.jit(client.begin), _client_loop(parts.algorithm)

    def run(context: ClientContext, batches: Tree) -> ClientResult:
        num_steps = None if context.num_steps is None else int(context.num_steps)
        return loop(context._replace(frozen=()), begin(context), context.frozen, batches, num_steps)

    return run


def _trainer(parts: Round) -> Callable[[ServerState, Tree, Cohort], Cohort]:
    """train(state, frozen, cohort [devices, C, ...]) -> the cohort with ClientResults [devices, C, ...] in place of its
    batches. Each device trains its clients, all devices at a time."""
    algorithm = parts.algorithm

    @jax.jit
    def begin(state, frozen, member: Cohort):
        context = client_context(algorithm, state, frozen, member)
        return context._replace(frozen=()), algorithm.client.begin(context)

    @jax.jit
    def begin_at_server(state, frozen):
        context = server_context(algorithm, state, frozen)
        return context._replace(frozen=()), algorithm.client.begin(context)

    client = _client_loop(algorithm)
    stack = jax.jit(lambda *results: jax.tree.map(lambda *x: jnp.stack(x)[None], *results))

    def train(state: ServerState, frozen: Tree, cohort: Cohort) -> Cohort:
        host = jax.tree.map(np.asarray, cohort)
        parts_of_devices, references = [], []
        for d in range(host.client_ids.shape[0]):
            state_here, frozen_here = jax.tree.map(lambda x: x.addressable_shards[d].data, (state, frozen))
            results = []
            for c in range(host.client_ids.shape[1]):
                member = jax.tree.map(lambda x: x[d, c], host._replace(server_batches=None, batches=()))
                context, work = begin(state_here, frozen_here, member)
                batches = jax.tree.map(lambda x: x[d, c], host.batches)
                num_steps = None if member.num_steps is None else int(member.num_steps)
                results.append(client(context, work, frozen_here, batches, num_steps))
            parts_of_devices.append(stack(*results))
            if host.server_batches is not None:
                context, work = begin_at_server(state_here, frozen_here)
                batches = jax.tree.map(lambda x: x[d], host.server_batches)
                references.append(jax.tree.map(lambda x: x[None], client(context, work, frozen_here, batches, None)))
        trained = _joined(parts_of_devices)
        return cohort._replace(batches=trained, server_batches=_joined(references) if references else None)

    return train


def _client_loop(algorithm: FederatedAlgorithm):
    """client(context, work, frozen, batches, num_steps) -> ClientResult, from what `begin` gave: one compiled step for
    every phase, called from Python. context: without `frozen`."""
    phases = algorithm.client.phases

    def step_of(phase):
        def step(work, totals, context: ClientContext, frozen, batch, i):
            key = jax.random.fold_in(phase_key(phase, context.key), i)
            work, metrics = phase.step(context._replace(frozen=frozen), work, batch, key)
            return work, jax.tree.map(jnp.add, totals, metrics)

        return jax.jit(step, donate_argnums=0)

    steps = [step_of(phase) for phase in phases]
    zeros: list[Metrics] = []  # of every phase, made once

    @jax.jit
    def finish(work, context, frozen, totals: list, counts: list) -> ClientResult:
        metrics = {}
        for total, count in zip(totals, counts):
            metrics |= jax.tree.map(lambda x: x / count, total)
        return algorithm.client.finish(context._replace(frozen=frozen), work, metrics)

    def client(context, work, frozen, batches, num_steps: int | None) -> ClientResult:
        totals, counts = [], []
        num_batches = len(jax.tree.leaves(batches)[0])
        held = num_batches if num_steps is None else max(num_steps, 1)
        if not zeros:
            zeros.extend(_no_metrics(phase, context._replace(frozen=frozen), work, batches) for phase in phases)
        for phase, step, total in zip(phases, steps, zeros):
            count = phase.num_steps if phase.num_steps is not None else num_batches if num_steps is None else num_steps
            for i in range(count):
                batch = jax.tree.map(lambda x: x[i % held], batches)
                work, total = step(work, total, context, frozen, batch, np.int32(i))
            totals.append(total)
            counts.append(np.float32(max(count, 1)))
        return finish(work, context, frozen, totals, counts)

    return client


def _no_metrics(phase, context: ClientContext, work, batches) -> Metrics:
    """Zeros like a step's metrics."""
    _, metrics = jax.eval_shape(phase.step, context, work, jax.tree.map(lambda x: x[0], batches), context.key)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)


def _joined(shards: list[Tree]) -> Tree:
    """One array [devices, ...] over all devices of each device's [1, ...]."""
    sharding = device_sharding(split=True)

    def join(*leaves):
        return jax.make_array_from_single_device_arrays((len(leaves), *leaves[0].shape[1:]), sharding, [*leaves])

    return jax.tree.map(join, *shards)
