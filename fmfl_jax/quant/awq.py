"""Activation-aware weight quantization (AWQ; Lin et al., MLSys 2024): the two searches, for one weight matrix.

Scale search: for r in 0, 0.05, ..., 0.95, s = mean|x|^r per input channel, divided by sqrt(max(s) min(s)); the weight
diag(s) W is rounded, diag(s)^-1 taken off again, and the r with the smallest mean squared error *of the module's
output* wins. The activations are divided by s in the operation before, which costs nothing at run time.

Clip search: the range of every group is cut where that lowers the product's error, by factors 1, 0.95, ..., 0.55.

Both recipes find the scale by `race`: most ratios are seen to be worse after a part of the calibration tokens.

The recipe "paper" is the published one; "clip", the default, differs (docs/results/awq.md has the figures):
  - The paper cuts both ends of a range by one factor, one group at a time. Here each end has its own factor, as the
    quantizer is asymmetric, and a group is given what the other groups of its column leave.
  - Scaling and clipping are searched one after the other in the paper. Here the scale must still win over no scale at
    all once both are clipped.
  - What they leave is refined afterwards (quant/refine.py): steps and integers, which the paper rounds.

Where the output in question is the matrix product itself, its error on all calibration tokens follows from the Gram
matrix of the inputs: sum_t |x_t E|^2 = trace(E' (X' X) E). So nothing needs to be sampled there.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.quant.race import race
from fmfl_jax.quant.rtn import (
    check_bits,
    group_ranges,
    group_rows,
    round_groups,
    round_weight,
    round_within,
    ungroup_rows,
)

METHODS = ("awq", "gptq", "rtn")
RECIPES = ("clip", "paper")
NUM_RATIOS = 20  # the paper's grid of r
NUM_SWEEPS = 3
_MIN_RACING_COLUMNS, _MAX_RACING_PASSES = 64, 8
_COLUMNS_ON_CPU = 512


def _clip_ratio(place):
    """The ratio at a place, 0 to 9, of the paper's grid."""
    return 1.0 - place / 20


