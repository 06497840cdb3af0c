"""Robust aggregation: one update of many updates, some of which may be made to do harm.

Coordinate-wise median and trimmed mean: Yin et al., ICML 2018. Krum and multi-Krum: Blanchard et al., NeurIPS 2017.
Geometric median: RFA, Pillutla et al., IEEE TSP 2022. Norm bounding: Sun et al., 2019. FLTrust: Cao et al., NDSS 2021.

    median   med_c m_c[j]                         trimmed   mean of m_c[j] without the k lowest and k highest
    Krum     argmin_i sum_{j near i} |m_i - m_j|^2
    RFA      argmin_v sum_c w_c |v - m_c|          bound     m_c min(1, b / |m_c|)
    FLTrust  sum_c t_c m_c |r| / |m_c| / sum_c t_c,   t_c = relu(cos(m_c, r))

A update is a pytree; norms, distances and cosines are of the whole of it, all leaves joined. Below, p is the number of
clients that are present (weight > 0): it may change from round to round without a new compilation. What stands in the
rows of absent clients changes nothing, not even if it is NaN. An empty cohort gives zeros. Arithmetic is float32, the
result has the updates' dtypes. The functions on (updates [C, ...], weights [C]) come first, the `Aggregator`s after.
"""

import math

import jax
import jax.numpy as jnp

from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates
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

    return _shaped([one(rows) for rows in _rows(updates, present)], updates)


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
    trimmed_each_side = _trimmed_of_present(fraction, weights)
    rank = jnp.arange(weights.shape[0], dtype=jnp.int32)
    kept = (rank >= trimmed_each_side) & (rank < num_present - trimmed_each_side)
    share = kept.astype(jnp.float32) / jnp.maximum(num_present - 2 * trimmed_each_side, 1).astype(jnp.float32)

    def one(rows):
        ordered = jnp.where(kept[:, None], _sorted_present(rows, present), 0.0)  # absent rows are infinite
        return jnp.sum(share[:, None] * ordered, axis=0)

    return _shaped([one(rows) for rows in _rows(updates, present)], updates)


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
    for rows, middle in zip(_rows(updates, present), centre):
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
    rows = _rows(updates, present)
    weights = _shares(jnp.where(present, weights, 0.0))

    def distances(points):  # [n] each -> [C]; an overflow is infinitely far and has no share
        return jnp.sqrt(sum(jnp.sum(jnp.square(x - v[None, :]), axis=1) for x, v in zip(rows, points)))

    def step(carry):
        count, points, *_ = carry
        away = distances(points)
        shares = _shares(weights / jnp.maximum(away, smoothing))
        new = _weighted_rows(rows, shares)
        moved = jnp.sqrt(sum(jnp.sum(jnp.square(a - b)) for a, b in zip(new, points)))
        spread = jnp.sum(jnp.where(present & jnp.isfinite(away), weights * away, 0.0))
        return count + 1, new, shares, moved > tolerance * spread

    def unfinished(carry):
        count, _, _, moving = carry
        return moving & (count < max_iterations)

    start = [x.reshape(-1).astype(jnp.float32) for x in jax.tree.leaves(coordinate_median(updates, weights))]
    count, points, shares, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), start, weights, jnp.bool_(True)))
    return _shaped(points, updates), shares, count


def trust_scores(updates, weights, reference):
    """relu(cos(update, reference)): float32 [C], 0 for the absent and for updates or a reference of zeros.

    A reference that is not finite trusts nobody.
    """
    units, _ = _unit_rows(_rows(updates, weights > 0))
    directions, _ = _unit_rows(_one_row(reference))
    cosine = sum(jnp.sum(unit * direction, axis=1) for unit, direction in zip(units, directions))
    return jnp.where(cosine > 0, cosine, 0.0)


def trusted_mean(updates, trust, reference):
    """sum_c trust_c m_c |reference| / |m_c| / sum_c trust_c: pytree [...]; zeros where nobody is trusted.

    updates: pytree [C, ...]. trust: float32 [C], of `trust_scores`. reference: pytree [...].
    """
    units, _ = _unit_rows(_rows(updates, trust > 0))
    _, length = _unit_rows(_one_row(reference))
    length = jnp.where(jnp.any(trust > 0), length[0], 0.0)
    return _shaped([length * x for x in _weighted_rows(units, _shares(trust))], updates)


