"""Tokens per second and resident memory of federated LoRA rounds, in turn with PyTorch + PEFT doing the same work.

  python -m launch.benchmark_rounds --checkpoint=DIR --text=FILE
  python -m launch.benchmark_rounds --checkpoint=DIR --text=FILE --peer_python=VENV/bin/python --peer_script=FILE.py
  python -m launch.benchmark_rounds --checkpoint=DIR --text=FILE --num_clients=20,200,2000

Work of a round: every client takes --local_steps fresh AdamW steps of --batch_size x --seq_len tokens on LoRA of q and
v; the server takes the mean. The peer is a script that takes the same flags (--checkpoint, --text, --rounds, --clients,
--local_steps, --batch_size, --seq_len, --lr, --rank) and prints one JSON line with round_s, tokens_per_s, nll_start and
nll_end; it and ours run in turn, --pairs times. One JSON line per run, then one with the ratios. Several --num_clients
run in a process each, so that peak_resident_bytes is that number's own.

On a machine where others work too, run it under `taskset -c 0`: one thread each, which waits for nobody.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from fmfl_jax.data.tokenizers import model_tokenizer
from fmfl_jax.experiment.build.language_model import ClientData, window_batches
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import default_clients_per_pass, pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort, Execution, ServerState
from fmfl_jax.memory import keep_freed_memory, return_freed_memory
from fmfl_jax.models.formats.checkpoint import open_checkpoint
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.quantize import head_group_size, quantize_head
from fmfl_jax.parallel import replicate
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import check_context, split
from launch import app

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Hugging Face folder, or GGUF file, with a tokenizer.", required=True
)
_TEXT = flags.DEFINE_string("text", None, "The clients' text, one file.", required=True)
_MAX_CHARS = flags.DEFINE_integer("max_chars", 2_000_000, "Characters of the text that are used.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds per run.", lower_bound=1)
_NUM_CLIENTS = flags.DEFINE_list("num_clients", ["20"], "Clients, all in every round; several numbers: one run each.")
_LOCAL_STEPS = flags.DEFINE_integer("local_steps", 4, "Steps of a client per round.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Windows per step.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens per window.", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 8, "LoRA rank; alpha is twice that.", lower_bound=1)
_LR = flags.DEFINE_float("lr", 1e-3, "Learning rate of the clients' AdamW.", lower_bound=0)
_PER_PASS = flags.DEFINE_integer(
    "clients_per_pass",
    None,
    "Clients of a device that train side by side. Default: 1 on a CPU, where that is fastest, all elsewhere.",
    lower_bound=1,
)
_DEQUANTIZE = flags.DEFINE_bool(
    "dequantize", False, "Unpack the checkpoint's 4-bit weights to float32; else they are trained on as stored."
)
_HEAD = flags.DEFINE_enum(
    "head", "fp", ["fp", "int8"], "The head: in float32, or in 8 bits, as GGUF's Q8_0 has it already."
)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 1, "Devices that the CPU's cores are divided into.", lower_bound=1)
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of the peer's own environment.")
_PEER_SCRIPT = flags.DEFINE_string("peer_script", None, "The peer.")
_PEER_CHECKPOINT = flags.DEFINE_string(
    "peer_checkpoint", None, "The same model in a format that the peer reads. Default: --checkpoint."
)
_PAIRS = flags.DEFINE_integer("pairs", 2, "Runs of each, in turn, where there is a peer.", lower_bound=1)

_HELD_OUT = 64  # windows that no client holds


class Job(NamedTuple):
    """A compiled round and what it starts from. evaluate(params) -> nats per token on the held-out windows."""

    config: RoundsConfig
    data: ClientData
    round: jax.stages.Compiled
    state: ServerState
    frozen: dict
    evaluate: Callable[[dict, dict], float]


def load_windows() -> np.ndarray:
    """int32 [W, T + 1] windows without overlap."""
    text = pathlib.Path(_TEXT.value).read_text(encoding="utf-8")[: _MAX_CHARS.value]
    checkpoint = open_checkpoint(_CHECKPOINT.value)
    ids = model_tokenizer(
        checkpoint.tokenizer_path, vocab_size=checkpoint.config.vocab_size, model_name=_CHECKPOINT.value
    ).encode(text)
    count = len(ids) // (_SEQ_LEN.value + 1)
    if count <= _HELD_OUT:
        raise ValueError(
            f"--text={_TEXT.value} has {count} windows of {_SEQ_LEN.value + 1} tokens: expected more than {_HELD_OUT}"
        )
    return ids[: count * (_SEQ_LEN.value + 1)].reshape(count, -1)


def prepare(windows: np.ndarray, num_clients: int, *, seed: int = 0) -> Job:
    """Deals the windows to num_clients at random and compiles the round."""
    order = np.random.default_rng(seed).permutation(len(windows))
    shards = np.array_split(order[_HELD_OUT:], num_clients)
    if len(shards[-1]) == 0:
        raise ValueError(f"--num_clients={num_clients} is more than the {len(order) - _HELD_OUT} windows of the text")
    held_out = windows[order[:_HELD_OUT]]
    data = ClientData(windows, shards)
    as_stored = _HEAD.value == "int8"
    checkpoint = open_checkpoint(_CHECKPOINT.value, dtype="float32", dequantize=_DEQUANTIZE.value, int8_head=as_stored)
    model_config, params = checkpoint.config, checkpoint.params
    if as_stored:
        model_config, params = quantize_head(model_config, params, bits=8, group_size=head_group_size(model_config))
    lora = LoraConfig(rank=_RANK.value, alpha=2.0 * _RANK.value)
    check_context(model_config, lora, _SEQ_LEN.value)
    model = split(model_config, dict(params), lora, key=jax.random.key(seed))

    def loss_fn(trainable, frozen, batch, key):
        return jnp.mean(token_nll(model.merge(trainable, frozen), batch))

    config = RoundsConfig(
        num_rounds=_ROUNDS.value,
        cohort_size=num_clients,
        local_steps=_LOCAL_STEPS.value,
        batch_size=_BATCH_SIZE.value,
        seed=seed,
        clients_per_pass=_PER_PASS.value or default_clients_per_pass(),
    )
    parts = make_round(
        fed_opt(jax.value_and_grad(loss_fn), optax.adamw(_LR.value, weight_decay=0.0)),
        execution=Execution(clients_per_pass=config.clients_per_pass),
    )
    frozen, state = replicate(model.frozen, copy=False), replicate(parts.init(model.trainable, seed))
    compiled = pmap_round(parts).lower(state, frozen, batches(config, data, 0)).compile()
    nll = jax.jit(lambda params, frozen, batch: jnp.mean(token_nll(model.merge(params, frozen), batch)))

    def evaluate(params, frozen):  # as the peer does, a few windows at a time: all at once take more than the rounds
        return statistics.fmean(float(nll(params, frozen, b)) for b in np.split(held_out, _HELD_OUT // 8))

    return Job(config, data, compiled, state, frozen, evaluate)


def batches(config: RoundsConfig, data: ClientData, r: int) -> Cohort:
    """Round r's cohort, laid out over the devices."""
    ids = np.arange(len(data.client_indices), dtype=np.int32)
    sizes = np.asarray([len(indices) for indices in data.client_indices], np.float32)
    made, _ = window_batches(config, data)(ids, r)
    return put_on_devices(Cohort(ids, sizes, made), clients_per_pass=config.clients_per_pass)


