"""Latency that depends on the request (section III-D): how long answers are, and how long they queue for it.

Output lengths are log-normal, X = exp(N(mu, sigma^2)), and cut at the limit n of new tokens:

    E[min(X, n)^j] = e^(j mu + j^2 sigma^2 / 2) Phi(a - j sigma) + n^j (1 - Phi(a)),   a = (ln n - mu) / sigma

Service takes prefill_s + X token_s; one server with Poisson requests is M/G/1 (Pollaczek-Khinchine): wait =
rate E[S^2] / (2 (1 - rate E[S])). Lengths are taken as continuous.

    >>> lengths = fit_log_normal(observed_tokens, limit=256)
    >>> service = service_time(lengths, prefill_s=0.1, token_s=0.02, limit=256)
    >>> mg1_wait_s(service, arrivals_per_s=0.2)
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive, same_length, vector

_MAX_STEPS = 500  # of expectation-maximization


@dataclasses.dataclass(frozen=True)
@finite_fields
class LogNormal:
    """Output lengths in tokens: the logarithm has mean mu and standard deviation sigma >= 0."""

    mu: float
    sigma: float

    def __post_init__(self):
        at_least(0, sigma=self.sigma)


class ServiceTime(NamedTuple):
    """mean_s, second_moment_s2: E[S] and E[S^2]; cut_share: of answers that the limit ends."""

    mean_s: float
    second_moment_s2: float
    cut_share: float

    @property
    def squared_cv(self) -> float:
        """var(S) / E[S]^2."""
        return self.second_moment_s2 / self.mean_s**2 - 1


def fit_log_normal(lengths, *, limit: float | None = None) -> LogNormal:
    """Maximum likelihood from lengths [n] > 0 in tokens. Those at `limit` or above were cut: it is only known that
    they are as long (right-censored; expectation-maximization). To take them at their word would shorten the tail.

    Raises ValueError for lengths that are not positive, and where all were cut.
    """
    lengths = vector("lengths", lengths)
    same_length(lengths=lengths)
    if lengths.min() <= 0:
        raise ValueError(f"lengths must be positive, got {lengths.min():g}")
    cut = np.zeros(len(lengths), bool) if limit is None else lengths >= limit
    if cut.all():
        raise ValueError(f"all {len(lengths)} lengths reach limit={limit:g}: nothing is known of the distribution")
    log = np.log(lengths)
    mu, sigma = float(log.mean()), float(log.std())
    if limit is None or not cut.any() or sigma == 0:
        return LogNormal(mu, sigma)
    edge, known, num_cut = math.log(limit), log[~cut], int(cut.sum())
    for _ in range(_MAX_STEPS):
        a = (edge - mu) / sigma
        hazard = math.exp(stats.norm.logpdf(a) - stats.norm.logsf(a))
        first = mu + sigma * hazard  # E[log X | X >= limit]
        second = mu**2 + sigma**2 + sigma * hazard * (edge + mu)  # E[log^2 X | X >= limit]
        last = mu, sigma
        mu = (float(known.sum()) + num_cut * first) / len(log)
        sigma = math.sqrt((float(np.square(known).sum()) + num_cut * second) / len(log) - mu**2)
        if abs(mu - last[0]) + abs(sigma - last[1]) < 1e-9:
            break
    return LogNormal(mu, sigma)


def clipped_moment(lengths: LogNormal, power: int, limit: float | None = None) -> float:
    """E[min(X, limit)^power], tokens^power; without a limit E[X^power]. Raises ValueError for a limit <= 0."""
    mu, sigma = lengths.mu, lengths.sigma
    if limit is None:
        return math.exp(power * mu + power**2 * sigma**2 / 2)
    positive(limit=limit)
    if sigma == 0:
        return min(math.exp(mu), limit) ** power
    a = (math.log(limit) - mu) / sigma
    below = math.exp(power * mu + power**2 * sigma**2 / 2) * stats.norm.cdf(a - power * sigma)
    return float(below + limit**power * stats.norm.sf(a))


def service_time(lengths: LogNormal, *, prefill_s: float, token_s: float, limit: float | None = None) -> ServiceTime:
    """Moments of S = prefill_s + token_s min(X, limit). Raises ValueError for negative times."""
    at_least(0, prefill_s=prefill_s, token_s=token_s)
    first, second = (clipped_moment(lengths, j, limit) for j in (1, 2))
    cut = 0.0
    if limit is not None:
        gap = math.log(limit) - lengths.mu
        cut = float(stats.norm.sf(gap / lengths.sigma)) if lengths.sigma > 0 else float(gap <= 0)
    mean = prefill_s + token_s * first
    return ServiceTime(mean, prefill_s**2 + 2 * prefill_s * token_s * first + token_s**2 * second, cut)


def mg1_wait_s(service: ServiceTime, *, arrivals_per_s: float) -> float:
    """Mean time in the queue before service starts, s; infinite where the server is loaded to 1 or more."""
    at_least(0, arrivals_per_s=arrivals_per_s)
    load = arrivals_per_s * service.mean_s
    return arrivals_per_s * service.second_moment_s2 / (2 * (1 - load)) if load < 1 else math.inf
