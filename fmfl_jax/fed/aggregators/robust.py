"""Robust aggregation: one update of many updates, some of which may be made to do harm.

The statistics, with their papers and equations, are those of robust_statistics.py. Norm bounding, m_c min(1, b /
|m_c|), is Sun et al., 2019. p is the number of clients that are present (weight > 0).
"""

import math

import jax
import jax.numpy as jnp

from fmfl_jax.fed.aggregators.robust_statistics import (
    coordinate_median,
    krum_choice,
    one_row,
    rows_of,
    shaped,
    shares_of,
    trimmed_mean,
    trimmed_of_present,
    trust_scores,
    trusted_mean,
    unit_rows,
    weighted_rows,
    weiszfeld,
)
from fmfl_jax.fed.core.types import Aggregator, GatheredUpdates
from fmfl_jax.fed.shares import nearest_count


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
        return update, {"trimmed_clients": trimmed_of_present(fraction, gathered.weights).astype(jnp.float32)}

    return Aggregator(aggregate=aggregate)


def multi_krum(malicious: float, num_kept: int | None = None) -> Aggregator:
    """The mean of the clients that multi-Krum keeps; see `krum_choice`. Data sizes do not count.

    malicious: f, as a number (>= 1) or as a fraction (< 1) of the present clients, the nearest whole number
    (fed/shares.py). num_kept: None is p - f. Breaks down when more than f are malicious. The metric krum_malicious is
    f, krum_guaranteed is 1 where p >= 2 f + 3, else 0.

    Raises ValueError for a negative number, one >= 1 that is not whole, a fraction of 1/2 or more, num_kept < 1.
    """
    if not (0 <= malicious < 0.5 or (1 <= malicious < math.inf and malicious == int(malicious))):
        raise ValueError(f"malicious clients must be a whole number or a fraction below 0.5, got {malicious}")
    if num_kept is not None and num_kept < 1:
        raise ValueError(f"num_kept must be >= 1, got {num_kept}")

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        present = gathered.weights > 0
        num_present = jnp.sum(present.astype(jnp.int32))
        num_malicious = _portion(malicious, gathered.weights.shape[0])[num_present]
        chosen = krum_choice(gathered.updates, gathered.weights, num_malicious, num_kept)
        shares = shares_of(chosen.astype(jnp.float32))
        update = shaped(weighted_rows(rows_of(gathered.updates, present), shares), gathered.updates)
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
    by its share of `bound`. The metric clipped_share is the weighted share of updates above the
    bound, update_norm the mean norm before.

    Raises ValueError where bound <= 0.
    """
    if bound <= 0:
        raise ValueError(f"bound must be > 0, got {bound}")

    def transform_update(update, state):
        del state
        _, norms = unit_rows(one_row(update))
        scale = bound / jnp.maximum(norms[0], bound)  # exactly 1 within the bound
        bounded = jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), update)
        return bounded, {"clipped_share": (norms[0] > bound).astype(jnp.float32), "update_norm": norms[0]}

    return Aggregator(transform_update=transform_update)


def fltrust() -> Aggregator:
    """FLTrust: the update on the server's root data says whom to trust; see `trust_scores` and `trusted_mean`.

    Data sizes do not count. There is no breakdown point: a malicious client has influence only as far as it points the
    reference's way, and then at the reference's length, so an attack's scale changes nothing. If nobody points that
    way the update is zero. The reference must be an update of the same kind: the delta of as many local steps.
    """

    def aggregate(gathered: GatheredUpdates, state, key):
        del state, key
        trust = trust_scores(gathered.updates, gathered.weights, gathered.reference)
        update = trusted_mean(gathered.updates, trust, gathered.reference)
        count = jnp.maximum(jnp.sum((gathered.weights > 0).astype(jnp.float32)), 1.0)
        trusted = jnp.sum((trust > 0).astype(jnp.float32))
        metrics = {"trust_mean": jnp.sum(trust) / count, "trusted_share": trusted / count}
        return update, metrics | _malicious_share(gathered, shares_of(trust))

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
