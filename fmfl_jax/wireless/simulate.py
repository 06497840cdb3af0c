"""One round of a federated algorithm over a network: who is heard, when, and at what cost.

Pure: (config, state, key, bits, compute) -> (state, RoundOutcome). The learning side reads `delivered`,
`delivery_probability` and the times, nothing else; with an ideal link everyone is delivered with probability 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import fading, geometry, link, network, round_time, special, transfer
from fmfl_jax.wireless.allocation import assignment, fdma, schedule


class RoundOutcome(NamedTuple):
    """A round, [C] unless said otherwise. Times and energies are those actually spent, cut off where the round closed:
    finite always, 0 for clients that took no part.

    latency_s: [] the round. delivered: the update arrived whole and in time. scheduled: took part (a client may be
    selected and yet not scheduled: no block, no energy, no chance by the deadline). delivery_probability: of `delivered`,
    given everything but the fast fading, the block errors and a random choice of blocks.
    downlink_s, compute_s, wait_s (for the channel), uplink_s, finish_s (seconds into the round).
    energy_j = compute_j + uplink_j. bandwidth_hz, tx_power_w, snr_db (mean), rate_bps (planned).
    uplink_bits: payload of those who sent; block_error_rate: of the time-resolved transfers, 0 elsewhere.
    """

    latency_s: jax.Array
    delivered: jax.Array
    delivery_probability: jax.Array
    scheduled: jax.Array
    energy_j: jax.Array
    compute_j: jax.Array
    uplink_j: jax.Array
    downlink_s: jax.Array
    compute_s: jax.Array
    wait_s: jax.Array
    uplink_s: jax.Array
    finish_s: jax.Array
    bandwidth_hz: jax.Array
    tx_power_w: jax.Array
    snr_db: jax.Array
    rate_bps: jax.Array
    uplink_bits: jax.Array
    block_error_rate: jax.Array


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


class Uploads(NamedTuple):
    """What became of the uploads, [U] of one cell: start and end (s into the round), time transmitting, whole or not,
    probability of being whole, block error rate."""

    start_s: jax.Array
    finish_s: jax.Array
    airtime_s: jax.Array
    arrived: jax.Array
    probability: jax.Array
    block_error_rate: jax.Array


def _draw_subset(key, wanting, limit: int):
    """At most `limit` of the clients that want to send, uniformly. Returns (chosen [U] bool, inclusion probability [U])."""
    score = jnp.where(wanting, jax.random.uniform(key, wanting.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(score))
    count = jnp.sum(wanting.astype(score.dtype))
    probability = jnp.minimum(1.0, limit / jnp.maximum(count, 1.0))
    return wanting & (rank < limit), jnp.where(wanting, probability, 0.0)


def min_time_blocks(payload_bits, cn0_hz, active, num_blocks: int, block_hz: float, ready_s):
    """Whole resource blocks for the shortest round: the least T with sum ceil(b_k(T) / block) <= N, by bisection on T.

    Needs at most N active users. Exact up to the bisection's rounding. Returns [U] blocks as floats.
    """
    payload = jnp.where(active, payload_bits, 0.0)
    bound = fdma.min_max_time(payload, cn0_hz, num_blocks * block_hz, ready_s).time_s
    one_block = ready_s + payload / jnp.maximum(link.shannon_rate_bps(jnp.full_like(cn0_hz, block_hz), cn0_hz), 1e-30)
    ceiling = jnp.max(jnp.where(active, one_block, 0.0))

    def blocks(end):
        rate = payload / jnp.maximum(end - ready_s, 1e-30)
        return jnp.where(active, jnp.ceil(fdma.bandwidth_for_rate(rate, cn0_hz) / block_hz * (1.0 - 1e-6)), 0.0)

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        fits = jnp.sum(blocks(middle)) <= num_blocks
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    _, end = jax.lax.fori_loop(0, 40, halve, (bound, jnp.maximum(ceiling, bound) * (1.0 + 1e-5)))
    return jnp.maximum(blocks(end), jnp.where(active, 1.0, 0.0))


def _planning_gap(config) -> float:
    """Linear SNR margin with which an allocation turns Shannon's formula into what the link will carry.

    1.7 dB: implementation gap of the MCS table (link.IMPLEMENTATION_GAP_DB); 2.5 dB: what Rayleigh fading takes from the
    mean rate at high SNR (Euler's gamma / ln 10 x 10).
    """
    loss_db = config.gap_db
    loss_db += 1.7 if config.rate_model == "mcs" else 0.0
    loss_db += 2.5 if config.transfer_mode == "slots" else 0.0
    return 10.0 ** (loss_db / 10.0)


def _widest_hz(config, cn0):
    """[U] Hz over which a client's power reaches the lowest MCS, with the planning margin; the whole band for Shannon."""
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
    chosen = fdma.admit_most(sent, cn0 / _planning_gap(config), config.bandwidth_hz, time_s * (1.0 - 1e-5),
                             _widest_hz(config, cn0), block_hz)
    return chosen | (active & (payload <= 0.0) & (time_s > 0.0))


def _min_time_bandwidth(config, payload, cn0, ready):
    """`min_max_time`, where nobody's power is spread below the lowest MCS: who is capped gets the cap, the rest share."""
    effective = cn0 / _planning_gap(config)
    if config.rate_model == "shannon":
        return fdma.min_max_time(payload, effective, config.bandwidth_hz, ready).bandwidth_hz
    cap_hz = _widest_hz(config, cn0)

    def again(_, carry):
        capped, _ = carry
        left_hz = config.bandwidth_hz - jnp.sum(jnp.where(capped, cap_hz, 0.0))
        rest = jnp.where(capped, 0.0, payload)
        share = fdma.min_max_time(rest, effective, jnp.maximum(left_hz, 1.0), ready).bandwidth_hz
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
        blocks = min_time_blocks(payload, cn0 / _planning_gap(config), chosen, config.num_blocks, config.resource_block_hz, ready)
    else:
        count = jnp.maximum(jnp.sum(chosen.astype(jnp.int32)), 1)
        rank = jnp.cumsum(chosen.astype(jnp.int32)) - 1
        blocks = config.num_blocks // count + (rank < config.num_blocks % count).astype(jnp.int32)
        blocks = jnp.where(chosen, blocks, 0).astype(cn0.dtype)
    return blocks * config.resource_block_hz, cn0, power_w, chosen, inclusion


def _plan_assignment(config, payload, cn0, power_w, active, ready, compute_j, weight):
    """One block each, by the Hungarian method on data weight x success probability (Chen et al., eq. 24)."""
    interference = jnp.asarray(config.block_interference_w or (0.0,) * config.num_blocks, cn0.dtype)
    noise_psd_w_hz = 10.0 ** ((link.THERMAL_NOISE_DBM_HZ + config.noise_figure_db + config.interference_margin_db) / 10 - 3)
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
        snr = cn0 / jnp.maximum(bandwidth, 1e-30)
        rate = jnp.where(bandwidth > 0.0, bandwidth * link.rayleigh_capacity(snr), 0.0)
    else:
        rate = network.planned_rate_bps(config, bandwidth, cn0)
    duration = jnp.where(rate > 0.0, payload / jnp.where(rate > 0.0, rate, 1.0), jnp.inf)
    if math.isfinite(config.energy_limit_j):
        scheduled = scheduled & (compute_j + power_w * duration <= config.energy_limit_j)
    if config.scheduler in ("most_clients", "fedcs"):
        choose = schedule.most_clients if config.scheduler == "most_clients" else schedule.fedcs_greedy
        scheduled, order = choose(ready, duration, config.deadline_s, scheduled)
    return Plan(bandwidth, cn0, power_w, rate, scheduled, jnp.where(scheduled, inclusion, 0.0), order)


def upload_cell(config, key, plan: Plan, payload, rician_k, ready) -> Uploads:
    """Sends one cell's updates according to the plan. All [U]."""
    planned = jnp.where(plan.rate_bps > 0.0, payload / jnp.where(plan.rate_bps > 0.0, plan.rate_bps, 1.0), jnp.inf)
    limit = jnp.full_like(ready, config.max_uplink_s)
    if math.isfinite(config.deadline_s):
        limit = jnp.clip(config.deadline_s - ready, 0.0, config.max_uplink_s)
    zeros = jnp.zeros_like(ready)
    if config.transfer_mode == "slots":
        doppler = fading.doppler_hz(config.speed_mps, config.fc_ghz)
        model = transfer.SlotModel(config.slot_s, doppler, config.rate_model, config.gap_db, config.harq,
                                   config.max_attempts, network.reference_symbols(config))
        sent = transfer.slotted_transfer(key, jnp.where(plan.scheduled, payload, 0.0), plan.bandwidth_hz, plan.cn0_hz,
                                         rician_k, limit, model)
        duration, airtime, arrived = sent.time_s, sent.airtime_s, sent.completed
        probability, errors = arrived.astype(ready.dtype), sent.block_errors / jnp.maximum(sent.blocks, 1.0)
    else:
        duration = airtime = jnp.minimum(planned, config.max_uplink_s)
        arrived, probability, errors = planned <= config.max_uplink_s, zeros, zeros
        if config.transfer_mode == "packet":
            snr = plan.cn0_hz / jnp.maximum(plan.bandwidth_hz, 1e-30)
            whole, probability = transfer.one_packet(key, snr, config.waterfall)
            arrived = arrived & whole
        else:
            probability = arrived.astype(ready.dtype)
    if config.access == "tdma":
        # Clients that are not scheduled hold the channel for no time, but must not advance the clock to their ready time.
        order_ready = jnp.where(plan.scheduled, ready, 0.0)
        finish = schedule.finish_times(plan.order, order_ready, jnp.where(plan.scheduled, duration, 0.0))
    else:
        finish = ready + duration
    return Uploads(finish - duration, finish, airtime, arrived, probability, errors)


def _cells(config, function, key, *trees):
    """vmaps function(key, *trees of [U]) over the cells, [C] arrays cut into cells and joined again."""
    keys = jax.random.split(key, config.num_cells)
    split = jax.tree.map(lambda a: network.by_cell(config, a), trees)
    joined = jax.vmap(function)(keys, *split)
    return jax.tree.map(lambda a: a.reshape((config.num_clients,) + a.shape[2:]), joined)


def base_delivery_s(config: network.Network, state: network.NetworkState, base_bits, selected=None):
    """Seconds [C] to bring the base model to each selected client once, over the same downlink; inf where out of reach.

    The first round costs this on top (the paper's "huge communication overhead").
    """
    chosen = jnp.ones((config.num_clients,), bool) if selected is None else selected
    return _downlink(config, network.channel(config, state), jnp.asarray(base_bits, jnp.float32), chosen)


def _downlink(config, link_state, bits, selected):
    rate = network.downlink_rate_bps(config, link_state.path_gain_db)
    serve = round_time.broadcast_time_s if config.downlink == "broadcast" else round_time.unicast_time_s
    rate, chosen = network.by_cell(config, rate), network.by_cell(config, selected)
    return jax.vmap(lambda r, s: serve(bits, r, s))(rate, chosen).reshape(-1)


def simulate_round(config: network.Network, state: network.NetworkState, key, uplink_bits, downlink_bits, compute_s,
                   compute_j, *, selected=None, weight=None):
    """One round: downlink, compute, upload, close; then everyone moves for as long as the round took.

    Args:
      config, state: Network, NetworkState.
      key: PRNG key of this round (fast fading, block errors, random choices, mobility).
      uplink_bits: [C] float32 payload of each client.
      downlink_bits: scalar, what every selected client receives.
      compute_s, compute_j: [C] local work, s and J.
      selected: [C] bool, the cohort; all if None.
      weight: [C] >= 0, data weight for the scheduler "assign"; 1 if None.

    Returns:
      (NetworkState, RoundOutcome). jit- and vmap-able; compiles once per config.

    Raises:
      ValueError: if uplink_bits is not [num_clients], or concrete inputs are negative or NaN.
    """
    _check_inputs(config, uplink_bits=uplink_bits, downlink_bits=downlink_bits, compute_s=compute_s, compute_j=compute_j)
    k_plan, k_upload, k_sample, k_move = jax.random.split(key, 4)
    shape = (config.num_clients,)
    payload, compute_s, compute_j = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), shape)
                                     for a in (uplink_bits, compute_s, compute_j))
    selected = jnp.ones(shape, bool) if selected is None else jnp.asarray(selected, bool)
    weight = jnp.ones(shape, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    radio = network.channel(config, state)
    downlink_s = _downlink(config, radio, jnp.asarray(downlink_bits, jnp.float32), selected)
    cn0, power_dbm = network.uplink_cn0_hz(config, radio.path_gain_db)
    power_w = special.dbm_to_watt(power_dbm)
    reached = selected & jnp.isfinite(downlink_s)
    # Finite stand-ins: clients out of reach take no part, and no inf may meet a 0 further down.
    downlink_s = jnp.where(reached, downlink_s, 0.0)
    ready = jnp.where(reached, downlink_s + compute_s, 0.0)

    def play(k_plan, k_upload):
        plan = _cells(config, lambda *a: plan_cell(config, *a), k_plan, payload, cn0, power_w,
                      reached, ready, compute_j, weight)
        sent = _cells(config, lambda *a: upload_cell(config, *a), k_upload, plan, payload,
                      radio.rician_k, ready)
        latency, delivered = round_time.close_round(sent.finish_s, sent.arrived, plan.scheduled, config.deadline_s,
                                                    config.wait_for)
        return plan, sent, latency, delivered

    plan, sent, latency, delivered = play(k_plan, k_upload)
    probability = _delivery_probability(config, play, k_sample, plan, sent, latency, delivered)
    outcome = _account(config, plan, sent, latency, delivered, probability, downlink_s, compute_s, compute_j, payload)
    motion = geometry.move(k_move, state.motion, latency, mobility=config.mobility, speed_mps=config.speed_mps,
                           memory_s=config.memory_s, cell=config.cell, cell_radius_m=config.cell_radius_m,
                           min_distance_m=config.min_distance_m)
    state = state._replace(motion=motion, time_s=state.time_s + latency, round=state.round + 1)
    return state, outcome


def _check_inputs(config, **arrays):
    for name, value in arrays.items():
        shape = jnp.shape(value)
        allowed = ((), (config.num_clients,)) if name != "downlink_bits" else ((),)
        if shape not in allowed:
            raise ValueError(f"{name} must have shape {allowed[-1]}, got {shape}")
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) >= 0.0):
            raise ValueError(f"{name} must be >= 0 and not NaN")


