"""Quantized updates. QSGD: Alistarh et al., NeurIPS 2017; stochastic rounding on a uniform grid.

x -> scale sign(x) l / s,   l in 0..s rounded at random so that E[decoded] = x,   scale = |bucket|_2 or max|bucket|
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.transport.bits import pack, pack_elias, unpack, unpack_elias
from fmfl_jax.transport.codec import Codec, Coded, from_raw_bytes, left_out, make_codec, owed, raw_bytes, start


def qsgd(levels: int, *, bucket_size: int = 512, coding: str = "fixed", error_feedback: bool = False) -> Codec:
    """QSGD: each value x of a bucket becomes |x|_2 sign(x) l/s with l in 0..s rounded at random, E[decoded] = x.

    Variance at most min(d/s^2, sqrt(d)/s) |x|^2 for buckets of d values.

    Args:
      levels: s.
      bucket_size: d, values that share one norm (float32, 32 bits).
      coding: "fixed": ceil(log2(2 s + 1)) bits a value; "elias": a real prefix code, Elias gamma and sign.
      error_feedback: keep what was rounded away for the next round. Needs a contraction, so a variance bound below 1.

    Raises:
      ValueError: if error feedback would diverge at this (levels, bucket_size).
    """
    bound = min(bucket_size / levels**2, math.sqrt(bucket_size) / levels) if levels >= 1 else math.inf
    if error_feedback and bound >= 1.0:
        raise ValueError(
            f"error feedback needs a variance bound below 1, but levels={levels} and bucket_size={bucket_size} "
            f"give {bound:.3g}: raise levels or lower bucket_size"
        )
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=1, keepdims=True))
    return _quantizer(levels, bucket_size, norm, coding, error_feedback)


def stochastic_rounding(
    bits: int, *, bucket_size: int = 512, coding: str = "fixed", error_feedback: bool = True
) -> Codec:
    """Rounds at random to the 2^(bits-1) - 1 levels on each side of 0 below the bucket's largest magnitude; unbiased.

    The error of a value is below max|x| / (2^(bits-1) - 1), so error feedback contracts for all but degenerate buckets.

    Raises:
      ValueError: if bits is below 2 (no level but 0).
    """
    if bits < 2:
        raise ValueError(f"bits must be >= 2 (a sign and a level), got {bits}")
    norm = lambda x: jnp.max(jnp.abs(x), axis=1, keepdims=True)
    return _quantizer(2 ** (bits - 1) - 1, bucket_size, norm, coding, error_feedback)


def elias_gamma_bits(levels):
    """Exact length of the levels' prefix code: Elias gamma of |level| + 1 (2 floor(log2) + 1 bits), and a sign if !=
    0."""
    magnitude = jnp.abs(levels)
    # frexp's exponent is exact where log2 is not: floor(log2(m)) = exponent - 1
    _, exponent = jnp.frexp((magnitude + 1).astype(jnp.float32))
    return jnp.sum((2 * (exponent - 1) + 1 + (magnitude > 0).astype(exponent.dtype)).astype(jnp.float32))


def _quantizer(num_levels, bucket_size, norm, coding, error_feedback):
    if num_levels < 1 or bucket_size < 1:
        raise ValueError(f"levels and bucket_size must be >= 1, got {num_levels}, {bucket_size}")
    if num_levels > 2**24:
        raise ValueError(f"levels must be <= 2^24, up to where float32 counts, got {num_levels}")
    if coding not in ("fixed", "elias"):
        raise ValueError(f"coding must be 'fixed' or 'elias', got {coding!r}")
    width = (2 * num_levels).bit_length()  # bits for 2 s + 1 levels

    def exact_bits(template):
        if coding == "elias":
            return None
        return sum(width * n + 32 * buckets for n, buckets in shapes(template))

    def quantize(leaf, key):
        """levels int32 [n, bucket] and step float32 [n, 1]: together the decoded value."""
        x = _buckets(leaf, bucket_size)
        scale = norm(x)  # [n, 1]
        ratio = jnp.abs(x) / jnp.where(scale > 0.0, scale, 1.0) * num_levels
        low = jnp.floor(ratio)
        up = jax.random.uniform(key, x.shape) < ratio - low
        levels = jnp.clip(low + up.astype(low.dtype), 0.0, float(num_levels)) * jnp.sign(x)
        # A bucket with a NaN has no levels; its step is NaN, so that every value arrives as one.
        return jnp.where(jnp.isnan(levels), 0.0, levels).astype(jnp.int32), scale / num_levels

    def code(update, state, key):
        owing = owed(update, state, error_feedback)
        leaves, structure = jax.tree.flatten(owing)
        symbols, sent, entropy, coded = [], [], 0.0, 0.0
        for leaf, leaf_key in zip(leaves, jax.random.split(key, max(len(leaves), 1))):
            if leaf.size == 0:
                sent.append(leaf)
                continue
            levels, step = quantize(leaf, leaf_key)
            sent.append(_values(levels, step, leaf))
            entropy = entropy + _entropy_bits(levels, num_levels, leaf.size) + 32.0 * step.shape[0]
            # Padding is never sent.
            real = levels.reshape(-1)[: leaf.size]
            coded = coded + elias_gamma_bits(real) + 32.0 * step.shape[0]
            symbols.append((real, step))
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(update)) if coding == "fixed" else jnp.asarray(coded, jnp.float32)
        left = left_out(owing, decoded, error_feedback)
        state = state._replace(residual=left, entropy_bits=jnp.asarray(entropy, jnp.float32))
        return Coded(symbols, decoded, state, bits)

    def shapes(template):
        """(values, buckets) of every leaf that is sent."""
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(template)]
        return [(n, -(-n // min(bucket_size, n))) for n in sizes if n]

    def to_bytes(symbols, template):
        """All steps, then all levels."""
        steps = b"".join(raw_bytes(step) for _, step in symbols)
        levels = np.concatenate([np.zeros(0, np.int32), *(levels for levels, _ in symbols)])
        return steps + (pack(levels + num_levels, width) if coding == "fixed" else pack_elias(levels))

    def from_bytes(payload, template):
        sizes = shapes(template)
        count, num_steps = sum(n for n, _ in sizes), sum(buckets for _, buckets in sizes)
        if len(payload) < 4 * num_steps:
            raise ValueError(f"message has {len(payload)} bytes of payload, expected {num_steps} steps of 4 bytes")
        steps = from_raw_bytes(payload[: 4 * num_steps], jax.ShapeDtypeStruct((num_steps, 1), np.float32))
        rest = payload[4 * num_steps :]
        levels = unpack(rest, width, count) - num_levels if coding == "fixed" else unpack_elias(rest, count)
        if np.any(np.abs(levels) > num_levels):
            raise ValueError(f"message has levels above {num_levels}")
        return _tree_of(levels, steps, template, bucket_size)

    def most_bytes(template):
        longest = 2 * (num_levels + 1).bit_length()  # of the prefix code
        return -(-sum(longest * n + 32 * buckets for n, buckets in shapes(template)) // 8)

    return make_codec(
        f"quantize {num_levels} {bucket_size} {coding}",
        init=lambda template: start(template, error_feedback),
        code=code,
        exact_bits=exact_bits,
        to_bytes=to_bytes,
        from_bytes=from_bytes,
        most_bytes=most_bytes,
    )


def _tree_of(levels, steps, template, bucket_size):
    """The decoded leaves of `template` from the levels [n] of all of them in a row and the steps [buckets, 1]."""
    leaves, structure = jax.tree.flatten(template)
    found = []
    for leaf in leaves:
        n = math.prod(leaf.shape)
        if n == 0:
            found.append(np.zeros(leaf.shape, leaf.dtype))
            continue
        own, levels = levels[:n].astype(np.int32), levels[n:]
        bucket = min(bucket_size, n)
        buckets = -(-n // bucket)
        padded = np.pad(own, (0, buckets * bucket - n)).reshape(buckets, bucket)
        found.append(_values(jnp.asarray(padded), jnp.asarray(steps[:buckets]), leaf))
        steps = steps[buckets:]
    return jax.tree.unflatten(structure, found)


def _buckets(leaf, bucket_size):
    """[...] -> [n, bucket] float32, padded with zeros."""
    flat = leaf.reshape(-1).astype(jnp.float32)
    size = min(bucket_size, flat.shape[0])
    count = -(-flat.shape[0] // size)
    return jnp.pad(flat, (0, count * size - flat.shape[0])).reshape(count, size)


def _values(levels, step, leaf):
    """levels int32 [n, bucket], step [n, 1] -> like the leaf: one product each, the same wherever it is computed."""
    values = levels.astype(jnp.float32) * step
    return values.reshape(-1)[: math.prod(leaf.shape)].reshape(leaf.shape).astype(leaf.dtype)


def _entropy_bits(levels, num_levels, num_values):
    """n H of the levels' histogram: what an adaptive memoryless entropy coder approaches. levels: int [n, bucket]."""
    offsets = (levels + num_levels).reshape(-1)[:num_values]
    counts = jnp.zeros((2 * num_levels + 1,), jnp.float32).at[offsets].add(1.0)
    return -jnp.sum(counts * jnp.log2(jnp.maximum(counts, 1.0) / num_values))
