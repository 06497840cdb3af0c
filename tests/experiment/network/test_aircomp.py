"""Over-the-air computation in a round: the exact mean without noise, the closed form's error with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.experiment.network.aircomp import TRUNCATION, over_the_air
from fmfl_jax.fed.core.types import GatheredUpdates
from fmfl_jax.wireless.over_the_air import optimal_denoising, transmit_amplitude


def gathered_of(snr, weights, seed=0, size=4000):
    updates = np.random.default_rng(seed).normal(size=(len(snr), size)).astype(np.float32)
    updates[np.asarray(weights) == 0] = 0
    weights = jnp.asarray(weights, jnp.float32)
    return GatheredUpdates(
        {"w": jnp.asarray(updates)},
        weights,
        weights,
        {"snr": jnp.asarray(snr, jnp.float32)},
        client_ids=jnp.arange(len(snr)),
    )


def received(gathered, truncated=False, key=0):
    update, _ = over_the_air(truncated=truncated).aggregate(gathered, (), jax.random.key(key))
    return np.asarray(update["w"])


def weighted(gathered):
    weights = np.asarray(gathered.weights)
    return weights @ np.asarray(gathered.updates["w"]) / max(weights.sum(), 1)


def test_strong_channels_give_the_weighted_mean_of_those_who_are_there():
    gathered = gathered_of([1e9, 1e9, 1e-3, 1e9], [3, 1, 0, 2])
    np.testing.assert_allclose(received(gathered), weighted(gathered), atol=2e-4)
    nobody = gathered_of([1.0, 1.0], [0, 0])
    assert np.all(received(nobody) == 0) and np.all(received(nobody, truncated=True) == 0)


def test_the_error_is_the_closed_forms():
    """Updates of equal power and equal weights: the mean squared error is that of Cao et al., within 4 standard errors
    (updates are independent; the common scale is their largest root mean square)."""
    snr = np.asarray([0.5, 2.0, 8.0, 30.0])
    gathered = gathered_of(snr, np.ones(4), size=200_000)
    error = (received(gathered) - weighted(gathered)) ** 2
    one = jnp.ones(4)
    eta = optimal_denoising(jnp.asarray(snr, jnp.float32), one, jnp.float32(1))
    at_server = np.asarray(transmit_amplitude(jnp.asarray(snr, jnp.float32), one, eta) / jnp.sqrt(eta))
    expected = (np.sum((at_server - 1) ** 2) + 1 / float(eta)) / 16  # sum (h b / sqrt(eta) - 1)^2 + noise / eta, by C^2
    assert expected > 0.01
    assert error.mean() == pytest.approx(expected, abs=4 * error.std() / np.sqrt(error.size) + 0.01 * expected)


def test_truncated_inversion_is_unbiased_over_the_fades():
    gathered = gathered_of([40.0, 10.0, 20.0, 1e-9], [1, 2, 1, 0], size=50)
    received_mean = np.stack([received(gathered, truncated=True, key=k) for k in range(300)])
    error = (received_mean.mean(0) - weighted(gathered)) / (received_mean.std(0) / np.sqrt(300))
    assert np.abs(error).max() < 4.5 and np.abs(error).mean() < 1.2
    assert received_mean.std() > 0.01 and TRUNCATION > 0
