"""Over-the-air computation in a round: the exact mean without noise, the closed form's error with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.experiment.network.aircomp import TRUNCATION, over_the_air
from fmfl_jax.fed.core.types import Stack
from fmfl_jax.wireless.over_the_air import mean_squared_error, optimal_denoising


def stack_of(snr, weights, seed=0, size=4000):
    messages = np.random.default_rng(seed).normal(size=(len(snr), size)).astype(np.float32)
    messages[np.asarray(weights) == 0] = 0
    weights = jnp.asarray(weights, jnp.float32)
    return Stack(
        {"w": jnp.asarray(messages)},
        weights,
        weights,
        {"snr": jnp.asarray(snr, jnp.float32)},
        client_ids=jnp.arange(len(snr)),
    )


def hear(stack, truncated=False, key=0):
    update, _ = over_the_air(truncated=truncated).combine(stack, (), jax.random.key(key))
    return np.asarray(update["w"])


def weighted(stack):
    weights = np.asarray(stack.weights)
    return weights @ np.asarray(stack.messages["w"]) / max(weights.sum(), 1)


def test_strong_channels_give_the_weighted_mean_of_those_who_are_there():
    stack = stack_of([1e9, 1e9, 1e-3, 1e9], [3, 1, 0, 2])
    np.testing.assert_allclose(hear(stack), weighted(stack), atol=2e-4)
    nobody = stack_of([1.0, 1.0], [0, 0])
    assert np.all(hear(nobody) == 0) and np.all(hear(nobody, truncated=True) == 0)


def test_the_error_is_the_closed_forms():
    """Messages of equal power and equal weights: the mean squared error is that of Cao et al., within 4 standard errors
    (messages are independent; the common scale is their largest root mean square)."""
    snr = np.asarray([0.5, 2.0, 8.0, 30.0])
    stack = stack_of(snr, np.ones(4), size=200_000)
    error = (hear(stack) - weighted(stack)) ** 2
    one = jnp.ones(4)
    eta = optimal_denoising(jnp.asarray(snr, jnp.float32), one, jnp.float32(1))
    expected = float(mean_squared_error(jnp.asarray(snr, jnp.float32), one, jnp.float32(1), eta))
    assert expected > 0.01
    assert error.mean() == pytest.approx(expected, abs=4 * error.std() / np.sqrt(error.size) + 0.01 * expected)


def test_truncated_inversion_is_unbiased_over_the_fades():
    stack = stack_of([40.0, 10.0, 20.0, 1e-9], [1, 2, 1, 0], size=50)
    heard = np.stack([hear(stack, truncated=True, key=k) for k in range(300)])
    error = (heard.mean(0) - weighted(stack)) / (heard.std(0) / np.sqrt(300))
    assert np.abs(error).max() < 4.5 and np.abs(error).mean() < 1.2
    assert heard.std() > 0.01 and TRUNCATION > 0
