"""Rounding with error compensation (GPTQ; Frantar et al., ICLR 2023, arXiv 2210.17323), for one weight matrix.

Rows (input channels) are rounded one after the other, and the rows that are still free make up for what that does to
the product with the calibration inputs. With G = X' X of the inputs and U upper triangular, U' U = G^-1:

    e_k = (w_k - rounded w_k) / U_kk;    w_j -= U_kj e_k   for all rows j after k

A group's range is found when the group begins, on its rows as they are by then: both ends are cut as `awq.search_clip`
does it, by the cost e' (U_gg' U_gg)^-1 e of the group's rounding error e when all rows after the group are free, U_gg
being the group's block of U. (The authors take the whole range.)

The authors' order by activation size would scatter a group's rows. Here whole groups are ordered by it, and the rows
within each, so that a group stays a run of consecutive rows, as the published formats have it. What comes out
is refined (quant/refine.py), which the authors do not do: 4 to 8 % less error (docs/results/awq.md).
"""

import jax
import jax.numpy as jnp

from fmfl_jax.quant.awq import CLIP_RATIOS, best_cut, in_column_parts, pairs
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.refine import SWEEPS_AFTER_GPTQ, damped, pack_refined
from fmfl_jax.quant.rtn import check_bits, group_ranges, group_rows, step_and_zero


def pack_compensated(weight, gram, *, bits: int, group_size: int) -> Int4Weight:
    """weight float32 [K, N] rounded as `compensated_integers` does it, and refined (quant/refine.py).

    Raises ValueError for bits or group_size out of range.
    """
    check_bits(bits, group_size)
    q, s, z = compensated_integers(weight, gram, bits=bits, group_size=group_size)
    return pack_refined(weight, gram, q, s, z, bits=bits, group_size=group_size, num_sweeps=SWEEPS_AFTER_GPTQ)


def compensated_integers(weight, gram, *, bits: int, group_size: int):
    """The integers q [K, N], steps s float16 [G, N] and zero points z [G, N] (q and z as float32) of a weight.

    Args:
      weight: float32 [K, N].
      gram: float32 [K, K], X' X of the inputs.
    """
    k = weight.shape[0]
    size = k if group_size == -1 else group_size
    rows = group_rows(weight, size).reshape(-1, weight.shape[1])  # [G g, N]
    order = _order(jnp.diagonal(gram), size)
    place = jnp.argsort(order)  # of a row in that order
    group_place = place[::size] // size
    factor = _inverse_factor(damped(gram, len(rows))[order][:, order])
    q, s, z = in_column_parts(lambda part: _round_groups(part, factor, bits, size), rows[order])
    return q[place[:k]], s[group_place], z[group_place]


def _order(power, size: int):
    """int32 [G g]: the groups by the mean of power [K], largest first, and the rows of each likewise."""
    grouped = group_rows(power, size)  # [G, g]
    groups = jnp.argsort(-jnp.mean(grouped, axis=1))
    rows = jnp.argsort(-grouped, axis=1)[groups]  # [G, g], within a group
    return (groups[:, None] * size + rows).ravel()


def _inverse_factor(gram):
    """U upper triangular with U' U = gram^-1, [K, K]."""
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram), True), identity)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def _round_groups(w, factor, bits: int, size: int):
    """w float32 [G g, N], rows in the order of rounding -> q [G g, N], s float16 and z [G, N]."""
    total, n = w.shape
    row = jnp.arange(total, dtype=jnp.int32)

    def one_group(w, start):
        block = jax.lax.dynamic_slice_in_dim(factor, start, size)  # [g, G g]
        own = jax.lax.dynamic_slice_in_dim(block, start, size, axis=1)  # [g, g]
        group = jax.lax.dynamic_slice_in_dim(w, start, size)  # [g, N]
        low, high = _best_range(group, own, bits)
        s, z = step_and_zero(low, high, bits)
        q, error = _round_rows(group, own, s.astype(jnp.float32), z, float(2**bits - 1))
        after = jnp.where(row[None] >= start + size, block, 0.0)
        return w - jnp.dot(after.T, error, precision="highest"), (q, s, z)

    _, (q, s, z) = jax.lax.scan(one_group, w, row[::size])
    return q.reshape(total, n), s, z


def _best_range(group, own, bits: int):
    """The ends [2, N] of the range of a group [g, N]; own: U_gg [g, g]."""
    whole = jnp.concatenate(group_ranges(group[None]), axis=1)[0]  # [2, N]
    inverse = jax.scipy.linalg.solve_triangular(own, jnp.eye(len(own), dtype=own.dtype))
    cost = jnp.dot(inverse, inverse.T, precision="highest")
    cuts = pairs(CLIP_RATIOS)
    return whole * best_cut(group, cost, jnp.zeros_like(group), lambda cut: whole * cut, cuts, bits)


def _round_rows(group, own, s, z, top: float):
    """The rows of a group [g, N] rounded in turn by s and z [N] -> q and the errors e [g, N]; own: U_gg [g, g]."""
    row = jnp.arange(len(own), dtype=jnp.int32)

    def one_row(group, i):
        q = jnp.clip(jnp.round(group[i] / s) + z, 0.0, top)
        error = (group[i] - (q - z) * s) / own[i, i]
        after = jnp.where(row > i, own[i], 0.0)
        return group - after[:, None] * error[None], (q, error)

    return jax.lax.scan(one_row, group, row)[1]
