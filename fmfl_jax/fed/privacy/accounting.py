"""What a run costs in (epsilon, delta), by Google's dp-accounting: Renyi DP and privacy loss distributions.

    P[M(D) in S] <= e^epsilon P[M(D') in S] + delta   for D, D' that differ by one unit added or removed

RDP: Mironov et al., 2019 (arXiv:1908.10530). PLD: Doroshenko et al., PoPETs 2022. Both are upper bounds on what
Gaussian noise on Poisson samples costs; PLD is the tighter one, and the one to quote. The unit is a client for
DP-FedAvg and an example for DP-SGD.

dp-accounting is imported where it is used: with its scipy it is a third of what every other command waits for.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.finite import finite_fields

_INTERVAL = 1e-4  # of the finest grid of privacy losses, dp-accounting's own choice
_COARSER = tuple(10.0 ** (k / 2) for k in (4, 3, 2, 1, 0))  # the grids, in units of the finest
_PRECISION = 1e-4  # of a calibrated noise multiplier, relative
_PATIENCE_S = 3.0  # a calibration that takes longer reports where it is


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
    from dp_accounting.rdp import compute_epsilon

    releases = _checked(releases, delta)
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release, _ in releases):
        return math.inf
    total = functools.reduce(operator.add, (count * _rdp(release) for release, count in releases))
    # dp-accounting's annotations say Sequence[float]; it computes on arrays.
    return float(compute_epsilon(_orders(), total, delta)[0])  # pyright: ignore[reportArgumentType]


def epsilon_pld(releases: Releases, delta: float) -> float:
    """See `privacy_spent`. At most 1e-4 above what the finest grid of losses gives, whose interval is 1e-4 up to an
    epsilon of 10.

    Grids are refined until the error that is left is small: every one is an upper bound, and the error falls with the
    square of the interval (once this is small enough, which the last two differences show). Above an epsilon of 10
    intervals and the error allowed grow in proportion to it, and above 1000 RDP's epsilon is given: the work stays
    bounded where there is no privacy left to measure.
    """
    releases = _checked(releases, delta)
    if not releases:
        return 0.0
    bound = epsilon_rdp(releases, delta)
    if bound > 1000:
        return bound
    finest = _INTERVAL * 10.0 ** max(0, math.ceil(math.log10(max(bound, 1.0) / 10)))
    found: list[float] = []
    for coarser in _COARSER:
        found.append(_pld_on_grid(releases, delta, finest * coarser))
        if len(found) >= 3:
            earlier, last = found[-3] - found[-2], found[-2] - found[-1]
            ratio = min(earlier / last, 10.0) if last > 0 else 10.0
            if ratio > 2 and last / (ratio - 1) < finest / 4:
                break
    return found[-1]


def _pld_on_grid(releases: Releases, delta: float, interval: float) -> float:
    parts = [_pld(release, interval).self_compose(count) for release, count in releases]
    return float(functools.reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(delta))


def calibrate_noise(
    target_epsilon: float,
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    epsilon: Callable[[Releases, float], float] = epsilon_pld,
    progress: Callable[[str], None] | None = None,
) -> float:
    """The smallest noise multiplier, to 1e-4 of itself, whose `steps` releases cost at most target_epsilon.

    epsilon: `epsilon_pld` or `epsilon_rdp`; with PLD, whose values are off by up to 1e-4, the multiplier is off by as
    much as this makes. progress: gets a line after each evaluation once the search takes more than 3 s. Raises
    ValueError for target_epsilon <= 0, steps < 1 and where no noise multiplier up to 1e6 is enough.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon is {target_epsilon}: expected a positive number")
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    started = time.monotonic()

    def cost(how: Callable[[Releases, float], float]) -> Callable[[float], float]:
        def of(z: float) -> float:
            value = how([(SampledGaussian(sampling_rate, z), steps)], delta)
            seconds = time.monotonic() - started
            if progress is not None and seconds > _PATIENCE_S:
                progress(f"noise for epsilon {target_epsilon:g}: {z:.5g} gives {value:.5g} ({seconds:.0f} s)")
            return value

        return of

    def coarse(releases: Releases, delta: float) -> float:
        bound = epsilon_rdp(releases, delta)
        return bound if bound > 1000 else _pld_on_grid(releases, delta, 10 * _INTERVAL * max(1.0, bound))

    try:
        start = _smallest(cost(epsilon_rdp), target_epsilon, (1.0, -1.0), slack=0.0)  # cheap, close with many steps
        if epsilon is epsilon_rdp:
            return start[0]
        if epsilon is epsilon_pld:
            start = _smallest(cost(coarse), target_epsilon, start, slack=0.0)
        return _smallest(cost(epsilon), target_epsilon, start, slack=_INTERVAL / 2)[0]
    except OverflowError as error:
        raise ValueError(
            f"no noise brings {steps} steps at rate {sampling_rate} to epsilon {target_epsilon} at delta {delta}"
        ) from error


def _smallest(
    cost: Callable[[float], float], target: float, start: tuple[float, float], *, slack: float
) -> tuple[float, float]:
    """(z, d log cost / d log z): the smallest z to 1e-4 of itself with cost(z) <= target, cost falling in z, or one
    whose cost is at most `slack` below what that takes.

    start: a guess of both. Secants between the logarithms, kept within what is known. OverflowError beyond 1e6.
    """
    (z, slope), low, high, last = start, 0.0, math.inf, None
    step = 0
    while True:
        value, step = cost(z), step + 1
        usable = 0 < value < math.inf
        low, high = (low, z) if value <= target else (z, high)
        if last is not None and usable:
            slope = min(max(math.log(value / last[1]) / math.log(z / last[0]), -50.0), -0.2)
        if target * (1 + slope * _PRECISION) - slack <= value <= target:
            return z, slope
        if high <= low * (1 + _PRECISION):
            return high, slope
        if usable:
            last = z, value
            aim = max(target * (1 + slope * _PRECISION / 2) - slack / 2, target / 2)
            guess = z * min(max((aim / value) ** (1 / slope), 0.25), 4.0)
        else:
            guess = z * (0.5 if value <= target else 2.0)
        if low > 0 and high < math.inf and (not low < guess < high or step % 4 == 0):  # or they come from one side only
            guess = math.sqrt(low * high)
        z = guess
        if z > 1e6:
            raise OverflowError


def example_level_spent(
    num_examples: Sequence[int] | np.ndarray,
    steps: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
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
    most_steps, costs = 0, []
    for rate in sorted(most, reverse=True):
        if most[rate] > most_steps:
            most_steps = most[rate]
            costs.append(privacy_spent([(SampledGaussian(rate, noise_multiplier), most_steps)], delta))
    return PrivacySpent(
        max((s.epsilon_rdp for s in costs), default=0.0), max((s.epsilon_pld for s in costs), default=0.0), delta
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
    from dp_accounting.rdp import RdpAccountant

    return RdpAccountant().orders


@functools.lru_cache(maxsize=256)
def _rdp(release: SampledGaussian) -> np.ndarray:
    """Of one release, by order."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(release.noise_multiplier))
    with _without_order_warnings():
        return RdpAccountant().compose(event).rdp


@functools.lru_cache(maxsize=8 * len(_COARSER))
def _pld(release: SampledGaussian, interval: float):
    from dp_accounting.pld import privacy_loss_distribution

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
