"""Every algorithm on one problem: a layer of two projections with LoRA factors, clients with unequal numbers of steps.

For the tests of what all algorithms have in common. Frozen is WEIGHT, which FLoRA's own weights take the place of.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax.fed.aggregators.robust import fltrust
from fmfl_jax.fed.algorithms.apfl import apfl
from fmfl_jax.fed.algorithms.ditto import ditto
from fmfl_jax.fed.algorithms.fed_buff import fed_buff
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.lora.flex_lora import flex_lora
from fmfl_jax.fed.algorithms.lora.flora import Target, flora
from fmfl_jax.fed.algorithms.lora.het_lora import het_lora
from fmfl_jax.fed.algorithms.partial import partial_model
from fmfl_jax.fed.algorithms.scaffold import scaffold
from fmfl_jax.fed.core.types import Aggregator, ClientState, Cohort, FederatedAlgorithm

N, S, RANK, SCALE, SEED, SGD = 11, 3, 4, 0.5, 7, optax.sgd(0.1)
TARGETS = (Target("q.lora_a", "q.lora_b", "m.weight", 0, 5), Target("v.lora_a", "v.lora_b", "m.weight", 5, 8))
RANKS = (1, 3, 2, 4, 1, 2, 3, 4, 4, 2, 1)
NUM_STEPS = np.asarray([3, 1, 2, 3, 2, 1, 3, 0, 2, 1, 3], np.int32)
WEIGHT = {"m.weight": jnp.asarray(np.random.default_rng(5).normal(size=(6, 8)), jnp.float32)}


def loss_fn(factors, frozen, batch, key):
    """Mean squared error, the inputs scaled by a random number of the step's key, as dropout would."""
    x = batch["x"] * jax.random.uniform(key, (), minval=0.5, maxval=1.5)
    added = [(x @ factors[t.a]) @ factors[t.b] for t in TARGETS]
    return jnp.mean((x @ frozen["m.weight"] + SCALE * jnp.concatenate(added, axis=1) - batch["y"]) ** 2)


grad_fn = jax.value_and_grad(loss_fn)


def start(rank=RANK) -> dict:
    rng = np.random.default_rng(3)
    shapes = {t.a: (6, rank) for t in TARGETS} | {t.b: (rank, t.stop - t.start) for t in TARGETS}
    return {name: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


class Case(NamedTuple):
    """An algorithm, what its `init` is given, and the aggregator beside it."""

    algorithm: FederatedAlgorithm
    params: dict
    aggregator: Aggregator = Aggregator()


V = {name: x for name, x in start().items() if name.startswith("v")}  # what partial models keep
CASES = {
    "fed_opt": Case(fed_opt(grad_fn, optax.adam(0.1), optax.adam(0.1), proximal=0.5), start()),
    "fltrust": Case(fed_opt(grad_fn, SGD), start(), fltrust()),
    "scaffold": Case(scaffold(grad_fn, 0.1, optax.sgd(0.8, momentum=0.5), num_clients=N), start()),
    "fed_buff": Case(fed_buff(grad_fn, SGD), start()),
    "ditto": Case(ditto(grad_fn, SGD, strength=0.3, proximal=0.1), start()),
    "apfl": Case(apfl(grad_fn, SGD, alpha=0.4, alpha_learning_rate=0.2, proximal=0.1), start()),
    "fedrep": Case(partial_model(grad_fn, SGD, kept=V, kept_steps=4), start()),
    "flora": Case(flora(grad_fn, SGD, TARGETS, scale=SCALE, ranks=RANKS), start() | WEIGHT),
    "flex_lora": Case(flex_lora(grad_fn, SGD, ranks=RANKS), start()),
    "het_lora": Case(het_lora(grad_fn, SGD, gamma=0.6, regularization=0.05, ranks=RANKS), start()),
}


def batches(lead: tuple, seed: int) -> dict:
    """{"x": [*lead, 4, 6], "y": [*lead, 4, 8]}."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*lead, 4, n)).astype(np.float32) for name, n in (("x", 6), ("y", 8))}


def cohort(case: Case, r: int, states) -> Cohort:
    """All clients in round r; states: what the algorithm keeps at them, [N, ...]."""
    return Cohort(
        np.arange(N, dtype=np.int32),
        np.linspace(1, 3, N, dtype=np.float32),
        batches((N, S), seed=r),
        client_states=ClientState(algorithm=states) if case.algorithm.init_client else (),
        num_steps=NUM_STEPS,
        server_batches=batches((S,), seed=99) if case.aggregator.needs_reference else None,
    )


def first_states(case: Case):
    """[N, ...], or (). Each FedBuff client started from parameters of its own."""
    if case.algorithm.init_client is None:
        return ()
    made = [case.algorithm.init_client(case.params, jnp.int32(i)) for i in range(N)]
    states = jax.tree.map(lambda *x: np.stack(x), *made)
    if case.algorithm.dispatch is not None:
        rng = np.random.default_rng(2)
        states = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), states)
    return states
