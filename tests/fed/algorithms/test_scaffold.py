"""SCAFFOLD against a published value, a plain loop, and the optimum that FedAvg misses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.algorithms.scaffold import scaffold
from fmfl_jax.fed.core.round import Transport, make_round
from fmfl_jax.fed.core.types import Traffic
from tests.fed import quadratics


def test_the_published_values():
    """One step of .1 along the gradient [[.5, .5], [1, 1]] from [[2, 4], [3, 5]] with c = 0."""
    gradient = np.asarray([[0.5, 0.5], [1, 1]], np.float32)
    algorithm = scaffold(jax.value_and_grad(lambda p, f, b, k: jnp.sum(p["w"] * b)), 0.1, num_clients=1)
    start = {"w": jnp.asarray([[2, 4], [3, 5]], jnp.float32)}
    state, states, _ = quadratics.play(algorithm, start, gradient[None, None], rounds=1)
    np.testing.assert_allclose(start["w"] - state.params["w"], [[0.05, 0.05], [0.1, 0.1]], atol=1e-6)
    np.testing.assert_allclose(states.algorithm["w"][0], [[0.5, 0.5], [1, 1]], atol=1e-5)


def test_rounds_equal_a_plain_loop():
    """Cohorts of some clients, of unequal weights and steps, one of which is lost each time; momentum at the server."""
    n, eta, rounds = 11, 0.1, 4
    a, h, batches = quadratics.objectives(n, steps=3)
    rng = np.random.default_rng(1)
    cohorts = [rng.permutation(n)[:6] for _ in range(rounds)]
    weights, num_steps = rng.uniform(1, 3, n).astype(np.float32), rng.integers(1, 4, n).astype(np.int32)
    algorithm = scaffold(quadratics.grad_fn, eta, optax.sgd(0.7, momentum=0.9), num_clients=n)
    state, states, _ = quadratics.play(
        algorithm,
        quadratics.start(),
        batches,
        rounds=rounds,
        cohorts=cohorts,
        weights=weights,
        delivered=lambda r: np.arange(6) != r,
        num_steps=num_steps,
    )
    x, c, c_i, momentum = np.asarray(quadratics.start()["w"]), np.zeros(2), np.zeros((n, 2)), np.zeros(2)
    for r, cohort in enumerate(cohorts):
        arrived = np.delete(cohort, r)
        delta, change = np.zeros(2), np.zeros(2)
        for i in arrived:
            y = x.copy()
            for _ in range(num_steps[i]):
                y = y - eta * (h[i] * (y - a[i]) - c_i[i] + c)
            new = c_i[i] - c + (x - y) / (num_steps[i] * eta)
            delta += weights[i] / weights[arrived].sum() * (x - y)
            change += new - c_i[i]
            c_i[i] = new
        momentum = 0.9 * momentum + delta
        x, c = x - 0.7 * momentum, c + change / n
    np.testing.assert_allclose(state.params["w"], x, atol=1e-5)
    np.testing.assert_allclose(states.algorithm["w"], c_i, atol=1e-5)
    np.testing.assert_allclose(state.extra["w"], c, atol=1e-5)
    np.testing.assert_allclose(state.extra["w"], states.algorithm["w"].mean(axis=0), atol=1e-5)


def test_the_drift_of_local_steps_is_gone():
    """K steps of rate eta contract client i's error by (1 - eta h_i)^K: FedAvg stops at the mean of the optima with the
    weights 1 - (1 - eta h_i)^K. The optimum has the weights h_i; SCAFFOLD goes there, also with half of the clients."""
    n, eta, steps = 8, 0.3, 10
    a, h, batches = quadratics.objectives(n, steps=steps, curvature=(0.1, 2.0))
    q = 1 - (1 - eta * h) ** steps
    drifted, optimum = (q * a).sum(axis=0) / q.sum(axis=0), (h * a).sum(axis=0) / h.sum(axis=0)
    assert np.abs(drifted - optimum).min() > 0.05
    average, *_ = quadratics.play(fed_opt(quadratics.grad_fn, optax.sgd(eta)), quadratics.start(), batches, rounds=60)
    np.testing.assert_allclose(average.params["w"], drifted, atol=1e-5)
    rng = np.random.default_rng(2)
    cohorts = [rng.permutation(n)[:4] for _ in range(300)]
    algorithm = scaffold(quadratics.grad_fn, eta, optax.sgd(0.5), num_clients=n)
    state, *_ = quadratics.play(algorithm, quadratics.start(), batches, rounds=300, cohorts=cohorts)
    np.testing.assert_allclose(state.params["w"], optimum, atol=1e-4)


def test_both_ways_carry_the_control_variate_too():
    algorithm = scaffold(quadratics.grad_fn, 0.1, num_clients=3)
    state = algorithm.init(quadratics.start(5), 0)
    assert make_round(algorithm).traffic(state, np.arange(3), None, 3) == Traffic(2 * 5 * 32, 2 * 5 * 32)


def test_other_optimizers_and_repeated_messages_are_refused():
    for rate in (optax.adamw(0.1), 0.0, None):
        with pytest.raises(ValueError, match="SGD steps of a fixed learning rate"):
            scaffold(quadratics.grad_fn, rate, num_clients=3)
    with pytest.raises(ValueError, match="substitute_lost"):
        make_round(scaffold(quadratics.grad_fn, 0.1, num_clients=3), transport=Transport(substitute_lost=True))
