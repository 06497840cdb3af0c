"""Low-rank updates: PowerSGD (Vogels et al., NeurIPS 2019), one power step a round from the last factors."""

import math

import jax
import jax.numpy as jnp

from fmfl_jax.transport.codec import Codec, CodecState, left_out, owed, start
from fmfl_jax.transport.size import tree_bits


def low_rank(rank: int, *, error_feedback: bool = True) -> Codec:
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
        return start(template, error_feedback, warm)

    def apply(update, state, key):
        del key
        owing = owed(update, state, error_feedback)
        leaves, structure = jax.tree.flatten(owing)
        sent, warm = [], []
        for leaf, q in zip(leaves, state.extra):
            if not factored(leaf):
                sent.append(leaf)
                warm.append(q)
                continue
            matrix = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
            p, _ = jnp.linalg.qr(matrix @ q)  # [m, r]
            new_q = matrix.T @ p  # [n, r]
            sent.append((p @ new_q.T).reshape(leaf.shape).astype(leaf.dtype))
            # A zero update would kill the warm start for good.
            warm.append(jnp.where(jnp.any(new_q != 0.0), new_q, q))
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(update))
        state = CodecState(left_out(owing, decoded, error_feedback), bits, warm)
        return decoded, state, bits

    return Codec(init, apply, exact_bits)
