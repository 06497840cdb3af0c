"""Branch and bound equals brute force over all assignments, queues and memories included; greedy and the linear bound
stand on either side; the golden problem of three users."""

import itertools

import numpy as np
import pytest
from scipy import optimize

from fmfl_jax.services.latency import LogNormal
from fmfl_jax.services.qos.problem import REFUSED, Option, Place, Problem, Stream, background
from fmfl_jax.services.qos.queue import Exponential, Law
from fmfl_jax.services.qos.solve import branch_and_bound, greedy, lp_bound


def fixed(seconds, value, **more):
    return Option(model=f"m{value}", place="node", value=value, law=Law(prefill_s=seconds), **more)


def golden():
    """Facts, section 7: no queue."""
    options = tuple(fixed(s, q) for q, s in ((0.60, 0.05), (0.72, 0.30), (0.80, 0.65), (0.82, 0.72)))
    streams = tuple(
        Stream(name=f"s{i}", arrivals_per_s=0, payload_bits=400e3, spectral_efficiency=se, deadline_s=deadline)
        for i, (se, deadline) in enumerate([(4, 1), (2, 1), (1, 1.5)])
    )
    return Problem(
        streams=streams,
        options=(options,) * 3,
        places={"node": Place(name="node", memory_bytes=1e9)},
        bandwidth_hz=0.9e6,
    )


def random_problem(seed, *, streams=4, budget=3e5):
    """Two shared places and one's own, models that compete for memory, queues that are felt."""
    rng = np.random.default_rng(seed)
    places = {
        "cloud": Place(name="cloud", memory_bytes=10.0, replicas=2, background=background(0.4, 0.3), availability=0.98),
        "edge": Place(name="edge", memory_bytes=6.0),
        "client": Place(name="client", memory_bytes=3.0, own=True),
    }
    speed = {"cloud": 0.1, "edge": 0.3, "client": 1.0}
    models = {"small": (1.0, 0.5, 2.0), "middle": (2.0, 0.7, 3.0), "large": (4.0, 0.9, 5.0)}  # time, quality, memory
    users, options = [], []
    for i in range(streams):
        users.append(
            Stream(
                name=f"u{i}",
                arrivals_per_s=float(rng.uniform(0.05, 0.6)),
                payload_bits=float(rng.uniform(2e4, 2e5)),
                spectral_efficiency=float(rng.choice([1.0, 2.0, 4.0])),
                deadline_s=float(rng.uniform(1.0, 4.0)),
                weight=float(rng.choice([1.0, 2.0])),
            )
        )
        lengths = LogNormal(0.0, float(rng.uniform(0.0, 0.8)))
        options.append(
            tuple(
                Option(
                    model=model,
                    place=place,
                    value=quality - float(rng.uniform(0.0, 0.2)),
                    law=Law(prefill_s=0.02, token_s=speed[place] * seconds, lengths=lengths, limit=4.0),
                    fixed_s=0.06 if place == "cloud" else 0.01,
                    over_air=place != "client",
                    model_bytes=size,
                    request_bytes=0.5,
                )
                for place in places
                for model, (seconds, quality, size) in models.items()
            )
        )
    return Problem(streams=tuple(users), options=tuple(options), places=places, bandwidth_hz=budget)


def brute_force(problem):
    """The best value of all feasible assignments."""
    choices = [[REFUSED, *range(len(options))] for options in problem.options]
    found = (problem.evaluate(assignment) for assignment in itertools.product(*choices))
    return max(e.value for e in found if e.total_hz <= problem.bandwidth_hz * (1 + 1e-9))


def test_golden_three_users():
    problem = golden()
    for solution in (branch_and_bound(problem), greedy(problem)):
        assert solution.assignment == (1, 1, 2)
        assert solution.value == pytest.approx(2.24)
        assert solution.evaluation.bandwidth_hz / 1e3 == pytest.approx([142.857, 285.714, 470.588], abs=5e-4)
    assert branch_and_bound(problem).proven
    equal = [problem.evaluate(a).bandwidth_hz for a in itertools.product(range(4), repeat=3)]
    values = [problem.evaluate(a).value for a in itertools.product(range(4), repeat=3)]
    assert max(v for v, hz in zip(values, equal) if max(hz) <= 0.3e6) == pytest.approx(2.12)
    assert lp_bound(problem) >= 2.24


