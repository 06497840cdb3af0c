"""Bringing one large file to every client of a cell over fading channels: at which rate, and how often it is sent.

A broadcast cannot follow each client's fades: packets go out at one rate, and a client loses those that fall into a
fade too deep for it. A low rate loses few packets, a high one costs less for each; the best is chosen, by the expected
number of sends that the way of repairing losses takes. Packets of one block are interleaved over more than the
channel's coherence time, so that their losses are independent.
"""

from collections.abc import Callable

import jax
import numpy as np

from fmfl_jax.wireless import link, network

# Rates to choose from where there is no MCS table, bit/s/Hz.
_EFFICIENCIES = np.geomspace(0.05, 10.0, 60)
_channel = jax.jit(network.channel, static_argnums=0)
_MOST_LOST = 0.99  # a client that loses more of the packets at a rate cannot be served at it


def loss_probability(threshold, snr, rician_k):
    """P(|h|^2 snr < threshold), |h|^2 of mean 1 and Rician with linear K (0: Rayleigh). Broadcasts; 1 at SNR 0."""
    from scipy.stats import ncx2  # slow to import, and only a multicast needs it

    k, snr = np.asarray(rician_k, np.float64), np.asarray(snr, np.float64)
    fade = np.asarray(threshold, np.float64) / np.maximum(snr, 1e-300)
    return ncx2.cdf(2 * (k + 1) * fade, 2, 2 * k)


def rates(config: network.Network) -> tuple[np.ndarray, np.ndarray]:
    """(bit/s, SNR that they need, linear) of the full downlink band: the MCS table's, or Shannon's."""
    if config.rate_model == "shannon":
        gap = 10.0 ** (config.gap_db / 10.0)
        return config.downlink_bandwidth_hz * _EFFICIENCIES, gap * (2.0**_EFFICIENCIES - 1.0)
    thresholds = link.mcs_thresholds_db(config.downlink_bandwidth_hz * config.slot_s)
    return config.downlink_bandwidth_hz * link.MCS_EFFICIENCY, 10.0 ** (thresholds / 10.0)


def broadcast_s(
    config: network.Network,
    state: network.NetworkState,
    file_bits: float,
    selected: np.ndarray,
    sends: Callable[[np.ndarray], float],
) -> np.ndarray:
    """Expected seconds until the last selected client of a cell has the file, float64 [C]: inf for those out of reach,
    0 for those not selected.

    sends: expected number of sends of a packet from the receivers' loss probabilities [U], each below 1. A client is
    out of reach where even alone, and at its best rate, it would take longer than max_base_delivery_s.

    Raises:
      ValueError: for a network without broadcast.
    """
    if config.downlink != "broadcast":
        raise ValueError(f"downlink={config.downlink}: expected broadcast")
    channel = _channel(config, state)
    cn0_hz = link.carrier_to_noise_hz(config.bs_power_dbm, channel.path_gain_db, config.ue_noise_figure_db)
    snr = np.asarray(cn0_hz, np.float64) / config.downlink_bandwidth_hz
    rate_bps, threshold = rates(config)
    loss = loss_probability(threshold[:, None], snr, np.asarray(channel.rician_k))  # [rates, C]
    alone_s = np.where(loss <= _MOST_LOST, file_bits / rate_bps[:, None] / np.maximum(1.0 - loss, 1e-12), np.inf)
    reached = selected & (alone_s.min(axis=0) <= config.max_base_delivery_s)
    seconds = np.where(selected & ~reached & (file_bits > 0), np.inf, 0.0)
    for cell in np.arange(config.num_clients).reshape(config.num_cells, -1):
        own = cell[reached[cell]]
        if len(own):
            seconds[own] = min(
                file_bits / rate * sends(lost[own])
                for rate, lost in zip(rate_bps, loss)
                if np.all(lost[own] <= _MOST_LOST)
            )
    return seconds