def median() -> Aggregator:
    """Coordinate-wise median; see `coordinate_median`. Data sizes do not count."""

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        return coordinate_median(gathered.updates, gathered.weights), {}

    return Aggregator(aggregate=aggregate)


def trimmed(fraction: float) -> Aggregator:
    """Trimmed mean; see `trimmed_mean`. Data sizes do not count. Raises ValueError for a fraction outside [0, 1/2)."""
    if not 0.0 <= fraction < 0.5:
        raise ValueError(f"the trimmed fraction must be in [0, 0.5), got {fraction}")

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        update = trimmed_mean(gathered.updates, gathered.weights, fraction)
        return update, {"trimmed_clients": _trimmed_of_present(fraction, gathered.weights).astype(jnp.float32)}

    return Aggregator(aggregate=aggregate)


def multi_krum(malicious: float, num_kept: int | None = None) -> Aggregator:
    """The mean of the clients that multi-Krum keeps; see `krum_choice`. Data sizes do not count.

    malicious: f, as a number (>= 1) or as a fraction (< 1) of the present clients, the nearest whole number
    (fed/shares.py). num_kept: None is p - f. Breaks down when more than f are malicious. The metric krum_malicious is
    f, krum_guaranteed is 1 where p >= 2 f + 3, else 0.

    Raises ValueError for a negative number, one >= 1 that is not whole, a fraction of 1/2 or more, num_kept < 1.
    """
    if malicious < 0 or 0.5 <= malicious < 1 or (malicious > 1 and malicious != int(malicious)):
        raise ValueError(f"malicious clients must be a whole number or a fraction below 0.5, got {malicious}")
    if num_kept is not None and num_kept < 1:
        raise ValueError(f"num_kept must be >= 1, got {num_kept}")

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        present = gathered.weights > 0
        num_present = jnp.sum(present.astype(jnp.int32))
        num_malicious = _portion(malicious, gathered.weights.shape[0])[num_present]
        chosen = krum_choice(gathered.updates, gathered.weights, num_malicious, num_kept)
        shares = _shares(chosen.astype(jnp.float32))
        update = _shaped(_weighted_rows(_rows(gathered.updates, present), shares), gathered.updates)
        chosen_share = jnp.sum(chosen.astype(jnp.float32)) / jnp.maximum(num_present, 1).astype(jnp.float32)
        enough = (num_present >= 2 * num_malicious + 3).astype(jnp.float32)
        metrics = {
            "krum_chosen_share": chosen_share,
            "krum_guaranteed": enough,
            "krum_malicious": num_malicious.astype(jnp.float32),
        }
        return update, metrics | _malicious_share(gathered, shares)

    return Aggregator(aggregate=aggregate)


def krum(malicious: float) -> Aggregator:
    """The one update of the lowest score: `multi_krum` with one client kept."""
    return multi_krum(malicious, 1)


def geometric_median(*, max_iterations: int = 50, smoothing: float = 1e-6, tolerance: float = 1e-5) -> Aggregator:
    """Geometric median, weighted by data size; see `weiszfeld`.

    Breaks down when the malicious clients hold half of the weight. smoothing is a length, far below that of an update.
    Raises ValueError where max_iterations < 1, smoothing <= 0 or tolerance < 0.
    """
    if max_iterations < 1 or smoothing <= 0 or tolerance < 0:
        raise ValueError(
            f"expected max_iterations >= 1, smoothing > 0, tolerance >= 0, "
            f"got {max_iterations}, {smoothing}, {tolerance}"
        )

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        update, shares, count = weiszfeld(
            gathered.updates, gathered.weights, max_iterations=max_iterations, smoothing=smoothing, tolerance=tolerance
        )
        return update, {"weiszfeld_iterations": count.astype(jnp.float32)} | _malicious_share(gathered, shares)

    return Aggregator(aggregate=aggregate)