def test_without_queues_it_is_an_integer_program():
    """HiGHS's branch and cut on the golden problem, with other budgets."""
    base = golden()
    hz = np.asarray([[base.least_hz(i, o, base.alone_s(i, o)) for o in base.options[i]] for i in range(3)])
    value = np.asarray([[o.value for o in base.options[0]]] * 3)
    one = np.kron(np.eye(3), np.ones(4))
    for budget in (0.3e6, 0.6e6, 0.75e6, 1.2e6):
        found = optimize.milp(
            -value.ravel(),
            constraints=[
                optimize.LinearConstraint(hz.ravel()[None], ub=budget),
                optimize.LinearConstraint(one, ub=1),
            ],
            integrality=np.ones(12),
            bounds=(0, 1),
        )
        problem = Problem(streams=base.streams, options=base.options, places=base.places, bandwidth_hz=budget)
        assert branch_and_bound(problem).value == pytest.approx(-found.fun)
        assert lp_bound(problem) >= -found.fun - 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_branch_and_bound_is_brute_force_and_lies_between_greedy_and_the_bound(seed):
    problem = random_problem(seed, streams=3, budget=1.2e5)
    exact = branch_and_bound(problem)
    assert exact.proven and exact.evaluation.total_hz <= problem.bandwidth_hz * (1 + 1e-9)
    assert exact.value == pytest.approx(brute_force(problem))
    assert greedy(problem).value <= exact.value + 1e-9
    assert lp_bound(problem) >= exact.value - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_equal_streams_are_no_shortcut_past_the_optimum(seed):
    """Of two equal streams one may be served better than the other."""
    one = random_problem(seed, streams=2)
    few = [options[::2] for options in one.options]
    problem = Problem(
        streams=(one.streams[0], one.streams[1]) * 2,
        options=(few[0], few[1]) * 2,
        places=one.places,
        bandwidth_hz=1e5,
    )
    exact = branch_and_bound(problem)
    assert exact.value == pytest.approx(brute_force(problem))
    assert exact.evaluation.total_hz <= problem.bandwidth_hz * (1 + 1e-9)


def test_greedy_is_not_always_the_optimum_and_an_early_stop_says_so():
    """A cheap small gain first, and the large one no longer fits."""
    stream = lambda i, bits: Stream(
        name=f"s{i}", arrivals_per_s=0, payload_bits=bits, spectral_efficiency=1, deadline_s=1.1
    )
    problem = Problem(
        streams=(stream(0, 1e5), stream(1, 9e5)),
        options=((fixed(0.1, 0.2),), (fixed(0.1, 0.9),)),
        places={"node": Place(name="node", memory_bytes=1.0)},
        bandwidth_hz=0.95e6,
    )
    assert greedy(problem).value == pytest.approx(0.2)
    assert branch_and_bound(problem).value == pytest.approx(0.9)
    assert not branch_and_bound(random_problem(0), max_nodes=3).proven


def draw_services(law, n, rng):
    if isinstance(law, Exponential):
        return rng.exponential(law.mean_s, n)
    tokens = np.minimum(rng.lognormal(law.lengths.mu, law.lengths.sigma, n), law.limit)
    return law.prefill_s + law.token_s * tokens


