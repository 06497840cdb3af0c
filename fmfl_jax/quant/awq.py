"""Activation-aware weight quantization (AWQ; Lin et al., MLSys 2024): the two searches, for one weight matrix.

Scale search: for r in 0, 0.05, ..., 0.95, s = mean|x|^r per input channel, divided by sqrt(max(s) min(s)); the weight
diag(s) W is rounded, diag(s)^-1 taken off again, and the r with the smallest mean squared error *of the module's
output* wins. The activations are divided by s in the operation before, which costs nothing at run time.

Clip search: the range of every group is cut where that lowers the product's error, by factors 1, 0.95, ..., 0.55.

Chosen differently from the paper (BUILD_NOTES.md has the figures):
  - The paper cuts both ends of a range by one factor, one group at a time. Here each end has its own factor, as the
    quantizer is asymmetric, and a group is given what the other groups of its column leave.
  - Scaling and clipping are searched one after the other in the paper. Here the scale must still win over no scale at
    all once both are clipped.

Where the output in question is the matrix product itself, its error on all calibration tokens follows from the Gram
matrix of the inputs: sum_t |x_t E|^2 = trace(E' (X' X) E). So nothing needs to be sampled there.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmfl_jax.quant.rtn import check_bits, group_rows, round_groups, round_weight, ungroup_rows

NUM_RATIOS = 20  # the paper's grid of r
CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))  # the paper's grid of clip ratios, here for each end of the range
NUM_SWEEPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights are quantized. method: "awq" or "rtn" (round to nearest); bits: 4 or 3; group_size -1: one group,
    None: 128 or less, as the model's dimensions allow (`models.quantize.with_group_size`)."""

    method: str = "awq"
    bits: int = 4
    group_size: int | None = 128

    def __post_init__(self):
        if self.method not in ("awq", "rtn"):
            raise ValueError(f"quantization method must be 'awq' or 'rtn', got {self.method!r}")
        check_bits(self.bits, -1 if self.group_size is None else self.group_size)


def channel_scale(x_mean, ratio):
    """s float32 [K] of x_mean = mean|x| float32 [K] and ratio r: x_mean^r, at least 1e-4, centred on 1."""
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
    """weight float32 [K, N] with the range of every group cut to where the product's error is smallest.

    gram: X' X float32 [K, K] of the inputs. The groups of a column are gone through NUM_SWEEPS times, each given what
    the others' rounding leaves: with e the rounding error of a column and e_g that of its group g,

        |X e|^2 = e_g' G_gg e_g + 2 e_g' (G e - G_gg e_g)_g + what does not depend on e_g.
    """
    w = group_rows(weight, quant.group_size)  # [G, g, N]
    groups, size, columns = w.shape
    pad = groups * size - gram.shape[0]
    gram = jnp.pad(gram, ((0, pad), (0, pad))).reshape(groups, size, groups * size)  # [G, g, G g]
    low, high = jnp.minimum(jnp.min(w, axis=1), 0.0), jnp.maximum(jnp.max(w, axis=1), 0.0)  # [G, N]
    ratios = jnp.asarray(CLIP_RATIOS, jnp.float32)
    cuts = jnp.stack([x.ravel() for x in jnp.meshgrid(ratios, ratios)], axis=1)  # [100, 2]

    def one_group(carry, g):
        error, limits = carry  # [G, g, N], [G, 2, N]
        own = jax.lax.dynamic_slice_in_dim(gram[g], g * size, size, axis=1)  # [g, g]
        full = jnp.dot(gram[g], error.reshape(groups * size, columns), precision="highest")  # [g, N]
        others = full - jnp.dot(own, error[g], precision="highest")

        def one_cut(best, cut):
            limit = jnp.stack([low[g] * cut[0], high[g] * cut[1]])  # [2, N]
            e = round_groups(jnp.clip(w[g], limit[:1], limit[1:])[None], quant.bits)[0] - w[g]
            loss = jnp.sum(e * (jnp.dot(own, e, precision="highest") + 2.0 * others), axis=0, keepdims=True)  # [1, N]
            better = loss < best[0]
            return tuple(jnp.where(better, new, old) for new, old in zip((loss, e, limit), best, strict=True)), None

        start = (jnp.full((1, columns), jnp.inf), error[g], limits[g])
        (_, e, limit), _ = jax.lax.scan(one_cut, start, cuts)
        return (error.at[g].set(e), limits.at[g].set(limit)), None

    order = jnp.tile(jnp.arange(groups, dtype=jnp.int32), NUM_SWEEPS)
    start = (round_groups(w, quant.bits) - w, jnp.stack([low, high], axis=1))
    (_, limits), _ = jax.lax.scan(one_group, start, order)
    return ungroup_rows(jnp.clip(w, limits[:, :1], limits[:, 1:]), weight.shape[0])


def search_scale_and_clip(weight, x_mean, gram, output_error: Callable, quant: QuantConfig):
    """The scale of `search_scale`, or ones where clipping makes up for more than scaling does, and the weight clipped.

    Scaling is searched without clipping, as in the paper; the two then compete, both clipped, on the module's output.
    Arguments as in `search_scale` and `search_clip`.

    Returns:
      (s float32 [K], weight float32 [K, N] with the groups of diag(s) weight clipped, not multiplied by s).
    """

    def clipped(s):
        w = search_clip(weight * s[:, None], gram / (s[:, None] * s[None]), quant)
        rounded = round_weight(w, bits=quant.bits, group_size=quant.group_size)
        return output_error(rounded / s[:, None]), w / s[:, None]

    s, _ = search_scale(weight, x_mean, output_error, quant)
    candidates = jnp.stack([s, jnp.ones_like(s)])
    errors, weights = jax.lax.map(clipped, candidates)
    best = jnp.argmin(errors)
    return candidates[best], weights[best]
