"""Clipping a whole tree by its norm, and Gaussian noise: the two halves of the Gaussian mechanism.

    clip(x) = x min(1, C / ||x||_2)        noise(x) = x + N(0, s^2 I)

Arithmetic is float32 and the noise is drawn from a seeded counter-based generator: this simulates the mechanism. Guards
against attacks on floating-point noise (Mironov, CCS 2012) and a secret source of randomness are a deployment's
business.
"""

import jax
import jax.numpy as jnp


def global_norm(tree):
    """L2 norm over all leaves joined, scalars included: float32. A tree without leaves has norm 0."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0.0)))


def clip_by_norm(tree, clip):
    """(tree, norm before): scaled down to norm `clip` where it is longer, else the same bits.

    clip: float32 scalar > 0. A norm that overflows gives zeros. A tree that is not finite stays so.
    """
    norm = global_norm(tree)
    too_long = norm > clip
    factor = jnp.where(too_long, clip / jnp.where(too_long, norm, 1.0), 1.0)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), tree), norm


def add_noise(tree, std, key):
    """tree + N(0, std^2 I), every leaf from its own key. std: float32 scalar, the same for all values."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + (std * jax.random.normal(own, leaf.shape, jnp.float32)).astype(leaf.dtype)
        for leaf, own in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, noisy)