def norm_bound(bound: float) -> Aggregator:
    """Every update is scaled down to a norm of at most `bound`; then comes the mean weighted by data size.

    It streams: updates are never held together. It has no breakdown point: each malicious client still moves the mean
    by its share of `bound`. The metric clipped_share is the weighted share of updates above the bound.

    Raises ValueError where bound <= 0.
    """
    if bound <= 0:
        raise ValueError(f"bound must be > 0, got {bound}")

    def transform_update(update, state):
        del state
        _, norms = _unit_rows(_one_row(update))
        scale = bound / jnp.maximum(norms[0], bound)  # exactly 1 within the bound
        bounded = jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), update)
        return bounded, {"clipped_share": (norms[0] > bound).astype(jnp.float32), "message_norm": norms[0]}

    return Aggregator(transform_update=transform_update)


def fltrust() -> Aggregator:
    """FLTrust: the update on the server's root data says whom to trust; see `trust_scores` and `trusted_mean`.

    Data sizes do not count. There is no breakdown point: a malicious client has influence only as far as it points the
    reference's way, and then at the reference's length, so an attack's scale changes nothing. If nobody points that
    way the update is zero. The reference must be a update of the same kind: the delta of as many local steps.
    """

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        trust = trust_scores(gathered.updates, gathered.weights, gathered.reference)
        update = trusted_mean(gathered.updates, trust, gathered.reference)
        count = jnp.maximum(jnp.sum((gathered.weights > 0).astype(jnp.float32)), 1.0)
        trusted = jnp.sum((trust > 0).astype(jnp.float32))
        metrics = {"trust_mean": jnp.sum(trust) / count, "trusted_share": trusted / count}
        return update, metrics | _malicious_share(gathered, _shares(trust))

    return Aggregator(aggregate=aggregate, needs_reference=True)


def _malicious_share(gathered: GatheredUpdates, shares) -> dict:
    """What part of the update is the malicious clients', where the cohort says who they are."""
    if "malicious" not in gathered.extras:
        return {}
    return {"malicious_share": jnp.sum(jnp.where(gathered.extras["malicious"], shares, 0.0))}


def _portion(amount: float, num_clients: int):
    """int32 [C + 1]: how many of p present clients `amount` is, a number or (below 1) a share of them."""
    counts = [nearest_count(amount, p) if amount < 1 else int(amount) for p in range(num_clients + 1)]
    return jnp.asarray(counts, jnp.int32)


def _trimmed_of_present(fraction: float, weights):
    """int32 scalar: `num_trimmed` of the present clients."""
    table = [num_trimmed(fraction, p) for p in range(weights.shape[0] + 1)]
    return jnp.asarray(table, jnp.int32)[jnp.sum((weights > 0).astype(jnp.int32))]


def _rows(updates, present) -> list:
    """The leaves as float32 [C, n], with the rows of absent clients 0."""
    flat = [x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in jax.tree.leaves(updates)]
    return [jnp.where(present[:, None], x, jnp.zeros_like(x)).astype(jnp.float32) for x in flat]


def _one_row(update) -> list:
    """One update as `_rows` of a single client."""
    return _rows(jax.tree.map(lambda x: x[None], update), jnp.ones(1, bool))


def _shaped(flat: list, updates):
    """Vectors [n] to the tree of one update, in the updates' shapes and dtypes."""
    leaves, structure = jax.tree.flatten(updates)
    return jax.tree.unflatten(structure, [x.reshape(y.shape[1:]).astype(y.dtype) for x, y in zip(flat, leaves)])


def _sorted_present(rows, present):
    """[C, n], each column in ascending order, the absent last and infinite."""
    return jnp.sort(jnp.where(present[:, None], rows, jnp.inf), axis=0)


def _shares(values):
    """values / their sum; zeros where that is 0."""
    total = jnp.sum(values)
    return values / jnp.where(total > 0, total, 1.0)


def _weighted_rows(rows: list, shares) -> list:
    """sum_c shares_c row_c of every leaf: [C, n] -> [n]."""
    return [jnp.sum(shares[:, None] * x, axis=0) for x in rows]


def _unit_rows(rows: list):
    """Rows divided by their norm over all leaves, and the norms [C]. Zero rows stay zero.

    The largest value goes first, so that the square of a huge or tiny update neither overflows nor vanishes.
    """
    peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x), axis=1, initial=0.0) for x in rows]), axis=0)
    safe = jnp.where(peak > 0, peak, 1.0)[:, None]
    rows = [x / safe for x in rows]
    length = jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=1) for x in rows))
    return [x / jnp.where(length > 0, length, 1.0)[:, None] for x in rows], length * peak