def _delivery_probability(config, play, key, plan, sent, latency, delivered):
    """[C] P(delivered | all but fast fading, block errors and drawn subsets).

    Exact where the round's end does not depend on the fades; elsewhere the share of replicas that deliver, the actual
    round counted in, so that it is never 0 for a client that was heard.
    """
    as_float = delivered.astype(latency.dtype)
    limited = math.isfinite(config.deadline_s) or config.wait_for is not None
    drawn = config.access == "ofdma" and config.scheduler != "assign"
    sampled = (config.transfer_mode == "slots" and limited) or (config.transfer_mode == "packet" and config.wait_for is not None)
    if not sampled:
        in_time = plan.scheduled & (sent.finish_s <= latency)
        if config.transfer_mode == "packet":
            return jnp.where(in_time, sent.probability * plan.inclusion, 0.0)
        return as_float * plan.inclusion if drawn else as_float

    def replica(total, key):
        k_plan, k_upload = jax.random.split(key)
        return total + play(k_plan, k_upload)[3].astype(latency.dtype), None

    keys = jax.random.split(key, config.probability_samples)
    total = jnp.sum(jax.vmap(lambda k: replica(jnp.zeros_like(as_float), k)[0])(keys), axis=0)
    return (total + as_float) / (config.probability_samples + 1.0)


