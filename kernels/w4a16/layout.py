"""The storage layout of 4-bit weights: packing, unpacking, concatenation and slicing for tensor parallelism.

A weight W[K, N] is kept as integers q in 0..15 with one scale and one 4-bit zero point per group of `group_size`
consecutive rows (of K) and column: W = (q - z) * s (AWQ's asymmetric form, Lin et al., MLSys 2024; symmetric is z = 8).

Order of the nibbles ("K slices"). K is cut into superblocks of 128 rows, each into 4 slices of 32 rows:

    k = 128 * b + 32 * i + r,   b superblock, i in 0..3 slice, r in 0..31 row of the slice.

A 16-bit word (row 32 * b + r, column n) holds the four values q[128 b + 32 i + r, n] in its bits 4 i .. 4 i + 3, so
slice 0 is the lowest nibble. Shifting a tile of words [32, N] by 4 i and masking gives the whole tile of slice i: a
GPU thread unpacks tiles without moving anything between threads, two values per 32-bit instruction. Two neighbouring
columns (2 c, 2 c + 1) share one stored int32, the even column in the low half: `qweight` is int32 [Kp / 4, Np / 2].
Nothing in this order looks across a superblock, so rows may be cut at multiples of 128 (tensor parallelism over K).

Zero points are packed by pairs of groups, so that at group size 128 the kernel's shifts are constants: the byte
(p, n) holds group 2 p in its low nibble and group 2 p + 1 in its high one, four columns to an int32, the first in the
lowest byte: `zero_point` is int32 [ceil(G / 2), Np / 4]. Scales are [G, Np].

Some formats (GGUF's Q4_1) store what a group is at q = 0 as a number of its own, its minimum m: W = q * s + m, a zero
point -m / s that is no integer. Then `zero_point` is m itself: a float array [G, Np], laid out as the scales are. The
dtype says which of the two it is; nothing else in the layout changes.

K is padded to Kp (a multiple of 128, whole superblocks) and N to Np (a multiple of 16, so that rows are whole
16-byte loads). Padding has q = z = s = 0, hence W = 0 there. At group size 128 with a 16-bit scale and an even G a
weight takes 4 + 20 / 128 = 4.156 bits.

All functions take numpy arrays (offline, without copies in wider types) or jax arrays, and return the same kind.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SUPERBLOCK = 128  # rows of K per superblock
SLICES = 4  # nibbles in a 16-bit word
SLICE = SUPERBLOCK // SLICES  # rows of K in a slice
N_ALIGN = 16  # columns: 16 words of 2 bytes are two 16-byte loads


def padded_shape(k: int, n: int) -> tuple[int, int]:
    """(Kp, Np): K and N rounded up to what the layout stores."""
    return -(-k // SUPERBLOCK) * SUPERBLOCK, -(-n // N_ALIGN) * N_ALIGN


def num_groups(k: int, group_size: int) -> int:
    """G = ceil(K / group_size); the last group may be short."""
    return -(-k // group_size)


def is_minimum(zero_point) -> bool:
    """Whether this `zero_point` holds minima (float, W = q * s + m) and not packed integers (W = (q - z) * s)."""
    return jnp.issubdtype(zero_point.dtype, jnp.floating)


def packed_shapes(k: int, n: int, group_size: int, *, minimum: bool = False) -> dict[str, tuple[int, int]]:
    """The shapes of the three stored arrays: qweight (int32), scale (float), zero_point (int32; float minima)."""
    kp, np_ = padded_shape(k, n)
    g = num_groups(k, group_size)
    zero_point = (g, np_) if minimum else (-(-g // 2), np_ // 4)
    return {"qweight": (kp // 4, np_ // 2), "scale": (g, np_), "zero_point": zero_point}


def check(qweight, scale, zero_point, *, k: int, n: int, group_size: int) -> None:
    """Raises ValueError where the arrays are not the packed form of a [k, n] weight with this group size."""
    if k < 1 or n < 1 or group_size < 1:
        raise ValueError(f"w4a16: k, n and group_size must be positive, got k={k}, n={n}, group_size={group_size}")
    arrays = {"qweight": qweight, "scale": scale, "zero_point": zero_point}
    minimum = zero_point is not None and is_minimum(zero_point)
    for name, shape in packed_shapes(k, n, group_size, minimum=minimum).items():
        array = arrays[name]
        if array is None:
            continue
        if tuple(array.shape) != shape:
            static = f"k={k}, n={n}, group_size={group_size}"
            raise ValueError(f"w4a16: {name} has shape {tuple(array.shape)}, expected {shape} for {static}")
        is_float = name == "scale" or (minimum and name == "zero_point")
        if not is_float and array.dtype != np.int32:
            raise ValueError(f"w4a16: {name} has dtype {array.dtype}, expected int32")
    if scale is not None and not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"w4a16: scale has dtype {scale.dtype}, expected a float type")


def _xp(array):
    """numpy for numpy arrays, jax.numpy for everything else (tracers included)."""
    return np if isinstance(array, np.ndarray) else jnp


def _halves_to_int32(words):
    """uint16 [R, Np] -> int32 [R, Np / 2], the even column in the low half."""
    rows, cols = words.shape
    if isinstance(words, np.ndarray):
        return np.ascontiguousarray(words).view("<i4")
    return jax.lax.bitcast_convert_type(words.reshape(rows, cols // 2, 2), jnp.int32)


def int32_to_halves(qweight):
    """int32 [R, Np / 2] -> uint16 [R, Np]: the 16-bit words of the module docstring."""
    rows, cols = qweight.shape
    if isinstance(qweight, np.ndarray):
        return np.ascontiguousarray(qweight).view("<u2")
    return jax.lax.bitcast_convert_type(qweight, jnp.uint16).reshape(rows, cols * 2)


def pack_zero_point(zero_point):
    """Integers 0..15 [G, Np] (Np a multiple of 4) -> int32 [ceil(G / 2), Np / 4]; float minima stay as they are."""
    if is_minimum(zero_point):
        return zero_point
    xp = _xp(zero_point)
    g, np_ = zero_point.shape
    pairs = xp.pad(zero_point.astype(xp.uint8), ((0, g % 2), (0, 0))).reshape(-1, 2, np_)
    z = pairs[:, 0] | (pairs[:, 1] << xp.uint8(4))  # [ceil(G/2), Np]
    if xp is np:
        return np.ascontiguousarray(z).view("<i4")
    return jax.lax.bitcast_convert_type(z.reshape(-1, np_ // 4, 4), jnp.int32)


def unpack_zero_point(zero_point, *, groups: int, n: int):
    """int32 [ceil(G / 2), Np / 4] -> uint8 [G, n]; float minima [G, Np] -> [G, n]."""
    if is_minimum(zero_point):
        return zero_point[:groups, :n]
    xp = _xp(zero_point)
    rows, words = zero_point.shape
    if xp is np:
        z = np.ascontiguousarray(zero_point).view("<u1")
    else:
        z = jax.lax.bitcast_convert_type(zero_point, jnp.uint8).reshape(rows, words * 4)
    both = xp.stack([z & xp.uint8(15), z >> xp.uint8(4)], axis=1)  # [ceil(G/2), 2, Np]
    return both.reshape(rows * 2, words * 4)[:groups, :n]


def pack(q, zero_point, scale, *, group_size: int):
    """Packs a quantized weight.

    Args:
      q: integers 0..15, [K, N].
      zero_point: integers 0..15, [G, N], G = ceil(K / group_size); or float minima [G, N], whose dtype is kept.
      scale: float, [G, N]; its dtype is kept.
      group_size: rows of K per group, positive; K for one group.

    Returns:
      (qweight int32 [Kp/4, Np/2], scale [G, Np], zero_point int32 [ceil(G/2), Np/4] or float [G, Np]), see the module
      docstring.

    Raises:
      ValueError: shapes that do not agree, or (for numpy inputs) values outside 0..15.
    """
    k, n = q.shape
    g = num_groups(k, group_size)
    for name, array in (("zero_point", zero_point), ("scale", scale)):
        if tuple(array.shape) != (g, n):
            raise ValueError(f"w4a16.pack: {name} has shape {tuple(array.shape)}, expected {(g, n)}")
    for name, array in (("q", q), ("zero_point", zero_point)):
        in_numpy = isinstance(array, np.ndarray) and array.size and not is_minimum(array)
        if in_numpy and (array.min() < 0 or array.max() > 15):
            raise ValueError(f"w4a16.pack: {name} must hold integers 0..15, got {array.min()}..{array.max()}")
    kp, np_ = padded_shape(k, n)
    xp = _xp(q)
    blocks = xp.pad(q.astype(xp.uint8), ((0, kp - k), (0, np_ - n))).reshape(kp // SUPERBLOCK, SLICES, SLICE, np_)
    words = blocks[:, 0].astype(xp.uint16)
    for i in range(1, SLICES):
        words = words | (blocks[:, i].astype(xp.uint16) << xp.uint16(4 * i))
    qweight = _halves_to_int32(words.reshape(kp // SLICES, np_))
    scale_padded = _xp(scale).pad(scale, ((0, 0), (0, np_ - n)))
    zero_padded = _xp(zero_point).pad(zero_point, ((0, 0), (0, np_ - n)))
    return qweight, scale_padded, pack_zero_point(zero_padded)


def unpack_rows(qweight):
    """int32 [Kp/4, Np/2] -> uint8 [Kp, Np], padding included."""
    return _unpack_words(int32_to_halves(qweight))


def _unpack_words(words):
    """uint16 [Kp/4, n] -> uint8 [Kp, n]."""
    xp = _xp(words)
    rows, np_ = words.shape
    words = words.reshape(rows // SLICE, 1, SLICE, np_)
    shifts = (xp.arange(SLICES, dtype=xp.uint16) * xp.uint16(4)).reshape(1, SLICES, 1, 1)
    return ((words >> shifts) & xp.uint16(15)).astype(xp.uint8).reshape(rows * SLICES, np_)


def unpack(qweight, zero_point, *, k: int, n: int, group_size: int):
    """The exact inverse of `pack`: (q uint8 [K, N], zero_point uint8, or float minima, [G, N]).

    Raises:
      ValueError: arrays that are not the packed form of a [k, n] weight.
    """
    check(qweight, None, zero_point, k=k, n=n, group_size=group_size)
    return unpack_rows(qweight)[:k, :n], unpack_zero_point(zero_point, groups=num_groups(k, group_size), n=n)


def take_columns(qweight, scale, zero_point, columns, *, k: int, n: int, group_size: int):
    """q uint8 [K, T], scale [G, T] and zero_point [G, T] (uint8, or float minima) of the columns int [T], each in
    0..n-1. Reads no others."""
    check(qweight, scale, zero_point, k=k, n=n, group_size=group_size)
    words = jnp.take(qweight, columns // 2, axis=1) >> (16 * (columns % 2))[None]
    q = _unpack_words(words.astype(jnp.uint16))[:k]  # the cast keeps the low half
    if is_minimum(zero_point):
        return q, jnp.take(scale, columns, axis=1), jnp.take(zero_point, columns, axis=1)
    pairs = (jnp.take(zero_point, columns // 4, axis=1) >> (8 * (columns % 4))[None]).astype(jnp.uint8)
    zero = jnp.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1, columns.shape[0])[: num_groups(k, group_size)]
    return q, jnp.take(scale, columns, axis=1), zero


def concatenate(weights: Sequence[tuple], ns: Sequence[int], *, k: int, group_size: int) -> tuple:
    """Joins packed weights along N (q/k/v, gate/up), so that one call serves them all.

    Args:
      weights: (qweight, scale, zero_point) of [k, n_i] weights.
      ns: the n_i. Padding columns between the parts are dropped.

    Returns:
      (qweight, scale, zero_point) of the [k, sum(ns)] weight.
    """
    halves, scales, zeros = [], [], []
    for (qweight, scale, zero_point), n in zip(weights, ns, strict=True):
        check(qweight, scale, zero_point, k=k, n=n, group_size=group_size)
        halves.append(int32_to_halves(qweight)[:, :n])
        scales.append(scale[:, :n])
        zeros.append(unpack_zero_point(zero_point, groups=num_groups(k, group_size), n=n))
    xp = _xp(weights[0][0])
    pad = ((0, 0), (0, padded_shape(k, sum(ns))[1] - sum(ns)))
    qweight = _halves_to_int32(xp.pad(xp.concatenate(halves, axis=1), pad))
    zero_point = pack_zero_point(xp.pad(xp.concatenate(zeros, axis=1), pad))
    return qweight, xp.pad(xp.concatenate(scales, axis=1), pad), zero_point


def shard_n(qweight, scale, zero_point, *, k: int, n: int, group_size: int, parts: int) -> tuple:
    """Cuts a packed weight into `parts` along N, stacked on a new first axis (for in_specs P("model")).

    Returns:
      (qweight, scale, zero_point), each [parts, ...], of [k, n / parts] weights.

    Raises:
      ValueError: n is no multiple of parts.
    """
    check(qweight, scale, zero_point, k=k, n=n, group_size=group_size)
    if n % parts:
        raise ValueError(f"w4a16.shard_n: n={n} is no multiple of parts={parts}")
    xp, local = _xp(qweight), n // parts
    halves, zero = int32_to_halves(qweight), unpack_zero_point(zero_point, groups=num_groups(k, group_size), n=n)
    pad = ((0, 0), (0, padded_shape(k, local)[1] - local))
    pieces = []
    for p in range(parts):
        cols = slice(p * local, (p + 1) * local)
        pieces.append(
            (
                _halves_to_int32(xp.pad(halves[:, cols], pad)),
                xp.pad(scale[:, cols], pad),
                pack_zero_point(xp.pad(zero[:, cols], pad)),
            )
        )
    return tuple(xp.stack(arrays) for arrays in zip(*pieces, strict=True))


def shard_k(qweight, scale, zero_point, *, k: int, n: int, group_size: int, parts: int) -> tuple[tuple, int]:
    """Cuts a packed weight into `parts` along K, stacked on a new first axis.

    A part of K = 11008 / 4 = 2752 rows is no multiple of 128, so groups straddle the cuts: the groups are split into
    smaller ones (their scale and zero point repeated), which changes no value.

    Returns:
      ((qweight, scale, zero_point), each [parts, ...], of [k / parts, n] weights; their group size).

    Raises:
      ValueError: k is no multiple of parts.
    """
    check(qweight, scale, zero_point, k=k, n=n, group_size=group_size)
    if k % parts:
        raise ValueError(f"w4a16.shard_k: k={k} is no multiple of parts={parts}")
    local = k // parts
    size = local if group_size >= k else math.gcd(group_size, local)
    xp = _xp(qweight)
    q, zero = unpack(qweight, zero_point, k=k, n=n, group_size=group_size)
    group_of = np.minimum(np.arange(k), k - 1) // group_size  # the group of each row
    pieces = []
    for p in range(parts):
        starts = group_of[p * local : (p + 1) * local : size]
        rows = slice(p * local, (p + 1) * local)
        pieces.append(pack(q[rows], zero[starts], scale[starts, :n], group_size=size))
    return tuple(xp.stack(arrays) for arrays in zip(*pieces, strict=True)), size
