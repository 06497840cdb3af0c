"""Sparsified updates: the largest values of the whole, each with its index."""

import math

import jax
import jax.numpy as jnp

from fmfl_jax.transport.codec import Codec, left_out, owed, start


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

    def exact_bits(template):
        total, k = count(template)
        width = max((jnp.dtype(leaf.dtype).itemsize * 8 for leaf in jax.tree.leaves(template)), default=0)
        return k * (max(total - 1, 0).bit_length() + width)

    def apply(update, state, key):
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
        entropy = jnp.float32(exact_bits(update) - k * max(total - 1, 0).bit_length() + subsets)
        return decoded, state._replace(residual=left_out(owing, decoded, error_feedback), entropy_bits=entropy), bits

    return Codec(lambda template: start(template, error_feedback), apply, exact_bits)
