"""Orders: what a policy looks at, and that ageing by arrival is ageing by wait."""

import numpy as np

from fmfl_jax.services.scheduling.event_loops import BY_KEY, BY_WORK_LEFT, NO_PREEMPTION
from fmfl_jax.services.scheduling.policies import EarliestDeadline, Fcfs, Priority, Shortest
from fmfl_jax.services.scheduling.requests import Requests

ARRIVALS_S = np.array([0.0, 1.0, 4.0])
REQUESTS = Requests(arrivals_s=ARRIVALS_S, priorities=np.array([2, 0, 1]), deadlines_s=np.array([np.inf, 9.0, 5.0]))
SIZES = np.array([5.0, 1.0, 3.0])


def order(policy, seed=0):
    return policy.order(REQUESTS, SIZES, np.random.default_rng(seed))


def test_bases():
    assert order(Fcfs()).base.tolist() == [0, 0, 0]
    assert order(Priority()).base.tolist() == [2, 0, 1] and order(Priority()).preemption == NO_PREEMPTION
    assert order(Priority(preemptive=True)).preemption == BY_KEY
    assert order(EarliestDeadline()).base.tolist() == [np.inf, 9, 5]
    assert order(Shortest()).base.tolist() == SIZES.tolist()
    assert order(Shortest(preemptive=True)).preemption == BY_WORK_LEFT


def test_a_noisy_prediction_is_off_by_a_log_normal_factor():
    many = Requests(arrivals_s=np.arange(20_000.0))
    sizes = np.full(20_000, 3.0)
    log = np.log(Shortest(noise=0.5).order(many, sizes, np.random.default_rng(0)).base / 3.0)
    assert abs(log.mean()) < 0.02 and abs(log.std() - 0.5) < 0.02
    assert (order(Shortest(noise=0.5), 1).base != order(Shortest(noise=0.5), 2).base).all()


def test_the_key_orders_as_predicted_work_less_what_the_wait_forgives():
    aged = order(Shortest(ageing=2.0))
    keys = aged.base + aged.ageing * ARRIVALS_S
    for now in (4.0, 11.0):
        left = SIZES - 2.0 * (now - ARRIVALS_S)
        assert np.argsort(keys).tolist() == np.argsort(left).tolist() == [1, 0, 2]
