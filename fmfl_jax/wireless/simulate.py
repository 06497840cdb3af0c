"""One round of a federated algorithm over a network: who is heard, when, and at what cost.

Pure: (config, state, key, bits, compute) -> (state, RoundOutcome). The learning side reads `delivered`,
`delivery_probability` and the times, nothing else; with an ideal link everyone is delivered with probability 1.
"""

import math
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import fading, network, planning, round_time, special, transfer
from fmfl_jax.wireless.allocation import schedule


class RoundOutcome(NamedTuple):
    """A round, [C] unless said otherwise. Times and energies are those actually spent, cut off where the round closed:
    finite always, 0 for clients that took no part.

    latency_s: [] the round. delivered: the update arrived whole and in time. scheduled: took part (a client may be
    selected and yet not scheduled: no block, no energy, no chance by the deadline). delivery_probability: of
    `delivered`, given everything but the fast fading, the block errors and a random choice of blocks. downlink_s,
    compute_s, wait_s (for the channel), uplink_s, finish_s (seconds into the round). energy_j = compute_j + uplink_j.
    bandwidth_hz, tx_power_w, snr_db (mean), rate_bps (planned).
    uplink_bits: of the payload, what was sent by then (time-resolved: what arrived); block_error_rate: of the
    time-resolved transfers, 0 elsewhere.
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


class Uploads(NamedTuple):
    """What became of the uploads, [U] of one cell: start and end (s into the round), time transmitting, whole or not,
    bits of the payload sent, probability of being whole, block error rate."""

    start_s: jax.Array
    finish_s: jax.Array
    airtime_s: jax.Array
    arrived: jax.Array
    bits: jax.Array
    probability: jax.Array
    block_error_rate: jax.Array


def upload_cell(config, key, plan: planning.Plan, payload, rician_k, ready) -> Uploads:
    """Sends one cell's updates according to the plan. All [U]."""
    planned = jnp.where(plan.rate_bps > 0.0, payload / jnp.where(plan.rate_bps > 0.0, plan.rate_bps, 1.0), jnp.inf)
    limit = jnp.full_like(ready, config.max_uplink_s)
    if math.isfinite(config.deadline_s):
        limit = jnp.clip(config.deadline_s - ready, 0.0, config.max_uplink_s)
    zeros = jnp.zeros_like(ready)
    if config.transfer_mode == "slots":
        doppler = fading.doppler_hz(config.speed_mps, config.fc_ghz)
        model = transfer.SlotModel(
            config.slot_s,
            doppler,
            config.rate_model,
            config.gap_db,
            config.harq,
            config.max_attempts,
            network.reference_symbols(config),
        )
        sent = transfer.slotted_transfer(
            key, jnp.where(plan.scheduled, payload, 0.0), plan.bandwidth_hz, plan.cn0_hz, rician_k, limit, model
        )
        duration, airtime, arrived, bits = sent.time_s, sent.airtime_s, sent.completed, sent.bits
        probability, errors = arrived.astype(ready.dtype), sent.block_errors / jnp.maximum(sent.blocks, 1.0)
    else:
        duration = airtime = jnp.minimum(planned, config.max_uplink_s)
        arrived, probability, errors = planned <= config.max_uplink_s, zeros, zeros
        bits = jnp.where(arrived, payload, plan.rate_bps * duration)
        if config.transfer_mode == "packet":
            snr = plan.cn0_hz / jnp.where(plan.bandwidth_hz > 0.0, plan.bandwidth_hz, config.bandwidth_hz)
            whole, probability = transfer.one_packet(key, snr, config.waterfall)
            arrived = arrived & whole
        else:
            probability = arrived.astype(ready.dtype)
    if config.access == "tdma":
        # Clients that are not scheduled hold the channel for no time, but must not advance the clock to
        # their ready time.
        order_ready = jnp.where(plan.scheduled, ready, 0.0)
        finish = schedule.finish_times(plan.order, order_ready, jnp.where(plan.scheduled, duration, 0.0))
    else:
        finish = ready + duration
    return Uploads(finish - duration, finish, airtime, arrived, bits, probability, errors)


