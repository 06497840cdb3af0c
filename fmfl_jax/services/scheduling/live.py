"""The scheduler of a real model: what `batching.py` simulates, over an engine that computes.

The engine is functions (`models/slots.py` makes them); the loop here decides who joins, whose prompt is read and who
leaves, step by step in the order of event_loops.run_batcher, and keeps the times.
"""

import dataclasses
import heapq
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fmfl_jax.services.scheduling.batching import Batching, batch_order
from fmfl_jax.services.scheduling.policies import Policy
from fmfl_jax.services.scheduling.requests import Outcome, Requests

NO_POSITION = -1  # of a slot that takes no part in a step


class Engine(Protocol):
    """A model with num_slots rows. Each function returns when it is done; state is not used again once it was given."""

    def join(self, state: Any, slot: int, request: int, /) -> Any:
        """The slot is the request's from now on."""
        ...

    def read(self, state: Any, slot: int, tokens: Sequence[int], position: int, /) -> Any:
        """Tokens of the slot's prompt, a chunk at most, the first of them at `position`."""
        ...

    def step(self, state: Any, tokens: np.ndarray, positions: np.ndarray, /) -> tuple[Any, np.ndarray]:
        """tokens, positions int32 [num_slots] (NO_POSITION: idle) -> state and the token that follows each, int
        [num_slots]."""
        ...


class Clock(Protocol):
    """What serving is timed by."""

    def now_s(self) -> float:
        """Seconds since its start."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Returns when now_s() is time_s or later."""
        ...


class WallClock:
    """Real time."""

    def __init__(self):
        self._start_s = time.perf_counter()

    def now_s(self):
        return time.perf_counter() - self._start_s

    def wait_until(self, time_s):
        while (left_s := time_s - self.now_s()) > 0:
            time.sleep(left_s)


class WorkClock:
    """Seconds of work by `read_s` (time.process_time: those of the CPU, which other processes do not lengthen); waiting
    takes no time, the clock is put forward."""

    def __init__(self, read_s: Callable[[], float] = time.process_time):
        self._read_s, self._start_s = read_s, read_s()

    def now_s(self):
        return self._read_s() - self._start_s

    def wait_until(self, time_s):
        self._start_s -= max(0.0, time_s - self.now_s())


class Served(NamedTuple):
    """outcome, as a simulation has it; tokens: of each answer; first_token_s [n]. join_s, chunk_s, step_s: seconds of
    every join, chunk and step; step_rows: rows of each step that drew a token for somebody."""

    outcome: Outcome
    tokens: list[list[int]]
    first_token_s: np.ndarray
    join_s: np.ndarray
    chunk_s: np.ndarray
    step_s: np.ndarray
    step_rows: np.ndarray


@dataclasses.dataclass
class _Row:
    """A slot's request: of prompt + tokens, `read` are in the cache."""

    request: int
    prompt: Sequence[int]
    joined: int
    tokens: list[int]
    read: int = 0
    done: bool = False

    @property
    def unread(self) -> int:
        """Prompt tokens to read before the last, which a step reads."""
        return len(self.prompt) - 1 - self.read


