"""What a client sends instead of its update: identity, quantization, sparsification, low rank, with exact payload bits.

An `Uplink` is a pair of pure functions, in the manner of optax's transformations:
`init(template) -> state`, `apply(delta, state, key) -> (decoded delta, new state, payload_bits)`, vmappable over
clients. The decoded delta is what the server reconstructs from exactly payload_bits bits; the state (error feedback,
warm starts) stays at the client. If the network loses the update, `keep_lost` puts it back into the client's residual.

QSGD: Alistarh et al., NeurIPS 2017. Error feedback: Karimireddy et al., ICML 2019. Low rank: PowerSGD, Vogels et al.,
NeurIPS 2019.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Uplink(NamedTuple):
    """init(template) -> state; apply(delta, state, key) -> (decoded, state, payload_bits float32 scalar); exact_bits
    (template) -> Python int, or None where the size depends on the values. float32 is exact up to 2^24 bits and within
    6e-8 above: the integer is for whoever counts bytes."""

    init: Callable
    apply: Callable
    exact_bits: Callable


class UplinkState(NamedTuple):
    """residual: what error feedback still owes, a tree like the delta (or ()); entropy_bits: the size of the last
    message under an ideal memoryless entropy code (the payload itself where nothing is coded); extra: of the method."""

    residual: object
    entropy_bits: jax.Array
    extra: object = ()


def tree_bits(tree) -> int:
    """Bits of a pytree sent as it is: size x width of each leaf's dtype."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize * 8 for leaf in jax.tree.leaves(tree))


def _zeros(template):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)


def _start(template, error_feedback, extra=()):
    return UplinkState(_zeros(template) if error_feedback else (), jnp.zeros((), jnp.float32), extra)


def _owed(delta, state, error_feedback):
    """The delta plus what earlier rounds left out."""
    return jax.tree.map(jnp.add, delta, state.residual) if error_feedback else delta


def _left(owed, decoded, error_feedback):
    return jax.tree.map(jnp.subtract, owed, decoded) if error_feedback else ()


def keep_lost(state: UplinkState, decoded, delivered) -> UplinkState:
    """The client's state after it learns whether its message arrived: a lost message returns to the residual whole.

    Without error feedback there is nothing to keep. delivered: bool scalar (or [C] under vmap).
    """
    if not jax.tree.leaves(state.residual):
        return state
    residual = jax.tree.map(lambda r, d: jnp.where(delivered, r, r + d), state.residual, decoded)
    return state._replace(residual=residual)


def identity() -> Uplink:
    """The update as it is, bit for bit; its dtypes' widths in bits."""

    def apply(delta, state, key):
        del key
        bits = jnp.float32(tree_bits(delta))
        return delta, state._replace(entropy_bits=bits), bits

    return Uplink(lambda template: _start(template, False), apply, tree_bits)


