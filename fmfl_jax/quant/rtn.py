"""The asymmetric group quantizer, round to nearest (AWQ's quantizer: Lin et al., MLSys 2024, section 4).

    s = max(max - min, 1e-5) / (2^bits - 1);  z = clamp(-round(min / s));  q = clamp(round(w / s) + z);  w ~ (q - z) s

with max and min over a group of `group_size` consecutive rows of a column and the clamps to 0 .. 2^bits - 1. Two things
are made sure here that the paper leaves open:
  - s is rounded to float16, the dtype it is stored in, before z and q are computed from it: what is searched with is
    what is stored.
  - max and min include 0. Otherwise a group of one sign, such as a short last group, is cut off: z cannot leave
    0 .. 2^bits - 1. Groups with both signs, nearly all of them, are not touched.
"""

import jax.numpy as jnp

from fmfl_jax.quant.int4 import Int4Weight

SCALE_DTYPE = jnp.float16


def check_bits(bits: int, group_size: int) -> None:
    """Raises ValueError unless bits is 3 or 4 and group_size is -1 (one group) or positive."""
    if bits not in (3, 4):
        raise ValueError(f"bits must be 3 or 4, got {bits}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for one group of the input dimension, got {group_size}")


def group_rows(x, group_size: int):
    """[K, ...] -> [G, group_size, ...], the last group filled up with zeros; group_size -1 is one group."""
    k = x.shape[0]
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    padded = jnp.pad(x, [(0, groups * group_size - k)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(groups, group_size, *x.shape[1:])


def ungroup_rows(x, k: int):
    """The inverse of `group_rows`: [G, group_size, ...] -> [K, ...]."""
    return x.reshape(-1, *x.shape[2:])[:k]


def group_ranges(w):
    """w float32 [G, group_size, N] -> the ends (low, high) of each group's range with 0 in it, [G, 1, N] each."""
    low, high = jnp.min(w, axis=1, keepdims=True), jnp.max(w, axis=1, keepdims=True)
    return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)


def step_and_zero(low, high, bits: int):
    """A range's s, float16, and z, float32, of its shape."""
    top = float(2**bits - 1)
    stored = (jnp.maximum(high - low, 1e-5) / top).astype(SCALE_DTYPE)
    return stored, jnp.clip(-jnp.round(low / stored.astype(jnp.float32)), 0.0, top)


def quantize_groups(w, bits: int):
    """w float32 [G, group_size, N] -> integers q [G, group_size, N] and z [G, 1, N] as float32, s float16 [G, 1, N]."""
    s, z = step_and_zero(*group_ranges(w), bits)
    return jnp.clip(jnp.round(w / s.astype(jnp.float32)) + z, 0.0, float(2**bits - 1)), z, s


def round_within(w, low, high, bits: int):
    """What clip(w, low, high) rounded stands for, where that takes up the range low .. high whole; shapes broadcast.

    Rounding is monotone, so clipping and the clamp of the integers are one clamp.
    """
    stored, z = step_and_zero(low, high, bits)
    s = stored.astype(jnp.float32)
    least, most = jnp.maximum(jnp.round(low / s), -z), jnp.minimum(jnp.round(high / s), float(2**bits - 1) - z)
    return jnp.clip(jnp.round(w / s), least, most) * s


def round_groups(w, bits: int):
    """w float32 [G, group_size, N] -> what its quantized form stands for, the same shape."""
    q, z, s = quantize_groups(w, bits)
    return (q - z) * s.astype(jnp.float32)


def round_weight(w, *, bits: int, group_size: int):
    """w float32 [K, N] -> quantized and back, float32 [K, N]."""
    return ungroup_rows(round_groups(group_rows(w, group_size), bits), w.shape[0])


def pack_weight(w, *, bits: int, group_size: int) -> Int4Weight:
    """Rounds w [K, N] to nearest. With 3 bits the integers are 0..7, in the same 4-bit container.

    Raises ValueError for bits or group_size out of range.
    """
    check_bits(bits, group_size)
    q, z, s = quantize_groups(group_rows(w.astype(jnp.float32), group_size), bits)
    q = ungroup_rows(q, w.shape[0]).astype(jnp.uint8)
    return Int4Weight.pack(q, s[:, 0], z[:, 0].astype(jnp.uint8), group_size=group_size)