def _cells(config, function, key, *trees):
    """vmaps function(key, *trees of [U]) over the cells, [C] arrays cut into cells and joined again."""
    keys = jax.random.split(key, config.num_cells)
    split = jax.tree.map(lambda a: network.by_cell(config, a), trees)
    joined = jax.vmap(function)(keys, *split)
    return jax.tree.map(lambda a: a.reshape((config.num_clients,) + a.shape[2:]), joined)


def base_delivery_s(config: network.Network, state: network.NetworkState, base_bits, selected=None):
    """Seconds [C] to bring the base model to each selected client once, over the same downlink; inf where out of reach
    (max_base_delivery_s).

    The first round costs this on top (the paper's "huge communication overhead").
    """
    return _downlink(config, network.channel(config, state), base_bits, selected, config.max_base_delivery_s)


def downlink_s(config: network.Network, state: network.NetworkState, downlink_bits, selected=None):
    """Seconds [C] of a round's downlink to each selected client; inf where it would last beyond max_downlink_s or the
    deadline: out of reach."""
    limit_s = min(config.max_downlink_s, config.deadline_s)
    return _downlink(config, network.channel(config, state), downlink_bits, selected, limit_s)


def _downlink(config, radio, bits, selected, limit_s: float):
    chosen = jnp.ones((config.num_clients,), bool) if selected is None else selected
    rate = network.downlink_rate_bps(config, radio.path_gain_db)
    serve = round_time.broadcast_time_s if config.downlink == "broadcast" else round_time.unicast_time_s
    bits = jnp.asarray(bits, jnp.float32)
    rate, chosen = network.by_cell(config, rate), network.by_cell(config, chosen)
    return jax.vmap(lambda r, s: serve(bits, r, s, limit_s))(rate, chosen).reshape(-1)


def simulate_round(
    config: network.Network,
    state: network.NetworkState,
    key,
    uplink_bits,
    downlink_bits,
    compute_s,
    compute_j,
    *,
    selected=None,
    weight=None,
):
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
    _check_inputs(
        config, uplink_bits=uplink_bits, downlink_bits=downlink_bits, compute_s=compute_s, compute_j=compute_j
    )
    k_plan, k_upload, k_sample, k_move = jax.random.split(key, 4)
    shape = (config.num_clients,)
    payload, compute_s, compute_j = (
        jnp.broadcast_to(jnp.asarray(a, jnp.float32), shape) for a in (uplink_bits, compute_s, compute_j)
    )
    selected = jnp.ones(shape, bool) if selected is None else jnp.asarray(selected, bool)
    weight = jnp.ones(shape, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    radio = network.channel(config, state)
    down_s = _downlink(config, radio, downlink_bits, selected, min(config.max_downlink_s, config.deadline_s))
    cn0, power_dbm = network.uplink_cn0_hz(config, radio.path_gain_db)
    power_w = special.dbm_to_watt(power_dbm)
    reached = selected & jnp.isfinite(down_s)
    # Finite stand-ins: clients out of reach take no part, and no inf may meet a 0 further down.
    down_s = jnp.where(reached, down_s, 0.0)
    ready = jnp.where(reached, down_s + compute_s, 0.0)

    def play(k_plan, k_upload):
        plan = _cells(
            config,
            lambda *a: planning.plan_cell(config, *a),
            k_plan,
            payload,
            cn0,
            power_w,
            reached,
            ready,
            compute_j,
            weight,
        )
        sent = _cells(config, lambda *a: upload_cell(config, *a), k_upload, plan, payload, radio.rician_k, ready)
        latency, delivered = round_time.close_round(
            sent.finish_s, sent.arrived, plan.scheduled, config.deadline_s, config.wait_for
        )
        return plan, sent, latency, delivered

    if _needs_samples(config):
        # The round itself and its replicas run as one batch: the upload is compiled once, and lane 0 is what happens.
        lanes = [
            jnp.concatenate([k[None], jax.random.split(jax.random.fold_in(k_sample, i), config.probability_samples)])
            for i, k in enumerate((k_plan, k_upload))
        ]
        played = jax.vmap(play)(*lanes)
        plan, sent, latency, delivered = jax.tree.map(lambda a: a[0], played)
        probability = jnp.mean(played[3].astype(latency.dtype), axis=0)
    else:
        plan, sent, latency, delivered = play(k_plan, k_upload)
        probability = _exact_probability(config, plan, sent, latency, delivered)
    outcome = _account(config, plan, sent, latency, delivered, probability, down_s, compute_s, compute_j)
    state = network.advance(config, state, k_move, latency)
    return state._replace(round=state.round + 1), outcome


def _check_inputs(config, **arrays):
    for name, value in arrays.items():
        shape = jnp.shape(value)
        allowed = ((), (config.num_clients,)) if name != "downlink_bits" else ((),)
        if shape not in allowed:
            raise ValueError(f"{name} must have shape {allowed[-1]}, got {shape}")
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) >= 0.0):
            raise ValueError(f"{name} must be >= 0 and not NaN")


