"""Activation-aware weight quantization (AWQ; Lin et al., MLSys 2024): the two searches, for one weight matrix.

Scale search: for r in 0, 0.05, ..., 0.95, s = mean|x|^r per input channel, divided by sqrt(max(s) min(s)); the weight
diag(s) W is rounded, diag(s)^-1 taken off again, and the r with the smallest mean squared error *of the module's
output* wins. The activations are divided by s in the operation before, which costs nothing at run time.

Clip search: each group's range is cut to (1 - i / 20) of its largest magnitude, i = 0 .. 9, and the cut with the
smallest squared error of the group's part of the output wins.

Where the output in question is the matrix product itself, its error on all calibration tokens follows from the Gram
matrix of the inputs: sum_t |x_t E|^2 = trace(E' (X' X) E). So nothing needs to be sampled there.
"""

import dataclasses
from typing import Callable

import jax
import jax.numpy as jnp

from fmfl_jax.quant.rtn import check_bits, group_rows, round_groups, round_weight, ungroup_rows

NUM_RATIOS = 20  # the paper's grid of r, and the grid of clip ratios, of which the first half is tried
MAX_SHRINK = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights are quantized. method: "awq" or "rtn" (round to nearest); bits: 4 or 3; group_size: -1 for one group."""

    method: str = "awq"
    bits: int = 4
    group_size: int = 128

    def __post_init__(self):
        if self.method not in ("awq", "rtn"):
            raise ValueError(f"quantization method must be 'awq' or 'rtn', got {self.method!r}")
        check_bits(self.bits, self.group_size)


def channel_scale(x_mean, ratio):
    """s float32 [K] of x_mean = mean|x| float32 [K] and ratio r: x_mean^r, at least 1e-4, centred on 1 (paper, eq. 5)."""
    s = jnp.maximum(x_mean**ratio, 1e-4)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


def search_scale(weight, x_mean, output_error: Callable, quant: QuantConfig):
    """The channel scale under which rounding hurts the module's output least.

    Args:
      weight: float32 [K, N].
      x_mean: float32 [K], mean |x| over the calibration tokens.
      output_error: [K, N] -> float32 scalar, squared error of the module's output with this weight in place.

    Returns:
      (s float32 [K], errors float32 [20] by ratio).
    """
    def error(ratio):
        s = channel_scale(x_mean, ratio)[:, None]
        return output_error(round_weight(weight * s, bits=quant.bits, group_size=quant.group_size) / s)

    ratios = jnp.arange(NUM_RATIOS, dtype=jnp.float32) / NUM_RATIOS
    errors = jax.lax.map(error, ratios)
    return channel_scale(x_mean, ratios[jnp.argmin(errors)]), errors


def product_error(weight, gram):
    """rounded [K, N] -> sum over tokens of |x (rounded - weight)|^2, for gram = X' X float32 [K, K]."""
    def error(rounded):
        e = rounded - weight
        return jnp.sum(e * jnp.dot(gram, e, precision="highest"))

    return error


def search_clip(weight, gram, quant: QuantConfig):
    """weight float32 [K, N] with every group clipped to the range under which its output is nearest to the unclipped.

    gram: X' X float32 [K, K] of the inputs, of which the blocks of the groups are used.
    """
    w = group_rows(weight, quant.group_size)  # [G, g, N]
    size = w.shape[1]
    blocks = _diagonal_blocks(gram, size)  # [G, g, g]
    largest = jnp.max(jnp.abs(w), axis=1, keepdims=True)  # [G, 1, N]

    def error(shrink):
        limit = largest * shrink
        e = round_groups(jnp.clip(w, -limit, limit), quant.bits) - w
        return jnp.sum(e * jnp.einsum("gij,gjn->gin", blocks, e, precision="highest"), axis=1)  # [G, N]

    shrinks = 1.0 - jnp.arange(int(NUM_RATIOS * MAX_SHRINK), dtype=jnp.float32) / NUM_RATIOS
    errors = jax.lax.map(error, shrinks)  # [10, G, N]
    limit = largest * shrinks[jnp.argmin(errors, axis=0)][:, None]
    return ungroup_rows(jnp.clip(w, -limit, limit), weight.shape[0])


def _diagonal_blocks(gram, size: int):
    """[K, K] -> [G, size, size], filled up with zeros."""
    groups = -(-gram.shape[0] // size)
    pad = groups * size - gram.shape[0]
    g = jnp.pad(gram, ((0, pad), (0, pad))).reshape(groups, size, groups, size)
    return jnp.einsum("gigj->gij", g)
