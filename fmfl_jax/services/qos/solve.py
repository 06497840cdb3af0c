"""Solvers of `problem.Problem`: exact by branch and bound, greedy by value per Hz, and a bound by linear programming.

Greedy is no optimum: what a stream adds to the queue of others is seen only when it is added. The bound takes every
queue as if the stream were alone, so it is no less than the optimum; the gap of the two is printed with a plan.

    >>> exact = branch_and_bound(problem)
    >>> quick = greedy(problem)
    >>> lp_bound(problem)
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from fmfl_jax.services.qos.problem import REFUSED, Evaluation, Problem

_ROUNDING = 1e-9  # relative, of sums of bandwidth and of values


class Solution(NamedTuple):
    """assignment: of each stream the number of its option, or REFUSED; its evaluation; proven: no other is better."""

    assignment: tuple[int, ...]
    evaluation: Evaluation
    proven: bool

    @property
    def value(self) -> float:
        return self.evaluation.value


class _Step(NamedTuple):
    """Of a stream's concave hull of value over Hz: what the next choice adds."""

    stream: int
    value: float
    hz: float


def branch_and_bound(problem: Problem, *, max_nodes: int = 200_000) -> Solution:
    """The best assignment, queues included. Depth first, streams of much to gain first, starting from greedy's.

    A branch is cut where the streams decided so far break a limit (more streams only make it worse) or where their
    value and the linear relaxation of the others, alone in their queues, are no better than the best found. After
    max_nodes branches the best so far is returned with proven False.
    """
    n, budget = len(problem.streams), problem.bandwidth_hz * (1 + _ROUNDING)
    hulls = [_hull(problem, i) for i in range(n)]
    kinds = [(dataclasses.replace(problem.streams[i], name=""), problem.options[i]) for i in range(n)]
    # Equal streams stand together; of their assignments that differ by who is who only one is looked at.
    order = sorted(range(n), key=lambda i: (-sum(step.value for step in hulls[i]), kinds.index(kinds[i])))
    # Of the streams from the d-th of the order on, the steps that are worth most per Hz first.
    later = [sorted((s for i in order[d:] for s in hulls[i]), key=_per_hz) for d in range(n + 1)]
    start = greedy(problem)
    best, best_value = list(start.assignment), start.value
    assignment, visited = [REFUSED] * n, 0

    def visit(depth: int, first: int) -> None:
        """Decides for the streams of the order from depth on; first: the place in its choices where this one starts."""
        nonlocal best, best_value, visited
        found = problem.evaluate(assignment)
        if not found.total_hz <= budget:
            return
        if found.value > best_value + _ROUNDING:
            best, best_value = list(assignment), found.value
        if depth == n or visited >= max_nodes:
            return
        if found.value + _relaxed(later[depth], budget - found.total_hz) <= best_value + _ROUNDING:
            return
        i = order[depth]
        choices = sorted(range(len(problem.options[i])), key=lambda o: -problem.value(i, o))
        choices = [o for o in choices if problem.value(i, o) > 0] + [REFUSED]
        equal_next = depth + 1 < n and kinds[order[depth + 1]] == kinds[i]
        for place in range(first, len(choices)):
            visited += 1
            assignment[i] = choices[place]
            visit(depth + 1, place if equal_next else 0)
        assignment[i] = REFUSED

    visit(0, 0)
    return Solution(tuple(best), problem.evaluate(best), visited < max_nodes)


def greedy(problem: Problem) -> Solution:
    """From nobody served, the change of one stream's option that brings most value per Hz, again and again.

    Hz are counted with what the change costs the others in the queue. A change that needs no more Hz comes first, the
    most valuable of them; changes that bring no value are not made.
    """
    n = len(problem.streams)
    choices = [REFUSED] * n
    kinds = [dataclasses.replace(stream, name="") for stream in problem.streams]  # equal ones need one look
    members: dict[str, dict[int, int]] = {place: {} for place in problem.places}  # place -> {stream: option}
    hz = dict.fromkeys(problem.places, 0.0)
    total = 0.0
    everything = [(i, o) for i in range(n) for o in range(len(problem.options[i]))]

    def hz_of(place: str, chosen: dict[int, int]) -> float:
        listed = [(i, problem.options[i][o]) for i, o in chosen.items()]
        seconds = problem.latencies_s(place, listed)
        return sum(problem.least_hz(i, option, taken) for (i, option), taken in zip(listed, seconds))

    while True:
        moves, hz_without, seen = [], {}, set()
        for i, o in everything:
            gain = problem.value(i, o) - problem.value(i, choices[i])
            option = problem.options[i][o]
            old = None if choices[i] == REFUSED else problem.options[i][choices[i]]
            if gain <= _ROUNDING or (kinds[i], old, option) in seen:
                continue
            seen.add((kinds[i], old, option))
            changed = {option.place: hz_of(option.place, members[option.place] | {i: o})}
            if old is not None and old.place != option.place:
                if i not in hz_without:
                    hz_without[i] = hz_of(old.place, {j: c for j, c in members[old.place].items() if j != i})
                changed[old.place] = hz_without[i]
            more = sum(changed.values()) - sum(hz[place] for place in changed)
            if total + more <= problem.bandwidth_hz * (1 + _ROUNDING):
                moves.append((more <= 0, gain if more <= 0 else gain / more, i, o, old, changed))
        if not moves:
            return Solution(tuple(choices), problem.evaluate(choices), False)
        *_, i, o, old, changed = max(moves, key=lambda move: move[:2])
        if old is not None:
            del members[old.place][i]
        members[problem.options[i][o].place][i] = o
        choices[i] = o
        hz |= changed
        total = sum(hz.values())


