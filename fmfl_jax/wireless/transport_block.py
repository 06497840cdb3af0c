"""How many bits a transport block carries: the quantization of 3GPP TS 38.214, section 5.1.3.2.

A block of N_RE symbols at code rate R and modulation order Qm has room for N_info = N_RE R Qm bits; the standard rounds
that to a size that cuts into equal code blocks of whole bytes. One layer; N_RE is what the caller counts (the standard
takes pilots and overhead off and caps a resource block at 156 elements a slot).
"""

import jax
import jax.numpy as jnp
import numpy as np

# Table 5.1.3.2-1, the sizes up to 3824 bits.
_TABLE = np.asarray(
    [*range(24, 193, 8), *range(208, 385, 16), *range(408, 577, 24), *range(608, 769, 32), *range(808, 929, 40)]
    + [984, 1032, 1064, 1128, 1160, 1192, 1224, 1256, 1288, 1320, 1352, 1416, 1480, 1544, 1608, 1672, 1736, 1800, 1864]
    + [1928, 2024, 2088, 2152, 2216, 2280, 2408, 2472, 2536, 2600, 2664, 2728, 2792, 2856, 2976, 3104, 3240, 3368, 3496]
    + [3624, 3752, 3824],
    np.int32,
)


def _floor_log2(value):
    """floor(log2 n) of int32 n >= 1."""
    return 31 - jax.lax.clz(jnp.maximum(value, 1))


def transport_block_bits(info_bits, low_rate):
    """The transport block size for N_info unquantized bits, steps 2 to 4 of 5.1.3.2.

    Args:
      info_bits: N_info, float, any shape, below 2^30. 0 or less: nothing is sent.
      low_rate: bool, broadcastable: the code rate is 1/4 or less, whose code blocks are shorter (LDPC base graph 2).

    Returns:
      whole bits, in info_bits' shape and dtype. At least 24 where info_bits > 0, so tiny blocks get a higher code rate.
    """
    info_bits = jnp.asarray(info_bits)
    # Every rounding below is to whole numbers: int32 has no room for a float's own rounding.
    info = jnp.clip(info_bits, 0.0, 2.0**30).astype(jnp.int32)
    shift = jnp.maximum(3, _floor_log2(info) - 6)
    wanted = jnp.maximum(24, (info >> shift) << shift)
    at = jnp.searchsorted(_TABLE, jnp.minimum(wanted, _TABLE[-1]), method="compare_all")
    small = jnp.asarray(_TABLE)[at]

    rest = jnp.maximum(info - 24, 64)
    shift = _floor_log2(rest) - 5
    half = jnp.left_shift(1, shift - 1)  # ties go up
    with_crc = jnp.maximum(3840, ((rest + half) >> shift) << shift) + 24
    longest = jnp.where(low_rate, 3816, jnp.where(with_crc > 8424 + 24, 8424, 2**30))
    whole = 8 * (-(-with_crc // longest))  # bytes over all code blocks, equal in each
    large = whole * (-(-with_crc // whole)) - 24
    bits = jnp.where(info_bits > 3824.0, large, small)
    return jnp.where(info_bits > 0.0, bits, 0).astype(info_bits.dtype)
