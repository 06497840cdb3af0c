"""Servers of batches: all who wait in one call, and a language model's static and continuous batching.

Continuous batching (Yu et al., Orca, OSDI 2022): requests join and leave at token steps. One joins when a slot is free
and its prompt and whole answer fit the memory of keys and values. Prompts are read in chunks, chunks_per_step of them
at most between two steps, so that a long prompt stalls the others' tokens for a chunk and no longer (Agrawal et al.,
Sarathi-Serve, OSDI 2024); a prompt's last token is read by the step that draws the first new one.

Static batching: a batch is formed of those who wait when the last one has ended, its prompts are read first, and all of
it is handed back when its longest answer is done; rows that are done are computed on.

    >>> steps = Steps(chunk_s=0.05, chunk_token_s=0.0, step_s=0.02, step_row_s=0.004, step_kv_s=0.0)
    >>> outcome, first_s = serve_tokens(requests, prompt_tokens, output_tokens, Fcfs(), Batching(num_slots=8), steps)
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from fmfl_jax.finite import finite_fields
from fmfl_jax.services.checks import at_least, positive, same_length
from fmfl_jax.services.scheduling.event_loops import (
    NO_PREEMPTION,
    NUM_ATTEMPTS,
    Batcher,
    Steps,
    new_clients,
    run_batcher,
    run_batches,
)
from fmfl_jax.services.scheduling.policies import Order, Policy
from fmfl_jax.services.scheduling.requests import Outcome, Patience, Requests, check_load, last_attempts, outcome_of

_ALL_CHUNKS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields(may_be_infinite=("kv_tokens",))
class Batching:
    """num_slots: rows of a batch. kv_tokens: of context that the memory of keys and values holds. chunk_tokens: prompt
    tokens of a chunk. chunks_per_step: see above; None reads whole prompts first. static: static batching, which always
    does."""

    num_slots: int
    kv_tokens: float = math.inf
    chunk_tokens: int = 64
    chunks_per_step: int | None = 1
    static: bool = False

    def __post_init__(self):
        at_least(1, num_slots=self.num_slots, kv_tokens=self.kv_tokens, chunk_tokens=self.chunk_tokens)
        if self.chunks_per_step is not None:
            at_least(1, chunks_per_step=self.chunks_per_step)

    @property
    def most_chunks(self) -> int:
        """Chunks between two steps."""
        return _ALL_CHUNKS if self.static or self.chunks_per_step is None else self.chunks_per_step


class TokenOutcome(NamedTuple):
    """first_token_s [n]: when the last attempt's first token was there, infinite if never. mean_rows: of a step."""

    outcome: Outcome
    first_token_s: np.ndarray
    mean_rows: float


def serve_tokens(
    requests: Requests,
    prompt_tokens,
    output_tokens,
    policy: Policy,
    batching: Batching,
    steps: Steps,
    *,
    patience: Patience = Patience(),
    rng: np.random.Generator | int = 0,
) -> TokenOutcome:
    """Serves all requests to their end. prompt_tokens, output_tokens: int [n] >= 1. The policy's sizes are the output
    tokens.

    Raises ValueError for a request that exceeds kv_tokens alone, for times and lengths that are none, and for a policy
    that preempts: a row that has begun stays.
    """
    prompt, output = (
        _tokens(name, x) for name, x in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens))
    )
    same_length(arrivals_s=requests.arrivals_s, prompt_tokens=prompt, output_tokens=output)
    at_least(0, **steps._asdict())
    positive(time_of_a_step=steps.step_s + steps.step_row_s)
    most = int((prompt + output).max())
    if most > batching.kv_tokens:
        raise ValueError(f"kv_tokens={batching.kv_tokens:g}: a request has {most} tokens of prompt and answer")
    order = batch_order(requests, output, policy, rng)
    clients = patience.clients(requests)
    first_s = np.full(len(clients.start_s), np.inf)
    batcher = Batcher(
        batching.num_slots, float(batching.kv_tokens), batching.chunk_tokens, batching.most_chunks, batching.static
    )
    steps = Steps(*map(float, steps))
    busy_s, num_steps, num_rows = run_batcher(
        clients, prompt, output, order.base, order.ageing, patience.drops, batcher, steps, first_s
    )
    return TokenOutcome(outcome_of(clients, busy_s), first_s[last_attempts(clients)], num_rows / num_steps)


