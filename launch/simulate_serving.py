"""Who waits how long under which policy: an event simulation of requests at a placement, without a model.

  python -m launch.simulate_serving --arrivals=poisson:0.6
  python -m launch.simulate_serving --arrivals=two_state:busy_per_s=2,calm_per_s=0.2,busy_s=30,calm_s=120 \\
      --task=output=4,limit=8,share=4,deadline_s=2 --task=output=55,deadline_s=20,priority=1
  python -m launch.simulate_serving --arrivals=poisson:0.6 --num_requests=60 --prompts=FILE --write_trace=trace.jsonl
  python -m launch.simulate_serving --requests=trace.jsonl --timeout_s=20 --retries=2

Prints a table: each server under each policy. Servers: one (a request at a time, a server of --num_servers each),
static and continuous (batches of --slots rows), batch (all who wait in one call of --batch_s + --row_s rows, as for
scoring). "theory s" is the mean latency where a formula knows it, "bound s" what ageing keeps the longest below, "cpu
s" what the simulation took (a server's first line: with loading its loop, or compiling it the first time).
"""

import math
import time
from typing import NamedTuple

import numpy as np
from absl import flags

from fmfl_jax.data.corpora import load_documents
from fmfl_jax.experiment.methods.names import parse_method
from fmfl_jax.services.scheduling import closed_forms
from fmfl_jax.services.scheduling.arrivals import Poisson, TwoState
from fmfl_jax.services.scheduling.batching import (
    Batching,
    Steps,
    batch_load,
    serve_batches,
    serve_tokens,
    token_load,
)
from fmfl_jax.services.scheduling.jobs import ageing_bound_s, job_load, serve_jobs
from fmfl_jax.services.scheduling.policies import POLICIES, Fcfs, Policy, Priority, Shortest
from fmfl_jax.services.scheduling.requests import Outcome, Patience, summarize
from fmfl_jax.services.scheduling.trace import TraceRequest, read_trace, requests_of, write_trace
from fmfl_jax.services.scheduling.workload import Task, Workload, draw_workload
from fmfl_jax.streams import SERVING, SERVING_PREDICTOR, host_rng
from launch import app

