"""The best choice of model, place and bandwidth for all streams of a scenario together."""

from typing import NamedTuple

from fmfl_jax.experiment.config.scenario import Scenario
from fmfl_jax.experiment.plan_services.ways import Way, place_of, stream_of
from fmfl_jax.services.qos.problem import REFUSED, Problem
from fmfl_jax.services.qos.solve import Solution, branch_and_bound, greedy, lp_bound

EXACT_STREAMS = 10  # up to which the joint choice is made by branch and bound


class Joint(NamedTuple):
    """The joint choice: its problem and solution, by which method, and what no choice can be worth more than."""

    problem: Problem
    solution: Solution
    method: str
    lp_bound: float


def joint_choice(scenario: Scenario, ways: list[Way]) -> Joint:
    """The best choice for all streams together: by branch and bound up to EXACT_STREAMS, else greedy."""
    streams, options = [], []
    for row in scenario.streams:
        # Load and latency are the joint problem's own; what no allocation can change is left out here.
        own = [way for way in ways if way.stream == row.name and way.obstacle in ("", "load", "latency")]
        for number in range(row.count):
            name = row.name if row.count == 1 else f"{row.name} {number + 1}"
            streams.append(stream_of(row, name))
            options.append(tuple(way.option for way in own))
    problem = Problem(
        streams=tuple(streams),
        options=tuple(options),
        places={place.name: place_of(place) for place in scenario.places},
        bandwidth_hz=scenario.bandwidth_hz,
        level=scenario.level,
    )
    if len(streams) <= EXACT_STREAMS:
        solution = branch_and_bound(problem)
        method = "branch and bound" if solution.proven else "branch and bound, stopped early"
    else:
        solution, method = greedy(problem), "greedy by value per Hz"
    return Joint(problem, solution, method, lp_bound(problem))


def stand_in(way_place: str, stream: str, ways: list[Way]) -> Way | None:
    """Who answers a stream while its place is down: the most valuable way at another place, alone there; None: nobody
    may in time."""
    others = [way for way in ways if way.stream == stream and way.place != way_place and not way.obstacle]
    return max(others, key=lambda way: way.option.value, default=None)


def chosen_names(joint: Joint) -> dict[str, list[str] | None]:
    """{stream: [model, place]}, None where it is refused."""
    problem, names = joint.problem, {}
    for stream, options, choice in zip(problem.streams, problem.options, joint.solution.assignment):
        names[stream.name] = None if choice == REFUSED else [options[choice].model, options[choice].place]
    return names
