"""APFL against a plain loop, and at both ends of its degree."""

import jax
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.apfl import apfl
from fmfl_jax.fed.algorithms.fed_opt import FED_AVG, fed_opt
from tests.fed import quadratics

N, ETA, STEPS = 9, 0.2, 3


def personal(algorithm, state, states):
    return jax.vmap(algorithm.personal, in_axes=(None, 0))(state.params, states.algorithm)["w"]


def run(rounds=3, server=FED_AVG, **options):
    _, _, batches = quadratics.objectives(N, steps=STEPS)
    algorithm = apfl(quadratics.grad_fn, optax.sgd(ETA), server, **options)
    return algorithm, *quadratics.play(algorithm, quadratics.start(), batches, rounds=rounds)


@pytest.mark.parametrize("alpha_rate", [None, 0.3])
def test_rounds_equal_a_plain_loop(alpha_rate):
    a, h, _ = quadratics.objectives(N, steps=STEPS)
    rate = 0.0 if alpha_rate is None else alpha_rate
    algorithm, state, states, metrics = run(alpha=0.4, alpha_learning_rate=alpha_rate)
    w, v, alpha = np.asarray(quadratics.start()["w"]), np.tile(quadratics.start()["w"], (N, 1)), np.full(N, 0.4)
    for _ in range(3):
        ends = []
        for i in range(N):
            gradient = lambda x, i=i: h[i] * (x - a[i])
            alpha[i] -= rate * np.dot(v[i] - w, gradient(alpha[i] * v[i] + (1 - alpha[i]) * w))
            alpha[i] = np.clip(alpha[i], 0, 1)
            u = w.copy()
            for _ in range(STEPS):
                mixed = alpha[i] * v[i] + (1 - alpha[i]) * u
                u, v[i] = u - ETA * gradient(u), v[i] - ETA * alpha[i] * gradient(mixed)
            ends.append(u)
        w = np.mean(ends, axis=0)
    np.testing.assert_allclose(state.params["w"], w, atol=1e-5)
    np.testing.assert_allclose(states.algorithm["v"]["w"], v, atol=1e-5)
    np.testing.assert_allclose(states.algorithm["alpha"], alpha, atol=1e-5)
    np.testing.assert_allclose(
        personal(algorithm, state, states), alpha[:, None] * v + (1 - alpha[:, None]) * w, atol=1e-5
    )
    np.testing.assert_allclose(metrics["alpha"], alpha.mean(), atol=1e-5)
    assert alpha_rate is None or np.ptp(alpha) > 0.01


def test_the_ends_of_the_degree():
    """alpha = 0 is the shared model; 1 is training alone, whatever the server does. The shared model is FedAvg's."""
    _, _, batches = quadratics.objectives(N, steps=STEPS)
    fed_avg, *_ = quadratics.play(fed_opt(quadratics.grad_fn, optax.sgd(ETA)), quadratics.start(), batches, rounds=3)
    algorithm, state, states, _ = run(alpha=0.0)
    np.testing.assert_array_equal(state.params["w"], fed_avg.params["w"])
    np.testing.assert_array_equal(personal(algorithm, state, states), np.tile(state.params["w"], (N, 1)))
    alone, *others = run(alpha=1.0), run(alpha=1.0, server=optax.sgd(3.0))
    for other in others:
        np.testing.assert_array_equal(personal(*alone[:3]), personal(*other[:3]))
        assert np.any(alone[1].params["w"] != other[1].params["w"])


def test_a_learned_alpha_stays_a_share():
    """A large step overshoots to the ends; with a small one clients whose optima differ move to their own models."""
    *_, states, _ = run(rounds=6, alpha=0.5, alpha_learning_rate=100.0)
    assert set(states.algorithm["alpha"].tolist()) == {0.0, 1.0}
    *_, states, _ = run(rounds=6, alpha=0.5, alpha_learning_rate=0.02)
    assert np.mean(states.algorithm["alpha"]) > 0.51 and np.all(states.algorithm["alpha"] < 1)


def test_an_alpha_beyond_its_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        apfl(quadratics.grad_fn, optax.sgd(0.1), alpha=1.5)
