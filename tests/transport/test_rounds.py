"""Rounds in which updates pass an uplink transform, and means with a denominator of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import pmap_round, replicate, shard_cohort
from fmfl_jax.fed.core.types import Cohort, Delivery
from fmfl_jax.transport import codec as uplinks

START = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}


def linear_loss(params, frozen, batch, key):
    """A client's gradient is its batch [1, 8], so that with SGD of rate 1 its delta is too."""
    return jnp.sum(params["w"] * batch[0, :6].reshape(3, 2)) + jnp.sum(params["b"] * batch[0, 6:])


GRAD = jax.value_and_grad(linear_loss)


def deltas(num_clients, seed=0):
    return np.random.default_rng(seed).normal(size=(num_clients, 1, 1, 8)).astype(np.float32)


def run(algorithm, cohort, *, num_devices=8, clients_per_pass=None):
    step = pmap_round(algorithm)
    laid_out = shard_cohort(cohort, num_devices=num_devices, clients_per_pass=clients_per_pass)
    return step(replicate(algorithm.init(START, 0)), replicate(jnp.zeros(())), laid_out)


def flat(params):
    return np.concatenate([np.asarray(params["w"]).reshape(-1), np.asarray(params["b"])])


@pytest.mark.parametrize("clients_per_pass", [None, 1])
def test_mean_with_normalizers_is_the_weighted_sum_over_theirs(clients_per_pass):
    rng, x = np.random.default_rng(1), deltas(13)
    weights = np.where(rng.random(13) < 0.5, rng.uniform(1, 9, 13), 0).astype(np.float32)
    examples = rng.integers(1, 9, 13).astype(np.float32)
    algorithm = fed_opt(GRAD, optax.sgd(1.0), delivery=Delivery(clients_per_pass=clients_per_pass))
    cohort = Cohort(np.arange(13, dtype=np.int32), weights, x, examples)
    state, metrics, _ = run(algorithm, cohort, clients_per_pass=clients_per_pass)
    expected = (weights[:, None] * x[:, 0, 0]).sum(0) / examples.sum()
    np.testing.assert_allclose(flat(state.params), -expected, rtol=1e-5, atol=1e-6)
    assert metrics["examples"] == examples.sum()


def test_normalizers_equal_to_the_weights_are_plain_fedavg_bit_for_bit():
    cohort = Cohort(np.arange(9, dtype=np.int32), np.arange(1, 10, dtype=np.float32), deltas(9))
    algorithm = fed_opt(GRAD, optax.sgd(1.0), optax.adam(0.1))
    plain, *_ = run(algorithm, cohort)
    other, *_ = run(algorithm, cohort._replace(denominators=cohort.weights))
    jax.tree.map(np.testing.assert_array_equal, plain, other)


def test_nobody_heard_leaves_the_server_as_it_was_whatever_the_normalizers():
    cohort = Cohort(np.arange(9, dtype=np.int32), np.zeros(9, np.float32), deltas(9), np.ones(9, np.float32))
    algorithm = fed_opt(GRAD, optax.sgd(1.0), optax.adam(0.1))
    state, *_ = run(algorithm, cohort)
    before = algorithm.init(START, 0)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))


def with_states(uplink, num_clients, residual=0.0):
    one = {"uplink": uplink.init(START)}
    states = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), one)
    if residual:
        owed = jax.tree.map(lambda x: x + np.float32(residual), states["uplink"].residual)
        states["uplink"] = states["uplink"]._replace(residual=owed)
    weights = np.ones(num_clients, np.float32)
    return Cohort(np.arange(num_clients, dtype=np.int32), weights, deltas(num_clients), None, states)


def test_identity_is_plain_fedavg_bit_for_bit_and_its_bits_are_counted():
    uplink = uplinks.identity()
    cohort = with_states(uplink, 9)
    state, metrics, _ = run(fed_opt(GRAD, optax.sgd(1.0), delivery=Delivery(uplink=uplink)), cohort)
    plain, *_ = run(fed_opt(GRAD, optax.sgd(1.0)), cohort._replace(client_states=()))
    jax.tree.map(np.testing.assert_array_equal, plain, state)
    assert metrics["payload_bits"] == 8 * 32


@pytest.mark.parametrize("clients_per_pass", [None, 1])
def test_error_feedback_keeps_what_was_left_out_and_what_was_lost(clients_per_pass):
    uplink = uplinks.top_k(0.25)  # 2 of 8 values
    cohort = with_states(uplink, 10, residual=0.5)
    cohort = cohort._replace(weights=np.asarray([1, 0] * 5, np.float32))
    algorithm = fed_opt(GRAD, optax.sgd(1.0), delivery=Delivery(uplink=uplink, clients_per_pass=clients_per_pass))
    state, _, report = run(algorithm, cohort, clients_per_pass=clients_per_pass)
    residual = {
        name: np.asarray(x).reshape(-1, *x.shape[2:])[:10] for name, x in report.states.codec.residual.items()
    }
    owed = cohort.batches[:, 0, 0] + 0.5  # [C, 8]
    sent = np.where(np.abs(owed) >= np.sort(np.abs(owed), axis=1)[:, -2:-1], owed, 0)
    for c in range(10):
        expected = owed[c] - sent[c] if cohort.weights[c] else owed[c]
        np.testing.assert_allclose(flat({k: v[c] for k, v in residual.items()}), expected, atol=1e-6)
    np.testing.assert_allclose(flat(state.params), -sent[::2].mean(0), atol=1e-6)


def test_a_client_that_is_not_finite_keeps_its_state():
    uplink = uplinks.top_k(0.25)
    cohort = with_states(uplink, 8, residual=0.5)
    cohort.batches[3] = np.nan
    state, metrics, report = run(fed_opt(GRAD, optax.sgd(1.0), delivery=Delivery(uplink=uplink)), cohort)
    assert metrics["dropped_clients"] == 1 and np.all(np.isfinite(flat(state.params)))
    for leaf in jax.tree.leaves(report.states.codec.residual):
        leaf = np.asarray(leaf).reshape(8, -1)
        assert np.all(leaf[3] == 0.5) and np.any(leaf[4] != 0.5)


@pytest.mark.parametrize("uplink", [uplinks.qsgd(8), uplinks.stochastic_rounding(6), uplinks.low_rank(1)])
def test_every_transform_runs_in_a_round_and_stays_near_the_update(uplink):
    cohort = with_states(uplink, 8)
    state, metrics, _ = run(fed_opt(GRAD, optax.sgd(1.0), delivery=Delivery(uplink=uplink)), cohort)
    exact = -cohort.batches[:, 0, 0].mean(0)
    assert np.linalg.norm(flat(state.params) - exact) < 0.6 * np.linalg.norm(cohort.batches[:, 0, 0], axis=1).mean()
    assert metrics["payload_bits"] == uplink.exact_bits(START)
