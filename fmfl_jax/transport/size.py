"""Sizes of pytrees in bits."""

import math

import jax
import jax.numpy as jnp


def tree_bits(tree) -> int:
    """Bits of a pytree sent as it is: size x width of each leaf's dtype. Leaves may be shapes."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize * 8 for leaf in jax.tree.leaves(tree))
