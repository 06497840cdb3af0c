"""Percentiles of queues against closed forms (M/M/1, M/D/1), the mean wait, and Lindley's recursion."""

import math

import numpy as np
import pytest

from fmfl_jax.services.latency import LogNormal
from fmfl_jax.services.qos.queue import Exponential, Flow, Law, Queue, mm1_sojourn_s

LENGTHS = LogNormal(4.0, 1.0)
ANSWERS = Law(prefill_s=0.1, token_s=0.02, lengths=LENGTHS, limit=256)


@pytest.mark.parametrize("load", [0.05, 0.6, 0.95])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_exponential_services_give_the_closed_form_of_mm1(load, level):
    queue = Queue([Flow(Exponential(0.5), load / 0.5)])
    expected = mm1_sojourn_s(arrivals_per_s=load / 0.5, mean_s=0.5, level=level)
    assert expected == pytest.approx(-math.log(1 - level) / (1 / 0.5 - load / 0.5))
    assert queue.sojourn_s(Exponential(0.5), level) == pytest.approx(expected, rel=2e-3)
    waits = max(math.log(load / (1 - level)), 0.0) / (2 - load / 0.5)  # P(W > t) = load e^(-(mu - lambda) t)
    assert queue.wait_s(level) == pytest.approx(waits, abs=3e-3 * expected)


def test_constant_services_give_erlangs_md1():
    """P(W <= t) = (1 - l) sum_k (l (k - t))^k / k! e^(l (t - k)), k up to floor(t), services of 1 s."""
    load = 0.7

    def cdf(t):
        terms = [(load * (k - t)) ** k / math.factorial(k) * math.exp(load * (t - k)) for k in range(math.floor(t) + 1)]
        return (1 - load) * sum(terms)

    queue = Queue([Flow(Law(prefill_s=1.0), load)])
    for level in (0.6, 0.9, 0.95):
        assert cdf(queue.wait_s(level)) == pytest.approx(level, abs=2e-3)
        assert queue.sojourn_s(Law(prefill_s=1.0), level) == pytest.approx(1 + queue.wait_s(level), rel=2e-3)


def test_golden_mean_wait_and_a_mixture_by_lindleys_recursion():
    clipped = Queue([Flow(ANSWERS, 0.2)])
    assert clipped.mean_wait_s == pytest.approx(0.722809, abs=5e-7)
    short = Law(prefill_s=0.3)
    flows = [Flow(ANSWERS, 0.3), Flow(short, 0.5)]
    queue, rng = Queue(flows), np.random.default_rng(0)
    n = 400_000
    long = rng.random(n) < 0.3 / 0.8
    tokens = np.minimum(rng.lognormal(LENGTHS.mu, LENGTHS.sigma, n), 256)
    service = np.where(long, 0.1 + 0.02 * tokens, 0.3)
    # W_(i+1) = max(W_i + S_i - A_i, 0) is the walk above its least value so far.
    walk = np.concatenate([[0.0], np.cumsum(service - rng.exponential(1 / 0.8, n))[:-1]])
    waits = walk - np.minimum.accumulate(np.minimum(walk, 0.0))
    assert queue.mean_wait_s == pytest.approx(waits.mean(), rel=0.05)
    for law, of in ((ANSWERS, long), (short, ~long)):
        for level in (0.5, 0.95):
            simulated = np.quantile((waits + service)[of], level)
            assert queue.sojourn_s(law, level) == pytest.approx(simulated, rel=0.03)
    # Of a law that does not queue here itself, the same wait.
    other = Law(prefill_s=5.0)
    assert queue.sojourn_s(other, 0.95) == pytest.approx(5 + queue.wait_s(0.95), rel=3e-3)


def test_without_arrivals_the_percentile_is_the_services_own():
    queue = Queue([Flow(ANSWERS, 0.0)])
    drawn = 0.1 + 0.02 * np.minimum(np.random.default_rng(1).lognormal(4.0, 1.0, 200_000), 256)
    for level in (0.3, 0.9, 0.99):
        assert queue.sojourn_s(ANSWERS, level) == pytest.approx(np.quantile(drawn, level), rel=0.01)
        assert Queue([Flow(ANSWERS, 1e-6)]).sojourn_s(ANSWERS, level) == pytest.approx(
            queue.sojourn_s(ANSWERS, level), rel=3e-3
        )
    assert queue.wait_s(0.95) == 0 and queue.sojourn_s(Law(prefill_s=0.3), 0.95) == 0.3


def test_percentiles_grow_with_every_flow_and_an_overload_is_said():
    flows = [Flow(ANSWERS, 0.1), Flow(Law(prefill_s=0.5), 0.4), Flow(Exponential(0.2), 1.0)]
    found = [Queue(flows[:n]).sojourn_s(ANSWERS, 0.95) for n in (1, 2, 3)]
    assert found == sorted(found) and found[0] < found[2]
    with pytest.raises(ValueError, match=r"load=1\.200: requests come faster than they are served"):
        Queue([Flow(Law(prefill_s=0.5), 2.4)])
    with pytest.raises(ValueError, match=r"load=1\.000"):
        mm1_sojourn_s(arrivals_per_s=2.0, mean_s=0.5, level=0.95)
    with pytest.raises(ValueError, match="level must be in"):
        Queue(flows).sojourn_s(ANSWERS, 1.0)
    with pytest.raises(ValueError, match="arrivals_per_s must be at least 0"):
        Queue([Flow(ANSWERS, -1.0)])
    with pytest.raises(ValueError, match="seconds must be above 0"):
        Law(prefill_s=0.0)