def _buckets(leaf, bucket_size):
    """[...] -> [n, bucket] float32, padded with zeros."""
    flat = leaf.reshape(-1).astype(jnp.float32)
    size = min(bucket_size, flat.shape[0])
    count = -(-flat.shape[0] // size)
    return jnp.pad(flat, (0, count * size - flat.shape[0])).reshape(count, size)


def _unbucket(buckets, leaf):
    return buckets.reshape(-1)[: math.prod(leaf.shape)].reshape(leaf.shape).astype(leaf.dtype)


def _entropy_bits(levels, num_levels, num_values):
    """n H of the levels' histogram: what an adaptive memoryless entropy coder approaches. levels: int [n, bucket]."""
    offsets = (levels + num_levels).reshape(-1)[:num_values]
    counts = jnp.zeros((2 * num_levels + 1,), jnp.float32).at[offsets].add(1.0)
    return -jnp.sum(counts * jnp.log2(jnp.maximum(counts, 1.0) / num_values))


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
    if coding not in ("fixed", "elias"):
        raise ValueError(f"coding must be 'fixed' or 'elias', got {coding!r}")
    width = (2 * num_levels).bit_length()  # bits for 2 s + 1 levels

    def exact_bits(template):
        if coding == "elias":
            return None
        leaves = [math.prod(leaf.shape) for leaf in jax.tree.leaves(template)]
        return sum(width * n + 32 * -(-n // min(bucket_size, n)) for n in leaves if n)

    def quantize(leaf, key):
        x = _buckets(leaf, bucket_size)
        scale = norm(x)  # [n, 1]
        ratio = jnp.abs(x) / jnp.where(scale > 0.0, scale, 1.0) * num_levels
        low = jnp.floor(ratio)
        up = jax.random.uniform(key, x.shape) < ratio - low
        levels = jnp.clip(low + up.astype(low.dtype), 0.0, float(num_levels)) * jnp.sign(x)
        return levels.astype(jnp.int32), scale, levels * (scale / num_levels)

    def apply(delta, state, key):
        owed = _owed(delta, state, error_feedback)
        leaves, structure = jax.tree.flatten(owed)
        sent, entropy, coded = [], 0.0, 0.0
        for leaf, leaf_key in zip(leaves, jax.random.split(key, max(len(leaves), 1))):
            if leaf.size == 0:
                sent.append(leaf)
                continue
            levels, scale, value = quantize(leaf, leaf_key)
            sent.append(_unbucket(value, leaf))
            entropy = entropy + _entropy_bits(levels, num_levels, leaf.size) + 32.0 * scale.shape[0]
            # Padding is never sent.
            real = levels.reshape(-1)[: leaf.size]
            coded = coded + elias_gamma_bits(real) + 32.0 * scale.shape[0]
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(delta)) if coding == "fixed" else jnp.asarray(coded, jnp.float32)
        left = _left(owed, decoded, error_feedback)
        return decoded, state._replace(residual=left, entropy_bits=jnp.asarray(entropy, jnp.float32)), bits

    return Uplink(lambda template: _start(template, error_feedback), apply, exact_bits)


def qsgd(levels: int, *, bucket_size: int = 512, coding: str = "fixed", error_feedback: bool = False) -> Uplink:
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
) -> Uplink:
    """Rounds at random to the 2^(bits-1) - 1 levels on each side of 0 below the bucket's largest magnitude; unbiased.

    The error of a value is below max|x| / (2^(bits-1) - 1), so error feedback contracts for all but degenerate buckets.

    Raises:
      ValueError: if bits is below 2 (no level but 0).
    """
    if bits < 2:
        raise ValueError(f"bits must be >= 2 (a sign and a level), got {bits}")
    norm = lambda x: jnp.max(jnp.abs(x), axis=1, keepdims=True)
    return _quantizer(2 ** (bits - 1) - 1, bucket_size, norm, coding, error_feedback)


def top_k(fraction: float, *, error_feedback: bool = True) -> Uplink:
    """Keeps the ceil(fraction n) values of largest magnitude of the whole update; each costs its index and its value.

    Payload: k (ceil(log2 n) + width of the leaf's dtype), with the widest dtype of the tree for all values.

    Raises:
      ValueError: if fraction is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")

    def count(template):
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template))
        return total, min(total, math.ceil(fraction * total))

    def exact_bits(template):
        total, k = count(template)
        width = max((jnp.dtype(leaf.dtype).itemsize * 8 for leaf in jax.tree.leaves(template)), default=0)
        return k * (max(total - 1, 0).bit_length() + width)

    def apply(delta, state, key):
        del key
        owed = _owed(delta, state, error_feedback)
        leaves, structure = jax.tree.flatten(owed)
        total, k = count(delta)
        flat = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])
        _, index = jax.lax.top_k(jnp.abs(flat), k)
        kept = jnp.zeros_like(flat).at[index].set(flat[index])
        sent, offset = [], 0
        for leaf in leaves:
            sent.append(kept[offset : offset + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            offset += leaf.size
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(delta))
        # Ideal index code: log2 of the number of k-subsets.
        subsets = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)) / math.log(2.0)
        entropy = jnp.float32(exact_bits(delta) - k * max(total - 1, 0).bit_length() + subsets)
        return decoded, state._replace(residual=_left(owed, decoded, error_feedback), entropy_bits=entropy), bits

    return Uplink(lambda template: _start(template, error_feedback), apply, exact_bits)


def _as_matrix(leaf):
    """[a, b, ...] -> [a, b * ...]."""
    return leaf.reshape(leaf.shape[0], -1)


def low_rank(rank: int, *, error_feedback: bool = True) -> Uplink:
    """PowerSGD per client: a leaf [m, n] is sent as P Q^T, P [m, r] orthonormal, one power step from the last Q.

    Leaves for which r (m + n) >= m n, and vectors, are sent as they are. Factors are float32: 32 r (m + n) bits.

    Raises:
      ValueError: if rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")

    def factored(leaf):
        if len(leaf.shape) < 2:
            return False
        m, n = leaf.shape[0], math.prod(leaf.shape[1:])
        return rank * (m + n) < m * n

    def exact_bits(template):
        bits = 0
        for leaf in jax.tree.leaves(template):
            m, n = (leaf.shape[0], math.prod(leaf.shape[1:])) if factored(leaf) else (0, 0)
            bits += 32 * rank * (m + n) if factored(leaf) else tree_bits(leaf)
        return bits

    def init(template):
        leaves = jax.tree.leaves(template)
        # Leaves without factors hold a row that is never used: XLA's CPU compiler crashes on empty arrays under pmap.
        # A fixed key: the warm start only has to be generic, and must be the same on every run.
        keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
        warm = [
            jax.random.normal(k, (math.prod(leaf.shape[1:]), rank)) if factored(leaf) else jnp.zeros((1, rank))
            for leaf, k in zip(leaves, keys)
        ]
        return _start(template, error_feedback, warm)

    def apply(delta, state, key):
        del key
        owed = _owed(delta, state, error_feedback)
        leaves, structure = jax.tree.flatten(owed)
        sent, warm = [], []
        for leaf, q in zip(leaves, state.extra):
            if not factored(leaf):
                sent.append(leaf)
                warm.append(q)
                continue
            matrix = _as_matrix(leaf).astype(jnp.float32)
            p, _ = jnp.linalg.qr(matrix @ q)  # [m, r]
            new_q = matrix.T @ p  # [n, r]
            sent.append((p @ new_q.T).reshape(leaf.shape).astype(leaf.dtype))
            # A zero update would kill the warm start for good.
            warm.append(jnp.where(jnp.any(new_q != 0.0), new_q, q))
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(delta))
        state = UplinkState(_left(owed, decoded, error_feedback), bits, warm)
        return decoded, state, bits

    return Uplink(init, apply, exact_bits)
