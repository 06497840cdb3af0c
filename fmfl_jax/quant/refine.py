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
    size = len(weight) // len(s)

    def columns(w, q, s, z):
        target = group_rows(jnp.dot(gram, w, precision="highest"), size)  # G w, [G, g, N]
        bounds = -z, float(2**bits - 1) - z

        def sweep(i, found):
            u, s = found
            u, a = _descend(gram, target, u, s.astype(jnp.float32), bounds, descends=i > 0)
            return u, _least_squares_steps(a, _sum((u * target).swapaxes(0, 1)), s)

        u, s = jax.lax.fori_loop(0, num_sweeps + 1, sweep, (group_rows(q, size) - z[:, None], s))
        return (u + z[:, None]).reshape(q.shape), s

    return in_column_parts(columns, weight, q, s, z)


def _descend(gram, target, u, s, bounds, *, descends):
    """A sweep over the rows, each integer set to its best given the others, and what least squares then needs.

    A group's products G_gh u_h with the groups before it, which are done, serve both.

    Args:
      gram: float32 [K, K], K = G g. target: float32 [G, g, N], G w.
      u: float32 [G, g, N], q - z, within the bounds (low, high), float32 [G, N] each. s: float32 [G, N].
      descends: bool scalar; False leaves u as it is.

    Returns:
      (u, a float32 [G, G, N], whose a[g, h] is u_g' G_gh u_h for h <= g and means nothing for h > g).
    """
    groups, size, _ = u.shape

    def one_group(u, g):
        rows = jax.lax.dynamic_slice_in_dim(gram, g * size, size).reshape(size, groups, size).swapaxes(0, 1)
        products = jnp.matmul(rows, u, precision="highest")  # [G, g, N], G_gh u_h
        pull = _sum(products * s[:, None]) - target[g]  # (G E)_g
        own = rows[g]
        low, high = (bound[g] for bound in bounds)
        new = jax.lax.cond(descends, lambda: _descend_rows(own, pull, u[g], s[g], low, high), lambda: u[g])
        a = _sum((products * new[None]).swapaxes(0, 1))  # [G, N]
        a = a.at[g].set(_sum(new * jnp.dot(own, new, precision="highest")))
        return u.at[g].set(new), a

    return jax.lax.scan(one_group, u, jnp.arange(groups, dtype=jnp.int32))


def _descend_rows(own, pull, u, s, low, high):
    """u [g, N] of a group, one row after the other. own: G_gg [g, g]; pull: (G E)_g [g, N]; s, low, high: [N]."""

    def one_row(change, i):
        left = pull[i] + jnp.dot(own[i], change, precision="highest")
        new = jnp.clip(jnp.round(u[i] - left / (own[i, i] * s)), low, high)
        return change.at[i].set((new - u[i]) * s), new

    return jax.lax.scan(one_row, jnp.zeros_like(u), jnp.arange(len(u), dtype=jnp.int32))[1]


def _sum(x):
    """Over the first axis, by halves: on a CPU XLA's own sum there (a YNN fusion in jax 0.11) takes several times as
    long."""
    half = len(x) // 2
    if half == 0:
        return x[0]
    total = _sum(x[:half] + x[half : 2 * half])
    return total + x[-1] if len(x) % 2 else total


def _least_squares_steps(a, b, s):
    """The steps float16 [G, N] with the least error; one that would not be positive stays as it was.

    a: float32 [G, G, N], of which a[g, h] with h <= g is read; b: float32 [G, N]; s: float16 [G, N].
    """
    place = jnp.arange(len(s), dtype=jnp.int32)
    a = jnp.where((place[None] <= place[:, None])[..., None], a, a.swapaxes(0, 1))
    diagonal = a[place, place]
    kept = jnp.where(diagonal > 0, _KEPT * diagonal, 1.0)  # a group without a weight keeps its step
    a = a.at[place, place].add(kept)
    b = b + kept * s.astype(jnp.float32)

    factor = jnp.linalg.cholesky(a.transpose(2, 0, 1), symmetrize_input=False), True  # [N, G, G]
    found = jax.scipy.linalg.cho_solve(factor, b.T[..., None])[..., 0].T.astype(SCALE_DTYPE)
    return jnp.where((found > 0) & jnp.isfinite(found), found, s)
