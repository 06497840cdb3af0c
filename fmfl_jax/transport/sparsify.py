"""Sparsified updates: the largest values of the whole, each with its index."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.transport.bits import pack, unpack
from fmfl_jax.transport.codec import Codec, Coded, from_raw_bytes, left_out, make_codec, owed, raw_bytes, start


def top_k(fraction: float, *, error_feedback: bool = True) -> Codec:
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

    def widest(template):
        return max((jnp.dtype(leaf.dtype).itemsize * 8 for leaf in jax.tree.leaves(template)), default=0)

    def index_bits(template):
        return max(count(template)[0] - 1, 0).bit_length()

    def exact_bits(template):
        return count(template)[1] * (index_bits(template) + widest(template))

    def code(update, state, key):
        del key
        owing = owed(update, state, error_feedback)
        leaves, structure = jax.tree.flatten(owing)
        total, k = count(update)
        flat = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])
        _, index = jax.lax.top_k(jnp.abs(flat), k)
        kept = jnp.zeros_like(flat).at[index].set(flat[index])
        sent, offset = [], 0
        for leaf in leaves:
            sent.append(kept[offset : offset + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            offset += leaf.size
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(update))
        # Ideal index code: log2 of the number of k-subsets.
        subsets = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)) / math.log(2.0)
        entropy = jnp.float32(exact_bits(update) - k * index_bits(update) + subsets)
        state = state._replace(residual=left_out(owing, decoded, error_feedback), entropy_bits=entropy)
        return Coded((index, decoded), decoded, state, bits)

    def to_bytes(symbols, template):
        """All values in the order of their indices, then the indices."""
        index, decoded = symbols
        index, width = np.sort(index), widest(template) // 8
        values, offset = [], 0
        for leaf in jax.tree.leaves(decoded):
            own = index[np.searchsorted(index, offset) : np.searchsorted(index, offset + leaf.size)] - offset
            octets = np.frombuffer(raw_bytes(leaf.reshape(-1)[own]), np.uint8).reshape(len(own), leaf.dtype.itemsize)
            values.append(np.pad(octets, ((0, 0), (0, width - leaf.dtype.itemsize))))
            offset += leaf.size
        return b"".join(v.tobytes() for v in values) + pack(index, index_bits(template))

    def from_bytes(payload, template):
        total, k = count(template)
        width = widest(template) // 8
        octets = np.frombuffer(payload[: k * width], np.uint8).reshape(k, width)
        index = unpack(payload[k * width :], index_bits(template), k)
        if np.any(np.diff(index) <= 0) or np.any(index >= total):
            raise ValueError("message names a value twice, or one that the update does not have")
        leaves, structure = jax.tree.flatten(template)
        found, offset = [], 0
        for leaf in leaves:
            size, dtype = math.prod(leaf.shape), np.dtype(leaf.dtype)
            own = slice(np.searchsorted(index, offset), np.searchsorted(index, offset + size))
            values = from_raw_bytes(
                octets[own, : dtype.itemsize].tobytes(), jax.ShapeDtypeStruct((own.stop - own.start,), dtype)
            )
            array = np.zeros(size, dtype)
            array[index[own] - offset] = values
            found.append(array.reshape(leaf.shape))
            offset += size
        return jax.tree.unflatten(structure, found)

    return make_codec(
        f"topk {fraction!r}",
        init=lambda template: start(template, error_feedback),
        code=code,
        exact_bits=exact_bits,
        to_bytes=to_bytes,
        from_bytes=from_bytes,
    )