CLIP_RATIOS = tuple(map(_clip_ratio, range(10)))  # here for each end of the range


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights are quantized.

    method: one of METHODS: "rtn" is round to nearest, "gptq" that of quant/gptq.py. bits: 4 or 3. group_size -1: one
    group, None: 128 or less, as the model's dimensions allow (`models.quantize.with_group_size`). recipe: AWQ's,
    "clip" (ours) or "paper" (as published).
    """

    method: str = "awq"
    bits: int = 4
    group_size: int | None = 128
    recipe: str = "clip"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"quantization method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        check_bits(self.bits, -1 if self.group_size is None else self.group_size)

    @property
    def needs_text(self) -> bool:
        """Whether the method is calibrated."""
        return self.method != "rtn"

    @property
    def known_group_size(self) -> int:
        """group_size, where `models.quantize.with_group_size` has been at it. Raises ValueError for None."""
        if self.group_size is None:
            raise ValueError("the group size is not known yet: see models.quantize.with_group_size")
        return self.group_size


class OutputLoss(NamedTuple):
    """What a weight [K, N] in a matrix's place does to a module's output.

    of: (weight float32 [K, N], number of the pass) -> float32 [n], squared errors of the pass's tokens or columns.
    """

    of: Callable
    num_passes: int


def channel_scale(x_mean, ratio):
    """s float32 [K] of x_mean = mean|x| float32 [K] and ratio r: x_mean^r, at least 1e-4, centred on 1."""
    s = jnp.maximum(x_mean**ratio, 1e-4)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


def search_scale(weight, x_mean, output_loss: OutputLoss, quant: QuantConfig):
    """The channel scale s float32 [K] under which rounding hurts the module's output least (`race`).

    Args:
      weight: float32 [K, N].
      x_mean: float32 [K], mean |x| over the calibration tokens.
    """

    def scale(candidate):
        return channel_scale(x_mean, candidate.astype(jnp.float32) / NUM_RATIOS)

    def loss(candidate, i):
        s = scale(candidate)[:, None]
        rounded = round_weight(weight * s, bits=quant.bits, group_size=quant.known_group_size) / s
        return output_loss.of(rounded, i)

    return scale(race(loss, NUM_RATIOS, output_loss.num_passes))


def product_loss(weight, gram) -> OutputLoss:
    """Of the product itself: a column's squared error over all tokens, by gram = X' X float32 [K, K].

    Its passes are parts of the columns.
    """
    n = weight.shape[1]
    most = min(_MAX_RACING_PASSES, max(n // _MIN_RACING_COLUMNS, 1))
    num_passes = max(passes for passes in range(1, most + 1) if n % passes == 0)
    width = n // num_passes

    def of(rounded, i):
        e = jax.lax.dynamic_slice_in_dim(rounded - weight, i * width, width, axis=1)
        return jnp.sum(e * jnp.dot(gram, e, precision="highest"), axis=0)

    return OutputLoss(of, num_passes)


def search_clip(weight, gram, quant: QuantConfig):
    """weight float32 [K, N] with the range of every group cut to where the product's error is small.

    gram: X' X float32 [K, K] of the inputs. The groups of a column are gone through NUM_SWEEPS times, each given what
    the others' rounding leaves: with e the rounding error of a column and e_g that of its group g,

        |X e|^2 = e_g' G_gg e_g + 2 e_g' (G e - G_gg e_g)_g + what does not depend on e_g.

    The first sweep tries every other ratio for both ends of a range, 25 pairs, the others those within two of what is
    there. Columns are independent of each other. On a CPU 512 are searched at a time: their errors stay in a core's
    cache.
    """
    return in_column_parts(lambda part: _clip_columns(part, gram, quant), weight)


def in_column_parts(function: Callable, *arrays):
    """function(arrays [K, N] ...) -> arrays [..., N], of one that treats columns alike; 512 at a time on a CPU."""
    n = arrays[0].shape[1]
    passes = -(-n // _COLUMNS_ON_CPU) if jax.default_backend() == "cpu" else 1
    width = -(-n // passes)

    def cut(x):
        return jnp.pad(x, ((0, 0), (0, passes * width - n))).reshape(len(x), passes, width).swapaxes(0, 1)

    found = jax.lax.map(lambda parts: function(*parts), tuple(map(cut, arrays)))  # [passes, ..., width]
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], passes * width)[:, :n], found)


def pairs(values):
    """float32 [n^2, 2, 1]: every pair of the n values, for the two ends of a range."""
    values = jnp.asarray(values, jnp.float32)
    return jnp.stack([x.ravel() for x in jnp.meshgrid(values, values)], axis=1)[..., None]


def _clip_columns(weight, gram, quant: QuantConfig):
    """As `search_clip`, all columns side by side."""
    w = group_rows(weight, quant.known_group_size)  # [G, g, N]
    groups, size, columns = w.shape
    pad = groups * size - gram.shape[0]
    gram = jnp.pad(gram, ((0, pad), (0, pad))).reshape(groups, size, groups * size)  # [G, g, G g]
    whole = jnp.concatenate(group_ranges(w), axis=1)  # [G, 2, N]
    first, nearby = pairs(range(0, len(CLIP_RATIOS), 2)), pairs(range(-2, 3))
    steps = jnp.stack([first] + [nearby] * (NUM_SWEEPS - 1))  # along CLIP_RATIOS

    def one_sweep(carry, steps):
        def one_group(carry, g):
            error, places = carry  # [G, g, N]; [G, 2, N], where in CLIP_RATIOS the cuts are
            own = jax.lax.dynamic_slice_in_dim(gram[g], g * size, size, axis=1)  # [g, g]
            full = jnp.dot(gram[g], error.reshape(groups * size, columns), precision="highest")  # [g, N]
            others = full - jnp.dot(own, error[g], precision="highest")

            def place(step):
                return jnp.clip(places[g] + step, 0.0, len(CLIP_RATIOS) - 1.0)

            def limits(step):
                return whole[g] * _clip_ratio(place(step))

            step = best_cut(w[g], own, others, limits, steps, quant.bits)
            best = limits(step)
            e = round_within(w[g], best[:1], best[1:], quant.bits) - w[g]
            return (error.at[g].set(e), places.at[g].set(place(step))), None

        return jax.lax.scan(one_group, carry, jnp.arange(groups, dtype=jnp.int32))

    start = (round_groups(w, quant.bits) - w, jnp.zeros_like(whole))
    (_, places), _ = jax.lax.scan(one_sweep, start, steps)
    limits = whole * _clip_ratio(places)
    return ungroup_rows(jnp.clip(w, limits[:, :1], limits[:, 1:]), weight.shape[0])


def search_symmetric_clip(weight, samples, quant: QuantConfig):
    """The paper's clip search: weight float32 [K, N] with every group cut to -m .. m, m being the group's max |w| times
    the ratio of CLIP_RATIOS under which the group's part of the product has the smallest squared error.

    samples: float32 [S, K] inputs.
    """
    w, x = (
        group_rows(weight, quant.known_group_size),
        group_rows(samples.T, quant.known_group_size),
    )  # [G, g, N], [G, g, S]

    def one_group(group):
        w, x = group
        low, high = group_ranges(w[None])
        low, high, largest = low[0, 0], high[0, 0], jnp.max(jnp.abs(w), axis=0)  # [N]

        def limits(ratio):
            return jnp.stack([jnp.maximum(low, -largest * ratio), jnp.minimum(high, largest * ratio)])

        gram, ratios = jnp.dot(x, x.T, precision="highest"), jnp.asarray(CLIP_RATIOS, jnp.float32)[:, None]
        best = limits(best_cut(w, gram, jnp.zeros_like(w), limits, ratios, quant.bits))
        return jnp.clip(w, best[:1], best[1:])

    return ungroup_rows(jax.lax.map(one_group, (w, x)), weight.shape[0])


def best_cut(w, gram, others, limits: Callable, cuts, bits: int):
    """[..., N]: of the cuts [C, ..., 1], for every column, that with the least e' gram e + 2 e' others.

    e is the rounding error of the group w [g, N] within the limits; gram [g, g], others [g, N], limits(cut) [2, N].
    """
    linear = 2.0 * others

    def one_cut(best, cut):
        new = limits(cut)
        e = round_within(w, new[:1], new[1:], bits) - w
        loss = jnp.sum(e * (jnp.dot(gram, e, precision="highest") + linear), axis=0)  # [N]
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, cut, best[1])), None

    columns = w.shape[1]
    start = (jnp.full(columns, jnp.inf), jnp.broadcast_to(cuts[0], (*cuts.shape[1:-1], columns)))
    return jax.lax.scan(one_cut, start, cuts)[0][1]


def search_scale_and_clip(weight, x_mean, gram, output_loss: OutputLoss, quant: QuantConfig):
    """The scale of `search_scale`, or ones where clipping makes up for more than scaling does, and the weight clipped.

    Scaling is searched without clipping, as in the paper; the two then compete, both clipped, on the module's output.
    Arguments as in `search_scale` and `search_clip`.

    Returns:
      (s float32 [K], weight float32 [K, N] with the groups of diag(s) weight clipped, not multiplied by s).
    """

    def clipped(s):
        w = search_clip(weight * s[:, None], gram / (s[:, None] * s[None]), quant)
        rounded = round_weight(w, bits=quant.bits, group_size=quant.known_group_size)
        return rounded / s[:, None], w / s[:, None]

    s = search_scale(weight, x_mean, output_loss, quant)
    candidates = jnp.stack([s, jnp.ones_like(s)])
    rounded, weights = jax.lax.map(clipped, candidates)
    best = race(lambda c, i: output_loss.of(rounded[c], i), 2, output_loss.num_passes)
    return candidates[best], weights[best]