SERVERS = ("one", "static", "continuous", "batch")
_ARRIVALS = flags.DEFINE_string(
    "arrivals", "poisson:0.5", "poisson:RATE_PER_S or two_state:busy_per_s=R,calm_per_s=R,busy_s=S,calm_s=S."
)
_TASK = flags.DEFINE_multi_string(
    "task",
    None,
    "Lengths of a task, repeated for several: share=1,prompt=60,prompt_sigma=0.5,prompt_limit=256,output=55,"
    "output_sigma=1,limit=256,deadline_s=S,priority=0 (median tokens, log-normal; priority 0 comes first). Default: "
    "short "
    "answers with a deadline, and long ones without.",
)
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 100_000, "Requests to draw.", lower_bound=1)
_REQUESTS = flags.DEFINE_string(
    "requests",
    None,
    "Trace in place of --arrivals and --task: as long as its answers were, or max_tokens; see --tokens_per_word.",
)
_TOKENS_PER_WORD = flags.DEFINE_float("tokens_per_word", 1.4, "Of prompts that were not counted.", lower_bound=0.1)
_SERVER = flags.DEFINE_list("server", ["one", "static", "continuous"], f"Any of {', '.join(SERVERS)}.")
_POLICY = flags.DEFINE_multi_string(
    "policy",
    ["fcfs", "priority", "priority:preemptive=true", "shortest:noise=0.5", "shortest:noise=0.5,ageing=0.5", "edf"],
    "fcfs, priority[:preemptive=true], shortest[:NOISE,AGEING,preemptive=true] or edf; several: again. NOISE: "
    "standard deviation of the predicted length's logarithm. AGEING: predicted seconds (one) or tokens (batches) "
    "forgiven per second of waiting.",
)
_NUM_SERVERS = flags.DEFINE_integer("num_servers", 1, "Servers of kind one.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 8, "Rows of a batch.", lower_bound=1)
_KV_TOKENS = flags.DEFINE_float("kv_tokens", math.inf, "Tokens of prompts and answers that the memory holds.")
_CHUNK_TOKENS = flags.DEFINE_integer("chunk_tokens", 64, "Prompt tokens of a chunk.", lower_bound=1)
_CHUNKS = flags.DEFINE_integer(
    "chunks_per_step", 1, "Chunks between two steps at most; 0: whole prompts.", lower_bound=0
)
_CHUNK_S = flags.DEFINE_float("chunk_s", 0.114, "Seconds of a chunk.", lower_bound=0)
_CHUNK_TOKEN_S = flags.DEFINE_float("chunk_token_s", 0.0, "And for each of its tokens.", lower_bound=0)
_STEP_S = flags.DEFINE_float("step_s", 0.011, "Seconds of a step.", lower_bound=0)
_STEP_ROW_S = flags.DEFINE_float("step_row_s", 0.0045, "And for each of its rows.", lower_bound=0)
_STEP_KV_S = flags.DEFINE_float("step_kv_s", 0.0, "And for each token of context.", lower_bound=0)
_BATCH_S = flags.DEFINE_float("batch_s", 0.8, "Server batch: seconds of a call.", lower_bound=0)
_ROW_S = flags.DEFINE_float("row_s", 0.12, "And for each of its rows.", lower_bound=0)
_TIMEOUT_S = flags.DEFINE_float("timeout_s", math.inf, "After which a client gives up.")
_BACKOFF_S = flags.DEFINE_float("backoff_s", 1.0, "Until it tries again.", lower_bound=0)
_RETRIES = flags.DEFINE_integer("retries", 0, "How often it does.", lower_bound=0)
_DROPS = flags.DEFINE_bool("drops", False, "The server takes who gave up out of its queue; else it works for them too.")
_SEED = flags.DEFINE_integer("seed", 0, "Determines everything random.", lower_bound=0)
_WRITE_TRACE = flags.DEFINE_string("write_trace", None, "File for the drawn requests, with prompts from --prompts.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text that prompts are cut from.")
_NUM_CLIENTS = flags.DEFINE_integer(
    "num_clients", 0, "Clients 0, 1, ... of the written trace; 0: none named.", lower_bound=0
)

_DEFAULT_TASKS = ("output=4,limit=8,share=4,deadline_s=4", "output=55,priority=1")


class Case(NamedTuple):
    """A server under a policy. spec: the policy as it was typed."""

    server: str
    spec: str
    policy: Policy


def main():
    unknown = [server for server in _SERVER.value if server not in SERVERS]
    if unknown:
        raise ValueError(f"--server={unknown[0]}: expected one of {', '.join(SERVERS)}")
    policies = {spec: parse_method("policy", spec, POLICIES) for spec in ["fcfs", *_POLICY.value]}
    rng = host_rng(SERVING, _SEED.value)
    if _REQUESTS.value is not None:
        if _WRITE_TRACE.value is not None:
            raise ValueError("--write_trace writes drawn requests: leave out --requests")
        workload, rate_per_s = _read(_REQUESTS.value), None
    else:
        arrivals = parse_method("arrivals", _ARRIVALS.value, {"poisson": Poisson, "two_state": TwoState})
        tasks = [parse_method("task", f"task:{spec}", {"task": Task}) for spec in _TASK.value or _DEFAULT_TASKS]
        workload, rate_per_s = draw_workload(tasks, arrivals, _NUM_REQUESTS.value, rng), arrivals.rate_per_s
    if _WRITE_TRACE.value is not None:
        write_trace(_WRITE_TRACE.value, _with_prompts(workload, rng))
        return app.say(f"{len(workload.requests)} requests in {_WRITE_TRACE.value}")
    app.say(_about(workload))
    app.say(_table(_rows(workload, _cases(policies), rate_per_s)))


def _cases(policies: dict[str, Policy]) -> list[Case]:
    """Servers and policies that go together: a batch does not preempt, and the server batch knows one order."""
    cases = []
    for server in _SERVER.value:
        for spec in ["fcfs"] if server == "batch" else _POLICY.value:
            if server == "one" or not getattr(policies[spec], "preemptive", False):
                cases.append(Case(server, spec, policies[spec]))
    if not cases:
        raise ValueError(f"--policy={_POLICY.value[0]}: a batch does not preempt, its rows stay until they are done")
    return cases


def _rows(workload: Workload, cases: list[Case], rate_per_s: float | None) -> list[dict[str, str]]:
    """Of all cases. Where the arrivals go on for ever (rate_per_s is known), a queue that is unstable is not simulated
    but said; it is stable where the server drops those who give up.

    Raises ValueError where all are unstable.
    """
    frees = _DROPS.value and _TIMEOUT_S.value < math.inf
    known = _ARRIVALS.value.startswith("poisson") and _TIMEOUT_S.value == math.inf
    rows, errors = [], []
    for case in cases:
        try:
            load = _load(workload, case.server, rate_per_s) if rate_per_s is not None and not frees else None
        except ValueError as error:
            errors.append(f"{case.server}: {error}")
            continue
        theory_s = None if rate_per_s is None or not known else _theory_s(workload, case, rate_per_s)
        rows.append(_row(workload, case, load, theory_s))
    if not rows:
        raise ValueError(errors[0])
    for error in dict.fromkeys(errors):
        app.say(error)
    return rows


def _steps() -> Steps:
    return Steps(_CHUNK_S.value, _CHUNK_TOKEN_S.value, _STEP_S.value, _STEP_ROW_S.value, _STEP_KV_S.value)


def _patience() -> Patience:
    return Patience(
        timeout_s=_TIMEOUT_S.value, backoff_s=_BACKOFF_S.value, max_retries=_RETRIES.value, drops=_DROPS.value
    )


def _batching(static: bool) -> Batching:
    return Batching(
        num_slots=_SLOTS.value,
        kv_tokens=_KV_TOKENS.value,
        chunk_tokens=_CHUNK_TOKENS.value,
        chunks_per_step=_CHUNKS.value or None,
        static=static,
    )


def _work_s(workload: Workload) -> np.ndarray:
    """[n] seconds that each request takes of a server of its own."""
    steps, unread, output = _steps(), workload.prompt_tokens - 1, workload.output_tokens
    context = unread + (output - 1) / 2
    chunks_s = steps.chunk_s * np.ceil(unread / _CHUNK_TOKENS.value) + steps.chunk_token_s * unread
    return chunks_s + output * (steps.step_s + steps.step_row_s + steps.step_kv_s * context)


def _load(workload: Workload, server: str, rate_per_s: float) -> float:
    """Raises ValueError, saying the load, where it is 1 or more."""
    if server == "one":
        return job_load(rate_per_s, float(_work_s(workload).mean()), num_servers=_NUM_SERVERS.value)
    if server == "batch":
        return batch_load(rate_per_s, batch_s=_BATCH_S.value, row_s=_ROW_S.value)
    batching = _batching(server == "static")
    return token_load(rate_per_s, workload.prompt_tokens, workload.output_tokens, batching, _steps())


def _serve(workload: Workload, case: Case) -> Outcome:
    requests, rng = workload.requests, host_rng(SERVING_PREDICTOR, _SEED.value)
    if case.server == "one":
        servers, patience = _NUM_SERVERS.value, _patience()
        return serve_jobs(requests, _work_s(workload), case.policy, num_servers=servers, patience=patience, rng=rng)
    if case.server == "batch":
        return serve_batches(requests, batch_s=_BATCH_S.value, row_s=_ROW_S.value).outcome
    prompt, output, batching = workload.prompt_tokens, workload.output_tokens, _batching(case.server == "static")
    return serve_tokens(
        requests, prompt, output, case.policy, batching, _steps(), patience=_patience(), rng=rng
    ).outcome


def _row(workload: Workload, case: Case, load: float | None, theory_s: float | None) -> dict[str, str]:
    """A line of the table."""
    began_s = time.process_time()
    outcome = _serve(workload, case)
    took_s = time.process_time() - began_s
    summary = summarize(workload.requests, outcome, num_servers=_NUM_SERVERS.value if case.server == "one" else 1)
    shown = lambda value, form: "" if value is None else format(value, form)
    return {
        "server": case.server,
        "policy": case.spec,
        "load": shown(load, ".2f"),
        "mean s": f"{summary.mean_s:.3g}",
        "theory s": shown(theory_s, ".3g"),
        "p50 s": f"{summary.p50_s:.3g}",
        "p95 s": f"{summary.p95_s:.3g}",
        "p99 s": f"{summary.p99_s:.3g}",
        "longest s": f"{summary.worst_s:.3g}",
        "bound s": shown(_bound_s(workload, case), ".3g"),
        "late": shown(summary.missed, ".1%"),
        "gave up": f"{summary.gave_up:.1%}",
        "tries": f"{summary.tries:.2f}",
        "busy": f"{summary.utilization:.1%}",
        "cpu s": f"{took_s:.2f}",
    }


def _bound_s(workload: Workload, case: Case) -> float | None:
    """What no latency can exceed, by the ageing of shortest predicted first at one server; None without that."""
    policy, alone = case.policy, case.server == "one" and _NUM_SERVERS.value == 1 and _TIMEOUT_S.value == math.inf
    if not alone or not isinstance(policy, Shortest) or policy.preemptive or policy.ageing == 0:
        return None
    work_s, arrivals_s = _work_s(workload), workload.requests.arrivals_s
    predicted_s = policy.order(workload.requests, work_s, host_rng(SERVING_PREDICTOR, _SEED.value)).base
    return float((ageing_bound_s(arrivals_s, work_s, predicted_s, policy.ageing) + work_s).max())


def _theory_s(workload: Workload, case: Case, rate_per_s: float) -> float | None:
    """The mean latency by a closed form with Poisson arrivals and the moments of this work, None where there is
    none."""
    if case.server == "batch":
        return closed_forms.batch_server(rate_per_s, batch_s=_BATCH_S.value, row_s=_ROW_S.value).sojourn_s
    policy = case.policy
    if case.server != "one" or _NUM_SERVERS.value > 1 or not isinstance(policy, Fcfs | Priority):
        return None
    work_s, classes = _work_s(workload), workload.requests.priorities
    if isinstance(policy, Fcfs):
        classes = np.zeros_like(classes)
    names, places = np.unique(classes, return_inverse=True)
    moment = lambda power: np.asarray([np.mean(work_s[places == place] ** power) for place in range(len(names))])
    shares = np.bincount(places) / len(places)
    preemptive = isinstance(policy, Priority) and policy.preemptive
    if preemptive:
        sojourns_s = closed_forms.preemptive_sojourns_s(rate_per_s * shares, moment(1), moment(2))
    else:
        sojourns_s = closed_forms.priority_waits_s(rate_per_s * shares, moment(1), moment(2)) + moment(1)
    return float(shares @ sojourns_s)


def _read(path: str) -> Workload:
    """A trace's requests, with counted tokens where it has them."""
    trace = read_trace(path)
    words = [max(1, round(_TOKENS_PER_WORD.value * len(request.prompt.split()))) for request in trace]
    prompt = [request.prompt_tokens or guess for request, guess in zip(trace, words)]
    output = [request.output_tokens or request.max_tokens for request in trace]
    return Workload(requests_of(trace), np.asarray(prompt), np.asarray(output), np.zeros(len(trace), np.int64))


def _with_prompts(workload: Workload, rng: np.random.Generator) -> list[TraceRequest]:
    """The drawn requests as lines of a trace: prompts of about as many tokens, whole words from random places of the
    text; max_tokens is the drawn length of the answer."""
    if _PROMPTS.value is None:
        raise ValueError("--write_trace needs --prompts, a text that prompts are cut from")
    words = " ".join(load_documents(_PROMPTS.value)).split()
    if not words:
        raise ValueError(f"--prompts={_PROMPTS.value} has no words")
    requests, trace = workload.requests, []
    for number, (tokens, most) in enumerate(zip(workload.prompt_tokens, workload.output_tokens)):
        count = max(1, int(tokens / _TOKENS_PER_WORD.value))
        start = int(rng.integers(max(1, len(words) - count)))
        deadline_s = float(requests.deadlines_s[number])
        trace.append(
            TraceRequest(
                arrival_s=round(float(requests.arrivals_s[number]), 6),
                prompt=" ".join(words[start : start + count]),
                max_tokens=int(most),
                client=str(rng.integers(_NUM_CLIENTS.value)) if _NUM_CLIENTS.value else None,
                priority=int(requests.priorities[number]),
                deadline_s=None if math.isinf(deadline_s) else round(deadline_s, 6),
            )
        )
    return trace


def _about(workload: Workload) -> str:
    arrivals_s = workload.requests.arrivals_s
    rate = f"{len(arrivals_s) / arrivals_s[-1]:.3g} a second, " if arrivals_s[-1] > 0 else ""
    return (
        f"{len(arrivals_s)} requests, {rate}{workload.prompt_tokens.mean():.1f} prompt and "
        f"{workload.output_tokens.mean():.1f} output tokens on average; latency until the answer, or until giving up"
    )


def _table(rows: list[dict[str, str]]) -> str:
    """Aligned columns, those that are empty in every row left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = [columns, *([row[name] or "-" for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    pad = lambda place, cell: cell.ljust(widths[place]) if place < 2 else cell.rjust(widths[place])
    return "\n".join("  ".join(pad(place, cell) for place, cell in enumerate(line)).rstrip() for line in cells)


if __name__ == "__main__":
    app.run(main)
