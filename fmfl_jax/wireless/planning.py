"""Before the upload: how a cell divides its band, and who is worth scheduling at all.

Glue between the network's configuration and the allocation problems; the uploads themselves are in `simulate.py`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import link, network
from fmfl_jax.wireless.allocation import assignment, fdma, schedule


class Plan(NamedTuple):
    """An allocation, [U] of one cell: bandwidth Hz, C/N0 Hz at the power used, power W, planned rate bit/s, who is
    scheduled, the probability of having been drawn (OFDMA with more users than blocks), TDMA order."""

    bandwidth_hz: jax.Array
    cn0_hz: jax.Array
    tx_power_w: jax.Array
    rate_bps: jax.Array
    scheduled: jax.Array
    inclusion: jax.Array
    order: jax.Array


def _draw_subset(key, wanting, limit: int):
    """At most `limit` of the clients that want to send, uniformly. Returns (chosen [U] bool, inclusion probability
    [U])."""
    score = jnp.where(wanting, jax.random.uniform(key, wanting.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(score))
    count = jnp.sum(wanting.astype(score.dtype))
    probability = jnp.minimum(1.0, limit / jnp.maximum(count, 1.0))
    return wanting & (rank < limit), jnp.where(wanting, probability, 0.0)


def min_time_blocks(
    payload_bits, cn0_hz, active, num_blocks: int, block_hz: float, ready_s, max_efficiency: float = math.inf
):
    """Whole resource blocks for the shortest round: the least T with sum ceil(b_k(T) / block) <= N, by bisection on T.

    Needs at most N active users. Exact up to the bisection's rounding. Returns [U] blocks as floats.
    """
    payload = jnp.where(active, payload_bits, 0.0)
    bound = fdma.min_max_time(payload, cn0_hz, num_blocks * block_hz, ready_s, max_efficiency).time_s
    one_rate = jnp.minimum(link.shannon_rate_bps(jnp.full_like(cn0_hz, block_hz), cn0_hz), block_hz * max_efficiency)
    one_block = ready_s + payload / jnp.maximum(one_rate, 1e-30)
    ceiling = jnp.max(jnp.where(active, one_block, 0.0))

    def blocks(end):
        rate = payload / jnp.maximum(end - ready_s, 1e-30)
        need = fdma.bandwidth_for_rate(rate, cn0_hz, max_efficiency)
        return jnp.where(active, jnp.ceil(need / block_hz * (1.0 - 1e-6)), 0.0)

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        fits = jnp.sum(blocks(middle)) <= num_blocks
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    _, end = jax.lax.fori_loop(0, 40, halve, (bound, jnp.maximum(ceiling, bound) * (1.0 + 1e-5)))
    return jnp.maximum(blocks(end), jnp.where(active, 1.0, 0.0))


def _planning_gap(config) -> float:
    """Linear SNR margin with which an allocation turns Shannon's formula into what the link will carry.

    1.7 dB: implementation gap of the MCS table (link.IMPLEMENTATION_GAP_DB); 2.5 dB: what Rayleigh fading takes from
    the mean rate at high SNR (Euler's gamma / ln 10 x 10).
    """
    loss_db = config.gap_db
    loss_db += 1.7 if config.rate_model == "mcs" else 0.0
    loss_db += 2.5 if config.transfer_mode == "slots" else 0.0
    return 10.0 ** (loss_db / 10.0)


def _max_efficiency(config) -> float:
    """bit/s/Hz that the rate model cannot exceed: the highest MCS at the target block error."""
    return (
        math.inf if config.rate_model == "shannon" else float(link.MCS_EFFICIENCY[-1]) * (1.0 - link.TARGET_BLOCK_ERROR)
    )


def _widest_hz(config, cn0):
    """[U] Hz over which a client's power reaches the lowest MCS, with the planning margin; the whole band for
    Shannon."""
    if config.rate_model == "shannon":
        return jnp.full_like(cn0, config.bandwidth_hz)
    lowest = 10.0 ** (link.mcs_thresholds_db(network.reference_symbols(config))[0] / 10.0)
    return jnp.minimum(cn0 / (lowest * _planning_gap(config)), config.bandwidth_hz)


def _admit(config, payload, cn0, active, ready, block_hz=None):
    """The most clients who can be done before they give up or the deadline passes: min-max over more would delay all.

    A client with nothing to send passes.
    """
    time_s = jnp.full_like(ready, config.max_uplink_s)
    if math.isfinite(config.deadline_s):
        time_s = jnp.minimum(time_s, config.deadline_s - ready)
    sent = jnp.where(active, payload, 0.0)
    # 1e-5 kept back: the common end must not land on the wrong side of the deadline by rounding.
    chosen = fdma.admit_most(
        sent,
        cn0 / _planning_gap(config),
        config.bandwidth_hz,
        time_s * (1.0 - 1e-5),
        _widest_hz(config, cn0),
        block_hz,
        _max_efficiency(config),
    )
    return chosen | (active & (payload <= 0.0) & (time_s > 0.0))


def _min_time_bandwidth(config, payload, cn0, ready):
    """`min_max_time`, where nobody's power is spread below the lowest MCS: who is capped gets the cap, the rest
    share."""
    effective = cn0 / _planning_gap(config)
    if config.rate_model == "shannon":
        return fdma.min_max_time(payload, effective, config.bandwidth_hz, ready).bandwidth_hz
    cap_hz = _widest_hz(config, cn0)

    def again(_, carry):
        capped, _ = carry
        left_hz = config.bandwidth_hz - jnp.sum(jnp.where(capped & (payload > 0.0), cap_hz, 0.0))
        rest = jnp.where(capped, 0.0, payload)
        share = fdma.min_max_time(
            rest, effective, jnp.maximum(left_hz, 1.0), ready, _max_efficiency(config)
        ).bandwidth_hz
        return capped | (share > cap_hz), jnp.where(capped & (payload > 0.0), cap_hz, jnp.minimum(share, cap_hz))

    # Capping one user leaves less to the others only if it was asking for less: a few passes settle it.
    start = (payload <= 0.0, jnp.zeros_like(payload))
    return jax.lax.fori_loop(0, 4, again, start)[1]


def _plan_fdma(config, payload, cn0, power_w, active, ready):
    count = jnp.maximum(jnp.sum(active.astype(cn0.dtype)), 1.0)
    equal = jnp.where(active, config.bandwidth_hz / count, 0.0)
    if config.scheduler == "equal":
        return equal, cn0, power_w, active
    if config.scheduler == "min_time":
        chosen = _admit(config, payload, cn0, active, ready)
        sent = jnp.where(chosen, payload, 0.0)
        bandwidth = _min_time_bandwidth(config, sent, cn0, ready)
        # Payload 0 still needs a nonzero share to divide by.
        return jnp.where(chosen & (sent <= 0.0), equal, bandwidth), cn0, power_w, chosen
    gap = _planning_gap(config)
    chosen = _admit(config, payload, cn0, active, ready)
    # Again 1e-5 of the time is kept back, so that rounding does not turn "exactly at the deadline" into "late".
    time_s = jnp.maximum((config.deadline_s - ready) * (1.0 - 1e-5), 0.0)
    best = fdma.min_energy(jnp.where(chosen, payload, 0.0), time_s, cn0 / (gap * power_w), config.bandwidth_hz, power_w)
    # Rounding may call a full band infeasible: full power then does what the admission promised.
    bandwidth = jnp.where(best.feasible, best.bandwidth_hz, best.bandwidth_hz * (1.0 - 1e-6))
    used = jnp.where(best.feasible & (best.power_w > 0.0), jnp.minimum(best.power_w, power_w), power_w)
    return jnp.where(chosen & (payload <= 0.0), equal, bandwidth), cn0 * used / power_w, used, chosen


def _plan_ofdma(config, key, payload, cn0, power_w, active, ready):
    if config.scheduler == "min_time":
        active = _admit(config, payload, cn0, active, ready, config.resource_block_hz)
    chosen, inclusion = _draw_subset(key, active, config.num_blocks)
    if config.scheduler == "min_time":
        blocks = min_time_blocks(
            payload,
            cn0 / _planning_gap(config),
            chosen,
            config.num_blocks,
            config.resource_block_hz,
            ready,
            _max_efficiency(config),
        )
    else:
        count = jnp.maximum(jnp.sum(chosen.astype(jnp.int32)), 1)
        rank = jnp.cumsum(chosen.astype(jnp.int32)) - 1
        blocks = config.num_blocks // count + (rank < config.num_blocks % count).astype(jnp.int32)
        blocks = jnp.where(chosen, blocks, 0).astype(cn0.dtype)
    return blocks * config.resource_block_hz, cn0, power_w, chosen, inclusion


def _plan_assignment(config, payload, cn0, power_w, active, ready, compute_j, weight):
    """One block each, by the Hungarian method on data weight x success probability (Chen et al., eq. 24)."""
    interference = jnp.asarray(config.block_interference_w or (0.0,) * config.num_blocks, cn0.dtype)
    noise_psd_w_hz = 10.0 ** (
        (link.THERMAL_NOISE_DBM_HZ + config.noise_figure_db + config.interference_margin_db) / 10 - 3
    )
    # I / (N0 b): how far each block's noise is raised.
    raised = 1.0 + interference / np.float32(noise_psd_w_hz * config.resource_block_hz)
    cn0_block = cn0[:, None] / raised[None, :]  # [U, B]
    snr = cn0_block / config.resource_block_hz
    if config.transfer_mode == "packet":
        success = 1.0 - link.packet_error_rate(snr, config.waterfall)
        rate = config.resource_block_hz * link.rayleigh_capacity(snr)
    else:
        success = jnp.ones_like(snr)
        rate = network.planned_rate_bps(config, jnp.full_like(snr, config.resource_block_hz), cn0_block)
    duration = payload[:, None] / jnp.maximum(rate, 1e-30)
    feasible = active[:, None] & (ready[:, None] + duration <= config.deadline_s) & (rate > 0.0)
    feasible = feasible & (compute_j[:, None] + power_w[:, None] * duration <= config.energy_limit_j)
    block = assignment.assign_blocks(weight[:, None] * success, feasible)
    held = block >= 0
    at = jnp.take_along_axis(cn0_block, jnp.maximum(block, 0)[:, None], axis=1)[:, 0]
    return jnp.where(held, config.resource_block_hz, 0.0), jnp.where(held, at, cn0), held


def plan_cell(config, key, payload, cn0, power_w, active, ready, compute_j, weight) -> Plan:
    """Allocates one cell's uplink. All [U]; ready: when the compute is done, s into the round."""
    inclusion = active.astype(cn0.dtype)
    order = jnp.argsort(jnp.where(active, ready, jnp.inf)).astype(jnp.int32)
    scheduled = active
    if config.access == "tdma":
        bandwidth = jnp.where(active, config.bandwidth_hz, 0.0)
    elif config.scheduler == "assign":
        bandwidth, cn0, scheduled = _plan_assignment(config, payload, cn0, power_w, active, ready, compute_j, weight)
    elif config.access == "ofdma":
        bandwidth, cn0, power_w, scheduled, inclusion = _plan_ofdma(config, key, payload, cn0, power_w, active, ready)
    else:
        bandwidth, cn0, power_w, scheduled = _plan_fdma(config, payload, cn0, power_w, active, ready)
        inclusion = scheduled.astype(cn0.dtype)
    if config.transfer_mode == "packet":
        snr = cn0 / jnp.where(bandwidth > 0.0, bandwidth, 1.0)
        rate = bandwidth * link.rayleigh_capacity(snr)
    else:
        rate = network.planned_rate_bps(config, bandwidth, cn0)
    duration = jnp.where(rate > 0.0, payload / jnp.where(rate > 0.0, rate, 1.0), jnp.inf)
    if math.isfinite(config.energy_limit_j):
        scheduled = scheduled & (compute_j + power_w * duration <= config.energy_limit_j)
    if config.scheduler in ("most_clients", "fedcs"):
        choose = schedule.most_clients if config.scheduler == "most_clients" else schedule.fedcs_greedy
        scheduled, order = choose(ready, duration, config.deadline_s, scheduled)
    return Plan(bandwidth, cn0, power_w, rate, scheduled, jnp.where(scheduled, inclusion, 0.0), order)
