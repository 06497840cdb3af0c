"""Simulated waits within 4 standard errors of theory, four jobs by hand, and the bound that ageing gives."""

import numpy as np
import pytest
from scipy import stats

from fmfl_jax.services.scheduling import closed_forms as forms
from fmfl_jax.services.scheduling.arrivals import Poisson
from fmfl_jax.services.scheduling.jobs import ageing_bound_s, job_load, serve_jobs
from fmfl_jax.services.scheduling.policies import EarliestDeadline, Fcfs, Priority, Shortest
from fmfl_jax.services.scheduling.requests import Patience, Requests, steady_mean, summarize

N = 200_000


def agrees(values, expected):
    estimate = steady_mean(values)
    assert 0 < estimate.standard_error < 0.05 * expected  # or agreement says little
    assert abs(estimate.mean - expected) < 4 * estimate.standard_error, f"{estimate} for {expected}"


def waits_s(rate_per_s, draw_work, policy, *, seed=0, num_servers=1, priorities=np.asarray(0)):
    """Waits, sojourns and work of N Poisson requests."""
    rng = np.random.default_rng(seed)
    arrivals_s = Poisson(rate_per_s).draw(N, rng)
    requests = Requests(arrivals_s=arrivals_s, priorities=priorities)
    work_s = draw_work(rng)
    outcome = serve_jobs(requests, work_s, policy, num_servers=num_servers)
    assert outcome.answered.all() and outcome.busy_s == pytest.approx(work_s.sum())
    return outcome.begin_s - arrivals_s, outcome.end_s - arrivals_s, work_s


def exponential(mean_s=1.0):
    return lambda rng: rng.exponential(mean_s, N)


def test_first_come_first_served():
    agrees(waits_s(0.6, exponential(), Fcfs())[0], 1.5)  # M/M/1
    agrees(waits_s(0.6, lambda rng: np.ones(N), Fcfs())[0], 0.75)  # M/D/1
    # M/G/1 with squared coefficient of variation 2: two exponentials with balanced means
    p = 0.5 * (1 + np.sqrt(1 / 3))
    mixed = lambda rng: rng.exponential(0.5 / (2 * np.where(rng.random(N) < p, p, 1 - p)))
    wait_s, _, work_s = waits_s(1.2, mixed, Fcfs())
    assert work_s.var() / work_s.mean() ** 2 == pytest.approx(2, abs=0.05)
    agrees(wait_s, 1.125)


def test_several_servers():
    for servers, load in ((3, 2.0), (8, 6.0)):
        wait_s, _, _ = waits_s(load, exponential(), Fcfs(), num_servers=servers)
        agrees(wait_s > 0, forms.erlang_c(servers, load))
        agrees(wait_s, forms.mmc_wait_s(load, 1.0, servers))


def classes():
    """Three classes by rates .1 .2 .3 with exponential work of means .5, 1, 1.5."""
    of = np.random.default_rng(9).choice(3, N, p=[1 / 6, 2 / 6, 3 / 6])
    return of, lambda rng: rng.exponential(np.asarray([0.5, 1.0, 1.5])[of])


def test_priorities_and_the_conservation_law():
    of, work = classes()
    moments = [0.1, 0.2, 0.3], [0.5, 1.0, 1.5], [0.5, 2.0, 4.5]
    wait_s, _, _ = waits_s(0.6, work, Priority(), priorities=of)
    for k, expected in enumerate(forms.priority_waits_s(*moments)):
        agrees(wait_s[of == k], expected)
    _, sojourn_s, _ = waits_s(0.6, work, Priority(preemptive=True), priorities=of)
    for k, expected in enumerate(forms.preemptive_sojourns_s(*moments)):
        agrees(sojourn_s[of == k], expected)
    # sum rho_k W_k is the same in any order that does not know the work
    means = np.asarray([0.5, 1.0, 1.5])[of]
    for policy, kinds in ((Fcfs(), of), (Priority(), of), (Priority(), 2 - of)):
        wait_s, _, _ = waits_s(0.6, work, policy, priorities=kinds)
        agrees(0.6 * means * wait_s, forms.conserved_wait_s(*moments))


