"""When one place, the cloud, beats another, the edge, and what overturns it: cause by cause, and as a map."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize

from fmfl_jax.experiment.config.scenario import PlaceRow, Scenario, StreamRow
from fmfl_jax.experiment.plan_services.ways import Way, percentile_s, way_of

MAP_POINTS = 41  # a side of the regime map
_MOST_LOAD = 0.999  # of others, up to which a lead's end is looked for


class Cause(NamedTuple):
    """Of what the first place's lead over the second may end by. now: as the scenario has it; turns_at: where the lead
    ends, None if nowhere; holds: whether the first leads now, by this cause alone."""

    name: str
    now: str
    turns_at: str | None
    holds: bool


class Regimes(NamedTuple):
    """By load and round trip of the first place the fastest, by its availability and price the most valuable in time:
    names of places, "" where nobody is in time; [MAP_POINTS, MAP_POINTS], the vertical axis first."""

    loads: np.ndarray
    rtts_s: np.ndarray
    fastest: np.ndarray
    availabilities: np.ndarray
    price_factors: np.ndarray
    best: np.ndarray


class _Lead(NamedTuple):
    """The map's stream at its first place with nobody else there (mine), and what it is held against."""

    scenario: Scenario
    stream: StreamRow
    first: PlaceRow
    mine: Way
    other_s: float

    def over(self, **changed) -> float:
        """Seconds that the first place is ahead, idle and always up but for what is changed. -inf: it never answers."""
        place = dataclasses.replace(self.first, **{"background_load": 0.0, "availability": 1.0} | changed)
        seconds = percentile_s(self.scenario, self.stream, place, self.mine.option, self.scenario.level)
        return self.other_s - seconds if math.isfinite(seconds) else -math.inf


def causes(scenario: Scenario) -> list[Cause]:
    """What keeps the map's first place ahead of its second, each cause alone: latency at no load, round trip, load,
    outage, price, privacy."""
    assert scenario.map is not None
    stream, model = scenario.stream(scenario.map.stream), scenario.model(scenario.map.model)
    first, second = scenario.place(scenario.map.first), scenario.place(scenario.map.second)
    mine, other = way_of(scenario, stream, _idle(first), model), way_of(scenario, stream, second, model)
    lead = _Lead(scenario, stream, first, mine, other.p95_s)
    return [*_of_latency(lead), _of_load(lead), _of_outage(lead), _of_price(mine, other), _of_privacy(first, stream)]


def regimes(scenario: Scenario) -> Regimes:
    """The two maps, over all places that can serve the map's stream by its model."""
    assert scenario.map is not None
    stream, model = scenario.stream(scenario.map.stream), scenario.model(scenario.map.model)
    first = scenario.place(scenario.map.first)
    others = [way_of(scenario, stream, place, model) for place in scenario.places if place.name != first.name]
    others = [way for way in others if way.obstacle in ("", "latency", "load")]
    mine = way_of(scenario, stream, _idle(first), model)
    # Seconds of the first place are what it is ahead of nobody, turned round.
    lead = _Lead(scenario, stream, first, mine, 0.0)
    rival_s = min((way.p95_s for way in others), default=math.inf)
    finite = [seconds for seconds in (mine.p95_s, rival_s) if math.isfinite(seconds)]
    loads = np.linspace(0.0, 0.98, MAP_POINTS)
    rtts = np.linspace(0.0, 1.3 * max(finite, default=stream.deadline_s), MAP_POINTS)
    by_load = [-lead.over(background_load=load, rtt_s=0.0) for load in loads]

    def quickest(seconds: float) -> str:
        least, name = min([(seconds, first.name)] + [(way.p95_s, way.place) for way in others])
        return name if least <= stream.deadline_s else ""

    fastest = np.asarray([[quickest(seconds + rtt) for seconds in by_load] for rtt in rtts])
    ups = np.linspace(scenario.level - 0.2 * (1 - scenario.level), 1.0, MAP_POINTS)
    factors = np.geomspace(0.1, 100.0, MAP_POINTS)
    by_up = [-lead.over(background_load=first.background_load, availability=up) for up in ups]

    def worthiest(seconds: float, factor: float) -> str:
        value = mine.option.value - (factor - 1) * mine.price
        named = [(seconds, value, first.name)] + [(way.p95_s, way.option.value, way.place) for way in others]
        return max(((value, name) for s, value, name in named if s <= stream.deadline_s), default=(0.0, ""))[1]

    best = np.asarray([[worthiest(seconds, factor) for factor in factors] for seconds in by_up])
    return Regimes(loads, rtts, fastest, ups, factors, best)


def _idle(place: PlaceRow) -> PlaceRow:
    return dataclasses.replace(place, background_load=0.0, availability=1.0)


def _of_latency(lead: _Lead) -> list[Cause]:
    """Compute and transfers alone, and how far the first place may be."""
    ahead, rtt = lead.over(), lead.first.rtt_s
    turn = f"{rtt + ahead:.4g} s" if 0 < ahead < math.inf else None
    shown = [f"{p95:.4g} s" if math.isfinite(p95) else "never" for p95 in (lead.mine.p95_s, lead.other_s)]
    return [
        Cause("latency, idle", f"p95 {shown[0]} against {shown[1]}", None, ahead > 0),
        Cause("round trip", f"{rtt:.4g} s", turn, ahead > 0),
    ]


def _of_load(lead: _Lead) -> Cause:
    first = lead.first
    turn = _end_of(lambda load: lead.over(background_load=load), 0.0, _MOST_LOAD)
    return Cause(
        f"load (others' requests, mean {first.background_mean_s:.3g} s)",
        f"{first.background_load:.0%}",
        None if turn is None else f"{turn:.1%}",
        lead.over(background_load=first.background_load) > 0,
    )


def _of_outage(lead: _Lead) -> Cause:
    level, up = lead.scenario.level, lead.first.availability
    turn = _end_of(lambda up: lead.over(availability=up), 1.0, level * (1 + 1e-6))
    if turn is None and lead.over() > 0:
        turn = level  # ahead as long as any latency will do
    return Cause(
        f"outage (p{100 * level:g} counts it as a miss)",
        f"up {up:.2%}",
        None if turn is None else f"up {turn:.2%}",
        lead.over(availability=up) > 0,
    )


def _of_price(mine: Way, other: Way) -> Cause:
    gain = mine.option.value - other.option.value
    factor = 1 + gain / mine.price if mine.price > 0 else -1.0
    return Cause(
        "price and energy (value of a request)",
        f"{mine.option.value:.6g} against {other.option.value:.6g}",
        f"the price times {factor:.3g}" if factor >= 0 else None,
        gain > 0,
    )


def _of_privacy(first: PlaceRow, stream: StreamRow) -> Cause:
    return Cause(
        "privacy",
        f"{'trusted' if first.trusted else 'not trusted'}, text {'private' if stream.private else 'public'}",
        None if first.trusted or stream.private else "private text",
        first.trusted or not stream.private,
    )


def _end_of(ahead: Callable[[float], float], start: float, end: float) -> float | None:
    """Where a lead that is there at `start` and falls towards `end` is gone; None where it is not there or stays."""
    if not ahead(start) > 0 or not ahead(end) < 0:
        return None
    bounded = lambda x: max(ahead(x), -1e9)
    return optimize.root_scalar(bounded, bracket=(start, end), xtol=1e-5).root
