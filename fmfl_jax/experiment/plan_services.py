"""What a scenario's foundation models cost and bring: every placement of every stream, the best joint choice, when the
idle cloud beats the edge, and models over several devices. Sums only; nothing is trained or drawn at random."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize

from fmfl_jax.experiment.config.scenario import ModelRow, PlaceRow, Scenario, StreamRow
from fmfl_jax.services import placement, split, tensor_parallel
from fmfl_jax.services.latency import LogNormal
from fmfl_jax.services.qos.problem import REFUSED, Option, Place, Problem, Stream, background
from fmfl_jax.services.qos.queue import Law
from fmfl_jax.services.qos.solve import Solution, branch_and_bound, greedy, lp_bound

EXACT_STREAMS = 10  # up to which the joint choice is made by branch and bound
MAP_POINTS = 41  # a side of the regime map


class Way(NamedTuple):
    """A stream's requests answered by a model at a place. option: as the joint problem has it; air_bits: over the
    air, in a band that is the stream's equal share for the figures below. p50_s, p95_s: alone there beside the place's
    background (p95: the scenario's level); idle_p95_s: without that. obstacle: what keeps it from serving
    (`placement.obstacle`), "" if nothing. beaten_by: a way of the stream that is as good in quality, p95, energy and
    price and better in one, "" if none; None where an obstacle stands."""

    stream: str
    place: str
    model: str
    option: Option
    quality: float
    p50_s: float
    p95_s: float
    idle_p95_s: float
    energy_j: float
    price: float
    obstacle: str
    beaten_by: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} at {self.place}"


class Joint(NamedTuple):
    """The joint choice: its problem and solution, by which method, and what no choice can be worth more than."""

    problem: Problem
    solution: Solution
    method: str
    lp_bound: float


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


class SplitPlan(NamedTuple):
    """layers_at: devices of the layers in both objectives; None: no split fits."""

    model: str
    devices: list[str]
    tokens: int
    latency: split.Split | None
    stage: split.Split | None
    alone_s: float | None
    reason: str


class TensorParallelPlan(NamedTuple):
    """token_s [counts], all_reduce_s of them in a token."""

    name: str
    model: str
    place: str
    num_devices: list[int]
    token_s: list[float]
    all_reduce_s: list[float]


def law_of(place: PlaceRow, model: ModelRow, stream: StreamRow) -> Law:
    """Of a request's service: reading the prompt, then tokens at the mean context."""
    node, size = _node(place), _size(model)
    prefill = placement.prefill_s(node, size, stream.prompt_tokens)
    if stream.output_median == 0:
        return Law(prefill_s=prefill)
    lengths = LogNormal(math.log(stream.output_median), stream.output_sigma)
    unit = Law(prefill_s=0.0, token_s=1.0, lengths=lengths, limit=stream.output_limit)
    steps = max(round(unit.moments.mean_s), 1)  # the mean number of tokens
    token = placement.decode_s(node, size, stream.prompt_tokens, steps) / steps
    return Law(prefill_s=prefill, token_s=token, lengths=lengths, limit=stream.output_limit)


def ways_of(scenario: Scenario) -> list[Way]:
    """Every stream at every place by every model that has a quality for its task."""
    found = []
    for stream in scenario.streams:
        ways = [
            _way(scenario, stream, place, model)
            for place in scenario.places
            for model in scenario.models
            if stream.task in model.quality
        ]
        found += [way._replace(beaten_by=None if way.obstacle else _beaten_by(way, ways)) for way in ways]
    return found


def joint_choice(scenario: Scenario, ways: list[Way]) -> Joint:
    """The best choice for all streams together: by branch and bound up to EXACT_STREAMS, else greedy."""
    streams, options = [], []
    for row in scenario.streams:
        # Load and latency are the joint problem's own; what no allocation can change is left out here.
        own = [way for way in ways if way.stream == row.name and way.obstacle in ("", "load", "latency")]
        for number in range(row.count):
            name = row.name if row.count == 1 else f"{row.name} {number + 1}"
            streams.append(_stream(row, name))
            options.append(tuple(way.option for way in own))
    problem = Problem(
        streams=tuple(streams),
        options=tuple(options),
        places={place.name: _place(place) for place in scenario.places},
        bandwidth_hz=scenario.bandwidth_hz,
        level=scenario.level,
    )
    if len(streams) <= EXACT_STREAMS:
        solution = branch_and_bound(problem)
        method = "branch and bound" if solution.proven else "branch and bound, stopped early"
    else:
        solution, method = greedy(problem), "greedy by value per Hz"
    return Joint(problem, solution, method, lp_bound(problem))


def chosen_names(joint: Joint) -> dict[str, list[str] | None]:
    """{stream: [model, place]}, None where it is refused."""
    problem, names = joint.problem, {}
    for stream, options, choice in zip(problem.streams, problem.options, joint.solution.assignment):
        names[stream.name] = None if choice == REFUSED else [options[choice].model, options[choice].place]
    return names


def causes(scenario: Scenario) -> list[Cause]:
    """What keeps the map's first place ahead of its second, each cause alone: latency at no load, round trip, load,
    outage, price, privacy."""
    assert scenario.map is not None
    stream, model = scenario.stream(scenario.map.stream), scenario.model(scenario.map.model)
    first, second = scenario.place(scenario.map.first), scenario.place(scenario.map.second)
    idle = dataclasses.replace(first, background_load=0.0, availability=1.0)
    mine, other = _way(scenario, stream, idle, model), _way(scenario, stream, second, model)
    lead = other.p95_s - mine.p95_s
    rows = [
        Cause("latency, idle", f"p95 {mine.p95_s:.4g} s against {other.p95_s:.4g} s", None, lead > 0),
        Cause(
            "round trip",
            f"{first.rtt_s:.4g} s",
            f"{first.rtt_s + lead:.4g} s" if lead > 0 else None,
            lead > 0,
        ),
    ]
    mean = first.background_mean_s
    at_load = lambda load: _p95(scenario, stream, dataclasses.replace(idle, background_load=load), mine) - other.p95_s
    turn = _crossing(at_load, 0.0, 0.999) if lead > 0 else None
    holds = lead > 0 and at_load(first.background_load) < 0
    rows.append(
        Cause(
            f"load (others' requests, mean {mean:.3g} s)",
            f"{first.background_load:.0%}",
            None if turn is None else f"{turn:.1%}",
            holds,
        )
    )
    at_availability = lambda up: _p95(scenario, stream, dataclasses.replace(idle, availability=up), mine) - other.p95_s
    least = scenario.level * (1 + 1e-6)
    turn = _crossing(at_availability, least, 1.0) if lead > 0 else None
    if lead > 0 and turn is None:  # ahead until no latency will do
        turn = scenario.level
    rows.append(
        Cause(
            f"outage (p{100 * scenario.level:g} counts it as a miss)",
            f"up {first.availability:.2%}",
            None if turn is None else f"up {turn:.2%}",
            lead > 0 and first.availability > scenario.level and at_availability(first.availability) < 0,
        )
    )
    gain = mine.option.value - other.option.value
    factor = 1 + gain / mine.price if mine.price > 0 else None
    rows.append(
        Cause(
            "price and energy (value of a request)",
            f"{mine.option.value:.6g} against {other.option.value:.6g}",
            None if factor is None else f"the price times {max(factor, 0.0):.3g}",
            gain > 0,
        )
    )
    rows.append(
        Cause(
            "privacy",
            f"{'trusted' if first.trusted else 'not trusted'}, text {'private' if stream.private else 'public'}",
            None if first.trusted or stream.private else "private text",
            first.trusted or not stream.private,
        )
    )
    return rows


def regimes(scenario: Scenario) -> Regimes:
    """The two maps, over all places that can serve the map's stream by its model."""
    assert scenario.map is not None
    stream, model = scenario.stream(scenario.map.stream), scenario.model(scenario.map.model)
    first = scenario.place(scenario.map.first)
    others = [_way(scenario, stream, place, model) for place in scenario.places if place.name != first.name]
    others = [way for way in others if way.obstacle in ("", "latency", "load")]
    idle = dataclasses.replace(first, background_load=0.0, availability=1.0)
    mine = _way(scenario, stream, idle, model)
    rival = min((way.p95_s for way in others), default=mine.p95_s)
    loads = np.linspace(0.0, 0.98, MAP_POINTS)
    rtts = np.linspace(0.0, 1.3 * max(rival, mine.p95_s), MAP_POINTS)
    by_load = [_p95(scenario, stream, dataclasses.replace(idle, background_load=x), mine) for x in loads]

    def quickest(p95_s: float) -> str:
        named = [(p95_s, first.name)] + [(way.p95_s, way.place) for way in others]
        seconds, name = min(named)
        return name if seconds <= stream.deadline_s else ""

    fastest = np.asarray([[quickest(p95 - first.rtt_s + rtt) for p95 in by_load] for rtt in rtts])
    ups = np.linspace(scenario.level - 0.2 * (1 - scenario.level), 1.0, MAP_POINTS)
    factors = np.geomspace(0.1, 100.0, MAP_POINTS)
    at_load = dataclasses.replace(first, availability=1.0)
    by_up = [_p95(scenario, stream, dataclasses.replace(at_load, availability=up), mine) for up in ups]

    def worthiest(p95_s: float, factor: float) -> str:
        named = [(mine.option.value - (factor - 1) * mine.price, first.name)] if p95_s <= stream.deadline_s else []
        named += [(way.option.value, way.place) for way in others if way.p95_s <= stream.deadline_s]
        return max(named, default=(0.0, ""))[1]

    best = np.asarray([[worthiest(p95, factor) for factor in factors] for p95 in by_up])
    return Regimes(loads, rtts, fastest, ups, factors, best)


def split_plans(scenario: Scenario) -> list[SplitPlan]:
    """The scenario's splits, for a request alone and for a full pipeline."""
    found = []
    for row in scenario.splits:
        model, places = scenario.model(row.model), [scenario.place(name) for name in row.devices]
        layers, n = model.num_layers, len(places)
        layer = dataclasses.replace(
            _size(model), num_params=model.num_params / layers, weight_bytes=model.weight_bytes / layers
        )
        seconds = [placement.prefill_s(_node(place), layer, row.tokens) for place in places]
        transfer = 8 * model.activation_bytes * row.tokens / row.link_bps + row.link_latency_s
        cost = split.ChainCost(
            np.tile(seconds, (layers, 1)),
            np.full(layers, layer.weight_bytes),
            np.asarray([place.memory_bytes for place in places]),
            transfer * (1 - np.eye(n)),
        )
        alone = layers * seconds[0] if model.weight_bytes <= places[0].memory_bytes else None
        try:
            both = [split.split_layers(cost, objective=objective) for objective in split.OBJECTIVES]
            found.append(SplitPlan(row.model, row.devices, row.tokens, both[0], both[1], alone, ""))
        except ValueError as error:
            found.append(SplitPlan(row.model, row.devices, row.tokens, None, None, alone, str(error)))
    return found


def tensor_parallel_plans(scenario: Scenario) -> list[TensorParallelPlan]:
    """The scenario's models over equal devices: a token at no context."""
    found = []
    for row in scenario.tensor_parallel:
        model, place = scenario.model(row.model), scenario.place(row.place)
        one = placement.decode_s(_node(place), _size(model), 1, 1)
        link = tensor_parallel.Interconnect(rate_bps=row.link_bps, latency_s=row.link_latency_s)
        reduces, tokens = [], []
        for n in row.num_devices:
            reduces.append(2 * model.num_layers * tensor_parallel.ring_all_reduce_s(n, model.activation_bytes, link))
            tokens.append(
                tensor_parallel.token_s(
                    one_device_s=one,
                    num_devices=n,
                    num_layers=model.num_layers,
                    activation_bytes=model.activation_bytes,
                    link=link,
                )
            )
        found.append(TensorParallelPlan(row.name, row.model, row.place, row.num_devices, tokens, reduces))
    return found


def _way(scenario: Scenario, stream: StreamRow, place: PlaceRow, model: ModelRow) -> Way:
    law = law_of(place, model, stream)
    bits = stream.up_bits + stream.down_bits
    tokens = stream.prompt_tokens + _mean_tokens(stream)
    price = place.price_per_s * law.moments.mean_s + place.price_per_token * tokens
    energy = place.active_power_w * law.moments.mean_s
    if not place.own:
        energy += stream.tx_psd_w_per_hz * bits / stream.spectral_efficiency
    quality = model.quality[stream.task]
    wire = bits / place.wire_bps if place.wire_bps is not None else 0.0
    longest = stream.prompt_tokens + (stream.output_limit if stream.output_median else 0)
    option = Option(
        model=model.name,
        place=place.name,
        value=scenario.quality_value * quality - price - scenario.price_per_j * energy,
        law=law,
        fixed_s=place.rtt_s + wire,
        over_air=not place.own,
        model_bytes=model.weight_bytes,
        request_bytes=model.kv_bytes_per_token * longest,
    )
    way = Way(stream.name, place.name, model.name, option, quality, 0.0, 0.0, 0.0, energy, price, "")
    idle = dataclasses.replace(place, background_load=0.0)
    p50, p95 = (_percentile(scenario, stream, place, way, level) for level in (0.5, scenario.level))
    nobody = dataclasses.replace(stream, arrivals_per_s=0.0)
    without_queue = _percentile(scenario, nobody, idle, way, scenario.level)
    cost = placement.Cost(p95, 0.0, p95 - without_queue if math.isfinite(p95) else math.inf, 0.0, price, energy)
    fits = option.model_bytes + option.request_bytes <= place.memory_bytes
    up = place.availability > scenario.level
    limits = placement.Limits(deadline_s=stream.deadline_s, max_price=stream.max_price, private=stream.private)
    obstacle = placement.obstacle(placement.Option(place.name, cost, up, fits, place.trusted), limits)
    if obstacle == "latency" and without_queue <= stream.deadline_s:
        obstacle = "load"  # an unstable queue: infinite less infinite is no number
    return way._replace(p50_s=p50, p95_s=p95, idle_p95_s=without_queue, obstacle=obstacle)


def _percentile(scenario: Scenario, stream: StreamRow, place: PlaceRow, way: Way, level: float) -> float:
    """Seconds of a way's request, with the payload in an equal share of the band; alone at the place but for the
    background."""
    users = sum(row.count for row in scenario.streams)
    air = 0.0
    if not place.own:
        air = (stream.up_bits + stream.down_bits) / (stream.spectral_efficiency * scenario.bandwidth_hz / users)
    problem = Problem(
        streams=(_stream(stream, stream.name),),
        options=((way.option,),),
        places={place.name: _place(place)},
        bandwidth_hz=scenario.bandwidth_hz,
        level=level,
    )
    return air + problem.alone_s(0, way.option)


def _p95(scenario: Scenario, stream: StreamRow, place: PlaceRow, way: Way) -> float:
    return _percentile(scenario, stream, place, way, scenario.level)


def _beaten_by(way: Way, ways: list[Way]) -> str:
    """The name of a way that dominates this one (Pareto)."""
    figures = lambda w: (-w.quality, w.p95_s, w.energy_j, w.price)
    for other in ways:
        if not other.obstacle and figures(other) != figures(way):
            if all(a <= b for a, b in zip(figures(other), figures(way))):
                return other.name
    return ""


def _crossing(difference, low: float, high: float) -> float | None:
    """Where a monotone difference changes its sign, None where it does not."""
    if not difference(low) * difference(high) < 0:
        return None
    bounded = lambda x: min(max(difference(x), -1e9), 1e9)
    return optimize.root_scalar(bounded, bracket=(low, high), xtol=1e-5).root


def _mean_tokens(stream: StreamRow) -> float:
    if stream.output_median == 0:
        return 0.0
    lengths = LogNormal(math.log(stream.output_median), stream.output_sigma)
    return Law(prefill_s=0.0, token_s=1.0, lengths=lengths, limit=stream.output_limit).moments.mean_s


def _node(place: PlaceRow) -> placement.Node:
    return placement.Node(
        name=place.name,
        compute_flops=place.compute_flops,
        memory_bandwidth_bytes_s=place.memory_bandwidth_bytes_s,
        memory_bytes=place.memory_bytes,
    )


def _size(model: ModelRow) -> placement.ModelSize:
    return placement.ModelSize(
        num_params=model.num_params,
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
    )


def _place(place: PlaceRow) -> Place:
    return Place(
        name=place.name,
        memory_bytes=place.memory_bytes,
        replicas=place.replicas,
        background=background(place.background_load, place.background_mean_s),
        own=place.own,
        availability=place.availability,
    )


def _stream(row: StreamRow, name: str) -> Stream:
    return Stream(
        name=name,
        arrivals_per_s=row.arrivals_per_s,
        payload_bits=row.up_bits + row.down_bits,
        spectral_efficiency=row.spectral_efficiency,
        deadline_s=row.deadline_s,
    )
