"""Means with a denominator of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort, Execution
from fmfl_jax.parallel import replicate

START = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}


def linear_loss(params, frozen, batch, key):
    """A client's gradient is its batch [1, 8], so that with SGD of rate 1 its delta is too."""
    return jnp.sum(params["w"] * batch[0, :6].reshape(3, 2)) + jnp.sum(params["b"] * batch[0, 6:])


GRAD = jax.value_and_grad(linear_loss)


def deltas(num_clients, seed=0):
    return np.random.default_rng(seed).normal(size=(num_clients, 1, 1, 8)).astype(np.float32)


def run(algorithm, cohort, *, clients_per_pass=None):
    whole = make_round(algorithm, execution=Execution(clients_per_pass=clients_per_pass))
    laid_out = put_on_devices(cohort, clients_per_pass=clients_per_pass)
    return pmap_round(whole)(replicate(whole.init(START, 0)), replicate(jnp.zeros(())), laid_out)


def flat(params):
    return np.concatenate([np.asarray(params["w"]).reshape(-1), np.asarray(params["b"])])


@pytest.mark.parametrize("clients_per_pass", [None, 1])
def test_mean_with_denominators_is_the_weighted_sum_over_theirs(clients_per_pass):
    rng, x = np.random.default_rng(1), deltas(13)
    weights = np.where(rng.random(13) < 0.5, rng.uniform(1, 9, 13), 0).astype(np.float32)
    examples = rng.integers(1, 9, 13).astype(np.float32)
    algorithm = fed_opt(GRAD, optax.sgd(1.0))
    cohort = Cohort(np.arange(13, dtype=np.int32), weights, x, examples)
    state, metrics, _ = run(algorithm, cohort, clients_per_pass=clients_per_pass)
    expected = (weights[:, None] * x[:, 0, 0]).sum(0) / examples.sum()
    np.testing.assert_allclose(flat(state.params), -expected, rtol=1e-5, atol=1e-6)
    assert metrics["examples"] == examples.sum()


def test_denominators_equal_to_the_weights_are_plain_fedavg_bit_for_bit():
    cohort = Cohort(np.arange(9, dtype=np.int32), np.arange(1, 10, dtype=np.float32), deltas(9))
    algorithm = fed_opt(GRAD, optax.sgd(1.0), optax.adam(0.1))
    plain, *_ = run(algorithm, cohort)
    other, *_ = run(algorithm, cohort._replace(denominators=cohort.weights))
    jax.tree.map(np.testing.assert_array_equal, plain, other)


def test_nobody_delivered_leaves_the_server_as_it_was_whatever_the_denominators():
    cohort = Cohort(np.arange(9, dtype=np.int32), np.zeros(9, np.float32), deltas(9), np.ones(9, np.float32))
    algorithm = fed_opt(GRAD, optax.sgd(1.0), optax.adam(0.1))
    state, *_ = run(algorithm, cohort)
    before = algorithm.init(START, 0)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
