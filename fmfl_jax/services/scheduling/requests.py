"""Requests on a time line, what became of them, and the figures that people ask for.

>>> requests = Requests(arrivals_s=arrivals_s, deadlines_s=arrivals_s + 2.0)
>>> outcome = serve_jobs(requests, work_s, Fcfs())                            # jobs.py
>>> summarize(requests, outcome).p95_s
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, same_length, vector
from fmfl_jax.services.scheduling.event_loops import NUM_ATTEMPTS, Clients, new_clients

_BATCHES = 40  # of batch means: few enough to be long against the queue's memory, enough for a variance


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """arrivals_s float64 [n], ascending, from 0. priorities int [n]: 0 comes first. deadlines_s [n]: on the same clock,
    infinite where there is none. A single number of either is for all.

    Raises ValueError for arrivals that go back, deadlines before the arrival and unequal lengths.
    """

    arrivals_s: np.ndarray
    priorities: np.ndarray = dataclasses.field(default_factory=lambda: np.asarray(0))
    deadlines_s: np.ndarray = dataclasses.field(default_factory=lambda: np.asarray(np.inf))

    def __post_init__(self):
        arrivals_s = vector("arrivals_s", self.arrivals_s)
        n = same_length(arrivals_s=arrivals_s)
        every = lambda values: np.full(n, values) if values.ndim == 0 else values
        priorities = every(np.asarray(self.priorities))
        deadlines_s = every(np.asarray(self.deadlines_s, np.float64))
        same_length(arrivals_s=arrivals_s, priorities=priorities, deadlines_s=deadlines_s)
        if arrivals_s[0] < 0 or (np.diff(arrivals_s) < 0).any():
            raise ValueError("arrivals_s must ascend from 0")
        if not np.issubdtype(priorities.dtype, np.integer):
            raise ValueError(f"priorities must be whole numbers, got {priorities.dtype}")
        late = np.flatnonzero(~(deadlines_s > arrivals_s))
        if late.size:
            i = late[0]
            raise ValueError(
                f"request {i} arrives at {arrivals_s[i]:g} s with its deadline at {deadlines_s[i]:g} s: expected a "
                "deadline after the arrival"
            )
        for name, array in (("arrivals_s", arrivals_s), ("priorities", priorities), ("deadlines_s", deadlines_s)):
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.arrivals_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields(may_be_infinite=("timeout_s",))
class Patience:
    """A client gives up timeout_s after each attempt (infinite: never) and tries again backoff_s later, max_retries
    times. drops: the server is told, and takes who has left out of its queue; else it works for them all the same."""

    timeout_s: float = np.inf
    backoff_s: float = 0.0
    max_retries: int = 0
    drops: bool = False

    def __post_init__(self):
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}: expected above 0")
        at_least(0, backoff_s=self.backoff_s, max_retries=self.max_retries)

    def clients(self, requests: Requests) -> Clients:
        """For an event loop."""
        return new_clients(requests.arrivals_s, self.timeout_s, self.backoff_s, self.max_retries)


class Outcome(NamedTuple):
    """Of each request [n]: answered bool; begin_s: when its last attempt was first served (infinite: never); end_s: of
    the answer, or of giving up; tries. Of the server: attempts that reached it, busy_s summed over its servers, last_s
    when it was done."""

    answered: np.ndarray
    begin_s: np.ndarray
    end_s: np.ndarray
    tries: np.ndarray
    attempts: int
    busy_s: float
    last_s: float


def last_attempts(clients: Clients) -> np.ndarray:
    """int64 [n]: the last attempt of each request, which alone can have been answered."""
    request = clients.request[: clients.marks[NUM_ATTEMPTS]]
    last = np.zeros(len(clients.arrivals_s), np.int64)
    last[request] = np.arange(len(request))  # of a repeated index the last value stays
    return last


def outcome_of(clients: Clients, busy_s: float) -> Outcome:
    """What an event loop left."""
    last, attempts = last_attempts(clients), int(clients.marks[NUM_ATTEMPTS])
    gives_up_s, finish_s = clients.start_s[last] + clients.timeout_s, clients.finish_s[last]
    done_s = clients.finish_s[:attempts]
    return Outcome(
        answered=finish_s <= gives_up_s,
        begin_s=clients.begin_s[last],
        end_s=np.minimum(finish_s, gives_up_s),
        tries=clients.tries[last] + 1,
        attempts=attempts,
        busy_s=float(busy_s),
        last_s=float(done_s[np.isfinite(done_s)].max(initial=0.0)),
    )


class Summary(NamedTuple):
    """Latency from arrival to the answer or to giving up, s; worst_s the longest. missed: share of the requests with a
    deadline that had no answer by it (None: no deadlines); gave_up: share never answered; tries a request; utilization:
    of the servers until they were done; answers_per_s."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    worst_s: float
    missed: float | None
    gave_up: float
    tries: float
    utilization: float
    answers_per_s: float


def summarize(requests: Requests, outcome: Outcome, *, num_servers: int = 1) -> Summary:
    """Over all requests."""
    latency_s = outcome.end_s - requests.arrivals_s
    p50, p95, p99 = np.percentile(latency_s, [50, 95, 99])
    due = np.isfinite(requests.deadlines_s)
    in_time = outcome.answered & (outcome.end_s <= requests.deadlines_s)
    span_s = max(outcome.last_s - requests.arrivals_s[0], np.finfo(float).tiny)
    return Summary(
        mean_s=float(latency_s.mean()),
        p50_s=float(p50),
        p95_s=float(p95),
        p99_s=float(p99),
        worst_s=float(latency_s.max()),
        missed=float(1 - in_time[due].mean()) if due.any() else None,
        gave_up=float(1 - outcome.answered.mean()),
        tries=float(outcome.tries.mean()),
        utilization=outcome.busy_s / (num_servers * span_s),
        answers_per_s=float(outcome.answered.sum() / span_s),
    )


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    standard_error: float


def steady_mean(values, *, warm_up: float = 0.1) -> Estimate:
    """Mean of a stationary sequence [n] without its first `warm_up` share, with a standard error by batch means: waits
    are correlated, means of long batches nearly not (Law & Kelton, Simulation Modeling and Analysis).

    Raises ValueError where fewer than 40 values are left.
    """
    values = vector("values", values)
    values = values[int(warm_up * len(values)) :]
    if len(values) < _BATCHES:
        raise ValueError(f"{len(values)} values after the warm-up: at least {_BATCHES} are needed")
    batch = len(values) // _BATCHES
    means = values[-_BATCHES * batch :].reshape(_BATCHES, batch).mean(axis=1)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / np.sqrt(_BATCHES)))


def check_load(load: float) -> None:
    """Raises ValueError where work arrives as fast as it can be done, or faster: the queue has no steady state."""
    if not load < 1:
        raise ValueError(f"the queue is unstable: its load is {load:.3f}, and waits grow without end from 1 on")
