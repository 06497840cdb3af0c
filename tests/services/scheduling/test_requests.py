"""Requests refuse what cannot be; summaries and standard errors."""

import numpy as np
import pytest

from fmfl_jax.services.scheduling.requests import Outcome, Patience, Requests, check_load, steady_mean, summarize


def test_requests_refuse_what_cannot_be():
    for arrivals_s in ([1.0, 0.5], [-1.0, 0.0]):
        with pytest.raises(ValueError, match="arrivals_s must ascend from 0"):
            Requests(arrivals_s=np.array(arrivals_s))
    with pytest.raises(ValueError, match="request 1 arrives at 2 s with its deadline at 1.5 s"):
        Requests(arrivals_s=np.array([0.0, 2.0]), deadlines_s=np.array([1.0, 1.5]))
    with pytest.raises(ValueError, match="arrivals_s 2, priorities 1, deadlines_s 2"):
        Requests(arrivals_s=np.array([0.0, 2.0]), priorities=np.array([1]))
    with pytest.raises(ValueError, match="whole numbers"):
        Requests(arrivals_s=np.array([0.0]), priorities=np.array([0.5]))
    with pytest.raises(ValueError, match="arrivals_s is empty"):
        Requests(arrivals_s=np.array([]))
    with pytest.raises(ValueError, match="timeout_s=0"):
        Patience(timeout_s=0)


def test_a_summary_by_hand():
    requests = Requests(arrivals_s=np.array([1.0, 2.0, 3.0, 4.0]), deadlines_s=np.array([2.0, 9.0, 3.5, np.inf]))
    outcome = Outcome(
        answered=np.array([True, True, False, True]),
        begin_s=np.array([1.0, 3.0, np.inf, 4.0]),
        end_s=np.array([3.0, 4.0, 3.2, 6.0]),
        tries=np.array([1, 1, 3, 1]),
        attempts=6,
        busy_s=4.0,
        last_s=6.0,
    )
    found = summarize(requests, outcome, num_servers=2)
    assert found.missed == pytest.approx(2 / 3)  # late; in time; never answered, though its end is before its deadline
    assert (found.mean_s, found.worst_s, found.gave_up, found.tries) == (pytest.approx(1.55), 2.0, 0.25, 1.5)
    assert (found.utilization, found.answers_per_s) == (0.4, 0.6)
    assert found.p50_s == pytest.approx(2.0)


def test_standard_errors_cover_the_mean_of_correlated_values():
    """First-order autoregression with coefficient .9: independent values' formula would cover 30 %, not 95."""
    rng, n, covered, naive = np.random.default_rng(0), 20_000, 0, 0
    for _ in range(200):
        noise = rng.standard_normal(n)
        values = np.empty(n)
        state = 0.0
        for start in range(0, n, 1000):  # the recursion as a short convolution, block by block
            powers = 0.9 ** np.arange(1, 1001)
            block = np.convolve(noise[start : start + 1000], 0.9 ** np.arange(200))[:1000]
            values[start : start + 1000] = block + state * powers
            state = values[start + 999]
        estimate = steady_mean(values)
        covered += abs(estimate.mean) < 1.96 * estimate.standard_error
        naive += abs(values.mean()) < 1.96 * values.std() / np.sqrt(n)
    assert 180 <= covered <= 198 and naive < 120
    with pytest.raises(ValueError, match="at least 40"):
        steady_mean(np.ones(30))


def test_load():
    check_load(0.999)
    for load in (1.0, 1.7, np.nan):
        with pytest.raises(ValueError, match=f"unstable: its load is {load:.3f}"):
            check_load(load)
