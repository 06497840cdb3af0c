"""Ditto against its closed form, and at both ends of its degree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.ditto import ditto
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from tests.fed import quadratics


def personal(algorithm, state, states):
    """[N, d] of all clients' own models."""
    return jax.vmap(algorithm.personal, in_axes=(None, 0))(state.params, states.algorithm)["w"]


@pytest.mark.parametrize("strength", [0.25, 4.0])
def test_the_closed_form(strength):
    """With curvature 1 the personal model is (a_k + lambda w) / (1 + lambda); w is the model that was sent."""
    a, _, batches = quadratics.objectives(9, steps=120, curvature=(1.0, 1.0))
    algorithm = ditto(quadratics.grad_fn, optax.sgd(0.1), strength=strength)
    w = quadratics.start()
    state, states, _ = quadratics.play(algorithm, w, batches, rounds=1)
    optimum = (a + strength * w["w"][None]) / (1 + strength)
    np.testing.assert_allclose(personal(algorithm, state, states), optimum, atol=1e-5)


def test_rounds_equal_a_plain_loop():
    """Unequal numbers of steps; who is lost keeps its model."""
    n, eta, lam, rounds = 9, 0.1, 0.5, 3
    a, h, _ = quadratics.objectives(n, steps=1)
    rng = np.random.default_rng(0)
    batches = np.stack([a[:, None] + rng.normal(size=(n, 3, 2)), np.repeat(h[:, None], 3, 1)], axis=2).astype(
        np.float32
    )
    num_steps = rng.integers(1, 4, n).astype(np.int32)
    algorithm = ditto(quadratics.grad_fn, optax.sgd(eta), strength=lam)
    state, states, metrics = quadratics.play(
        algorithm,
        quadratics.start(),
        batches,
        rounds=rounds,
        delivered=lambda r: np.arange(n) != r,
        num_steps=num_steps,
    )
    w, v = np.asarray(quadratics.start()["w"]), np.tile(quadratics.start()["w"], (n, 1))
    for r in range(rounds):
        arrived, ends, losses = np.delete(np.arange(n), r), [], []
        for i in arrived:
            u = w.copy()
            for s in range(num_steps[i]):
                u = u - eta * h[i] * (u - batches[i, s, 0])
            ends.append(u)
            mine = []
            for s in range(num_steps[i]):
                b = batches[i, s, 0]
                mine.append(0.5 * np.sum(h[i] * (v[i] - b) ** 2))
                v[i] = v[i] - eta * (h[i] * (v[i] - b) + lam * (v[i] - w))
            losses.append(np.mean(mine))
        w = np.mean(ends, axis=0)
    np.testing.assert_allclose(state.params["w"], w, atol=1e-5)
    np.testing.assert_allclose(personal(algorithm, state, states), v, atol=1e-5)
    np.testing.assert_allclose(metrics["personal_loss"], np.mean(losses), rtol=1e-5)


def test_the_ends_of_the_degree_and_what_lies_between():
    """lambda = 0: whatever the server does, bit for bit; a large one: the shared model. The shared one is FedAvg's."""
    a, _, batches = quadratics.objectives(9, steps=5)

    def run(algorithm, rounds=3):
        return algorithm, *quadratics.play(algorithm, quadratics.start(), batches, rounds=rounds)[:2]

    make = lambda strength: ditto(quadratics.grad_fn, optax.sgd(0.1), strength=strength)
    alone, other = run(make(0.0)), run(ditto(quadratics.grad_fn, optax.sgd(0.1), optax.sgd(3.0), strength=0.0))
    np.testing.assert_array_equal(personal(*alone), personal(*other))
    assert np.any(alone[1].params["w"] != other[1].params["w"])
    # eta lambda < 2 asks for small steps; the server's are large, so that the shared model moves all the same.
    slow = (quadratics.grad_fn, optax.sgd(1e-4), optax.sgd(500.0))
    near, before = run(ditto(*slow, strength=1e4)), run(ditto(*slow, strength=1e4), rounds=2)
    fed_avg, *_ = quadratics.play(fed_opt(*slow), quadratics.start(), batches, rounds=3)
    np.testing.assert_array_equal(near[1].params["w"], fed_avg.params["w"])
    sent = np.asarray(before[1].params["w"])
    assert np.abs(sent - quadratics.start()["w"]).min() > 0.1
    np.testing.assert_allclose(personal(*near), np.tile(sent, (9, 1)), atol=1e-3)
    spread = lambda result: float(jnp.mean(jnp.var(personal(*result), axis=0)))
    spreads = [spread(result) for result in (alone, run(make(0.5)), run(make(4.0)), near)]
    assert spreads[0] > 1.2 * spreads[1] > 1.44 * spreads[2] and spreads[3] < 1e-6


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="lambda"):
        ditto(quadratics.grad_fn, optax.sgd(0.1), strength=-1.0)