def run_ours(job: Job) -> dict:
    """The rounds from the start. round_s includes making the batches, as the peer's does; compilation is before."""
    state, round_s = jax.tree.map(jnp.copy, job.state), []  # a round gives its state's memory away
    result = {
        "engine": "fmfl_jax",
        "clients": job.config.cohort_size,
        "devices": jax.device_count(),
        "nll_start": job.evaluate(state.params, job.frozen),
    }
    return_freed_memory()  # of both compilations
    keep_freed_memory()
    cpu = time.process_time()
    for r in range(job.config.num_rounds):
        begin = time.perf_counter()
        state, *_ = jax.block_until_ready(job.round(state, job.frozen, batches(job.config, job.data, r)))
        round_s.append(time.perf_counter() - begin)
    cpu = time.process_time() - cpu
    tokens = job.config.cohort_size * job.config.local_steps * job.config.batch_size * _SEQ_LEN.value
    return result | {
        "round_s": round_s,
        "nll_end": job.evaluate(state.params, job.frozen),
        "tokens_per_s": tokens / statistics.median(round_s),
        "tokens_per_cpu_s": tokens * len(round_s) / cpu,
        "resident_bytes": resident_bytes(),
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def resident_bytes() -> int:
    """Memory that the process holds now (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_peer(num_clients: int) -> dict:
    """The peer's JSON line."""
    same = {
        "checkpoint": _PEER_CHECKPOINT.value or _CHECKPOINT.value,
        "text": _TEXT.value,
        "max_chars": _MAX_CHARS.value,
        "rank": _RANK.value,
        "rounds": _ROUNDS.value,
        "clients": num_clients,
        "local_steps": _LOCAL_STEPS.value,
        "lr": _LR.value,
        "batch_size": _BATCH_SIZE.value,
        "seq_len": _SEQ_LEN.value,
    }
    command = [_PEER_PYTHON.value, _PEER_SCRIPT.value, *(f"--{name}={value}" for name, value in same.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--peer_script={_PEER_SCRIPT.value} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    sizes = [int(n) for n in _NUM_CLIENTS.value if n.isdecimal() and int(n) > 0]
    if len(sizes) != len(_NUM_CLIENTS.value) or not sizes:
        raise ValueError(f"--num_clients={','.join(_NUM_CLIENTS.value)}: expected whole numbers above 0")
    if (_PEER_PYTHON.value is None) != (_PEER_SCRIPT.value is None):
        raise ValueError("--peer_python and --peer_script go together")
    jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    if len(sizes) > 1:
        for num_clients in sizes:
            command = [sys.executable, "-m", "launch.benchmark_rounds", *sys.argv[1:], f"--num_clients={num_clients}"]
            if subprocess.run(command, check=False).returncode:
                raise ValueError(f"the run with --num_clients={num_clients} failed")
        return
    job = prepare(load_windows(), sizes[0])
    if _PEER_PYTHON.value is None:
        app.say(json.dumps(run_ours(job)))
        return
    ratios = []
    for _ in range(_PAIRS.value):
        peer, ours = run_peer(sizes[0]), run_ours(job)
        app.say(json.dumps(peer))
        app.say(json.dumps(ours))
        ratios.append(ours["tokens_per_s"] / peer["tokens_per_s"])
    app.say(json.dumps({"clients": sizes[0], "ratios": ratios, "median_ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    app.run(main)
