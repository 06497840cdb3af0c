"""Aggregators by name: how one update is made of many."""

import dataclasses
import math
from typing import Protocol

from fmfl_jax.fed.aggregators import robust
from fmfl_jax.fed.core.types import Aggregator
from fmfl_jax.finite import finite_fields


class AggregatorMethod(Protocol):
    """A configured aggregator."""

    def make(self) -> Aggregator:
        """The aggregator itself."""
        ...


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean weighted by examples."""

    def make(self) -> Aggregator:
        return Aggregator()


@dataclasses.dataclass(frozen=True)
class Median:
    """Coordinate-wise median (Yin et al., ICML 2018)."""

    def make(self) -> Aggregator:
        return robust.median()


@dataclasses.dataclass(frozen=True)
@finite_fields
class TrimmedMean:
    """Without the fraction of lowest and of highest values (Yin et al., ICML 2018)."""

    fraction: float = 0.2

    def __post_init__(self):
        self.make()  # the aggregator checks its own numbers

    def make(self) -> Aggregator:
        return robust.trimmed(self.fraction)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Krum:
    """The one update nearest to its neighbours (Blanchard et al., NeurIPS 2017). malicious: share of the clients."""

    malicious: float = 0.2

    def __post_init__(self):
        self.make()

    def make(self) -> Aggregator:
        return robust.krum(self.malicious)


@dataclasses.dataclass(frozen=True)
@finite_fields
class MultiKrum:
    """The mean of the updates that Krum's score keeps. malicious: share of the clients."""

    malicious: float = 0.2

    def __post_init__(self):
        self.make()

    def make(self) -> Aggregator:
        return robust.multi_krum(self.malicious)


@dataclasses.dataclass(frozen=True)
class GeometricMedian:
    """RFA (Pillutla et al., IEEE TSP 2022)."""

    def make(self) -> Aggregator:
        return robust.geometric_median()


@dataclasses.dataclass(frozen=True)
@finite_fields
class NormBound:
    """Updates scaled down to a norm (Sun et al., 2019)."""

    bound: float

    def __post_init__(self):
        if not 0 < self.bound < math.inf:
            raise ValueError(f"norm_bound needs a bound above 0, got {self.bound}")

    def make(self) -> Aggregator:
        return robust.norm_bound(self.bound)


@dataclasses.dataclass(frozen=True)
class FLTrust:
    """Trust by agreement with the server's reference update (Cao et al., NDSS 2021)."""

    def make(self) -> Aggregator:
        return robust.fltrust()


AGGREGATORS: dict[str, type] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "geometric_median": GeometricMedian,
    "norm_bound": NormBound,
    "fltrust": FLTrust,
}
