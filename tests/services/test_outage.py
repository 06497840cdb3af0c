"""Outages: the chain's stationary share and run lengths, retries against a plain loop, and the load they make."""

import numpy as np
import pytest

from fmfl_jax.services import outage as o


def runs_of(up, state):
    """Lengths of the runs of a state, those at the two ends left out."""
    edges = np.flatnonzero(np.diff(up.astype(int)))
    lengths, states = np.diff(edges), up[edges[:-1] + 1]
    return lengths[states == state]


def test_the_chain_has_the_means_and_the_share_it_was_given():
    up = o.outage_trace(200_000, step_s=0.5, mean_up_s=30.0, mean_down_s=10.0, rng=0)
    assert o.availability(mean_up_s=30.0, mean_down_s=10.0) == 0.75
    assert up.mean() == pytest.approx(0.75, abs=0.02)
    # a state seen every dt is left with probability 1 - P(same after dt): runs are geometric
    kept = np.exp(-0.5 * (1 / 30 + 1 / 10))
    for state, leaves in ((True, 0.25 * (1 - kept)), (False, 0.75 * (1 - kept))):
        lengths = runs_of(up, state)
        assert lengths.mean() == pytest.approx(1 / leaves, rel=4 / np.sqrt(len(lengths)))


def test_the_first_state_is_stationary():
    rng = np.random.default_rng(4)
    first = [o.outage_trace(1, step_s=0.1, mean_up_s=30.0, mean_down_s=20.0, rng=rng)[0] for _ in range(4000)]
    assert np.mean(first) == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / 4000))


def test_outages_are_correlated_a_coin_understates_the_longest():
    up = o.outage_trace(20_000, step_s=1.0, mean_up_s=60.0, mean_down_s=20.0, rng=1)
    coin = np.random.default_rng(1).random(20_000) < 0.75
    assert o.longest_outage_s(up, step_s=1.0) > 4 * o.longest_outage_s(coin, step_s=1.0)
    assert o.longest_outage_s([0, 1, 0, 0, 1], step_s=2.0) == 4 and o.longest_outage_s([1, 1], step_s=2.0) == 0


def test_always_and_never_up():
    assert o.outage_trace(5, step_s=1.0, mean_up_s=1.0, mean_down_s=0.0, rng=0).all()
    assert not o.outage_trace(5, step_s=1.0, mean_up_s=0.0, mean_down_s=1.0, rng=0).any()
    with pytest.raises(ValueError, match="must be above 0"):
        o.availability(mean_up_s=0.0, mean_down_s=0.0)


def test_attempts_against_a_plain_loop():
    rng = np.random.default_rng(2)
    up = o.outage_trace(400, step_s=0.5, mean_up_s=5.0, mean_down_s=5.0, rng=rng)
    arrivals, latencies = rng.random(300) * 150, rng.exponential(1.0, size=(300, 4))
    found = o.attempt(arrivals, latencies, up, step_s=0.5, timeout_s=1.5, backoff_s=0.7)
    for i in range(300):
        served, waited, tries, reached = False, 0.0, 0, 0
        for latency in latencies[i]:
            waited += 0.7 if tries else 0.0
            tries += 1
            connected = up[int((arrivals[i] + waited) / 0.5)]
            reached += connected
            if connected and latency <= 1.5:
                served, waited = True, waited + latency
                break
            waited += 1.5
        assert found.served[i] == served and found.latency_s[i] == pytest.approx(waited)
        assert (found.tries[i], found.reached[i]) == (tries, reached)


def test_load_of_retries_is_the_closed_form_where_timeouts_are_independent():
    rng = np.random.default_rng(3)
    latencies = np.where(rng.random((40_000, 3)) < 0.4, 9.0, 1.0)
    found = o.attempt(np.zeros(40_000), latencies, np.ones(10), step_s=1.0, timeout_s=2.0)
    expected = o.expected_tries(0.4, 2)
    assert expected == pytest.approx(1 + 0.4 + 0.16)
    assert found.reached.mean() == pytest.approx(expected, rel=0.01)  # timed out, but worked for
    assert 1 - found.served.mean() == pytest.approx(0.4**3, abs=0.005)
    assert found.latency_s[~found.served] == pytest.approx(6.0)


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="the trace ends at 2 s"):
        o.attempt([3.0], [[1.0]], [1, 1], step_s=1.0, timeout_s=1.0)
    with pytest.raises(ValueError, match=r"latencies_s must be \[1, attempts\]"):
        o.attempt([0.0], [1.0], [1], step_s=1.0, timeout_s=1.0)
