"""Clients with quadratic objectives, and rounds that keep their states, for the tests of algorithms with any."""

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.fed.core.cohort import put_on_devices, without_padding
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort
from fmfl_jax.parallel import replicate


def loss_fn(params, frozen, batch, key):
    """1/2 sum h (w - a)^2 of a batch [2, d]: the client's optimum a and curvature h."""
    return 0.5 * jnp.sum(batch[1] * (params["w"] - batch[0]) ** 2)


grad_fn = jax.value_and_grad(loss_fn)


def objectives(num_clients, *, steps, dim=2, curvature=(0.5, 2.0), seed=0):
    """(optima [N, d], curvatures [N, d], batches [N, S, 2, d])."""
    rng = np.random.default_rng(seed)
    a, h = rng.normal(size=(num_clients, dim)), rng.uniform(*curvature, (num_clients, dim))
    one = np.stack([a, h], axis=1).astype(np.float32)
    return one[:, 0], one[:, 1], np.repeat(one[:, None], steps, axis=1)


def start(dim=2):
    return {"w": jnp.linspace(0.5, -0.5, dim, dtype=jnp.float32)}


def first_states(round, params, num_clients):
    """What the clients keep at first, leaves [N, ...]."""
    made = [round.init_client(params, jnp.int32(i)) for i in range(num_clients)]
    return jax.tree.map(lambda *x: np.stack(x), *made)


def play(
    algorithm,
    params,
    batches,
    *,
    rounds,
    cohorts=None,
    weights=None,
    delivered=None,
    num_steps=None,
    extras=None,
    frozen=None,
    **parts,
):
    """(server state, states of all clients, metrics of the last round) after `rounds` rounds over all clients, or those
    of cohorts[r]. weights [N]; delivered(r) -> bool of the cohort; num_steps [N]; extras: {name: [N]}. parts: of
    make_round, beside the algorithm."""
    everybody = np.arange(len(batches), dtype=np.int32)
    weights = np.ones(len(batches), np.float32) if weights is None else weights
    whole = make_round(algorithm, **parts)
    states = first_states(whole, params, len(batches)) if whole.keeps_client_states else ()
    state, step, metrics = replicate(whole.init(params, 7)), pmap_round(whole), None
    frozen = replicate(jnp.zeros((), jnp.float32) if frozen is None else frozen)
    for r in range(rounds):
        ids = everybody if cohorts is None else np.asarray(cohorts[r], np.int32)
        cohort = Cohort(
            ids,
            weights[ids],
            batches[ids],
            client_states=jax.tree.map(lambda x: x[ids], states),
            delivered=None if delivered is None else delivered(r),
            num_steps=None if num_steps is None else num_steps[ids],
            extras={name: x[ids] for name, x in (extras or {}).items()},
        )
        state, metrics, report = step(state, frozen, put_on_devices(cohort))
        for kept, new in zip(jax.tree.leaves(states), jax.tree.leaves(without_padding(report.states, len(ids)))):
            kept[ids] = new
    return state, states, metrics
