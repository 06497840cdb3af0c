"""Robust means of many updates: the functions on (updates [C, ...], weights [C]) behind the aggregators of robust.py.

Coordinate-wise median and trimmed mean: Yin et al., ICML 2018. Krum and multi-Krum: Blanchard et al., NeurIPS 2017.
Geometric median: RFA, Pillutla et al., IEEE TSP 2022. FLTrust: Cao et al., NDSS 2021.

    median   med_c m_c[j]                         trimmed   mean of m_c[j] without the k lowest and k highest
    Krum     argmin_i sum_{j near i} |m_i - m_j|^2
    RFA      argmin_v sum_c w_c |v - m_c|
    FLTrust  sum_c t_c m_c |r| / |m_c| / sum_c t_c,   t_c = relu(cos(m_c, r))

An update is a pytree; norms, distances and cosines are of the whole of it, all leaves joined. Below, p is the number of
clients that are present (weight > 0): it may change from round to round without a new compilation. What stands in the
rows of absent clients changes nothing, not even if it is NaN. An empty cohort gives zeros. Arithmetic is float32, the
result has the updates' dtypes.
"""

import math

import jax
import jax.numpy as jnp

from fmfl_jax.fed.shares import nearest_count


def coordinate_median(updates, weights):
    """The median of every coordinate over the present clients, each of which counts the same.

    updates: pytree [C, ...]. weights: float32 [C], of which only the sign matters. Returns a pytree [...].
    Of an even number it is the mean of the middle two. Breaks down when half of the present clients are malicious.
    """
    present = weights > 0
    num_present = jnp.sum(present.astype(jnp.int32))
    low, high = jnp.maximum(num_present - 1, 0) // 2, num_present // 2

    def one(rows):  # [C, n] -> [n]
        ordered = _sorted_present(rows, present)
        middle = 0.5 * jnp.take(ordered, low, axis=0) + 0.5 * jnp.take(ordered, high, axis=0)
        return jnp.where(num_present > 0, middle, 0.0)

    return shaped([one(rows) for rows in rows_of(updates, present)], updates)


def trimmed_mean(updates, weights, fraction: float):
    """The mean of every coordinate without the k lowest and as many highest of the present clients.

    k is the whole number nearest to fraction p (fed/shares.py), but one client always stays: k < p / 2.

    updates: pytree [C, ...]. weights: float32 [C], of which only the sign matters. Returns a pytree [...].
    Breaks down when more than k are malicious. Raises ValueError for a fraction outside [0, 1/2).
    """
    if not 0.0 <= fraction < 0.5:
        raise ValueError(f"the trimmed fraction must be in [0, 0.5), got {fraction}")
    present = weights > 0
    num_present = jnp.sum(present.astype(jnp.int32))
    trimmed_each_side = trimmed_of_present(fraction, weights)
    rank = jnp.arange(weights.shape[0], dtype=jnp.int32)
    kept = (rank >= trimmed_each_side) & (rank < num_present - trimmed_each_side)
    share = kept.astype(jnp.float32) / jnp.maximum(num_present - 2 * trimmed_each_side, 1).astype(jnp.float32)

    def one(rows):
        ordered = jnp.where(kept[:, None], _sorted_present(rows, present), 0.0)  # absent rows are infinite
        return jnp.sum(share[:, None] * ordered, axis=0)

    return shaped([one(rows) for rows in rows_of(updates, present)], updates)


def num_trimmed(fraction: float, num_present: int) -> int:
    """k of `trimmed_mean`: the nearest whole number, fewer than half."""
    return min(nearest_count(fraction, num_present), max(num_present - 1, 0) // 2)


def squared_distances(updates, weights):
    """Squared Euclidean distances between whole updates: float32 [C, C], infinite on the diagonal and to the absent.

    From |a|^2 + |b|^2 - 2 a.b, added up leaf by leaf, so that nothing of [C, C, n] is ever held. What all updates have
    in common would cancel badly in that sum, so the coordinate-wise median is taken off first. (Not the mean: one huge
    update would move it far from all others.) An overflow counts as infinitely far.
    """
    present = weights > 0
    centre = jax.tree.leaves(coordinate_median(updates, weights))
    gram = jnp.zeros((weights.shape[0],) * 2, jnp.float32)
    for rows, middle in zip(rows_of(updates, present), centre):
        rows = rows - middle.reshape(1, -1).astype(jnp.float32)
        rows = jnp.where(present[:, None], rows, 0.0)
        gram += jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.diagonal(gram)
    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)
    apart = present[:, None] & present[None, :] & ~jnp.eye(weights.shape[0], dtype=bool)
    return jnp.where(apart & ~jnp.isnan(distances), distances, jnp.inf)


def krum_choice(updates, weights, num_malicious, num_kept=None):
    """Who is kept by multi-Krum: bool [C].

    A client's score is the sum of its squared distances to the p - f - 2 nearest others; the num_kept lowest are kept.
    The guarantee of Blanchard et al. needs p >= 2 f + 3. Below that the rule still answers: at least one neighbour is
    counted and at least one client kept. Ties of the score, which one neighbour always gives, go to the client that is
    nearer to all others, so that the order of the clients does not decide.

    updates: pytree [C, ...]. weights: float32 [C], of which only the sign matters. num_malicious: f, an int32 scalar.
    num_kept: int32 scalar; None is p - f.
    """
    present = weights > 0
    num_present = jnp.sum(present.astype(jnp.int32))
    distances = squared_distances(updates, weights)
    rank = jnp.arange(weights.shape[0], dtype=jnp.int32)
    num_near = jnp.maximum(num_present - num_malicious - 2, 1)
    score = jnp.sum(jnp.where(rank[None, :] < num_near, jnp.sort(distances, axis=1), 0.0), axis=1)
    others = present[:, None] & present[None, :] & (rank[:, None] != rank[None, :])
    total = jnp.sum(jnp.where(others, distances, 0.0), axis=1)
    order = jnp.lexsort((total, score, ~present))  # by the last key first
    place = jnp.zeros_like(rank).at[order].set(rank)
    num_kept = jnp.maximum(num_present - num_malicious if num_kept is None else num_kept, 1)
    return present & (place < num_kept)


