"""launch.serve --requests: a trace served by one model, with continuous and with static batching, and the simulator
beside it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.tokenizers import Tokenizer, stream_decode
from fmfl_jax.experiment.methods.names import parse_method
from fmfl_jax.models.batching import encode_prompts, padded_length
from fmfl_jax.models.generate import Sampling
from fmfl_jax.models.serve import answer_one_by_one
from fmfl_jax.models.slots import RequestEngine, SlotEngine
from fmfl_jax.peft.split import Split
from fmfl_jax.services.placement import kv_bytes_per_token
from fmfl_jax.services.scheduling.batching import Batching, Steps, batch_order, serve_tokens
from fmfl_jax.services.scheduling.live import Clock, Served, WallClock, WorkClock, serve_live
from fmfl_jax.services.scheduling.policies import POLICIES, Policy
from fmfl_jax.services.scheduling.requests import Requests, Summary, summarize
from fmfl_jax.services.scheduling.trace import TraceRequest, requests_of, write_trace
from launch import app

REQUESTS = flags.DEFINE_string(
    "requests", None, "Trace of requests, a JSON object a line (launch.simulate_serving --write_trace draws one)."
)
_BATCHING = flags.DEFINE_list("batching", ["continuous", "static"], "Any of continuous, static: each serves the trace.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Rows of a batch at most.", lower_bound=1)
_SLOT_TOKENS = flags.DEFINE_integer(
    "slot_tokens", None, "Tokens of prompt and answer that a slot holds; default: the longest request's.", lower_bound=2
)
_KV_MEMORY = flags.DEFINE_float(
    "kv_memory_mb", None, "Megabytes for keys and values: as many slots as fit, --slots at most.", lower_bound=0
)
_CHUNK = flags.DEFINE_integer("chunk_tokens", 64, "Prompt tokens read between two steps of the batch.", lower_bound=1)
_POLICY = flags.DEFINE_string(
    "policy", "fcfs", "Who joins next: fcfs, priority, edf, or shortest:ageing=TOKENS_PER_S (by max_tokens)."
)
_CLOCK = flags.DEFINE_enum(
    "clock",
    "wall",
    ["wall", "cpu"],
    "cpu: seconds of this process's CPU, and waiting takes no time: for a machine in use, pinned to one core.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Times that each way serves the trace, in turn.", lower_bound=1)
_ALONE = flags.DEFINE_bool("alone", False, "Answer each request alone too, and compare the texts.")
_ANSWERS = flags.DEFINE_string("answers", None, "File for the answers, a JSON object a line.")

_TIE = 1e-3  # of the largest logit: products of packed weights round activations to 16 bits


class Job(NamedTuple):
    """What is served: prompts and adapters (by request; the base's own where there are none) over one model."""

    config: LlamaConfig
    split: Split
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    trace: list[TraceRequest]
    requests: Requests
    prompts: list[list[int]]
    adapters: list[dict]

    @property
    def max_tokens(self) -> list[int]:
        """Of each answer."""
        return [request.max_tokens for request in self.trace]

    @property
    def sampling(self) -> Sampling:
        """Greedy."""
        return Sampling(stop_tokens=self.stop_tokens, vocab_size=self.tokenizer.vocab_size)


def serve(
    trace: list[TraceRequest],
    config: LlamaConfig,
    split: Split,
    tokenizer: Tokenizer,
    stop_tokens: tuple[int, ...],
    adapters: list[dict],
) -> None:
    """Serves the trace as the flags say and prints a line for each batching. adapters: tuned parameters for each
    request, all of the same shapes; empty dictionaries where the model is used as it is."""
    job = Job(
        config,
        split,
        tokenizer,
        stop_tokens,
        trace,
        requests_of(trace),
        encode_prompts(tokenizer, [request.prompt for request in trace], room=config.max_seq_len),
        adapters,
    )
    policy = parse_method("policy", _POLICY.value, POLICIES)
    batch_order(job.requests, np.asarray(job.max_tokens), policy, 0)  # refuses before anything is compiled
    num_tuned = split.merge(split.trainable, split.frozen).num_prompt_slots
    slot_tokens, num_slots = _slots(job, num_tuned)
    engine = SlotEngine(
        config,
        split.merge,
        split.frozen,
        job.adapters[0],
        num_slots=num_slots,
        slot_tokens=slot_tokens,
        chunk_tokens=_CHUNK.value,
        sampling=job.sampling,
    )
    rows, served = _rounds(job, policy, engine, _batchings(num_slots))
    drawn = sum(map(len, served.tokens))
    app.say(
        f"{len(trace)} requests, {sum(map(len, job.prompts))} prompt tokens, {drawn} drawn; {num_slots} slots of "
        f"{slot_tokens} tokens, chunks of {_CHUNK.value}, {_POLICY.value}, {_CLOCK.value} time"
    )
    app.say(_table(rows))
    if _ANSWERS.value is not None:
        _write_answers(_ANSWERS.value, job, served)
    if _ALONE.value:
        _compare_alone(job, served)


def _batchings(num_slots: int) -> dict[str, Batching]:
    """Those of --batching, by name."""
    found = {}
    for name in _BATCHING.value:
        if name not in ("continuous", "static"):
            raise ValueError(f"--batching={name}: expected continuous or static")
        found[name] = Batching(num_slots=num_slots, chunk_tokens=_CHUNK.value, static=name == "static")
    return found


def _rounds(
    job: Job, policy: Policy, engine: SlotEngine, batchings: dict[str, Batching]
) -> tuple[dict[str, list[dict]], Served]:
    """Serves the trace with each batching in turn, --rounds times: figures of each round, and the last answers."""
    _measure(engine, job, time.process_time, 1)  # compiles
    compiled = engine.programs()
    rows: dict[str, list[dict]] = {name: [] for name in batchings}
    served = None
    for _ in range(_ROUNDS.value):
        for name, batching in batchings.items():
            before = _measure(engine, job, _clock().now_s)
            served = serve_live(
                job.requests,
                job.prompts,
                job.max_tokens,
                RequestEngine(engine, job.adapters),
                engine.start(),
                policy,
                batching,
                stop_tokens=job.stop_tokens,
                clock=_clock(),
            )
            around = before, _measure(engine, job, _clock().now_s)
            steps = Steps(*np.mean(around, axis=0))  # the machine's speed drifts
            rows[name].append(_figures(job, served, policy, batching, steps))
    assert served is not None
    if engine.programs() != compiled:
        raise AssertionError(f"{engine.programs() - compiled} programs were compiled while serving")
    return rows, served


def _slots(job: Job, num_tuned: int) -> tuple[int, int]:
    """Tokens of a slot and the number of slots. Raises ValueError, naming the request, where one does not fit a
    slot."""
    needs = [len(prompt) + request.max_tokens + num_tuned for prompt, request in zip(job.prompts, job.trace)]
    most = _SLOT_TOKENS.value or min(padded_length(max(needs)), job.config.max_seq_len)
    if max(needs) > most:
        longest = job.trace[int(np.argmax(needs))]
        raise ValueError(
            f"the request at {longest.arrival_s:g} s has {max(needs)} tokens of prompt and answer, a slot holds {most}"
        )
    if _KV_MEMORY.value is None:
        return most, _SLOTS.value
    c = job.config
    value_bytes = jnp.dtype(c.dtype).itemsize
    slot_mb = most * kv_bytes_per_token(c.num_layers, c.num_kv_heads, c.head_dim, value_bytes) / 1e6
    if slot_mb > _KV_MEMORY.value:
        raise ValueError(f"kv_memory_mb={_KV_MEMORY.value:g}: one slot of {most} tokens takes {slot_mb:.1f}")
    return most, min(_SLOTS.value, int(_KV_MEMORY.value / slot_mb))


def _clock() -> Clock:
    """Started now, as --clock says."""
    return WorkClock() if _CLOCK.value == "cpu" else WallClock()


def _measure(engine: SlotEngine, job: Job, now_s: Callable[[], float], repeats: int = 12) -> Steps:
    """Means of what a join, a chunk and a step take, whatever the rows: shapes are fixed."""
    state, chunk = engine.start(), [0] * engine.chunk_tokens
    tokens, positions = np.zeros(engine.num_slots, np.int32), np.zeros(engine.num_slots, np.int32)
    marks = []
    for repeat in range(repeats):
        marks.append(now_s())
        state = engine.join(state, repeat % engine.num_slots, job.adapters[0])
        marks.append(now_s())
        state = engine.read(state, repeat % engine.num_slots, chunk, 0)
        marks.append(now_s())
        state, _ = engine.step(state, tokens, positions)
        marks.append(now_s())
    join_s, chunk_s, step_s = np.diff(np.reshape(marks, (repeats, 4)), axis=1).mean(axis=0)
    return Steps(chunk_s, 0.0, step_s, 0.0, 0.0, join_s)


def _figures(job: Job, served: Served, policy: Policy, batching: Batching, steps: Steps) -> dict:
    """A line of the table: what was measured, and what the simulator says with the steps measured around it."""
    lengths = [len(prompt) for prompt in job.prompts], [len(tokens) for tokens in served.tokens]
    prompt_tokens, drawn = (np.asarray(x) for x in lengths)
    simulated = serve_tokens(job.requests, prompt_tokens, drawn, policy, batching, steps).outcome
    rate = lambda outcome: float(drawn.sum() / (outcome.last_s - job.requests.arrivals_s[0]))
    real, said = summarize(job.requests, served.outcome), summarize(job.requests, simulated)
    return {
        "tokens/s": rate(served.outcome),
        **_latencies(real),
        "first token p95 s": float(np.percentile(served.first_token_s - job.requests.arrivals_s, 95)),
        "rows a step": float(served.step_rows.mean()),
        "step ms": 1e3 * float(served.step_s.mean()),
        "chunk ms": 1e3 * float(served.chunk_s.mean()) if served.chunk_s.size else 0.0,
        "simulated tokens/s": rate(simulated),
        "off": rate(simulated) / rate(served.outcome) - 1,
        "simulated p95 s": said.p95_s,
        "p95 off": said.p95_s / real.p95_s - 1,
    }


def _latencies(summary: Summary) -> dict:
    late = {} if summary.missed is None else {"late": summary.missed}
    return {"p50 s": summary.p50_s, "p95 s": summary.p95_s, "p99 s": summary.p99_s, **late}


def _table(rows: dict[str, list[dict]]) -> str:
    """A line for each round and, of several, their medians, in aligned columns; "off": by how much the simulator
    errs."""
    first = next(iter(rows.values()))[0]
    forms = {"off": "+.1%", "p95 off": "+.1%", "late": ".1%"}
    shown = lambda row: [format(row[column], forms.get(column, ".3g")) for column in first]
    cells = [["batching", *first]]
    for name, rounds in rows.items():
        cells += [[name, *shown(row)] for row in rounds]
        if len(rounds) > 1:
            cells.append(["median", *shown({column: np.median([row[column] for row in rounds]) for column in first})])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def _texts(job: Job, answers: Sequence[Sequence[int]]) -> list[str]:
    """What follows each prompt, without the token that ended it."""
    texts = []
    for prompt, tokens in zip(job.prompts, answers):
        kept = [token for token in tokens if token not in job.stop_tokens]
        texts.append("".join(stream_decode(job.tokenizer, kept, prompt)))
    return texts


def _write_answers(path: str, job: Job, served: Served) -> None:
    """A trace with counted tokens, texts and times."""
    counted = [
        dataclasses.replace(request, prompt_tokens=len(prompt), output_tokens=len(tokens))
        for request, prompt, tokens in zip(job.trace, job.prompts, served.tokens)
    ]
    more = [
        {"text": text, "first_token_s": float(first_s), "end_s": float(end_s)}
        for text, first_s, end_s in zip(_texts(job, served.tokens), served.first_token_s, served.outcome.end_s)
    ]
    write_trace(path, counted, more)


def _compare_alone(job: Job, served: Served) -> None:
    """Says how many answers are those of one request at a time. Another order of summation may turn a near tie: of an
    answer that differs, how far apart the two tokens' logits are where it first does.

    Raises ValueError where that is no tie.
    """
    merge, frozen = job.split.merge, job.split.frozen
    alone = answer_one_by_one(job.config, merge, frozen, job.adapters, job.prompts, job.max_tokens, job.sampling)
    different = [number for number, tokens in enumerate(alone) if tokens != served.tokens[number]]
    app.say(f"{len(alone) - len(different)} of {len(alone)} answers are those of one request at a time")
    for number in different:
        pairs = list(zip(alone[number], served.tokens[number]))
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs) - 1)
        model = merge(job.adapters[number], frozen)
        text = job.prompts[number] + alone[number][:place]
        logits = np.asarray(model(np.asarray([text], np.int32))[0, -1])
        gap = float(abs(logits[pairs[place][0]] - logits[pairs[place][1]]) / np.abs(logits).max())
        app.say(f"request {number} differs from token {place} on: a gap of {gap:.1e} of the largest logit")
        if gap > _TIE:
            raise ValueError(f"request {number} was answered differently in the batch")
