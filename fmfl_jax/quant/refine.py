"""Lowers the error of a rounded weight's product within its format: least squares for the steps and coordinate descent
over the integers (QuantEase; Behdin et al., arXiv 2309.01885), in turn.

With G = X' X of the inputs, E = rounded - weight and every other number fixed, both minimize trace(E' G E) exactly:

    steps of a column n:   A s = b,  A_gh = u_g' G_gh u_h,  b_g = u_g' (G w)_g     (u = q - z, of groups g and h)
    integer of a row k:    w_k - (G E)_k / G_kk + E_k, in units of s, rounded

Zero points stay. Columns are independent of each other.
"""

import jax
import jax.numpy as jnp

from fmfl_jax.quant.awq import in_column_parts
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.rtn import SCALE_DTYPE, group_rows, quantize_groups, ungroup_rows

SWEEPS_AFTER_GPTQ = 2
SWEEPS_AFTER_AWQ = 4  # plain rounding is further from the least error: the last two take off another 2 to 4 %
DAMPING = 0.01  # of the mean of G's diagonal, added to it: GPTQ's authors'
_KEPT = 1e-6  # of A's diagonal: how much a step that the inputs do not decide is drawn to what it was


def pack_clipped(weight, clipped, gram, *, bits: int, group_size: int) -> Int4Weight:
    """weight [K, N] in the integers, steps and zero points of `clipped` [K, N], as AWQ left it, refined. As
    `pack_refined`."""
    q, z, s = quantize_groups(group_rows(clipped, group_size), bits)
    start = ungroup_rows(q, len(weight)), s[:, 0], z[:, 0]
    return pack_refined(weight, gram, *start, bits=bits, group_size=group_size, num_sweeps=SWEEPS_AFTER_AWQ)


def pack_refined(weight, gram, q, s, z, *, bits: int, group_size: int, num_sweeps: int) -> Int4Weight:
    """The weight float32 [K, N] refined from q float32 [K, N], s float16 and z float32 [G, N].

    gram: float32 [K, K], X' X of the inputs.
    """
    k = weight.shape[0]
    padded = group_rows(weight, group_size).reshape(-1, weight.shape[1])  # [G g, N], as a whole last group has it
    q = jnp.concatenate([q, jnp.repeat(z, len(padded) // len(z), axis=0)[k:]])
    q, s = refine(padded, damped(gram, len(padded)), q, s, z, bits=bits, num_sweeps=num_sweeps)
    return Int4Weight.pack(q[:k].astype(jnp.uint8), s, z.astype(jnp.uint8), group_size=group_size)


def damped(gram, rows: int):
    """gram [K, K] with DAMPING on its diagonal, and zeros but for that up to [rows, rows]."""
    damping = DAMPING * jnp.mean(jnp.diagonal(gram))
    return jnp.pad(gram, ((0, rows - len(gram)),) * 2) + damping * jnp.eye(rows, dtype=gram.dtype)


def refine(weight, gram, q, s, z, *, bits: int, num_sweeps: int):
    """The integers and steps after num_sweeps sweeps, least squares before, between and after them.

    Args:
      weight: float32 [K, N], K = G g.
      gram: float32 [K, K], positive definite.
      q, s, z: float32 [K, N], float16 [G, N] and float32 [G, N], as `gptq.compensated_integers` gives them.

    Returns:
      (q float32 [K, N], s float16 [G, N]).
    """

    def columns(w, q, s, z):
        def sweep(_, found):
            q, s = found
            q = descend(w, gram, q, s, z, bits)
            return q, least_squares_steps(w, gram, q, s, z)

        return jax.lax.fori_loop(0, num_sweeps, sweep, (q, least_squares_steps(w, gram, q, s, z)))

    return in_column_parts(columns, weight, q, s, z)


def least_squares_steps(w, gram, q, s, z):
    """The steps float16 [G, N] with the least error; one that would not be positive stays as it was. As `refine`."""
    groups = len(s)
    size = len(w) // groups
    u = q - jnp.repeat(z, size, axis=0)  # [K, N]
    per_group = lambda x: jnp.sum(group_rows(u * x, size), axis=1)  # [G, N]

    def of_group(g):
        inner = jax.lax.dynamic_slice_in_dim(gram, g * size, size, axis=1)  # [K, g]
        own = jax.lax.dynamic_slice_in_dim(u, g * size, size)  # [g, N]
        return per_group(jnp.dot(inner, own, precision="highest"))

    a = jax.lax.map(of_group, jnp.arange(groups, dtype=jnp.int32)).transpose(2, 0, 1)  # [N, G, G]
    b = per_group(jnp.dot(gram, w, precision="highest")).T  # [N, G]
    diagonal = jnp.diagonal(a, axis1=1, axis2=2)
    kept = jnp.where(diagonal > 0, _KEPT * diagonal, 1.0)  # a group without a weight keeps its step
    a = a + kept[:, :, None] * jnp.eye(groups)[None]
    b = b + kept * s.T.astype(jnp.float32)
    found = jnp.linalg.solve(a, b[..., None])[..., 0].T.astype(SCALE_DTYPE)
    return jnp.where((found > 0) & jnp.isfinite(found), found, s)


def descend(w, gram, q, s, z, bits: int):
    """The integers float32 [K, N] after one sweep over the rows, each set to its best given the others. As `refine`."""
    k, groups = w.shape[0], s.shape[0]
    size, top = k // groups, float(2**bits - 1)
    s = s.astype(jnp.float32)
    error = (q - jnp.repeat(z, size, axis=0)) * jnp.repeat(s, size, axis=0) - w

    def one_group(state, g):
        start = g * size
        rows = jax.lax.dynamic_slice_in_dim(gram, start, size)  # [g, K]
        own = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)  # [g, g]
        weights = jax.lax.dynamic_slice_in_dim(w, start, size)  # [g, N]
        pull = jnp.dot(rows, state[1], precision="highest")  # [g, N], of all errors

        def one_row(state, i):
            pull, q, e = state
            best = weights[i] + e[i] - pull[i] / own[i, i]
            new_q = jnp.clip(jnp.round(best / s[g]) + z[g], 0.0, top)
            new_e = (new_q - z[g]) * s[g] - weights[i]
            pull = pull + own[i][:, None] * (new_e - e[i])[None]
            return (pull, q.at[i].set(new_q), e.at[i].set(new_e)), None

        inner = (pull, *(jax.lax.dynamic_slice_in_dim(x, start, size) for x in state))
        (_, *new), _ = jax.lax.scan(one_row, inner, jnp.arange(size, dtype=jnp.int32))
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, part, start, 0) for x, part in zip(state, new)), None

    (q, _), _ = jax.lax.scan(one_group, (q, error), jnp.arange(groups, dtype=jnp.int32))
    return q
