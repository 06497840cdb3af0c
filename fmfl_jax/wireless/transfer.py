"""How an update crosses the air: slot by slot over hundreds of fades, or as one packet over one fade.

An update of a foundation model lasts seconds and the channel's coherence tens of milliseconds, so the transfer is cut
into one transport block a slot; a block in error is sent again (HARQ), and an outage only pauses the transfer. The
one-fade-one-packet model of Chen et al. (IEEE TWC 2021) loses a whole update with probability 1 - exp(-m / snr).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import fading, link

RATE_MODELS = ("shannon", "mcs")
HARQ_MODES = ("type1", "chase")
# Slots that one pass of the loop vectorizes: the AR(1) kernel is [L, L], its product costs L multiply-adds a slot.
CHUNK_SLOTS = 64


class Transfer(NamedTuple):
    """Of each client [C]: seconds from its start until done or given up, of these on the air, whether all bits arrived,
    bits that did, transport blocks sent and lost (float32 counts)."""

    time_s: jax.Array
    airtime_s: jax.Array
    completed: jax.Array
    bits: jax.Array
    blocks: jax.Array
    block_errors: jax.Array


class SlotModel(NamedTuple):
    """What a slot carries. rate: "shannon" (the instantaneous capacity with a gap, no errors) or "mcs" (one transport
    block of 38.214's table and sizes, with block errors; the MCS is chosen from the previous slot's SNR).
    harq: "type1" or "chase"."""

    slot_s: float
    doppler_hz: float
    rate: str = "shannon"
    gap_db: float = 0.0
    harq: str = "type1"
    max_attempts: int = 4
    reference_symbols: float = 1000.0  # block length for which the MCS thresholds are set


def _type1_chunk(key, snr, reported, num_symbols, mcs):
    """Bits per slot when every slot's block stands alone: snr, reported [C, L] linear -> (bits, sent, lost) [C, L].

    mcs: (thresholds_db [29], bits of a block at each MCS [29, C, 1]).
    """
    block_bits, gap = link.select_mcs(reported, *mcs)
    sends = block_bits > 0.0
    error = link.transport_block_error(snr, num_symbols[:, None], block_bits, gap)
    lost = sends & (jax.random.uniform(key, snr.shape, snr.dtype) < error)
    return jnp.where(sends & ~lost, block_bits, 0.0), sends, lost


def _chase_chunk(key, snr, reported, num_symbols, mcs, max_attempts, process):
    """As `_type1_chunk` with the SNRs of a block's transmissions added up; `process` carries the block in flight.

    One uniform number u per block decides all of its attempts (it fails while u < error(sum of SNRs)), so that the
    error after m attempts has exactly the combined SNR's probability.
    """
    block_bits, gap = link.select_mcs(reported, *mcs)
    sends = block_bits > 0.0
    draws = jax.random.uniform(key, snr.shape, snr.dtype)

    def slot(process, now):
        attempts, combined, draw, old_bits, old_gap = process
        snr, can_send, block_bits, gap, fresh = now
        new = attempts == 0
        sent = jnp.where(new, can_send, True)
        draw = jnp.where(new, fresh, draw)
        block_bits = jnp.where(new, block_bits, old_bits)
        gap = jnp.where(new, gap, old_gap)
        combined = jnp.where(new, snr, combined + snr)
        lost = sent & (draw < link.transport_block_error(combined, num_symbols, block_bits, gap))
        attempts = jnp.where(lost & (attempts + 1 < max_attempts), attempts + 1, 0)
        bits = jnp.where(sent & ~lost, block_bits, 0.0)
        return (attempts, combined, draw, block_bits, gap), (bits, sent, lost)

    by_slot = tuple(jnp.moveaxis(a, 1, 0) for a in (snr, sends, block_bits, gap, draws))
    process, outputs = jax.lax.scan(slot, process, by_slot, unroll=1)
    bits, sent, lost = (jnp.moveaxis(a, 0, 1) for a in outputs)  # [C, L]
    return process, bits, sent, lost


def slotted_transfer(key, payload_bits, bandwidth_hz, cn0_hz, rician_k, limit_s, model: SlotModel) -> Transfer:
    """Sends payload_bits over a fading channel, slot after slot, until done or until limit_s.

    The fade starts from its stationary distribution and is an AR(1) process with rho = J0(2 pi f_d T_slot). A type-I
    block that fails is simply sent again later, so for a transfer that resumes HARQ type I and ARQ are the same thing;
    with chase combining a block is dropped (and its bits sent anew) after max_attempts.

    Args:
      key: PRNG key.
      payload_bits, bandwidth_hz, cn0_hz: [C] bit, Hz, Hz (mean C/N0, without the fade).
      rician_k: [C] linear K factor, 0 for Rayleigh.
      limit_s: [C] finite seconds after which a client gives up; rounded down to slots.
      model: SlotModel.

    Returns:
      Transfer. A client with nothing to send is done at once. Memory: a few [C, 64] arrays.

    Raises:
      ValueError: on an unknown rate model or HARQ mode.
    """
    if model.rate not in RATE_MODELS or model.harq not in HARQ_MODES:
        raise ValueError(
            f"rate must be one of {RATE_MODELS} and harq of {HARQ_MODES}, got {model.rate!r}, {model.harq!r}"
        )
    num_clients, dtype = payload_bits.shape[0], cn0_hz.dtype
    k_start, k_phase, k_loop = jax.random.split(key, 3)
    phase = jax.random.uniform(k_phase, (num_clients, 1), dtype, maxval=2.0 * np.pi)
    k_factor = jnp.broadcast_to(rician_k, (num_clients,))[:, None]
    rho = fading.time_correlation(jnp.asarray(model.doppler_hz, dtype), model.slot_s)
    carry, kernel = fading.scatter_kernel(rho, CHUNK_SLOTS)
    num_symbols = bandwidth_hz * model.slot_s
    mean_snr = (cn0_hz / jnp.maximum(bandwidth_hz, 1e-30))[:, None]
    limit = jnp.floor(jnp.clip(limit_s / model.slot_s * (1.0 + 1e-6), 0.0, 2e9)).astype(jnp.int32)
    if model.rate == "mcs":
        mcs = link.mcs_thresholds_db(model.reference_symbols), link.mcs_block_bits(num_symbols)[:, :, None]
    gap = 10.0 ** (model.gap_db / 10.0)
    scatter = fading.scatter_init(k_start, (num_clients,)).astype(dtype)
    process = (jnp.zeros((num_clients,), jnp.int32),) + 4 * (jnp.ones((num_clients,), dtype),)
    in_chunk = jnp.arange(CHUNK_SLOTS, dtype=jnp.int32)

    def unfinished(state):
        chunk, _, _, remaining = state[:4]
        return jnp.any((remaining > 0.0) & (chunk * CHUNK_SLOTS < limit))

    def advance(state):
        chunk, scatter, process, remaining, slots, on_air, sent_total, lost_total = state
        k_fade, k_error = jax.random.split(jax.random.fold_in(k_loop, chunk))
        faded = fading.scatter_chunk(k_fade, scatter, carry, kernel)  # [2, C, L]
        snr = mean_snr * fading.power_gain(faded, k_factor, phase)
        if model.rate == "shannon":
            bits = link.shannon_rate_bps(bandwidth_hz[:, None], bandwidth_hz[:, None] * snr, gap) * model.slot_s
            sent, lost = jnp.ones(snr.shape, bool), jnp.zeros(snr.shape, bool)
        else:
            last = mean_snr * fading.power_gain(scatter[:, :, None], k_factor, phase)
            reported = jnp.concatenate([last, snr[:, :-1]], axis=1)
            if model.harq == "type1":
                bits, sent, lost = _type1_chunk(k_error, snr, reported, num_symbols, mcs)
            else:
                process, bits, sent, lost = _chase_chunk(
                    k_error, snr, reported, num_symbols, mcs, model.max_attempts, process
                )
        within = chunk * CHUNK_SLOTS + in_chunk[None, :] < limit[:, None]
        bits = jnp.where(within, bits, 0.0)
        got = jnp.cumsum(bits, axis=1)
        needed = within & (got - bits < remaining[:, None])  # slots in which there was still something to send
        count = lambda mask: jnp.sum(mask.astype(jnp.int32), axis=1)
        return (
            chunk + 1,
            faded[:, :, -1],
            process,
            remaining - got[:, -1],
            slots + count(needed),
            on_air + count(needed & sent),
            sent_total + count(needed & sent),
            lost_total + count(needed & lost),
        )

    zeros = jnp.zeros((num_clients,), jnp.int32)
    # Bits that rounding could leave over: less than 1e-6 of the payload is not worth a slot.
    state = (jnp.int32(0), scatter, process, payload_bits * (1.0 - 1e-6), zeros, zeros, zeros, zeros)
    _, _, _, remaining, slots, on_air, sent, lost = jax.lax.while_loop(unfinished, advance, state)
    as_float = lambda count: count.astype(dtype)
    completed = remaining <= 0.0
    return Transfer(
        as_float(slots) * model.slot_s,
        as_float(on_air) * model.slot_s,
        completed,
        jnp.where(completed, payload_bits, payload_bits - remaining),
        as_float(sent),
        as_float(lost),
    )


def one_packet(key, snr, waterfall: float):
    """One fade, one packet: arrives if |h|^2 snr > m with |h|^2 ~ Exp(1), that is with probability exp(-m / snr).

    Args:
      key: PRNG key.
      snr: [C] mean SNR.
      waterfall: m.

    Returns:
      (arrived [C] bool, probability [C]).
    """
    fade = jax.random.exponential(key, snr.shape, snr.dtype)
    return fade * snr > waterfall, 1.0 - link.packet_error_rate(snr, waterfall)