def lp_bound(problem: Problem) -> float:
    """No assignment is worth more: choices in parts, every stream alone in its queue (HiGHS).

    Besides bandwidth it holds each shared place's load below 1 and its memory, in which a part of a model may lie.
    """
    choices = [
        (i, o)
        for i in range(len(problem.streams))
        for o in range(len(problem.options[i]))
        if math.isfinite(_alone_hz(problem, i, o)) and problem.value(i, o) > 0
    ]
    if not choices:
        return 0.0
    shared = [place for place in problem.places.values() if not place.own]
    options = [problem.options[i][o] for i, o in choices]
    held = list(dict.fromkeys((option.place, option.model) for option in options))
    width = len(choices) + len(held)
    rows, limits = [], []

    def add(coefficients: dict[int, float], limit: float) -> None:
        row = np.zeros(width)
        row[list(coefficients)] = list(coefficients.values())
        rows.append(row)
        limits.append(limit)

    add({c: _alone_hz(problem, i, o) / problem.bandwidth_hz for c, (i, o) in enumerate(choices)}, 1.0)
    for i in {i for i, _ in choices}:
        add({c: 1.0 for c, choice in enumerate(choices) if choice[0] == i}, 1.0)
    for place in shared:
        here = [c for c, option in enumerate(options) if option.place == place.name]
        others = [] if place.background is None else [place.background]
        busy = sum(flow.arrivals_per_s * flow.law.moments.mean_s for flow in others)
        rate = lambda c: problem.streams[choices[c][0]].arrivals_per_s / place.replicas
        add({c: rate(c) * options[c].law.moments.mean_s for c in here}, 1.0 - busy)
        weights = {k: 0.0 for k, (name, _) in enumerate(held) if name == place.name}
        for c in here:
            k = held.index((place.name, options[c].model))
            weights[k] = options[c].model_bytes / place.memory_bytes
            add({c: 1.0, len(choices) + k: -1.0}, 0.0)
        add({len(choices) + k: share for k, share in weights.items()}, 1.0)
    value = np.zeros(width)
    value[: len(choices)] = [problem.value(i, o) for i, o in choices]
    found = optimize.linprog(
        -value, A_ub=sparse.csr_array(np.stack(rows)), b_ub=np.asarray(limits), bounds=(0, 1), method="highs"
    )
    return float(-found.fun)


def _alone_hz(problem: Problem, i: int, o: int) -> float:
    option = problem.options[i][o]
    return problem.least_hz(i, option, problem.alone_s(i, option))


def _hull(problem: Problem, i: int) -> list[_Step]:
    """The steps of the concave hull of a stream's (Hz, value) from refusal on, alone in its queue."""
    points = [(_alone_hz(problem, i, o), problem.value(i, o)) for o in range(len(problem.options[i]))]
    points = sorted((hz, value) for hz, value in points if math.isfinite(hz) and value > 0)
    hull = [(0.0, 0.0)]
    for hz, value in points:
        if value <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (hz, value)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((hz, value))
    return [_Step(i, b[1] - a[1], b[0] - a[0]) for a, b in itertools.pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else math.inf


def _per_hz(step: _Step) -> float:
    """Orders steps, the best first."""
    return -step.value / step.hz if step.hz > 0 else -math.inf


def _relaxed(steps: list[_Step], budget_hz: float) -> float:
    """The value of the linear relaxation (Sinha and Zoltners 1979): steps in order, the last in part."""
    value = 0.0
    for step in steps:
        if step.hz > budget_hz:
            return value + step.value * budget_hz / step.hz
        value, budget_hz = value + step.value, budget_hz - step.hz
    return value
