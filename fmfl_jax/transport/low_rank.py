"""Low-rank updates: PowerSGD (Vogels et al., NeurIPS 2019), one power step a round from the last factors."""

import math

import jax
import jax.numpy as jnp

from fmfl_jax.transport.codec import (
    Codec,
    CodecState,
    Coded,
    from_raw_bytes,
    left_out,
    make_codec,
    owed,
    raw_bytes,
    start,
)
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

    def code(update, state, key):
        del key
        owing = owed(update, state, error_feedback)
        leaves, structure = jax.tree.flatten(owing)
        symbols, sent, warm = [], [], []
        for leaf, q in zip(leaves, state.extra):
            if not factored(leaf):
                symbols.append(leaf)
                sent.append(leaf)
                warm.append(q)
                continue
            matrix = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
            p, _ = jnp.linalg.qr(matrix @ q)  # [m, r]
            new_q = matrix.T @ p  # [n, r]
            symbols.append((p, new_q))
            sent.append(_product(p, new_q, leaf))
            # A zero update would kill the warm start for good.
            warm.append(jnp.where(jnp.any(new_q != 0.0), new_q, q))
        decoded = jax.tree.unflatten(structure, sent)
        bits = jnp.float32(exact_bits(update))
        return Coded(symbols, decoded, CodecState(left_out(owing, decoded, error_feedback), bits, warm), bits)

    def from_bytes(payload, template):
        def take(like):
            nonlocal payload
            size = tree_bits(like) // 8
            own, payload = payload[:size], payload[size:]
            return from_raw_bytes(own, like)

        leaves, structure = jax.tree.flatten(template)
        found = []
        for leaf in leaves:
            if factored(leaf):
                sides = leaf.shape[0], math.prod(leaf.shape[1:])
                p, q = take([jax.ShapeDtypeStruct((side, rank), jnp.float32) for side in sides])
                found.append(jax.jit(lambda p, q: _product(p, q, leaf))(p, q))
            else:
                found.append(take(leaf))
        return jax.tree.unflatten(structure, found)

    return make_codec(
        f"lowrank {rank}",
        init=init,
        code=code,
        exact_bits=exact_bits,
        to_bytes=lambda symbols, template: b"".join(raw_bytes(leaf) for leaf in jax.tree.leaves(symbols)),
        from_bytes=from_bytes,
    )


def _product(p, q, leaf):
    """p [m, r], q [n, r] -> like the leaf."""
    return (p @ q.T).reshape(leaf.shape).astype(leaf.dtype)
