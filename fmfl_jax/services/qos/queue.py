"""Percentiles of the time at a node that serves one request after the other: the whole law of an M/G/1 queue.

A mean wait says nothing of a deadline that 95 % of the requests must meet. By Pollaczek and Khinchine the wait of
first come, first served is a geometric sum of residual services,

    W = R_1 + ... + R_N,  P(N = n) = (1 - rho) rho^n,  R of density (1 - F(t)) / E[S]
    E[e^(iwW)] = (1 - rho) / (1 - sum_k rho_k r_k(w)),  rho_k = arrivals_k E[S_k], r_k of the flow's own residual

which the fast Fourier transform inverts on a grid; a request of flow k spends W + S_k. Services are S = prefill_s +
token_s min(X, limit) with log-normal X (`services.latency`). More arrivals make W larger path by path, so the
percentiles grow with every flow that is added: what `branch_and_bound` prunes by.

    >>> law = Law(prefill_s=0.1, token_s=0.02, lengths=LogNormal(4, 1), limit=256)
    >>> Queue([Flow(law, 0.2)]).sojourn_s(law, 0.95)
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive
from fmfl_jax.services.latency import LogNormal, ServiceTime, service_time

_POINTS = 2**14  # of the grid: percentiles are exact to a few thousandths of themselves
_WAITS = 30.0  # mean waits that the grid holds beside the longest services: what lies beyond wraps around


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Law:
    """Of a request's service: prefill_s + token_s min(X, limit) seconds, X log-normal tokens of output."""

    prefill_s: float
    token_s: float = 0.0
    lengths: LogNormal = LogNormal(0.0, 0.0)
    limit: float = 1.0

    def __post_init__(self):
        at_least(0, prefill_s=self.prefill_s, token_s=self.token_s)
        positive(limit=self.limit, seconds=self.prefill_s + self.token_s)

    @cached_property
    def moments(self) -> ServiceTime:
        """E[S] and E[S^2]."""
        return service_time(self.lengths, prefill_s=self.prefill_s, token_s=self.token_s, limit=self.limit)

    @property
    def longest_s(self) -> float:
        """That of an answer of `limit` tokens."""
        return self.prefill_s + self.token_s * self.limit

    def cdf(self, seconds: np.ndarray) -> np.ndarray:
        """P(S <= seconds), float64 of the same shape."""
        if self.token_s == 0:
            return (seconds >= self.prefill_s).astype(np.float64)
        tokens = (seconds - self.prefill_s) / self.token_s
        if self.lengths.sigma == 0:
            return (tokens >= min(math.exp(self.lengths.mu), self.limit)).astype(np.float64)
        log = np.log(np.maximum(tokens, 1e-300))
        share = special.ndtr((log - self.lengths.mu) / self.lengths.sigma)
        return np.where(tokens >= self.limit, 1.0, np.where(tokens > 0, share, 0.0))

    def quantile_s(self, level: float) -> float:
        """The seconds that a share `level` of the services take at most, without a queue."""
        tokens = math.exp(self.lengths.mu + self.lengths.sigma * float(stats.norm.ppf(level)))
        return self.prefill_s + self.token_s * min(tokens, self.limit)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Exponential:
    """Services of exponential length: the usual assumption for requests of which only the mean is known."""

    mean_s: float

    def __post_init__(self):
        positive(mean_s=self.mean_s)

    @property
    def moments(self) -> ServiceTime:
        return ServiceTime(self.mean_s, 2 * self.mean_s**2, 0.0)

    @property
    def longest_s(self) -> float:
        """That of one in 10^8."""
        return self.quantile_s(1 - 1e-8)

    def cdf(self, seconds: np.ndarray) -> np.ndarray:
        return -np.expm1(-np.maximum(seconds, 0.0) / self.mean_s)

    def quantile_s(self, level: float) -> float:
        return -math.log1p(-level) * self.mean_s


class Flow(NamedTuple):
    """Poisson requests of one law."""

    law: Law | Exponential
    arrivals_per_s: float


