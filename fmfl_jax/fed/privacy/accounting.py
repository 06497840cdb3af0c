"""What a run costs in (epsilon, delta), by Google's dp-accounting: Renyi DP and privacy loss distributions.

    P[M(D) in S] <= e^epsilon P[M(D') in S] + delta   for D, D' that differ by one unit added or removed

RDP: Mironov et al., 2019 (arXiv:1908.10530). PLD: Doroshenko et al., PoPETs 2022. Both are upper bounds on what
Gaussian noise on Poisson samples costs; PLD is the tighter one, and the one to quote. The unit is a client for
DP-FedAvg and an example for DP-SGD.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from fmfl_jax.finite import finite_fields

_INTERVAL = 1e-4  # of the discretized privacy losses, dp-accounting's own choice
_PRECISION = 1e-4  # of a calibrated noise multiplier, relative


@dataclasses.dataclass(frozen=True)
@finite_fields
class SampledGaussian:
    """One release: Gaussian noise of noise_multiplier x sensitivity on the sum over a Poisson sample.

    sampling_rate: q in (0, 1]. noise_multiplier: z >= 0, infinitely costly at 0.
    """

    sampling_rate: float
    noise_multiplier: float

    def __post_init__(self):
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}: expected a probability above 0")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}: expected at least 0")


class PrivacySpent(NamedTuple):
    """(epsilon_rdp, delta) and (epsilon_pld, delta): two bounds on the same cost, infinite without noise."""

    epsilon_rdp: float
    epsilon_pld: float
    delta: float


Releases = Sequence[tuple[SampledGaussian, int]]  # each with how often it was made


def privacy_spent(releases: Releases, delta: float) -> PrivacySpent:
    """The cost of all releases together: of a run of T rounds, `[(SampledGaussian(q, z), T)]`.

    One release's cost is computed once per process, RDP then adds up and PLD is composed anew (about 0.1 s). Raises
    ValueError for a delta outside (0, 1) and negative counts.
    """
    return PrivacySpent(epsilon_rdp(releases, delta), epsilon_pld(releases, delta), delta)


def epsilon_rdp(releases: Releases, delta: float) -> float:
    """See `privacy_spent`."""
    releases = _checked(releases, delta)
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release, _ in releases):
        return math.inf
    total = sum(count * _rdp(release) for release, count in releases)
    return float(compute_epsilon(_orders(), total, delta)[0])


def epsilon_pld(releases: Releases, delta: float) -> float:
    """See `privacy_spent`. Above an epsilon of 10 the losses are discretized in proportion to it, still from above, and
    above 1000 RDP's epsilon is given: the work stays bounded where there is no privacy left to measure."""
    releases = _checked(releases, delta)
    if not releases:
        return 0.0
    bound = epsilon_rdp(releases, delta)
    if bound > 1000:
        return bound
    interval = _INTERVAL * 10.0 ** max(0, math.ceil(math.log10(max(bound, 1.0) / 10)))
    parts = [_pld(release, interval).self_compose(count) for release, count in releases]
    return float(functools.reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(delta))


def calibrate_noise(
    target_epsilon: float,
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    epsilon: Callable[[Releases, float], float] = epsilon_pld,
) -> float:
    """The smallest noise multiplier, to 1e-4 of itself, whose `steps` releases cost at most target_epsilon.

    epsilon: `epsilon_pld` or `epsilon_rdp`. Takes seconds with PLD. Raises ValueError for target_epsilon <= 0, steps <
    1 and where no noise multiplier up to 1e6 is enough.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon is {target_epsilon}: expected a positive number")
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")

    def enough(z: float, how: Callable) -> bool:
        return how([(SampledGaussian(sampling_rate, z), steps)], delta) <= target_epsilon

    def search(low: float, high: float, growth: float, how: Callable) -> float:
        while not enough(high, how):
            low, high = high, high * growth
            if high > 1e6:
                raise ValueError(
                    f"no noise brings {steps} steps at rate {sampling_rate} to epsilon {target_epsilon} "
                    f"at delta {delta}"
                )
        while enough(low, how):
            low, high = low / growth, low
        while high > low * (1 + _PRECISION):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle, how) else (middle, high)
        return high

    found = search(0.5, 1.0, 2.0, epsilon_rdp)  # cheap, and close to PLD's
    return found if epsilon is epsilon_rdp else search(found / 1.2, found, 1.2, epsilon)


def example_level_spent(
    num_examples: Sequence[int], steps: Sequence[int], *, batch_size: int, noise_multiplier: float, delta: float
) -> PrivacySpent:
    """What DP-SGD costs the example that pays most.

    num_examples, steps: of every client, how many examples it holds and the local steps that it took. Each step samples
    at q = min(1, batch_size / num_examples). An example is in one client's data, so costs of clients do not add up. The
    largest under each accountant; a client that holds more and stepped less than another costs less and is not
    computed.
    """
    if batch_size < 1 or any(n < 1 for n in num_examples):
        raise ValueError("batch_size and all num_examples must be at least 1")
    most: dict[float, int] = {}
    for n, count in zip(num_examples, steps, strict=True):
        rate = min(1.0, batch_size / int(n))
        most[rate] = max(most.get(rate, 0), int(count))
    dearest, spent = 0, []
    for rate in sorted(most, reverse=True):
        if most[rate] > dearest:
            dearest = most[rate]
            spent.append(privacy_spent([(SampledGaussian(rate, noise_multiplier), dearest)], delta))
    return PrivacySpent(
        max((s.epsilon_rdp for s in spent), default=0.0), max((s.epsilon_pld for s in spent), default=0.0), delta
    )


def _checked(releases: Releases, delta: float) -> list[tuple[SampledGaussian, int]]:
    """Those that were made at all."""
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}: expected a number between 0 and 1, well below 1 / the number of units")
    for _, count in releases:
        if count < 0:
            raise ValueError(f"a release was made {count} times: expected at least 0")
    return [(release, int(count)) for release, count in releases if count]


@functools.cache
def _orders() -> np.ndarray:
    return RdpAccountant().orders


@functools.lru_cache(maxsize=256)
def _rdp(release: SampledGaussian) -> np.ndarray:
    """Of one release, by order."""
    event = PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(release.noise_multiplier))
    with _without_order_warnings():
        return RdpAccountant().compose(event).rdp


@functools.lru_cache(maxsize=8)
def _pld(release: SampledGaussian, interval: float):
    return privacy_loss_distribution.from_gaussian_mechanism(
        release.noise_multiplier, sampling_prob=release.sampling_rate, value_discretization_interval=interval
    )


@contextlib.contextmanager
def _without_order_warnings():
    """dp-accounting warns of each order it leaves out; the bound is the least over the rest, and just as valid."""
    logger = logging.getLogger("absl")

    def keep(record):
        return "failed to converge" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
