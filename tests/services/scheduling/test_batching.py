"""Batches: the batch server's closed form, static and continuous batches by hand, memory, chunks and the load."""

import numpy as np
import pytest

from fmfl_jax.services.scheduling import closed_forms as forms
from fmfl_jax.services.scheduling.arrivals import Poisson
from fmfl_jax.services.scheduling.batching import (
    Batching,
    Steps,
    batch_load,
    serve_batches,
    serve_tokens,
    token_load,
)
from fmfl_jax.services.scheduling.policies import Fcfs, Priority, Shortest
from fmfl_jax.services.scheduling.requests import Patience, Requests, steady_mean

ONE_EACH = Steps(0.0, 0.0, 1.0, 0.0, 0.0)  # a second a step, prompts for nothing
LENGTHS = [2, 5, 3, 4, 1, 6]


def at_once(count):
    return Requests(arrivals_s=np.zeros(count))


def ones(count):
    return np.ones(count, np.int64)


@pytest.mark.parametrize("rate", [0.3, 1.0, 3.0, 6.0])
def test_the_batch_server_meets_its_closed_form(rate):
    arrivals_s = Poisson(rate).draw(400_000, np.random.default_rng(0))
    found = serve_batches(Requests(arrivals_s=arrivals_s), batch_s=0.8, row_s=0.12)
    expected = forms.batch_server(rate, batch_s=0.8, row_s=0.12)
    estimate = steady_mean(found.outcome.end_s - arrivals_s)
    assert abs(estimate.mean - expected.sojourn_s) < 4 * estimate.standard_error < 0.1
    assert found.mean_batch == pytest.approx(expected.mean_batch, rel=0.02)


def test_a_batch_has_a_most():
    found = serve_batches(at_once(5), batch_s=1.0, row_s=0.5, max_batch=2)
    assert found.outcome.end_s.tolist() == [2, 2, 4, 4, 5.5] and found.mean_batch == 5 / 3
    assert found.outcome.busy_s == 5.5
    assert batch_load(1.0, batch_s=1.0, row_s=0.2, max_batch=2) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="unstable: its load is 1.200"):
        batch_load(6.0, batch_s=0.8, row_s=0.2)


def test_static_and_continuous_by_hand():
    for static, ends in ((True, [5, 5, 9, 9, 15, 15]), (False, [2, 5, 5, 9, 6, 12])):
        batching = Batching(num_slots=2, static=static)
        found = serve_tokens(at_once(6), ones(6), np.asarray(LENGTHS), Fcfs(), batching, ONE_EACH)
        assert found.outcome.end_s.tolist() == ends
    assert found.first_token_s.tolist() == [1, 1, 3, 6, 6, 7] and found.mean_rows == 21 / 12


def test_chunks_bound_the_stall_of_the_others():
    """One that draws while a prompt of 1,001 tokens comes: whole, it waits 10 s for one token; in chunks 1 s."""
    requests, steps = Requests(arrivals_s=np.array([0.0, 2.5])), Steps(1.0, 0.0, 0.1, 0.0, 0.0)
    lengths = np.array([1, 1001]), np.array([60, 1])
    ends = {}
    for chunks in (1, None):
        batching = Batching(num_slots=2, chunk_tokens=100, chunks_per_step=chunks)
        ends[chunks] = serve_tokens(requests, *lengths, Fcfs(), batching, steps).outcome.end_s
    # 25 steps until 2.5; then ten chunks and 35 steps, ten of which lie between the chunks, or all behind them
    assert ends[1] == pytest.approx([16.0, 2.5 + 10 * 1.1])
    assert ends[None] == pytest.approx([16.0, 12.6])


