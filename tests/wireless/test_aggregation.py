"""Aggregation of what arrives, and over-the-air computation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from fmfl_jax.wireless import arrival, over_the_air


def _aggregate(deltas, weights):
    """sum_k w_k delta_k / total over pytrees of [C, ...]; zeros where nothing arrived, weight 0 removes even NaN."""

    def mean(leaf):
        weight = weights.weights.reshape((-1,) + (1,) * (leaf.ndim - 1))
        summed = jnp.sum(weight * jnp.where(weight == 0.0, 0.0, leaf), axis=0)
        return jnp.where(weights.total == 0.0, 0.0, summed / jnp.where(weights.total == 0.0, 1.0, weights.total))

    return jax.tree.map(mean, deltas)


def mean_squared_error(power_w, amplitude_gain, noise_w, eta):
    """[sum (h_k b_k / sqrt(eta) - 1)^2 + sigma^2 / eta] / C^2 for unit-variance independent symbols."""
    received = amplitude_gain * over_the_air.transmit_amplitude(power_w, amplitude_gain, eta) / jnp.sqrt(eta)
    return (jnp.sum(jnp.square(received - 1.0)) + noise_w / eta) / power_w.shape[0] ** 2


def test_ideal_link_is_plain_fedavg_bit_for_bit():
    key = jax.random.key(0)
    deltas = {"a": jax.random.normal(key, (7, 5, 3)), "b": jax.random.normal(key, (7, 4))}
    examples = jax.random.uniform(key, (7,)) * 100.0
    plain = jax.tree.map(
        lambda d: jnp.sum(examples.reshape((-1,) + (1,) * (d.ndim - 1)) * d, axis=0) / jnp.sum(examples), deltas
    )
    everyone = jnp.ones(7, bool)
    for weights in (
        arrival.survivors_mean(examples, everyone),
        arrival.inverse_probability(examples, everyone, jnp.ones(7)),
    ):
        jax.tree.map(np.testing.assert_array_equal, _aggregate(deltas, weights), plain)


def test_survivors_mean_is_biased_and_inverse_probability_is_not():
    """All 16 outcomes of the facts' example, enumerated."""
    examples, success = jnp.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.9, 0.6, 0.4, 0.8])
    values = {"x": jnp.asarray([[1.0], [-2.0], [3.0], [0.5]])}

    @jax.jit
    def estimate(delivered):
        p = jnp.asarray(success, jnp.float32)
        both = arrival.inverse_probability(examples, delivered, p), arrival.survivors_mean(examples, delivered)
        return [_aggregate(values, weights)["x"][0] for weights in both]

    mean = {"survivors": 0.0, "ipw": 0.0, "square": 0.0}
    for heard in itertools.product((False, True), repeat=4):
        chance = np.prod(np.where(heard, success, 1.0 - success))
        delivered = jnp.asarray(heard)
        ipw, survivors = estimate(delivered)
        mean["survivors"] += chance * float(survivors)
        mean["ipw"] += chance * float(ipw)
        mean["square"] += chance * float(ipw) ** 2
    # 0.506 if the empty outcome counts as no update, 0.509 given at least one survivor (the facts print 0.510).
    assert mean["survivors"] == pytest.approx(0.50634, abs=1e-5)
    assert mean["survivors"] / (1.0 - np.prod(1.0 - success)) == pytest.approx(0.510, abs=2e-3)
    assert mean["ipw"] == pytest.approx(0.800, abs=1e-5)
    assert mean["square"] - mean["ipw"] ** 2 == pytest.approx(1.3328, abs=1e-4)


def test_no_survivors_and_garbage_leave_the_model_unchanged():
    deltas = {"w": jnp.asarray([[jnp.nan, 1.0], [2.0, 4.0]])}
    lost = _aggregate(deltas, arrival.survivors_mean(jnp.ones(2), jnp.zeros(2, bool)))
    np.testing.assert_array_equal(lost["w"], [0.0, 0.0])
    one = _aggregate(deltas, arrival.survivors_mean(jnp.ones(2), jnp.asarray([False, True])))
    np.testing.assert_array_equal(one["w"], [2.0, 4.0])


def test_optimal_denoising_against_scipy():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        mse = jax.jit(lambda power, gain, noise, x: mean_squared_error(power, gain, noise, jnp.exp(x)))
        for noise in (0.01, 1.0, 30.0):
            power, gain = jnp.asarray(rng.uniform(0.5, 2, 6)), jnp.asarray(rng.rayleigh(1.0, 6))
            error = lambda x: float(mse(power, gain, noise, x))
            ours = over_the_air.optimal_denoising(power, gain, noise)
            grid = np.linspace(-8.0, 10.0, 200)
            start = grid[np.argmin([error(x) for x in grid])]
            best = scipy.optimize.minimize_scalar(
                error, bounds=(start - 0.1, start + 0.1), method="bounded", options={"xatol": 1e-10}
            )
            assert error(float(jnp.log(ours))) == pytest.approx(best.fun, rel=1e-6)


def test_aircomp_mean_has_the_predicted_error():
    clients, size = 5, 20000
    deltas = {"w": jax.random.normal(jax.random.key(0), (clients, size))}
    power, gain = jnp.ones(clients), jnp.asarray([0.2, 0.5, 1.0, 1.5, 2.0])
    heard, eta = over_the_air.aircomp_mean(jax.random.key(1), deltas, power, gain, 0.5)
    predicted = float(mean_squared_error(power, gain, 0.5, eta))
    error = np.mean(np.square(heard["w"] - np.mean(deltas["w"], axis=0)))
    assert error == pytest.approx(predicted, rel=0.06)  # 4 sqrt(2/20000) and the rms that normalizes
    clean, _ = over_the_air.aircomp_mean(jax.random.key(1), deltas, power, jnp.ones(clients), 0.0)
    np.testing.assert_allclose(clean["w"], np.mean(deltas["w"], axis=0), atol=1e-6)


def test_truncated_inversion_spends_the_budget_and_is_unbiased():
    plan = over_the_air.truncated_inversion(jnp.asarray([2.0]), jnp.asarray([0.1]), jnp.float32(0.3))
    fade = -np.log1p(-np.random.default_rng(0).uniform(size=400000))
    spent = np.where(fade > 0.3, float(plan.receive_power_w[0]) / (0.1 * fade), 0.0)
    assert spent.mean() == pytest.approx(2.0, abs=4.0 * spent.std() / np.sqrt(400000))
    assert float(plan.silence) == pytest.approx(1.0 - np.exp(-0.3), rel=1e-6)
    deltas = {"w": jnp.broadcast_to(jnp.arange(1.0, 5.0)[:, None], (4, 40000))}
    heard = over_the_air.truncated_mean(
        jax.random.key(0), deltas, jnp.ones(4), jnp.ones(4), 0.01, jnp.float32(0.3), jnp.arange(4)
    )["w"]
    assert abs(heard.mean() - 2.5) < 4.0 * heard.std() / 200.0