def weiszfeld(updates, weights, *, max_iterations: int, smoothing: float, tolerance: float):
    """The geometric median by the smoothed Weiszfeld iteration: (pytree [...], shares float32 [C], iterations int32).

    b_c = w_c / max(smoothing, |v - m_c|),  v = sum_c b_c m_c / sum_c b_c, from the coordinate-wise median, until a step
    is shorter than `tolerance` times the weighted mean distance. shares: b_c / sum_c b_c of the last step.

    updates: pytree [C, ...]. weights: float32 [C], the data sizes.
    """
    present = weights > 0
    rows = rows_of(updates, present)
    weights = shares_of(jnp.where(present, weights, 0.0))

    def distances(points):  # [n] each -> [C]; an overflow is infinitely far and has no share
        return jnp.sqrt(sum(jnp.sum(jnp.square(x - v[None, :]), axis=1) for x, v in zip(rows, points)))

    def step(carry):
        count, points, *_ = carry
        away = distances(points)
        shares = shares_of(weights / jnp.maximum(away, smoothing))
        new = weighted_rows(rows, shares)
        moved = jnp.sqrt(sum(jnp.sum(jnp.square(a - b)) for a, b in zip(new, points)))
        spread = jnp.sum(jnp.where(present & jnp.isfinite(away), weights * away, 0.0))
        return count + 1, new, shares, moved > tolerance * spread

    def unfinished(carry):
        count, _, _, moving = carry
        return moving & (count < max_iterations)

    start = [x.reshape(-1).astype(jnp.float32) for x in jax.tree.leaves(coordinate_median(updates, weights))]
    count, points, shares, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), start, weights, jnp.bool_(True)))
    return shaped(points, updates), shares, count


def trust_scores(updates, weights, reference):
    """relu(cos(update, reference)): float32 [C], 0 for the absent and for updates or a reference of zeros.

    A reference that is not finite trusts nobody.
    """
    units, _ = unit_rows(rows_of(updates, weights > 0))
    directions, _ = unit_rows(one_row(reference))
    cosine = sum(jnp.sum(unit * direction, axis=1) for unit, direction in zip(units, directions))
    return jnp.where(cosine > 0, cosine, 0.0)


def trusted_mean(updates, trust, reference):
    """sum_c trust_c m_c |reference| / |m_c| / sum_c trust_c: pytree [...]; zeros where nobody is trusted.

    updates: pytree [C, ...]. trust: float32 [C], of `trust_scores`. reference: pytree [...].
    """
    units, _ = unit_rows(rows_of(updates, trust > 0))
    _, length = unit_rows(one_row(reference))
    length = jnp.where(jnp.any(trust > 0), length[0], 0.0)
    return shaped([length * x for x in weighted_rows(units, shares_of(trust))], updates)


def trimmed_of_present(fraction: float, weights):
    """int32 scalar: `num_trimmed` of the present clients."""
    table = [num_trimmed(fraction, p) for p in range(weights.shape[0] + 1)]
    return jnp.asarray(table, jnp.int32)[jnp.sum((weights > 0).astype(jnp.int32))]


def rows_of(updates, present) -> list:
    """The leaves as float32 [C, n], with the rows of absent clients 0."""
    flat = [x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in jax.tree.leaves(updates)]
    return [jnp.where(present[:, None], x, jnp.zeros_like(x)).astype(jnp.float32) for x in flat]


def one_row(update) -> list:
    """One update as `rows_of` of a single client."""
    return rows_of(jax.tree.map(lambda x: x[None], update), jnp.ones(1, bool))


def shaped(flat: list, updates):
    """Vectors [n] to the tree of one update, in the updates' shapes and dtypes."""
    leaves, structure = jax.tree.flatten(updates)
    return jax.tree.unflatten(structure, [x.reshape(y.shape[1:]).astype(y.dtype) for x, y in zip(flat, leaves)])


def _sorted_present(rows, present):
    """[C, n], each column in ascending order, the absent last and infinite."""
    return jnp.sort(jnp.where(present[:, None], rows, jnp.inf), axis=0)


def shares_of(values):
    """values / their sum; zeros where that is 0."""
    total = jnp.sum(values)
    return values / jnp.where(total > 0, total, 1.0)


def weighted_rows(rows: list, shares) -> list:
    """sum_c shares_c row_c of every leaf: [C, n] -> [n]."""
    return [jnp.sum(shares[:, None] * x, axis=0) for x in rows]


def unit_rows(rows: list):
    """Rows divided by their norm over all leaves, and the norms [C]. Zero rows stay zero.

    The largest value goes first, so that the square of a huge or tiny update neither overflows nor vanishes.
    """
    peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x), axis=1, initial=0.0) for x in rows]), axis=0)
    safe = jnp.where(peak > 0, peak, 1.0)[:, None]
    rows = [x / safe for x in rows]
    length = jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=1) for x in rows))
    return [x / jnp.where(length > 0, length, 1.0)[:, None] for x in rows], length * peak
