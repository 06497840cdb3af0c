"""Every stream of a scenario at every place by every model: quality, latency, energy, price, and what stands against
it."""

import dataclasses
import math
from typing import NamedTuple

from fmfl_jax.experiment.config.scenario import ModelRow, PlaceRow, Scenario, StreamRow
from fmfl_jax.services import placement
from fmfl_jax.services.latency import LogNormal, clipped_moment
from fmfl_jax.services.qos.problem import Option, Place, Problem, Stream, background
from fmfl_jax.services.qos.queue import Law


class Way(NamedTuple):
    """A stream's requests answered by a model at a place. option: as the joint problem has it. p50_s, p95_s (p95: the
    scenario's level): alone there beside the place's background, in an equal share of the band; idle_p95_s: without
    any queue; load: of a replica then, 1 or more where the queue would grow. energy_j, price: of a request in the mean.
    obstacle: what keeps it from serving (`placement.obstacle`),
    "" if nothing. beaten_by: a way of the stream that is as good in quality, p95, energy and price and better in one,
    "" if none; None where an obstacle stands."""

    stream: str
    place: str
    model: str
    option: Option
    quality: float
    p50_s: float
    p95_s: float
    idle_p95_s: float
    load: float
    energy_j: float
    price: float
    obstacle: str
    beaten_by: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} at {self.place}"


def law_of(place: PlaceRow, model: ModelRow, stream: StreamRow) -> Law:
    """Of a request's service: reading the prompt, then tokens at the mean context."""
    prefill = placement.prefill_s(place, model, stream.prompt_tokens)
    if stream.output_median == 0:
        return Law(prefill_s=prefill)
    steps = max(round(_mean_output_tokens(stream)), 1)
    token = placement.decode_s(place, model, stream.prompt_tokens, steps) / steps
    return Law(prefill_s=prefill, token_s=token, lengths=_lengths(stream), limit=stream.output_limit)


def ways_of(scenario: Scenario) -> list[Way]:
    """Every stream at every place by every model that has a quality for its task."""
    found = []
    for stream in scenario.streams:
        ways = [
            way_of(scenario, stream, place, model)
            for place in scenario.places
            for model in scenario.models
            if stream.task in model.quality
        ]
        found += [way._replace(beaten_by=None if way.obstacle else _beaten_by(way, ways)) for way in ways]
    return found


def way_of(scenario: Scenario, stream: StreamRow, place: PlaceRow, model: ModelRow) -> Way:
    """A stream at a place by a model, not compared with others."""
    law = law_of(place, model, stream)
    bits = stream.up_bits + stream.down_bits
    tokens = stream.prompt_tokens + _mean_output_tokens(stream)
    price = place.price_per_s * law.moments.mean_s + place.price_per_token * tokens
    energy = place.active_power_w * law.moments.mean_s
    if not place.own:
        energy += stream.tx_psd_w_per_hz * bits / stream.spectral_efficiency
    quality = model.quality[stream.task]
    longest = stream.prompt_tokens + (stream.output_limit if stream.output_median else 0)
    option = Option(
        model=model.name,
        place=place.name,
        value=scenario.quality_value * quality - price - scenario.price_per_j * energy,
        law=law,
        fixed_s=_fixed_s(place, bits),
        over_air=not place.own,
        model_bytes=model.weight_bytes,
        request_bytes=model.kv_bytes_per_token * longest,
    )
    idle = dataclasses.replace(place, background_load=0.0)
    p50, p95 = (percentile_s(scenario, stream, place, option, level) for level in (0.5, scenario.level))
    nobody = dataclasses.replace(stream, arrivals_per_s=0.0)
    without_queue = percentile_s(scenario, nobody, idle, option, scenario.level)
    cost = placement.Cost(p95, 0.0, p95 - without_queue if math.isfinite(p95) else math.inf, 0.0, price, energy)
    fits = option.model_bytes + option.request_bytes <= place.memory_bytes
    up = place.availability > scenario.level
    limits = placement.Limits(deadline_s=stream.deadline_s, max_price=stream.max_price, private=stream.private)
    obstacle = placement.obstacle(placement.Option(place.name, cost, up, fits, place.trusted), limits)
    if obstacle == "latency" and without_queue <= stream.deadline_s:
        obstacle = "load"  # an unstable queue: infinite less infinite is no number
    return Way(
        stream=stream.name,
        place=place.name,
        model=model.name,
        option=option,
        quality=quality,
        p50_s=p50,
        p95_s=p95,
        idle_p95_s=without_queue,
        load=place.background_load + stream.arrivals_per_s / place.replicas * law.moments.mean_s,
        energy_j=energy,
        price=price,
        obstacle=obstacle,
    )


def percentile_s(scenario: Scenario, stream: StreamRow, place: PlaceRow, option: Option, level: float) -> float:
    """The seconds that a share `level` of a stream's requests take at most, alone at a place but for its background,
    with the payload in an equal share of the band. option: of this place, for the service's law; the round trip is the
    place's."""
    users = sum(row.count for row in scenario.streams)
    bits = stream.up_bits + stream.down_bits
    air = 0.0 if place.own else bits / (stream.spectral_efficiency * scenario.bandwidth_hz / users)
    option = dataclasses.replace(option, fixed_s=_fixed_s(place, bits))
    problem = Problem(
        streams=(stream_of(stream, stream.name),),
        options=((option,),),
        places={place.name: place_of(place)},
        bandwidth_hz=scenario.bandwidth_hz,
        level=level,
    )
    return air + problem.alone_s(0, option)


def _fixed_s(place: PlaceRow, bits: float) -> float:
    """Round trip and the wired hops."""
    return place.rtt_s + (bits / place.wire_bps if place.wire_bps is not None else 0.0)


def place_of(place: PlaceRow) -> Place:
    """The place's servers and their other work, as `qos` queues at them."""
    return Place(
        name=place.name,
        memory_bytes=place.memory_bytes,
        replicas=place.replicas,
        background=background(place.background_load, place.background_mean_s),
        own=place.own,
        availability=place.availability,
    )


def stream_of(row: StreamRow, name: str) -> Stream:
    """One user's requests, as `qos` serves them."""
    return Stream(
        name=name,
        arrivals_per_s=row.arrivals_per_s,
        payload_bits=row.up_bits + row.down_bits,
        spectral_efficiency=row.spectral_efficiency,
        deadline_s=row.deadline_s,
    )


def _beaten_by(way: Way, ways: list[Way]) -> str:
    """The name of a way that dominates this one (Pareto)."""
    figures = lambda w: (-w.quality, w.p95_s, w.energy_j, w.price)
    for other in ways:
        if not other.obstacle and figures(other) != figures(way):
            if all(a <= b for a, b in zip(figures(other), figures(way))):
                return other.name
    return ""


def _lengths(stream: StreamRow) -> LogNormal:
    return LogNormal(math.log(stream.output_median), stream.output_sigma)


def _mean_output_tokens(stream: StreamRow) -> float:
    return clipped_moment(_lengths(stream), 1, stream.output_limit) if stream.output_median else 0.0