@pytest.mark.parametrize("seed", [0, 5])
def test_the_chosen_plan_meets_its_deadlines_in_a_simulation(seed):
    """Poisson requests at one replica of every place, first come, first served; an outage is a miss."""
    problem, rng, n = random_problem(seed, streams=6, budget=4e5), np.random.default_rng(seed), 300_000
    solution = branch_and_bound(problem)
    served = [(i, problem.options[i][o]) for i, o in enumerate(solution.assignment) if o != REFUSED]
    shared = {option.place for _, option in served if not problem.places[option.place].own}
    assert len(served) >= 4 and shared
    for place in (problem.places[name] for name in shared):
        here = [(i, option) for i, option in served if option.place == place.name]
        laws = [option.law for _, option in here]
        rates = [problem.streams[i].arrivals_per_s / place.replicas for i, _ in here]
        if place.background is not None:
            laws, rates = [*laws, place.background.law], [*rates, place.background.arrivals_per_s]
        kind = rng.choice(len(laws), n, p=np.asarray(rates) / sum(rates))
        service = np.choose(kind, [draw_services(law, n, rng) for law in laws])
        walk = np.concatenate([[0.0], np.cumsum(service - rng.exponential(1 / sum(rates), n))[:-1]])
        sojourn = walk - np.minimum.accumulate(np.minimum(walk, 0.0)) + service
        for k, (i, option) in enumerate(here):
            stream = problem.streams[i]
            air = stream.payload_bits / (stream.spectral_efficiency * solution.evaluation.bandwidth_hz[i])
            in_time = np.mean(sojourn[kind == k] + option.fixed_s + air <= stream.deadline_s) * place.availability
            # The least band leaves just the level; a service of one length has no other share in time.
            assert in_time >= 0.95 - 0.005
            assert in_time <= 0.95 + 0.005 or option.law.lengths.sigma < 0.1


def test_more_streams_never_help_the_others():
    """What branches are cut by."""
    problem, rng = random_problem(7, streams=6), np.random.default_rng(0)
    for _ in range(10):
        assignment = rng.integers(-1, len(problem.options[0]), 6)
        fewer = np.where(rng.random(6) < 0.5, assignment, REFUSED)
        more, less = problem.evaluate(assignment.tolist()), problem.evaluate(fewer.tolist())
        served = fewer != REFUSED
        assert (less.bandwidth_hz[served] <= more.bandwidth_hz[served] * (1 + 1e-2)).all()


def test_memory_load_outage_and_deadline_forbid():
    problem = random_problem(3)
    everyone = [2] * 4  # the large model at the cloud
    assert np.isfinite(problem.alone_s(0, problem.options[0][2]))
    names = [(o.model, o.place) for o in problem.options[0]]
    two_models = [names.index(("large", "edge")), names.index(("middle", "edge")), REFUSED, REFUSED]
    assert problem.evaluate(two_models).total_hz == np.inf  # 5 + 3 + .5 of 6
    busy = Problem(
        streams=tuple(
            Stream(name=s.name, arrivals_per_s=9.0, payload_bits=1.0, spectral_efficiency=1.0, deadline_s=1e9)
            for s in problem.streams
        ),
        options=problem.options,
        places=problem.places,
        bandwidth_hz=1e6,
    )
    assert busy.evaluate(everyone).total_hz == np.inf
    assert branch_and_bound(busy).value == pytest.approx(brute_force(busy))
    down = dict(problem.places) | {"cloud": Place(name="cloud", memory_bytes=10.0, availability=0.95)}
    gone = Problem(streams=problem.streams, options=problem.options, places=down, bandwidth_hz=1e6)
    assert gone.alone_s(0, problem.options[0][0]) == np.inf
    nothing = Problem(streams=problem.streams, options=((),) * 4, places=problem.places, bandwidth_hz=1e6)
    assert branch_and_bound(nothing).assignment == (REFUSED,) * 4 and lp_bound(nothing) == 0


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match=r"deadline_s=-1\.0: it lies before now"):
        Stream(name="s", arrivals_per_s=0, payload_bits=1, spectral_efficiency=1, deadline_s=-1.0)
    with pytest.raises(ValueError, match=r"load=1\.1: requests come faster"):
        background(1.1, 1.0)
    with pytest.raises(ValueError, match="options at unknown places: node"):
        Problem(streams=golden().streams, options=golden().options, places={}, bandwidth_hz=1e6)
    with pytest.raises(ValueError, match="3 streams with options for 0"):
        Problem(streams=golden().streams, options=(), places={}, bandwidth_hz=1e6)
    with pytest.raises(ValueError, match=r"level=1\.0"):
        Problem(streams=(), options=(), places={}, bandwidth_hz=1e6, level=1.0)
    with pytest.raises(ValueError, match="availability must be in"):
        Place(name="p", memory_bytes=1.0, availability=1.5)
