"""One layer's program in a loop over all layers, for decoding on a CPU over 4-bit weights.

XLA makes as much code of 30 equal layers as of 30 different ones: for SmolLM2-135M twice 30 MB, and as much again that
compiling leaves in the heap. A loop has one. What is small (norms, LoRA's factors) is stacked, and the loop takes out
one layer's; packed weights stay where they are, and the kernel is told whose to read (`Int4Layers`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fmfl_jax.quant.int4 import Int4Layers, Int4Weight


def are_alike(blocks: Sequence[nnx.Module]) -> bool:
    """Whether the blocks differ in their arrays' values alone."""
    graphdefs, states = zip(*(nnx.split(block) for block in blocks))
    shapes = [jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), nnx.to_pure_dict(state)) for state in states]
    return all(g == graphdefs[0] and s == shapes[0] for g, s in zip(graphdefs, shapes))


def join(blocks: Sequence[nnx.Module]):
    """(what they are, their arrays stacked [L, ...] and their packed weights side by side) of blocks that are alike."""

    is_weight = lambda leaf: isinstance(leaf, Int4Weight)

    def one(*leaves):
        return Int4Layers(leaves, jnp.int32(0)) if is_weight(leaves[0]) else jnp.stack(leaves)

    graphdefs, states = zip(*(nnx.split(block) for block in blocks))
    return graphdefs[0], jax.tree.map(one, *states, is_leaf=is_weight)


def block_at(joined, layer):
    """The block of this layer, int32 [], of what `join` gives."""

    def one(leaf):
        if isinstance(leaf, Int4Layers):
            return Int4Layers(leaf.weights, layer)
        return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    graphdef, state = joined
    return nnx.merge(graphdef, jax.tree.map(one, state, is_leaf=lambda leaf: isinstance(leaf, Int4Layers)))