def batch_order(requests: Requests, sizes: np.ndarray, policy: Policy, rng: np.random.Generator | int) -> Order:
    """The policy's order. Raises ValueError for one that preempts."""
    order = policy.order(requests, sizes.astype(np.float64), np.random.default_rng(rng))
    if order.preemption != NO_PREEMPTION:
        raise ValueError(f"{policy}: a batch does not preempt, its rows stay until they are done")
    return order


def token_load(arrivals_per_s: float, prompt_tokens, output_tokens, batching: Batching, steps: Steps) -> float:
    """Arrivals over the most that full slots can serve. prompt_tokens, output_tokens [n]: a sample of the requests.

    A request takes its chunks and, of each of its steps, a row's share (continuous batching) or its share of as many
    steps as the longest answer of its batch has (static). Slots are full as far as the mean request's memory allows.
    Raises ValueError, saying it, where the load is 1 or more.
    """
    prompt, output = _tokens("prompt_tokens", prompt_tokens), _tokens("output_tokens", output_tokens)
    in_memory = batching.kv_tokens / float((prompt + output).mean())
    rows = int(max(1, min(batching.num_slots, in_memory, len(prompt))))
    unread = prompt - 1
    chunks_s = steps.join_s + steps.chunk_s * np.ceil(unread / batching.chunk_tokens) + steps.chunk_token_s * unread
    drawn = output
    if batching.static:
        batches = len(output) // rows
        drawn = np.repeat(output[: batches * rows].reshape(batches, rows).max(axis=1), rows)
        unread, chunks_s = unread[: len(drawn)], chunks_s[: len(drawn)]
    context = unread + (drawn - 1) / 2  # of a row, on average over its steps
    row_s = steps.step_s / rows + steps.step_row_s + steps.step_kv_s * context
    load = arrivals_per_s * float((chunks_s + drawn * row_s).mean())
    check_load(load)
    return load


class BatchOutcome(NamedTuple):
    """outcome; mean_batch: jobs of a batch."""

    outcome: Outcome
    mean_batch: float


def serve_batches(requests: Requests, *, batch_s: float, row_s: float, max_batch: int | None = None) -> BatchOutcome:
    """All who wait, at most max_batch (None: any number), are served together for batch_s + row_s * rows, and then all
    who wait by then (the batch server of Inoue, Performance Evaluation 2021)."""
    at_least(0, batch_s=batch_s, row_s=row_s)
    positive(time_of_a_batch=batch_s + row_s)
    most = len(requests) if max_batch is None else max_batch
    at_least(1, max_batch=most)
    clients = new_clients(requests.arrivals_s, np.inf, 0.0, 0)
    n = len(requests)
    clients.request[:] = np.arange(n)
    clients.start_s[:] = requests.arrivals_s
    clients.marks[NUM_ATTEMPTS] = n
    batches = run_batches(requests.arrivals_s, float(batch_s), float(row_s), most, clients.begin_s, clients.finish_s)
    return BatchOutcome(outcome_of(clients, batches * batch_s + n * row_s), n / batches)


def batch_load(arrivals_per_s: float, *, batch_s: float, row_s: float, max_batch: int | None = None) -> float:
    """Arrivals over the most that the batch server can serve. Raises ValueError, saying it, where it is 1 or more."""
    load = arrivals_per_s * (row_s if max_batch is None else row_s + batch_s / max_batch)
    check_load(load)
    return load


def _tokens(name: str, values) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or (array.size and array.min() < 1):
        raise ValueError(f"{name} must be whole numbers from 1, got shape {array.shape} of {array.dtype}")
    return array.astype(np.int64)
