"""Joint choice of model, bits, placement and bandwidth for streams of requests (section V).

    max  sum_i weight_i (quality - price - price_per_j energy)
    s.t. bits_i / (b_i se_i) + fixed_i + T_i(level) <= deadline_i,   sum b_i <= bandwidth,
         a place's memory holds the models that are served there, its load is below 1

with T_i(level) the percentile of wait and service at the stream's place, which depends on everybody who is served there
(`queue`). Given the choices, the least bandwidth is b_i = bits_i / (se_i slack_i): what is left is a search
(`solve`). A stream may also be refused, at value 0 and without bandwidth.

A place that is down for longer than any deadline, a share 1 - availability of the time, misses these requests: the
percentile that the others must meet is then level / availability, and at availability <= level no latency will do.

    >>> problem = Problem(streams=streams, options=options, places=places, bandwidth_hz=0.9e6)
    >>> problem.evaluate(assignment).bandwidth_hz
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive, share
from fmfl_jax.services.qos.queue import Exponential, Flow, Law, Queue

REFUSED = -1  # a stream's choice in an assignment


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Place:
    """Where requests are served. replicas: equal servers, among which requests are dealt at random. background: what
    others ask of each replica. own: every stream has such a place for itself. availability: share of the time up."""

    name: str
    memory_bytes: float
    replicas: int = 1
    background: Flow | None = None
    own: bool = False
    availability: float = 1.0

    def __post_init__(self):
        positive(memory_bytes=self.memory_bytes)
        at_least(1, replicas=self.replicas)
        share("availability", self.availability)
        if self.background is not None:
            Queue([self.background])  # raises where others alone are too many


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Stream:
    """Requests of one kind from one user. payload_bits: both ways over the air; spectral_efficiency in bit/s/Hz.
    weight: of its value in the sum."""

    name: str
    arrivals_per_s: float
    payload_bits: float
    spectral_efficiency: float
    deadline_s: float
    weight: float = 1.0

    def __post_init__(self):
        at_least(0, arrivals_per_s=self.arrivals_per_s, payload_bits=self.payload_bits)
        positive(spectral_efficiency=self.spectral_efficiency, weight=self.weight)
        if not self.deadline_s > 0:
            raise ValueError(f"deadline_s={self.deadline_s}: it lies before now")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Option:
    """A way to serve a stream: a model at a place. value: quality less price and energy, of one request. law: of its
    service there. fixed_s: round trip and wired hops. over_air: the payload takes bandwidth. model_bytes: its weights,
    in memory once for all that it serves at the place; request_bytes: of one request's cache."""

    model: str
    place: str
    value: float
    law: Law
    fixed_s: float = 0.0
    over_air: bool = True
    model_bytes: float = 0.0
    request_bytes: float = 0.0

    def __post_init__(self):
        at_least(0, fixed_s=self.fixed_s, model_bytes=self.model_bytes, request_bytes=self.request_bytes)