class Queue:
    """One server, first come, first served. A node of c servers among which requests are dealt at random is c of these
    with 1 / c of the arrivals each (at most as good as one line for all).

    Raises ValueError, which says the load, where the flows are more than it can serve.
    """

    def __init__(self, flows: Sequence[Flow]):
        at_least(0, arrivals_per_s=min((flow.arrivals_per_s for flow in flows), default=0.0))
        self._flows = [flow for flow in flows if flow.arrivals_per_s > 0]
        self.load = sum(flow.arrivals_per_s * flow.law.moments.mean_s for flow in self._flows)
        if self.load >= 1:
            raise ValueError(f"load={self.load:.3f}: requests come faster than they are served, and the queue grows")

    @property
    def mean_wait_s(self) -> float:
        """E[W] = sum arrivals E[S^2] / (2 (1 - load))."""
        return sum(f.arrivals_per_s * f.law.moments.second_moment_s2 for f in self._flows) / (2 * (1 - self.load))

    def sojourn_s(self, law: Law | Exponential, level: float) -> float:
        """The seconds, wait and service, that a share `level` in (0, 1) of the requests of a law stay at most."""
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), got {level}")
        if not self._flows:
            return law.quantile_s(level)
        horizon, wait = self._wait
        horizon_of_law = 3 * law.longest_s
        if horizon_of_law > horizon:  # a law that is not in the queue
            horizon, wait = self._wait_on(_rounded_up(horizon_of_law))
        return _quantile(np.fft.irfft(wait * _service_transform(law, horizon), _POINTS), horizon, level)

    def wait_s(self, level: float) -> float:
        """The same of the wait alone."""
        if not self._flows:
            return 0.0
        horizon, wait = self._wait
        return _quantile(np.fft.irfft(wait, _POINTS), horizon, level)

    @cached_property
    def _wait(self):
        longest = max(flow.law.longest_s for flow in self._flows)
        return self._wait_on(_rounded_up(3 * longest + _WAITS * self.mean_wait_s))

    def _wait_on(self, horizon: float):
        """horizon, and the transform of W on a grid [0, horizon)."""
        busy = sum(
            flow.arrivals_per_s * flow.law.moments.mean_s * _residual_transform(flow.law, horizon)
            for flow in self._flows
        )
        return horizon, (1 - self.load) / (1 - busy)


def mm1_sojourn_s(*, arrivals_per_s: float, mean_s: float, level: float) -> float:
    """The percentile of wait and exponential service: the sojourn is exponential with rate 1 / mean_s - arrivals.
    Raises ValueError, with the load, for an unstable queue."""
    positive(mean_s=mean_s)
    at_least(0, arrivals_per_s=arrivals_per_s)
    load = arrivals_per_s * mean_s
    if load >= 1:
        raise ValueError(f"load={load:.3f}: requests come faster than they are served, and the queue grows")
    return -math.log1p(-level) * mean_s / (1 - load)


def _rounded_up(seconds: float) -> float:
    """The next power of 2^(1/2), so that flows share their transforms."""
    return 2.0 ** (math.ceil(2 * math.log2(seconds)) / 2)


@lru_cache(maxsize=4096)
def _service_transform(law: Law | Exponential, horizon: float) -> np.ndarray:
    """Of S on the grid: a cell's mass lies at its middle, i step."""
    step = horizon / _POINTS
    edges = (np.arange(_POINTS + 1) - 0.5) * step
    edges[0] = -1.0
    return np.fft.rfft(np.diff(law.cdf(edges)))


@lru_cache(maxsize=4096)
def _residual_transform(law: Law | Exponential, horizon: float) -> np.ndarray:
    """Of R: the mass of a cell is the integral of (1 - F) over it, by the midpoint rule on 4 parts of each."""
    step = horizon / _POINTS
    parts = ((np.arange(4 * _POINTS) + 0.5) / 4 - 0.5) * step
    survival = np.where(parts < 0, 0.0, 1.0 - law.cdf(np.maximum(parts, 0.0)))
    mass = survival.reshape(_POINTS, 4).sum(axis=1)
    if not mass.any():
        mass[0] = 1.0  # all of it is shorter than a part of a cell
    return np.fft.rfft(mass / mass.sum())


def _quantile(mass: np.ndarray, horizon: float, level: float) -> float:
    """Where the sum of the cells' masses reaches the level, linear inside of a cell."""
    total = np.cumsum(mass)
    i = min(int(np.searchsorted(total, level)), len(mass) - 1)
    before = total[i - 1] if i else 0.0
    inside = (level - before) / max(total[i] - before, 1e-300)
    return max(float(i - 0.5 + inside) * horizon / _POINTS, 0.0)
