"""Rounds in which updates pass a codec, and those that are lost on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax import streams
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices, without_padding
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import Transport, make_round
from fmfl_jax.fed.core.types import ClientState, Cohort, Execution
from fmfl_jax.parallel import replicate
from fmfl_jax.transport.codec import identity
from fmfl_jax.transport.low_rank import low_rank
from fmfl_jax.transport.message import HEADER_BYTES
from fmfl_jax.transport.quantize import qsgd, stochastic_rounding
from fmfl_jax.transport.sparsify import top_k

START = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}


def linear_loss(params, frozen, batch, key):
    """A client's gradient is its batch [1, 8], so that with SGD of rate 1 its delta is too."""
    return jnp.sum(params["w"] * batch[0, :6].reshape(3, 2)) + jnp.sum(params["b"] * batch[0, 6:])


GRAD = jax.value_and_grad(linear_loss)


def deltas(num_clients, seed=0):
    return np.random.default_rng(seed).normal(size=(num_clients, 1, 1, 8)).astype(np.float32)


def run(algorithm, cohort, *, clients_per_pass=None, **transport):
    execution = Execution(clients_per_pass=clients_per_pass)
    whole = make_round(algorithm, transport=Transport(**transport), execution=execution)
    laid_out = put_on_devices(cohort, clients_per_pass=clients_per_pass)
    return pmap_round(whole)(replicate(whole.init(START, 0)), replicate(jnp.zeros(())), laid_out)


def flat(params):
    return np.concatenate([np.asarray(params["w"]).reshape(-1), np.asarray(params["b"])])


def with_states(codec, num_clients, residual=0.0):
    one = ClientState(codec=codec.init(START))
    states = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), one)
    if residual:
        owed = jax.tree.map(lambda x: x + np.float32(residual), states.codec.residual)
        states = states._replace(codec=states.codec._replace(residual=owed))
    weights = np.ones(num_clients, np.float32)
    return Cohort(np.arange(num_clients, dtype=np.int32), weights, deltas(num_clients), None, states)


def test_identity_is_plain_fedavg_bit_for_bit_and_its_bits_are_counted():
    codec = identity()
    cohort = with_states(codec, 9)
    state, metrics, _ = run(fed_opt(GRAD, optax.sgd(1.0)), cohort, codec=codec)
    plain, *_ = run(fed_opt(GRAD, optax.sgd(1.0)), cohort._replace(client_states=()))
    jax.tree.map(np.testing.assert_array_equal, plain, state)
    assert metrics["payload_bits"] == 8 * 32


@pytest.mark.parametrize("clients_per_pass", [None, 1])
def test_error_feedback_keeps_what_was_left_out_and_what_was_lost(clients_per_pass):
    codec = top_k(0.25)  # 2 of 8 values
    cohort = with_states(codec, 10, residual=0.5)
    cohort = cohort._replace(weights=np.asarray([1, 0] * 5, np.float32))
    state, _, report = run(fed_opt(GRAD, optax.sgd(1.0)), cohort, codec=codec, clients_per_pass=clients_per_pass)
    residual = without_padding(report.states.codec.residual, 10)
    owed = cohort.batches[:, 0, 0] + 0.5  # [C, 8]
    sent = np.where(np.abs(owed) >= np.sort(np.abs(owed), axis=1)[:, -2:-1], owed, 0)
    for c in range(10):
        expected = owed[c] - sent[c] if cohort.weights[c] else owed[c]
        np.testing.assert_allclose(flat({k: v[c] for k, v in residual.items()}), expected, atol=1e-6)
    np.testing.assert_allclose(flat(state.params), -sent[::2].mean(0), atol=1e-6)


def test_a_client_that_is_not_finite_keeps_its_state():
    codec = top_k(0.25)
    cohort = with_states(codec, 8, residual=0.5)
    cohort.batches[3] = np.nan
    state, metrics, report = run(fed_opt(GRAD, optax.sgd(1.0)), cohort, codec=codec)
    assert metrics["dropped_clients"] == 1 and np.all(np.isfinite(flat(state.params)))
    for leaf in jax.tree.leaves(report.states.codec.residual):
        leaf = np.asarray(leaf).reshape(8, -1)
        assert np.all(leaf[3] == 0.5) and np.any(leaf[4] != 0.5)