class Evaluation(NamedTuple):
    """Of an assignment. bandwidth_hz: float64 [n], 0 of the refused, infinite where a deadline, a memory or a load is
    not met; latency_s: float64 [n], the percentile without the payload's time over the air, infinite likewise and NaN
    of the refused; value: of the served."""

    value: float
    bandwidth_hz: np.ndarray
    latency_s: np.ndarray

    @property
    def total_hz(self) -> float:
        return float(self.bandwidth_hz.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Problem:
    """streams [n]; options: of each stream, perhaps none; places by name; level: the share of a stream's requests that
    must be in time. Raises ValueError for an option at an unknown place."""

    streams: tuple[Stream, ...]
    options: tuple[tuple[Option, ...], ...]
    places: dict[str, Place]
    bandwidth_hz: float
    level: float = 0.95
    _known: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        positive(bandwidth_hz=self.bandwidth_hz)
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level}: expected a share in (0, 1)")
        if len(self.options) != len(self.streams):
            raise ValueError(f"{len(self.streams)} streams with options for {len(self.options)}")
        unknown = {o.place for options in self.options for o in options} - set(self.places)
        if unknown:
            raise ValueError(f"options at unknown places: {', '.join(sorted(unknown))}")

    def evaluate(self, assignment: Sequence[int]) -> Evaluation:
        """assignment: of each stream the number of its option, or REFUSED.

        Band and latency grow with every stream that is served: those of some streams bound what they are with more.
        """
        bandwidth, latency = np.zeros(len(assignment)), np.full(len(assignment), np.nan)
        for place, members in self._members(assignment).items():
            seconds = self.latencies_s(place, members)
            for (i, option), taken in zip(members, seconds):
                latency[i] = taken
                bandwidth[i] = self.least_hz(i, option, taken)
        value = sum(self.value(i, o) for i, o in enumerate(assignment))
        return Evaluation(value, bandwidth, latency)

    def value(self, i: int, choice: int) -> float:
        """weight times value of a stream's choice; 0 where it is refused."""
        return 0.0 if choice == REFUSED else self.streams[i].weight * self.options[i][choice].value

    def least_hz(self, i: int, option: Option, latency_s: float) -> float:
        """bits / (se slack), Hz; infinite without slack."""
        stream = self.streams[i]
        slack = stream.deadline_s - latency_s
        if not option.over_air or stream.payload_bits == 0:
            return 0.0 if slack >= 0 else math.inf
        return stream.payload_bits / (stream.spectral_efficiency * slack) if slack > 0 else math.inf

    def latencies_s(self, place: str, members: list[tuple[int, Option]]) -> list[float]:
        """Of the streams that are served at a place with these options: percentile of wait and service, and fixed_s.
        Infinite for all where memory or load is too much."""
        where = self.places[place]
        if where.own:
            return [self.alone_s(i, option) for i, option in members]
        if not _fits(where, [option for _, option in members]):
            return [math.inf] * len(members)
        loads: dict[Law, float] = {}
        for i, option in members:
            loads[option.law] = loads.get(option.law, 0.0) + self.streams[i].arrivals_per_s / where.replicas
        sojourn = self._sojourns(where, loads)
        return [option.fixed_s + sojourn[option.law] for _, option in members]

    def alone_s(self, i: int, option: Option) -> float:
        """The latency if nobody else were served there: the least that it can be."""
        where = self.places[option.place]
        if not _fits(where, [option]):
            return math.inf
        loads = {option.law: self.streams[i].arrivals_per_s / where.replicas}
        return option.fixed_s + self._sojourns(where, loads)[option.law]

    def _members(self, assignment: Sequence[int]) -> dict[str, list[tuple[int, Option]]]:
        members: dict[str, list[tuple[int, Option]]] = {}
        for i, choice in enumerate(assignment):
            if choice != REFUSED:
                option = self.options[i][choice]
                members.setdefault(option.place, []).append((i, option))
        return members

    def _sojourns(self, where: Place, loads: dict[Law, float]) -> dict[Law, float]:
        """The percentile of each law at a place whose replica is asked so many times a second; kept, as a search comes
        back to the same loads again and again."""
        state = (where.name, frozenset((law, round(rate, 12)) for law, rate in loads.items()))
        if state not in self._known:
            self._known[state] = self._percentiles(where, loads)
        return self._known[state]

    def _percentiles(self, where: Place, loads: dict[Law, float]) -> dict[Law, float]:
        flows = [Flow(law, rate) for law, rate in loads.items()]
        flows += [] if where.background is None else [where.background]
        load = sum(flow.arrivals_per_s * flow.law.moments.mean_s for flow in flows)
        if load >= 1 or where.availability <= self.level:
            return dict.fromkeys(loads, math.inf)
        queue = Queue(flows)
        return {law: queue.sojourn_s(law, self.level / where.availability) for law in loads}


def background(load: float, mean_s: float) -> Flow | None:
    """Exponential requests of others that keep a replica busy a share `load` of the time. Raises ValueError for a load
    of 1 or more: the queue would grow without end."""
    at_least(0, load=load)
    if load >= 1:
        raise ValueError(f"load={load:g}: requests come faster than they are served, and the queue grows")
    return Flow(Exponential(mean_s), load / mean_s) if load > 0 else None


def _fits(where: Place, options: list[Option]) -> bool:
    """Whether the distinct models and the largest cache of a request fit a replica's memory."""
    models = {option.model: option.model_bytes for option in options}
    return sum(models.values()) + max((o.request_bytes for o in options), default=0.0) <= where.memory_bytes
