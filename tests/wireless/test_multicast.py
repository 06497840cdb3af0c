"""Broadcast over fading: losses against closed forms and draws, and the best rate against all of them by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from fmfl_jax.wireless import link, multicast, network, presets


def test_losses():
    snr = np.asarray([0.0, 0.5, 3.0, 100.0])
    for efficiency in (0.1, 1.0, 4.0):
        found = multicast.loss_probability(2.0**efficiency - 1, snr, 0.0)
        np.testing.assert_allclose(found, link.rayleigh_outage(efficiency, snr), rtol=1e-5)
    rng, k = np.random.default_rng(0), 4.0
    noise = rng.normal(size=(2, 200_000)) * np.sqrt(0.5 / (k + 1))
    gain = (np.sqrt(k / (k + 1)) + noise[0]) ** 2 + noise[1] ** 2
    for threshold in (0.3, 1.0, 2.0):
        share = np.mean(2.0 * gain < threshold)
        assert abs(multicast.loss_probability(threshold, 2.0, k) - share) < 4 * np.sqrt(share / 200_000)


def test_the_best_rate_and_who_is_out_of_reach():
    config = presets.facts_20(num_clients=6, num_cells=2, cell_radius_m=3000.0, max_base_delivery_s=20.0)
    state = network.init_network(config, jax.random.key(1))
    selected, bits = np.asarray([1, 1, 1, 0, 1, 1], bool), 4e8
    alone = lambda losses: 1.0 / (1.0 - losses.max())
    seconds = multicast.broadcast_s(config, state, bits, selected, alone)
    channel = network.channel(config, state)
    snr = np.asarray(link.carrier_to_noise_hz(config.bs_power_dbm, channel.path_gain_db)) / config.downlink_bandwidth_hz
    # With sends that the worst client decides, a cell takes as long as that client alone.
    efficiency = np.geomspace(0.05, 10.0, 60)
    arrives = np.exp(-(2.0 ** efficiency[:, None] - 1) / snr)
    each = bits / (20e6 * efficiency[:, None] * np.maximum(arrives, 1e-9))
    own = np.min(np.where(arrives >= 0.01, each, np.inf), axis=0)
    assert 0 < np.sum(own[selected] > 20.0) < selected.sum() - 1, "the test needs some in reach and some not"
    for cell in (slice(0, 3), slice(3, 6)):
        there = selected[cell] & (own[cell] <= 20.0)
        expected = np.where(there, own[cell].max(initial=0, where=there), np.where(selected[cell], np.inf, 0.0))
        np.testing.assert_allclose(seconds[cell], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="expected broadcast"):
        multicast.broadcast_s(dataclasses.replace(config, downlink="unicast"), state, bits, selected, alone)


def test_mcs_rates_reach_their_thresholds():
    rate_bps, threshold = multicast.rates(presets.umi_20())
    assert rate_bps.shape == threshold.shape == (29,)
    capacity = 20e6 * np.log2(1 + threshold)
    assert np.all(rate_bps < capacity) and np.all(rate_bps > 0.5 * capacity)
