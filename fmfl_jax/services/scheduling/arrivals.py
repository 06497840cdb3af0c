"""When requests come: Poisson, or a Poisson process whose rate a two-state Markov chain switches.

>>> TwoState(busy_per_s=4.0, calm_per_s=0.5, busy_s=30.0, calm_s=120.0).draw(1000, rng)
"""

import dataclasses
from typing import Protocol

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive


class Arrivals(Protocol):
    """A process of arrivals."""

    @property
    def rate_per_s(self) -> float:
        """The mean rate."""
        ...

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """float64 [count] times in s, ascending from 0."""
        ...


@dataclasses.dataclass(frozen=True)
@finite_fields
class Poisson:
    """Independent requests, rate_per_s on average."""

    rate_per_s: float

    def __post_init__(self):
        positive(rate_per_s=self.rate_per_s)

    def draw(self, count, rng) -> np.ndarray:
        return np.cumsum(rng.exponential(1 / self.rate_per_s, count))


@dataclasses.dataclass(frozen=True)
@finite_fields
class TwoState:
    """Bursts (a Markov-modulated Poisson process): busy_per_s requests a second in busy times, calm_per_s in calm ones,
    which last busy_s and calm_s on average, exponentially. The first state is stationary."""

    busy_per_s: float
    calm_per_s: float
    busy_s: float
    calm_s: float

    def __post_init__(self):
        positive(busy_per_s=self.busy_per_s, busy_s=self.busy_s, calm_s=self.calm_s)
        at_least(0, calm_per_s=self.calm_per_s)

    @property
    def rate_per_s(self) -> float:
        return (self.busy_per_s * self.busy_s + self.calm_per_s * self.calm_s) / (self.busy_s + self.calm_s)

    def draw(self, count, rng) -> np.ndarray:
        """Unit-rate arrivals in the integral of the rate, mapped back to time, where that integral is piecewise
        linear."""
        marks = np.cumsum(rng.exponential(1.0, count))
        is_busy = rng.random() < self.busy_s / (self.busy_s + self.calm_s)
        means_s, rates = np.array([self.busy_s, self.calm_s]), np.array([self.busy_per_s, self.calm_per_s])
        if not is_busy:
            means_s, rates = means_s[::-1], rates[::-1]
        times_s, integral = [np.zeros(1)], [np.zeros(1)]
        while integral[-1][-1] < marks[-1]:
            cycles = 16 + int((marks[-1] - integral[-1][-1]) / (means_s @ rates))
            stays_s = (rng.exponential(1.0, (cycles, 2)) * means_s).ravel()
            times_s.append(times_s[-1][-1] + np.cumsum(stays_s))
            integral.append(integral[-1][-1] + np.cumsum(stays_s * np.tile(rates, cycles)))
        return np.interp(marks, np.concatenate(integral), np.concatenate(times_s))