def test_shortest_first_and_srpt():
    agrees(waits_s(0.8, exponential(), Shortest())[0], 1.882219)
    agrees(waits_s(0.8, exponential(), Shortest(preemptive=True))[1], 2.352773)
    uniform = stats.uniform(0.2, 1.6)
    draw = lambda rng: uniform.rvs(N, random_state=rng)
    agrees(waits_s(0.8, draw, Shortest())[0], forms.shortest_first_wait_s(0.8, uniform))
    agrees(waits_s(0.8, draw, Shortest(preemptive=True))[1], forms.srpt_sojourn_s(0.8, uniform))
    # a predictor without any skill leaves FCFS's mean, one with some lies between
    noisy = [waits_s(0.8, exponential(), Shortest(noise=noise))[0].mean() for noise in (0.3, 1.0, 30.0)]
    assert 1.85 < noisy[0] < noisy[1] < noisy[2] and noisy[2] == pytest.approx(4.0, rel=0.1)


def test_four_jobs_by_hand():
    requests = Requests(arrivals_s=np.array([0.0, 0, 1, 2]), deadlines_s=np.array([9.0, 4, 5, 11]))
    for policy, late, mean_s in ((Fcfs(), 2, 6.75), (EarliestDeadline(), 0, 6.0), (Shortest(), 2, 5.0)):
        summary = summarize(requests, serve_jobs(requests, np.array([4.0, 3, 2, 1]), policy))
        assert summary.mean_s == mean_s and summary.missed == late / 4


def test_no_wait_exceeds_what_ageing_promises():
    """Nearly overloaded, with one job so long that shortest first alone starves it."""
    rng = np.random.default_rng(3)
    arrivals_s = Poisson(0.95).draw(20_000, rng)
    work_s = rng.exponential(1.0, 20_000)
    work_s[500] = 40.0
    requests = Requests(arrivals_s=arrivals_s)
    for noise, ageing in ((0.0, 0.5), (0.8, 0.1), (0.0, 0.02)):
        policy = Shortest(noise=noise, ageing=ageing)
        predicted_s = policy.order(requests, work_s, np.random.default_rng(7)).base
        wait_s = serve_jobs(requests, work_s, policy, rng=7).begin_s - arrivals_s
        bound_s = ageing_bound_s(arrivals_s, work_s, predicted_s, ageing)
        assert (wait_s <= bound_s * (1 + 1e-9) + 1e-9).all()
        assert ((wait_s > 0.99 * bound_s) & (bound_s > 2)).sum() >= 10  # it is reached
    starved_s = (serve_jobs(requests, work_s, Shortest()).begin_s - arrivals_s)[500]
    aged_s = (serve_jobs(requests, work_s, Shortest(ageing=0.5)).begin_s - arrivals_s)[500]
    assert starved_s > 3 * aged_s


def test_clients_who_try_again_are_load():
    """A queue at .8 with one burst of 100 s of work. Clients who leave after 30 s and try once more keep a server that
    works for all of them overloaded to the end; one that drops who has left gets out of it, and so does one whose
    clients try only once."""
    rng = np.random.default_rng(4)
    arrivals_s = np.sort(np.concatenate([Poisson(0.8).draw(20_000, rng), np.full(100, 500.0)]))
    requests, work_s = Requests(arrivals_s=arrivals_s), rng.exponential(1.0, 20_100)

    def served(**patience):
        return summarize(requests, serve_jobs(requests, work_s, Fcfs(), patience=Patience(**patience)))

    patient, once = served(), served(timeout_s=30.0)
    stuck = served(timeout_s=30.0, backoff_s=1.0, max_retries=1)
    freed = served(timeout_s=30.0, backoff_s=1.0, max_retries=1, drops=True)
    assert patient.gave_up == 0 and patient.tries == once.tries == 1
    assert stuck.gave_up > 0.9 and stuck.tries > 1.9 and stuck.utilization > 0.99
    assert once.gave_up < 0.05 and freed.gave_up < 0.05 and freed.utilization < 0.85


def test_bad_input():
    requests = Requests(arrivals_s=np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="work_s must be above 0, got 0"):
        serve_jobs(requests, [1.0, 0.0], Fcfs())
    with pytest.raises(ValueError, match="arrivals_s 2, work_s 3"):
        serve_jobs(requests, [1.0, 1.0, 1.0], Fcfs())
    assert job_load(1.5, 1.0, num_servers=2) == 0.75
    with pytest.raises(ValueError, match="unstable: its load is 1.500"):
        job_load(1.5, 1.0)
