"""Every algorithm: the three executions agree, and anybody may call its parts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.fed.core.cohort import put_on_devices, without_padding
from fmfl_jax.fed.core.execution import execution_of, pmap_round, stepwise_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Aggregate, ClientContext, GatheredUpdates
from fmfl_jax.parallel import replicate
from tests.fed.every_algorithm import CASES, NUM_STEPS, SEED, WEIGHT, N, cohort, first_states

ROUNDS = 2


@pytest.fixture(autouse=True)
def one_device(only_devices):
    """core/test_execution.py has several."""
    only_devices(1)


@functools.cache
def played(name, mode):
    """(parameters, the clients' states [N, ...], metrics, the clients' metrics [N]) after the rounds."""
    case = CASES[name]
    whole = make_round(case.algorithm, aggregator=case.aggregator, execution=execution_of(mode))
    step = (stepwise_round if whole.execution.stepwise else pmap_round)(whole)
    state, states, frozen = replicate(whole.init(case.params, SEED)), first_states(case), replicate(WEIGHT)
    for r in range(ROUNDS):
        laid_out = put_on_devices(cohort(case, r, states), clients_per_pass=whole.execution.clients_per_pass)
        state, metrics, report = step(state, frozen, laid_out)
        kept, reported = without_padding((report.states, report.metrics), N)
        states = kept.algorithm if whole.keeps_client_states else ()
    return jax.device_get((state.params, states, metrics, reported))


def assert_close(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_three_executions_agree(name):
    """With unequal numbers of steps (one client has none), two rounds, keys that every step draws from."""
    expected = played(name, "scan")
    for mode in ("vmap", "steps"):
        assert_close(played(name, mode), expected)
    before, after = CASES[name].params, expected[0]
    assert max(np.abs(after[key] - before[key]).max() for key in after) > 1e-2


def train(client, context, batches):
    """ClientResult of one client: begin, the steps of every phase, finish."""
    work, metrics = client.begin(context), {}
    for phase in client.phases:
        step = jax.jit(phase.step)
        key = context.key if phase.stream is None else jax.random.fold_in(context.key, phase.stream)
        steps = []
        for i in range(int(context.num_steps) if phase.num_steps is None else phase.num_steps):
            batch = jax.tree.map(lambda x: x[i % max(int(context.num_steps), 1)], batches)
            work, more = step(context, work, batch, jax.random.fold_in(key, i))
            steps.append(more)
        if steps:
            metrics |= jax.tree.map(lambda *x: sum(x) / len(x), *steps)
    return client.finish(context, work, metrics)


@pytest.mark.parametrize("name", [name for name in CASES if name != "fltrust"])
def test_by_hand_it_is_the_same_round(name):
    """As a client and a server on separate machines would run it: no make_round, no device axis, no padding."""
    case, states = CASES[name], first_states(CASES[name])
    algorithm = case.algorithm
    state = algorithm.init(case.params, SEED)
    for r in range(ROUNDS):
        given = cohort(case, r, states)
        message, key = algorithm.broadcast(state), jax.random.fold_in(jax.random.key(SEED), r)
        results = []
        for c in range(N):
            kept = jax.tree.map(lambda x: jnp.asarray(x[c]), states)
            own_key = jax.random.fold_in(key, c)
            context = ClientContext(
                message, WEIGHT, kept, jnp.int32(c), jnp.float32(given.weights[c]), NUM_STEPS[c], own_key
            )
            results.append(train(algorithm.client, context, jax.tree.map(lambda x: x[c], given.batches)))
        updates = jax.tree.map(lambda *x: jnp.stack(x), *[result.update for result in results])
        weights = jnp.stack([result.weight for result in results])
        states = jax.tree.map(lambda *x: np.stack(x), *[result.state for result in results])
        if algorithm.aggregate is None:
            update = jax.tree.map(lambda x: jnp.tensordot(weights / jnp.sum(weights), x, 1), updates)
        else:
            gathered = GatheredUpdates(updates, weights, weights, {}, params=state.params)
            update, _ = algorithm.aggregate(gathered, key)
        total = jnp.sum(weights)
        state = algorithm.server(state, Aggregate(update, {}, total, total))
    params, kept, *_ = played(name, "scan")
    assert_close(jax.device_get(state.params), params)
    if algorithm.init_client is not None:
        assert_close(states, kept)