@pytest.mark.parametrize("codec", [qsgd(8), stochastic_rounding(6), low_rank(1)])
def test_every_codec_runs_in_a_round_and_stays_near_the_update(codec):
    cohort = with_states(codec, 8)
    state, metrics, _ = run(fed_opt(GRAD, optax.sgd(1.0)), cohort, codec=codec)
    exact = -cohort.batches[:, 0, 0].mean(0)
    assert np.linalg.norm(flat(state.params) - exact) < 0.6 * np.linalg.norm(cohort.batches[:, 0, 0], axis=1).mean()
    assert metrics["payload_bits"] == codec.exact_bits(START)


@pytest.mark.parametrize("codec", [top_k(0.25), qsgd(8, coding="elias"), low_rank(1)])
def test_a_round_applies_what_a_client_would_send_as_bytes(codec):
    """One client, so that the mean is its update: bit for bit."""
    cohort = with_states(codec, 1)
    state, metrics, report = run(fed_opt(GRAD, optax.sgd(1.0)), cohort, codec=codec)
    delta = {"w": cohort.batches[0, 0, 0, :6].reshape(3, 2), "b": cohort.batches[0, 0, 0, 6:]}
    key = jax.random.key(0)
    for word in (0, 0, streams.CODEC):  # the round, the client
        key = jax.random.fold_in(key, word)
    message, kept = codec.encode(delta, codec.init(START), key)
    received = codec.decode(message, START)
    np.testing.assert_array_equal(flat(state.params), -flat(received))
    own = without_padding(report.states.codec, 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[0], b), own, kept)
    assert len(message) == HEADER_BYTES + -(-int(metrics["payload_bits"]) // 8)


def test_the_last_update_that_arrived_stands_in_for_a_lost_one():
    """Client 2 is lost in the second of two rounds, client 4 in both: zeros stand in for it. Who is not finite has no
    substitute."""
    n, x = 6, deltas(6)[:, 0, 0]
    cohort = Cohort(
        np.arange(n, dtype=np.int32),
        np.arange(1, n + 1, dtype=np.float32),
        deltas(n),
        denominators=np.arange(1, n + 1, dtype=np.float32),
        client_states=ClientState(last_update=jax.tree.map(lambda x: np.zeros((n, *x.shape), np.float32), START)),
        delivered=np.arange(n) != 4,
    )
    algorithm = fed_opt(GRAD, optax.sgd(1.0))
    first, metrics, report = run(algorithm, cohort, substitute_lost=True)
    sent = x * (np.arange(n) != 4)[:, None]
    np.testing.assert_allclose(flat(first.params), -np.average(sent, axis=0, weights=cohort.weights), atol=1e-6)
    assert metrics["examples"] == cohort.weights.sum() and metrics["dropped_clients"] == 0

    fresh = deltas(n, seed=5)
    fresh[3] = np.nan
    again = cohort._replace(
        batches=fresh, delivered=~np.isin(np.arange(n), [2, 4]), client_states=without_padding(report.states, n)
    )
    second, metrics, report = run(algorithm, again, substitute_lost=True)
    update = np.where(np.isin(np.arange(n), [2, 4])[:, None], sent, fresh[:, 0, 0])
    there = np.arange(n) != 3
    expected = np.average(update[there], axis=0, weights=cohort.weights[there])
    np.testing.assert_allclose(flat(second.params), -expected, atol=1e-6)
    assert metrics["dropped_clients"] == 1
    last = without_padding(report.states.last_update, n)
    for c in range(n):
        kept = fresh[c, 0, 0] if c in (0, 1, 5) else sent[c]
        np.testing.assert_allclose(flat({name: leaf[c] for name, leaf in last.items()}), kept, atol=1e-6)
