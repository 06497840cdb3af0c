"""The scheduler of a real model, with an engine that only lets time pass, equals the simulator."""

import numpy as np
import pytest

from fmfl_jax.services.scheduling.batching import Batching, Steps, serve_tokens
from fmfl_jax.services.scheduling.live import WallClock, WorkClock, serve_live
from fmfl_jax.services.scheduling.policies import EarliestDeadline, Fcfs, Priority, Shortest
from fmfl_jax.services.scheduling.requests import Requests

STOP = 7


class Time:
    """A clock that an engine moves."""

    def __init__(self):
        self.now = 0.0

    def now_s(self):
        return self.now

    def wait_until(self, time_s):
        self.now = max(self.now, time_s)


class PassingTime:
    """An engine that takes as long as `steps` say, and answers with its token + 10; it checks what it is asked."""

    def __init__(self, clock, steps, num_slots, stop_after=None):
        self.clock, self.steps, self.read_up_to = clock, steps, [0] * num_slots
        self.stop_after = stop_after

    def join(self, state, slot, request):
        self.read_up_to[slot] = 0
        self.clock.now += self.steps.join_s
        return state + 1

    def read(self, state, slot, tokens, position):
        assert position == self.read_up_to[slot]  # nothing is read twice or left out
        self.read_up_to[slot] += len(tokens)
        self.clock.now += self.steps.chunk_s + self.steps.chunk_token_s * len(tokens)
        return state + 1

    def step(self, state, tokens, positions):
        active = positions >= 0
        for slot in np.flatnonzero(active):
            assert positions[slot] == self.read_up_to[slot]
            self.read_up_to[slot] += 1
        kv = int(positions[active].sum())
        self.clock.now += self.steps.step_s + self.steps.step_row_s * active.sum() + self.steps.step_kv_s * kv
        return state + 1, np.where(tokens == self.stop_after, STOP, tokens + 10)


@pytest.mark.parametrize("policy", [Fcfs(), Priority(), Shortest(ageing=3.0), EarliestDeadline()])
@pytest.mark.parametrize("static", [False, True])
def test_it_does_what_the_simulator_says(policy, static):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        n = 40
        arrivals_s = np.cumsum(rng.exponential(0.6, n))
        deadlines_s = arrivals_s + rng.exponential(5.0, n)
        requests = Requests(arrivals_s=arrivals_s, priorities=rng.integers(0, 3, n), deadlines_s=deadlines_s)
        prompts = [list(range(100, 100 + length)) for length in rng.integers(1, 40, n)]
        most = rng.integers(1, 30, n)
        # a row that is done is computed on in a static batch, which this engine does not see
        rows = (0.0, 0.0) if static else (0.003, 1e-4)
        steps = Steps(0.05, 0.001, 0.02, *rows, join_s=0.01)
        batching = Batching(
            num_slots=4,
            kv_tokens=(150, np.inf)[seed % 2],
            chunk_tokens=8,
            chunks_per_step=(1, 2, None)[seed % 3],
            static=static,
        )
        clock = Time()
        engine = PassingTime(clock, steps, 4)
        live = serve_live(requests, prompts, most, engine, 0, policy, batching, stop_tokens=[], clock=clock)
        lengths = np.asarray([len(prompt) for prompt in prompts])
        simulated = serve_tokens(requests, lengths, most, policy, batching, steps)
        np.testing.assert_allclose(live.outcome.begin_s, simulated.outcome.begin_s)
        np.testing.assert_allclose(live.outcome.end_s, simulated.outcome.end_s)
        np.testing.assert_allclose(live.first_token_s, simulated.first_token_s)
        assert live.outcome.busy_s == pytest.approx(simulated.outcome.busy_s)
        if not static:
            assert live.step_rows.mean() == pytest.approx(simulated.mean_rows)
        for prompt, tokens, length in zip(prompts, live.tokens, most):
            assert tokens == [prompt[-1] + 10 * (i + 1) for i in range(length)]


def test_an_answer_ends_with_a_stop_token():
    clock = Time()
    engine = PassingTime(clock, Steps(0, 0, 1, 0, 0), 1, stop_after=25)
    requests = Requests(arrivals_s=np.array([0.0, 0.5]))
    batching = Batching(num_slots=1)
    live = serve_live(requests, [[5], [6]], [9, 2], engine, 0, Fcfs(), batching, stop_tokens=[STOP], clock=clock)
    assert live.tokens == [[15, 25, STOP], [16, 26]] and live.outcome.end_s.tolist() == [3, 5]


def test_bad_input():
    requests = Requests(arrivals_s=np.array([0.0]))
    serve = lambda policy, kv: serve_live(
        requests, [[5]], [9], None, 0, policy, Batching(num_slots=1, kv_tokens=kv), stop_tokens=[], clock=Time()
    )
    with pytest.raises(ValueError, match="kv_tokens=9: a request has 10 tokens"):
        serve(Fcfs(), 9)
    with pytest.raises(ValueError, match="does not preempt"):
        serve(Priority(preemptive=True), 99)


def test_clocks():
    ticks = iter([10.0, 12.0, 12.0, 13.0])
    work = WorkClock(lambda: next(ticks))
    assert work.now_s() == 2.0
    work.wait_until(7.0)  # waiting takes no time
    assert work.now_s() == 8.0
    wall = WallClock()
    wall.wait_until(0.02)
    assert 0.02 <= wall.now_s() < 5
