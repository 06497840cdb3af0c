"""Requests at a placement that serves one job a server: an event simulator for every policy.

>>> requests = Requests(arrivals_s=Poisson(0.8).draw(1_000_000, rng))
>>> outcome = serve_jobs(requests, rng.exponential(1.0, 1_000_000), Shortest(noise=0.5, ageing=0.1))
>>> summarize(requests, outcome)
"""

import numpy as np

from fmfl_jax.services.checks import at_least, positive, same_length, vector
from fmfl_jax.services.scheduling.event_loops import run_servers
from fmfl_jax.services.scheduling.policies import Policy
from fmfl_jax.services.scheduling.requests import Outcome, Patience, Requests, check_load, outcome_of


def serve_jobs(
    requests: Requests,
    work_s,
    policy: Policy,
    *,
    num_servers: int = 1,
    patience: Patience = Patience(),
    rng: np.random.Generator | int = 0,
) -> Outcome:
    """Serves all requests to their end. work_s [n] > 0: seconds that each takes of a server. rng: numpy Generator or
    seed of the policy's predictor.

    Raises ValueError for work that is not positive and unequal lengths. A list of requests has an end, so overload is
    no error here: see `job_load`.
    """
    work_s = _work(work_s)
    same_length(arrivals_s=requests.arrivals_s, work_s=work_s)
    at_least(1, num_servers=num_servers)
    order = policy.order(requests, work_s, np.random.default_rng(rng))
    clients = patience.clients(requests)
    busy_s = run_servers(clients, work_s, order.base, order.ageing, order.preemption, patience.drops, num_servers)
    return outcome_of(clients, busy_s)


def job_load(arrivals_per_s: float, mean_work_s: float, *, num_servers: int = 1) -> float:
    """Work that arrives in a second for each server. Raises ValueError, saying it, where it is 1 or more."""
    at_least(0, arrivals_per_s=arrivals_per_s)
    positive(mean_work_s=mean_work_s)
    load = arrivals_per_s * mean_work_s / num_servers
    check_load(load)
    return load


def ageing_bound_s(arrivals_s, work_s, predicted_s, ageing: float) -> np.ndarray:
    """[n]: what no wait exceeds at one server under shortest predicted first with ageing, without preemption, s.

    A request that comes at t with predicted work p waits for the work that is there, and for what comes until t + p /
    ageing: whoever comes later has a higher key. The work that is there is FCFS's wait.
    """
    positive(ageing=ageing)
    arrivals_s, predicted_s = vector("arrivals_s", arrivals_s), vector("predicted_s", predicted_s)
    work_s = _work(work_s)
    arrived = np.concatenate([[0.0], np.cumsum(work_s)])
    reach = np.searchsorted(arrivals_s, arrivals_s + predicted_s / ageing, side="right")
    # Lindley (1952): the work found is the arrived work less the time, above the least of that difference so far.
    drift = arrived[:-1] - arrivals_s
    found = drift - np.minimum.accumulate(drift)
    return found + arrived[reach] - arrived[np.arange(1, len(arrived))]


def _work(work_s) -> np.ndarray:
    work_s = vector("work_s", work_s)
    if work_s.size and work_s.min() <= 0:
        raise ValueError(f"work_s must be above 0, got {work_s.min():g}")
    return work_s