def serve_live(
    requests: Requests,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    engine: Engine,
    state: Any,
    policy: Policy,
    batching: Batching,
    *,
    stop_tokens: Sequence[int],
    clock: Clock,
    rng: np.random.Generator | int = 0,
) -> Served:
    """Serves the requests as they come by the clock. An answer ends after max_tokens or with one of stop_tokens. The
    policy's sizes are max_tokens, which is all that is known beforehand.

    Raises ValueError for a request whose prompt and answer exceed kv_tokens alone, and for a policy that preempts.
    """
    needs = np.asarray([len(prompt) + most for prompt, most in zip(prompts, max_tokens, strict=True)])
    if needs.max() > batching.kv_tokens:
        raise ValueError(f"kv_tokens={batching.kv_tokens:g}: a request has {needs.max()} tokens of prompt and answer")
    order = batch_order(requests, np.asarray(max_tokens), policy, rng)
    keys = order.base + order.ageing * requests.arrivals_s
    n = len(requests)
    begin_s, first_s, end_s = np.full(n, np.inf), np.full(n, np.inf), np.full(n, np.inf)
    answers: list[list[int]] = [[] for _ in range(n)]
    rows: dict[int, _Row] = {}  # by slot
    waiting: list[tuple[float, int]] = []
    join_s, chunk_s, step_s, step_rows = [], [], [], []
    arrived = joined = 0
    while True:
        now_s = began_s = clock.now_s()
        while arrived < n and requests.arrivals_s[arrived] <= now_s:
            heapq.heappush(waiting, (keys[arrived], arrived))
            arrived += 1
        if not rows or not batching.static:
            while waiting and len(rows) < batching.num_slots:
                request = waiting[0][1]
                if sum(needs[row.request] for row in rows.values()) + needs[request] > batching.kv_tokens:
                    break
                heapq.heappop(waiting)
                slot = next(slot for slot in range(batching.num_slots) if slot not in rows)
                state = engine.join(state, slot, request)
                rows[slot] = _Row(request, prompts[request], joined, answers[request])
                begin_s[request] = now_s
                joined += 1
                began_s = _log(join_s, clock, began_s)
        if not rows:
            if arrived == n:
                break
            clock.wait_until(requests.arrivals_s[arrived])
            continue
        for _ in range(batching.most_chunks):
            unread = [slot for slot, row in rows.items() if row.unread > 0]
            if not unread:
                break
            slot = min(unread, key=lambda slot: rows[slot].joined)
            state = _read_chunk(engine, state, slot, rows[slot], batching.chunk_tokens)
            began_s = _log(chunk_s, clock, began_s)
        active = {slot: row for slot, row in rows.items() if row.unread <= 0}
        if active:
            state = _step(engine, state, active, batching.num_slots)
            now_s = _log(step_s, clock, began_s)
            step_rows.append(sum(not row.done for row in active.values()))
            for row in active.values():
                if not row.done:
                    first_s[row.request] = min(first_s[row.request], now_s)
                    row.done = len(row.tokens) == max_tokens[row.request] or row.tokens[-1] in stop_tokens
            if not batching.static or all(row.done for row in rows.values()):
                for slot in [slot for slot, row in rows.items() if row.done]:
                    end_s[rows.pop(slot).request] = now_s
    outcome = Outcome(
        answered=np.isfinite(end_s),
        begin_s=begin_s,
        end_s=end_s,
        tries=np.ones(n, np.int64),
        attempts=n,
        busy_s=sum(join_s) + sum(chunk_s) + sum(step_s),
        last_s=float(end_s.max()),
    )
    logs = (np.asarray(log) for log in (join_s, chunk_s, step_s, step_rows))
    return Served(outcome, answers, first_s, *logs)


def _read_chunk(engine: Engine, state: Any, slot: int, row: _Row, chunk_tokens: int) -> Any:
    """The next of the slot's prompt."""
    tokens = row.prompt[row.read : row.read + min(chunk_tokens, row.unread)]
    state = engine.read(state, slot, tokens, row.read)
    row.read += len(tokens)
    return state


def _step(engine: Engine, state: Any, active: dict[int, _Row], num_slots: int) -> Any:
    """A token more for the rows that are not done."""
    tokens, positions = np.zeros(num_slots, np.int32), np.full(num_slots, NO_POSITION, np.int32)
    for slot, row in active.items():
        if not row.done:
            tokens[slot] = row.tokens[-1] if row.tokens else row.prompt[-1]
            positions[slot] = row.read
    state, drawn = engine.step(state, tokens, positions)
    for slot, row in active.items():
        if not row.done:
            row.tokens.append(int(drawn[slot]))
            row.read += 1
    return state


def _log(seconds: list[float], clock: Clock, began_s: float) -> float:
    """Appends what has passed since began_s; returns now."""
    now_s = clock.now_s()
    seconds.append(now_s - began_s)
    return now_s
