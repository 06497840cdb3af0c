"""Who is served next: first come, by priority, shortest predicted first with ageing, earliest deadline.

A policy gives each request a base; an attempt that starts at t has the key base + ageing * t, and the lowest key is
served first, among equals the earlier. Ageing that is linear in the wait needs no more than that: what a wait takes off
a key grows alike for all who wait, so only when they came tells them apart.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least
from fmfl_jax.services.scheduling.event_loops import BY_KEY, BY_WORK_LEFT, NO_PREEMPTION
from fmfl_jax.services.scheduling.requests import Requests


class Order(NamedTuple):
    """base float64 [n]; ageing; preemption: one of event_loops' three."""

    base: np.ndarray
    ageing: float = 0.0
    preemption: int = NO_PREEMPTION


class Policy(Protocol):
    """A configured order of service."""

    def order(self, requests: Requests, sizes: np.ndarray, rng: np.random.Generator) -> Order:
        """sizes [n]: the work of each request, which only a predictor may look at."""
        ...


@dataclasses.dataclass(frozen=True)
class Fcfs:
    """First come, first served."""

    def order(self, requests, sizes, rng) -> Order:
        return Order(np.zeros(len(requests)))


@dataclasses.dataclass(frozen=True)
class Priority:
    """By the request's priority, 0 first, first come first served within one. preemptive: a running job makes way and
    goes on later."""

    preemptive: bool = False

    def order(self, requests, sizes, rng) -> Order:
        return Order(requests.priorities.astype(np.float64), 0.0, BY_KEY if self.preemptive else NO_PREEMPTION)


@dataclasses.dataclass(frozen=True)
@finite_fields
class Shortest:
    """Shortest predicted work first; the prediction is the work times exp(N(0, noise^2)).

    ageing: predicted work forgiven per second of waiting. A request of predicted work p is then overtaken only by those
    that come within p / ageing seconds of it (`ageing_bound_s`). preemptive: the least predicted work that is left
    (SRPT where noise and ageing are 0).
    """

    noise: float = 0.0
    ageing: float = 0.0
    preemptive: bool = False

    def __post_init__(self):
        at_least(0, noise=self.noise, ageing=self.ageing)

    def order(self, requests, sizes, rng) -> Order:
        predicted = sizes * np.exp(self.noise * rng.standard_normal(len(requests)))
        return Order(predicted, self.ageing, BY_WORK_LEFT if self.preemptive else NO_PREEMPTION)


@dataclasses.dataclass(frozen=True)
class EarliestDeadline:
    """Earliest deadline first; requests without one come last."""

    def order(self, requests, sizes, rng) -> Order:
        return Order(requests.deadlines_s)


POLICIES: dict[str, type] = {"fcfs": Fcfs, "priority": Priority, "shortest": Shortest, "edf": EarliestDeadline}
