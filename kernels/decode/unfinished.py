"""An RMSNorm whose division is left to the product that takes it: h weight, and the sums of h's squares.

    RMSNorm(h) = x / sqrt(sum of squares / N + eps)        with x = h weight

The kernel that writes h sees tiles of columns, no whole row; the product's rows can be divided as well as its input's.
More than `ROWS` rows are always finished.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.w4a16 import configs

ROWS = configs.DECODE_ROWS


class Unfinished(NamedTuple):
    """x [M, N]; squares fp32 [M, num_tiles(M, N)]."""

    x: jax.Array
    squares: jax.Array


def num_tiles(m: int, n: int) -> int:
    """Into how many tiles of columns the product that writes [M, N] is cut, each with its sums of squares."""
    config = configs.choose(configs.MATMUL, m)
    return 1 if config is None else -(-n // config.block_n)


def finished(x, eps: float) -> Unfinished:
    """A norm x [M, N] that is complete: its squares are such that the division is by 1."""
    m, n = x.shape
    squares = np.zeros((m, num_tiles(m, n)), np.float32)
    squares[:, 0] = n * (1 - eps)
    return Unfinished(x, jnp.asarray(squares))


def finish(norm: Unfinished, eps: float) -> jax.Array:
    """The division, in fp32; [M, N] in x's dtype."""
    m, n = norm.x.shape
    if m > ROWS:
        return norm.x
    mean = jnp.sum(norm.squares, axis=-1, keepdims=True) / n
    return (norm.x.astype(jnp.float32) * jax.lax.rsqrt(mean + eps)).astype(norm.x.dtype)