def test_memory_admits_and_nobody_overtakes_whom_it_keeps_waiting():
    """12 tokens of memory: 5 + 5 fit, the third of 8 waits for both, the small fourth behind it."""
    lengths = np.array([1, 1, 1, 1]), np.array([4, 4, 7, 1])
    batching = Batching(num_slots=4, kv_tokens=12)
    found = serve_tokens(at_once(4), *lengths, Fcfs(), batching, ONE_EACH)
    assert found.outcome.begin_s.tolist() == [0, 0, 4, 4] and found.outcome.end_s.tolist() == [4, 4, 11, 5]
    with pytest.raises(ValueError, match="kv_tokens=7: a request has 8 tokens"):
        serve_tokens(at_once(4), *lengths, Fcfs(), Batching(num_slots=4, kv_tokens=7), ONE_EACH)


def test_steps_grow_with_rows_and_context():
    steps = Steps(0.0, 0.5, 1.0, 0.1, 0.01)
    found = serve_tokens(at_once(2), np.array([3, 1]), np.array([2, 3]), Fcfs(), Batching(num_slots=2), steps)
    # two tokens of the prompt; steps of (2 rows, 2 + 0 tokens), (2, 3 + 1), (1, 2)
    assert found.outcome.end_s == pytest.approx([1 + 1.22 + 1.24, 1 + 1.22 + 1.24 + 1.12])
    joined = serve_tokens(at_once(2), ones(2), ones(2), Fcfs(), Batching(num_slots=2), steps._replace(join_s=0.25))
    assert joined.outcome.end_s == pytest.approx([0.5 + 1.2] * 2)


def test_policies_and_patience():
    requests = Requests(arrivals_s=np.zeros(3), priorities=np.array([2, 1, 0]))
    one = Batching(num_slots=1)
    lengths = ones(3), np.array([3, 1, 2])
    assert serve_tokens(requests, *lengths, Priority(), one, ONE_EACH).outcome.end_s.tolist() == [6, 3, 2]
    assert serve_tokens(requests, *lengths, Shortest(), one, ONE_EACH).outcome.end_s.tolist() == [6, 1, 3]
    for drops, busy_s in ((False, 6), (True, 3)):
        patience = Patience(timeout_s=2.5, drops=drops)
        found = serve_tokens(requests, *lengths, Fcfs(), one, ONE_EACH, patience=patience).outcome
        assert not found.answered.any() and found.busy_s == busy_s and found.end_s.tolist() == [2.5] * 3
    with pytest.raises(ValueError, match="does not preempt"):
        serve_tokens(requests, *lengths, Priority(preemptive=True), one, ONE_EACH)


@pytest.mark.parametrize("static", [False, True])
def test_the_load_says_where_waits_begin_to_grow(static):
    rng = np.random.default_rng(5)
    prompt, output = rng.integers(1, 150, 20_000), rng.integers(1, 120, 20_000)
    batching, steps = Batching(num_slots=8, static=static), Steps(0.1, 0.001, 0.02, 0.002, 1e-5)
    capacity = 1 / token_load(1e-9, prompt, output, batching, steps) * 1e-9
    for load in (0.9, 1.1):
        arrivals_s = Poisson(load * capacity).draw(20_000, rng)
        outcome = serve_tokens(Requests(arrivals_s=arrivals_s), prompt, output, Fcfs(), batching, steps).outcome
        waits_s = outcome.begin_s - arrivals_s
        backlog = waits_s[-1_000:].mean() * capacity  # requests that wait
        assert (backlog < 200) == (load < 1) and backlog > 0
    with pytest.raises(ValueError, match="unstable: its load is 1.200"):
        token_load(1.2 * capacity, prompt, output, batching, steps)


def test_bad_input():
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        Batching(num_slots=0)
    with pytest.raises(ValueError, match="output_tokens must be whole numbers from 1"):
        serve_tokens(at_once(1), ones(1), np.array([0]), Fcfs(), Batching(num_slots=1), ONE_EACH)
    with pytest.raises(ValueError, match="time_of_a_step"):
        serve_tokens(at_once(1), ones(1), ones(1), Fcfs(), Batching(num_slots=1), Steps(0, 0, 0, 0, 0))
