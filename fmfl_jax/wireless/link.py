"""From SNR to bits: Shannon with a gap, the 38.214 MCS table with a finite-length block-error model, HARQ, power
control.

Block errors: the normal approximation of Polyanskiy, Poor, Verdu (IEEE Trans. IT 2010) moved by an implementation gap
per modulation, fitted to an LDPC chain (facts). Outages in closed form are for planning by hand; chase combining: Caire
and Tuninetti 2001.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.wireless import special, transport_block

THERMAL_NOISE_DBM_HZ = -174.0
RESOURCE_BLOCK_HZ = 180e3
TARGET_BLOCK_ERROR = 0.1
# 3GPP TS 38.212 5.2.2: the largest code block of LDPC base graph 1, bits.
MAX_CODE_BLOCK_BITS = 8448

# 3GPP TS 38.214 Table 5.1.3.1-1: modulation order and code rate x 1024 of MCS 0..28.
_RATES = {
    2: (120, 157, 193, 251, 308, 379, 449, 526, 602, 679),
    4: (340, 378, 434, 490, 553, 616, 658),
    6: (438, 466, 517, 567, 616, 666, 719, 772, 822, 873, 910, 948),
}
MCS_MODULATION_ORDER = np.asarray([q for q, rates in _RATES.items() for _ in rates], np.int32)
MCS_CODE_RATE = np.asarray([r / 1024.0 for rates in _RATES.values() for r in rates], np.float64)
MCS_EFFICIENCY = MCS_MODULATION_ORDER * MCS_CODE_RATE

# Mean of (LDPC chain - bare normal approximation) at 10 % block error, code block 2000, dB, per modulation order:
# QPSK (.97 + 1.24)/2, 16-QAM 1.45, 64-QAM (1.97 + 1.42)/2. The fit leaves 0.28 dB at most.
IMPLEMENTATION_GAP_DB = {2: 1.105, 4: 1.45, 6: 1.695}
MCS_GAP_DB = np.asarray([IMPLEMENTATION_GAP_DB[int(q)] for q in MCS_MODULATION_ORDER])


def carrier_to_noise_hz(tx_power_dbm, path_gain_db, noise_figure_db: float = 0.0, margin_db: float = 0.0):
    """C/N0 = P g / (N0 F M), in Hz: divided by the bandwidth it is the SNR. [C] -> [C].

    In dB until the last step: 1e-21 W/Hz times 1e-14 would leave float32's range.
    """
    return special.db_to_linear(tx_power_dbm + path_gain_db - THERMAL_NOISE_DBM_HZ - noise_figure_db - margin_db)


def shannon_rate_bps(bandwidth_hz, cn0_hz, gap: float = 1.0):
    """b log2(1 + cn0 / (gap b)), bit/s; 0 where the bandwidth is 0. Broadcasts."""
    safe = jnp.maximum(bandwidth_hz, 1e-30)
    return jnp.where(bandwidth_hz > 0.0, safe * jnp.log1p(cn0_hz / (gap * safe)) / np.log(2.0), 0.0)


def rayleigh_capacity(snr):
    """Ergodic capacity of Rayleigh fading, bit/s/Hz: e^{1/g} E1(1/g) / ln 2; 0 at SNR 0. Any shape."""
    return jnp.where(snr > 0.0, special.scaled_exp1(1.0 / jnp.maximum(snr, 1e-12)), 0.0) / np.log(2.0)


def rayleigh_outage(spectral_efficiency, snr):
    """P(log2(1 + g |h|^2) < R) = 1 - exp(-(2^R - 1)/g). Broadcasts; rate 0 is never in outage, any other is at SNR
    0."""
    return -jnp.expm1(-_outage_threshold(spectral_efficiency, snr))


def _outage_threshold(spectral_efficiency, snr):
    """(2^R - 1)/g: the fade, or sum of fades, below which rate R is in outage; 0 at R = 0 whatever g, inf at g = 0."""
    needed = jnp.expm1(jnp.asarray(spectral_efficiency) * np.log(2.0))
    needed, snr = jnp.broadcast_arrays(needed, jnp.asarray(snr))
    return needed / jnp.where(needed > 0.0, snr, jnp.ones_like(snr))


def packet_error_rate(snr, waterfall: float):
    """Chen et al., IEEE TWC 2021, eq. 7: q = 1 - exp(-m (I + B N0)/(P g)) = 1 - exp(-m / snr); 1 at SNR 0."""
    return -jnp.expm1(-waterfall / jnp.maximum(snr, 1e-30))


def uplink_power_dbm(path_loss_db, num_resource_blocks, *, max_dbm: float, p0_dbm: float, alpha: float):
    """Open-loop power of TS 38.213 7.1.1: min(P0 + alpha PL + 10 lg(#PRB), P_max), dBm. [C] -> [C]."""
    wanted = p0_dbm + alpha * path_loss_db + special.linear_to_db(jnp.maximum(num_resource_blocks, 1e-9))
    return jnp.minimum(wanted, max_dbm)


def block_error_rate(snr, num_symbols, info_bits, gap=1.0):
    """Q((n C - k + log2(n)/2) / sqrt(n V)) at snr / gap: block error of a length-n code for a complex Gaussian channel.

    Args:
      snr: linear, any shape.
      num_symbols: n, complex symbols per code block.
      info_bits: k, bits per code block.
      gap: linear implementation loss.

    Returns:
      probability in [0, 1]; 1 at SNR 0.
    """
    g = jnp.maximum(snr / gap, 1e-9)
    capacity = jnp.log1p(g) / np.log(2.0)
    dispersion = g * (g + 2.0) / jnp.square(g + 1.0) * (1.0 / np.log(2.0)) ** 2
    surplus = num_symbols * capacity - info_bits + 0.5 * jnp.log2(num_symbols)
    return special.q_function(surplus / jnp.sqrt(num_symbols * dispersion))


def transport_block_error(snr, num_symbols, block_bits, gap):
    """Error of a transport block of block_bits over num_symbols, split into code blocks of at most 8448 bits.

    All arguments broadcast. The code blocks see one SNR and fail independently: 1 - (1 - p)^n.
    """
    num_blocks = jnp.maximum(jnp.ceil(block_bits / MAX_CODE_BLOCK_BITS), 1.0)
    p = block_error_rate(snr, jnp.maximum(num_symbols / num_blocks, 1.0), block_bits / num_blocks, gap)
    return -jnp.expm1(num_blocks * jnp.log1p(-jnp.minimum(p, 1.0 - 1e-7)))


def mcs_thresholds_db(num_symbols: float) -> np.ndarray:
    """SNR in dB at which each MCS has 10 % block error over num_symbols, [29] float64: the solution of the model above.

    The normal approximation is inverted by bisection, in numpy: thresholds are constants of a configuration.
    """
    low, high = np.full(29, -30.0), np.full(29, 60.0)
    bits = num_symbols * MCS_EFFICIENCY
    blocks = np.maximum(np.ceil(bits / MAX_CODE_BLOCK_BITS), 1.0)
    n, k = np.maximum(num_symbols / blocks, 1.0), bits / blocks
    target = 1.0 - (1.0 - TARGET_BLOCK_ERROR) ** (1.0 / blocks)
    z = -np.asarray([_normal_quantile(t) for t in target])
    for _ in range(60):
        middle = 0.5 * (low + high)
        g = 10.0 ** ((middle - MCS_GAP_DB) / 10.0)
        dispersion = g * (g + 2.0) / (g + 1.0) ** 2 / np.log(2.0) ** 2
        fails = (n * np.log2(1.0 + g) - k + 0.5 * np.log2(n)) / np.sqrt(n * dispersion) < z
        low, high = np.where(fails, middle, low), np.where(fails, high, middle)
    return high


def _normal_quantile(p: float) -> float:
    """Inverse normal distribution function in plain Python (configuration time)."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def mcs_block_bits(num_symbols):
    """Bits of a transport block of num_symbols at each MCS, in the sizes of TS 38.214: [...] -> [29, ...]."""
    by_mcs = (29,) + (1,) * num_symbols.ndim
    efficiency = jnp.asarray(MCS_EFFICIENCY, num_symbols.dtype).reshape(by_mcs)
    info_bits = jnp.expand_dims(num_symbols, 0) * efficiency
    low_rate = np.broadcast_to((MCS_CODE_RATE <= 0.25).reshape(by_mcs), info_bits.shape)
    return transport_block.transport_block_bits(info_bits, low_rate)


def select_mcs(snr, thresholds_db, values=MCS_EFFICIENCY):
    """The fastest MCS whose 10 % threshold the SNR reaches.

    The table is not monotone at 16 and 17 (2.570 against 2.566 bit/symbol): thresholds are made so by a running
    maximum. Sums of steps rather than a search and a gather: they fuse into one pass, ten times faster on a CPU.

    Args:
      snr: linear, any shape.
      thresholds_db: [29] numpy, of `mcs_thresholds_db`.
      values: what is wanted of each MCS, 29 entries that broadcast against snr; default: bit/symbol.

    Returns:
      (the reached MCS's value, 0 where none is reached; implementation gap linear), both of snr's shape and dtype.
    """
    thresholds = 10.0 ** (np.maximum.accumulate(np.asarray(thresholds_db)) / 10.0)
    gaps = 10.0 ** (MCS_GAP_DB / 10.0)
    value, gap = jnp.zeros_like(snr), jnp.full_like(snr, gaps[0])
    before, before_gap = 0.0, gaps[0]
    for threshold, now, now_gap in zip(thresholds, values, gaps, strict=True):
        reached = snr >= threshold
        # Exact: bit/symbol are multiples of 1/1024, block sizes are whole numbers.
        value = value + jnp.where(reached, now - before, jnp.zeros_like(snr))
        if now_gap != before_gap:
            gap = jnp.where(reached, now_gap, gap)
        before, before_gap = now, now_gap
    return value, gap


def mcs_rate_bps(bandwidth_hz, snr, thresholds_db, slot_s: float):
    """Goodput, bit/s, at the target block error with an unlimited number of type-I retransmissions: one transport block
    a slot, (1 - 10 %) TBS / slot. bandwidth_hz and snr of one shape."""
    efficiency, _ = select_mcs(snr, thresholds_db)
    # The code rates up to 1/4 are those of at most 1/2 bit/symbol: QPSK. Quantized after the choice, so that the memory
    # stays linear in users.
    bits = transport_block.transport_block_bits(bandwidth_hz * slot_s * efficiency, efficiency <= 0.5)
    return bits * ((1.0 - TARGET_BLOCK_ERROR) / slot_s)


def chase_outage(spectral_efficiency, snr, attempts):
    """P(log2(1 + g sum of m |h|^2) < R), Rayleigh: the regularized gamma P(m, (2^R - 1)/g). Broadcasts; the limits are
    those of `rayleigh_outage`."""
    threshold = _outage_threshold(spectral_efficiency, snr)
    return jax.scipy.special.gammainc(jnp.asarray(attempts, threshold.dtype), threshold)
