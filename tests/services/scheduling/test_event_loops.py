"""The compiled loops against the same written plainly, and the heap against sorting."""

import itertools

import numpy as np
import pytest

from fmfl_jax.services.scheduling import event_loops as loops
from fmfl_jax.services.scheduling.requests import last_attempts
from tests.services.scheduling.plain import serve_plainly


def test_the_heap_gives_the_lowest_key_and_among_equals_the_lowest_number():
    rng = np.random.default_rng(0)
    keys, items, size, held = np.empty(300), np.empty(300, np.int64), 0, []
    for number in range(300):
        key = float(rng.integers(20))
        size = loops.push(keys, items, size, key, number)
        held.append((key, number))
        while held and rng.random() < 0.45:
            assert (keys[0], items[0]) == min(held)
            held.remove(min(held))
            size = loops.drop_first(keys, items, size)
            assert size == len(held)
    assert len(held) > 20


CASES = list(itertools.product((0, 1, 2), (1, 3), (np.inf, 1.5), (False, True)))


@pytest.mark.parametrize("preemption, num_servers, timeout_s, drops", CASES)
def test_servers_with_impatient_clients(preemption, num_servers, timeout_s, drops):
    for seed in range(6):
        rng = np.random.default_rng((seed, preemption, num_servers))
        arrivals_s, work_s = np.cumsum(rng.exponential(0.5 / num_servers, 40)), rng.exponential(0.6, 40)
        base, ageing, retries = rng.integers(0, 3, 40) + rng.random(40) * (seed % 2), 0.3 * (seed % 3), seed % 3
        clients = loops.new_clients(arrivals_s, timeout_s, 0.7, retries)
        busy_s = loops.run_servers(clients, work_s, base, ageing, preemption, drops, num_servers)
        found = [x[last_attempts(clients)] for x in (clients.start_s, clients.begin_s, clients.finish_s, clients.tries)]
        expected, plainly_busy_s = serve_plainly(
            arrivals_s,
            work_s,
            base,
            ageing=ageing,
            preemption=preemption,
            num_servers=num_servers,
            timeout_s=timeout_s,
            backoff_s=0.7,
            retries=retries,
            drops=drops,
        )
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        assert busy_s == pytest.approx(plainly_busy_s)


def test_steps_until_is_the_least_number_that_reaches():
    rng = np.random.default_rng(1)
    for _ in range(200):
        gap_s, step_s, growth_s = (
            rng.exponential(5.0),
            rng.exponential(0.3) + 0.01,
            rng.exponential(0.1) * rng.integers(2),
        )
        after = lambda k: k * step_s + growth_s * k * (k - 1) / 2
        count = loops._steps_until(gap_s, step_s, growth_s)
        assert after(count) >= gap_s * (1 - 1e-12) and (count == 1 or after(count - 1) < gap_s)