def _account(config, plan, sent, latency, delivered, probability, downlink_s, compute_s, compute_j, payload):
    """Cuts every client's times and energies off where the round closed."""
    active = plan.scheduled
    only = lambda value: jnp.where(active, value, 0.0)  # noqa: E731
    down = only(jnp.minimum(downlink_s, latency))
    worked = only(jnp.clip(latency - downlink_s, 0.0, compute_s))
    share = jnp.where(compute_s > 0.0, worked / jnp.where(compute_s > 0.0, compute_s, 1.0), only(1.0))
    start = jnp.minimum(sent.start_s, latency)
    duration = sent.finish_s - sent.start_s
    on_channel = only(jnp.clip(latency - sent.start_s, 0.0, duration))
    transmitting = jnp.where(duration > 0.0, on_channel * sent.airtime_s / jnp.where(duration > 0.0, duration, 1.0), 0.0)
    compute_used, uplink_used = share * compute_j, only(plan.tx_power_w) * transmitting
    snr = plan.cn0_hz / jnp.where(plan.bandwidth_hz > 0.0, plan.bandwidth_hz, config.bandwidth_hz)
    return RoundOutcome(
        latency_s=latency, delivered=delivered, delivery_probability=probability, scheduled=active,
        energy_j=compute_used + uplink_used, compute_j=compute_used, uplink_j=uplink_used, downlink_s=down,
        compute_s=worked, wait_s=only(jnp.maximum(start - down - worked, 0.0)), uplink_s=on_channel,
        finish_s=only(jnp.minimum(sent.finish_s, latency)), bandwidth_hz=only(plan.bandwidth_hz),
        tx_power_w=only(plan.tx_power_w), snr_db=special.linear_to_db(snr), rate_bps=only(plan.rate_bps),
        uplink_bits=only(payload), block_error_rate=only(sent.block_error_rate))
