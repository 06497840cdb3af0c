"""Outages of a backhaul or a node as a two-state Markov chain, and what clients that try again do to the server.

Up and down times are exponential with means 1 / beta and 1 / alpha: up with probability alpha / (alpha + beta), and
over a step dt a state is kept by exp(-(alpha + beta) dt) (Gilbert 1960). Outages come in runs: one coin a request with
the same availability understates the longest.

A timeout is a latency too: who gives up has waited, and the server has worked for it.

    >>> up = outage_trace(1000, step_s=1.0, mean_up_s=60.0, mean_down_s=20.0, rng=rng)
    >>> tried = attempt(arrivals_s, latencies_s, up, step_s=1.0, timeout_s=2.0, backoff_s=1.0)
"""

import math
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, indicators, positive, share, vector


class Attempts(NamedTuple):
    """[n] each. served; latency_s: from arrival to the answer, or to giving up; tries: attempts made; reached: those
    that the server worked for, the ones that timed out among them: its load counts these."""

    served: np.ndarray
    latency_s: np.ndarray
    tries: np.ndarray
    reached: np.ndarray


def availability(*, mean_up_s: float, mean_down_s: float) -> float:
    """Share of the time up. Raises ValueError for negative means and where both are 0."""
    at_least(0, mean_up_s=mean_up_s, mean_down_s=mean_down_s)
    positive(mean_up_s_plus_mean_down_s=mean_up_s + mean_down_s)
    return mean_up_s / (mean_up_s + mean_down_s)


def outage_trace(num_steps: int, *, step_s: float, mean_up_s: float, mean_down_s: float, rng) -> np.ndarray:
    """bool [num_steps]: up at the times 0, step_s, 2 step_s ...; the first state is stationary.

    mean_down_s 0 is always up, mean_up_s 0 never. rng: numpy Generator, or a seed.
    """
    up_share = availability(mean_up_s=mean_up_s, mean_down_s=mean_down_s)
    positive(step_s=step_s)
    at_least(0, num_steps=num_steps)
    if mean_up_s == 0 or mean_down_s == 0:
        return np.full(num_steps, mean_down_s == 0)
    kept = math.exp(-step_s * (1 / mean_up_s + 1 / mean_down_s))
    after_down, after_up = up_share * (1 - kept), up_share + (1 - up_share) * kept
    draws = np.random.default_rng(rng).random(num_steps).tolist()
    trace, state = [], None
    for draw in draws:
        state = draw < (up_share if state is None else after_up if state else after_down)
        trace.append(state)
    return np.asarray(trace, bool)


def longest_outage_s(up, *, step_s: float) -> float:
    """The longest run of down steps, s. up: bool [T]."""
    edges = np.flatnonzero(np.concatenate([[True], indicators("up", up), [True]]))
    return float((np.diff(edges) - 1).max()) * step_s


def attempt(arrivals_s, latencies_s, up, *, step_s: float, timeout_s: float, backoff_s: float = 0.0) -> Attempts:
    """Requests that try again: attempt i of a request starts timeout_s + backoff_s after attempt i - 1.

    Args:
      arrivals_s: [n] >= 0.
      latencies_s: [n, 1 + retries], what each attempt would take with the link up.
      up: bool [T] of `outage_trace`; every attempt must start within it.

    An attempt over a link that is down at its start never reaches the server and costs the client the timeout; one that
    takes longer than timeout_s reaches it, costs the timeout, and its answer is thrown away.
    """
    arrivals, latencies = vector("arrivals_s", arrivals_s), np.asarray(latencies_s, np.float64)
    up = indicators("up", up)
    positive(step_s=step_s, timeout_s=timeout_s)
    at_least(0, backoff_s=backoff_s)
    if latencies.ndim != 2 or len(latencies) != len(arrivals) or not (latencies >= 0).all():
        raise ValueError(f"latencies_s must be [{len(arrivals)}, attempts], at least 0, got shape {latencies.shape}")
    starts = np.arange(latencies.shape[1]) * (timeout_s + backoff_s)  # [attempts] after arrival
    steps = np.floor((arrivals[:, None] + starts) / step_s).astype(np.int64)
    if steps.size and (steps.min() < 0 or steps.max() >= len(up)):
        raise ValueError(
            f"attempts start at {steps.min() * step_s:g} to {steps.max() * step_s:g} s, "
            f"the trace ends at {len(up) * step_s:g} s"
        )
    connected = up[steps]  # [n, attempts]
    good = connected & (latencies <= timeout_s)
    served = good.max(axis=1)
    last = np.where(served, good.argmax(axis=1), latencies.shape[1] - 1)
    rows = np.arange(len(arrivals))
    end = np.where(served, latencies[rows, last], timeout_s)
    made = np.arange(latencies.shape[1]) <= last[:, None]
    return Attempts(served, starts[last] + end, last + 1, (connected & made).sum(axis=1))


def expected_tries(timeout_probability: float, max_retries: int) -> float:
    """(1 - p^(r + 1)) / (1 - p): attempts a request where each one times out independently. The server's arrival rate
    is this times the requests'; the share that is never served is p^(r + 1)."""
    share("timeout_probability", timeout_probability)
    at_least(0, max_retries=max_retries)
    return float(sum(timeout_probability**i for i in range(max_retries + 1)))