def _needs_samples(config) -> bool:
    """Whether the probability of delivery has no formula: time-resolved transfers against a deadline, or a race."""
    limited = math.isfinite(config.deadline_s) or config.wait_for is not None
    return (config.transfer_mode == "slots" and limited) or (
        config.transfer_mode == "packet" and config.wait_for is not None
    )


def _exact_probability(config, plan, sent, latency, delivered):
    """[C] P(delivered | all but fast fading, block errors and drawn subsets) where the round's end depends on no fade.

    Elsewhere (`_needs_samples`) it is the share of replicas that deliver, the actual round counted in: never 0 for a
    client that was heard.
    """
    if config.transfer_mode == "packet":
        in_time = plan.scheduled & (sent.finish_s <= latency)
        return jnp.where(in_time, sent.probability * plan.inclusion, 0.0)
    return delivered.astype(latency.dtype) * plan.inclusion


def _account(config, plan, sent, latency, delivered, probability, downlink_s, compute_s, compute_j):
    """Cuts every client's times and energies off where the round closed."""
    active = plan.scheduled
    only = lambda value: jnp.where(active, value, 0.0)
    down = only(jnp.minimum(downlink_s, latency))
    worked = only(jnp.clip(latency - downlink_s, 0.0, compute_s))
    share = jnp.where(compute_s > 0.0, worked / jnp.where(compute_s > 0.0, compute_s, 1.0), only(1.0))
    start = jnp.minimum(sent.start_s, latency)
    duration = sent.finish_s - sent.start_s
    on_channel = only(jnp.clip(latency - sent.start_s, 0.0, duration))
    on_time = jnp.where(duration > 0.0, on_channel / jnp.where(duration > 0.0, duration, 1.0), 0.0)
    compute_used, uplink_used = share * compute_j, only(plan.tx_power_w) * on_time * sent.airtime_s
    sent_share = jnp.where(delivered | (on_time > 1.0 - 1e-6), 1.0, on_time)  # rounding costs a whole upload no bits
    snr = plan.cn0_hz / jnp.where(plan.bandwidth_hz > 0.0, plan.bandwidth_hz, config.bandwidth_hz)
    return RoundOutcome(
        latency_s=latency,
        delivered=delivered,
        delivery_probability=probability,
        scheduled=active,
        energy_j=compute_used + uplink_used,
        compute_j=compute_used,
        uplink_j=uplink_used,
        downlink_s=down,
        compute_s=worked,
        wait_s=only(jnp.maximum(start - down - worked, 0.0)),
        uplink_s=on_channel,
        finish_s=only(jnp.minimum(sent.finish_s, latency)),
        bandwidth_hz=only(plan.bandwidth_hz),
        tx_power_w=only(plan.tx_power_w),
        snr_db=special.linear_to_db(snr),
        rate_bps=only(plan.rate_bps),
        uplink_bits=only(sent_share * sent.bits),
        block_error_rate=only(sent.block_error_rate),
    )
