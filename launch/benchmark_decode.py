"""Time per token of decoding, beside the floor that the memory bandwidth sets.

  python -m launch.benchmark_decode --preset=7b --weights=fp,int4 --batch=1,8,64
  python -m launch.benchmark_decode --preset=mini --weights=fp,int4 --batch=1,8       (on a CPU)
  python -m launch.benchmark_decode --checkpoint=smollm2-135m --batch=1 --context=64 --head=fp,int8,int4 \\
      --peer=llama_cpp,transformers --peer_python=VENV/bin/python

With --preset the weights are random and made on the device in the format they are used in: "fp" in --dtype, "int4"
packed. A decode step of a batch reads every weight and the cache's filled slots once; that, divided by the bandwidth of
a copy measured in the same run, is the floor.

With --checkpoint ("fp": unpacked, "int4": as it is) each row and each peer is a process of its own, and all are
measured in turn: decoding, reading a prompt of --prefill tokens, and peak memory (decode_rows.py).
"""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from fmfl_jax.config import LlamaConfig, llama_preset
from fmfl_jax.models.generate import DecodeState, Sampling, has_loop, init_cache, jit_generator
from fmfl_jax.models.params import init_params, num_bytes, param_specs
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.peft.split import NoPeftConfig, split
from kernels.w4a16 import measure
from launch import app, decode_rows
from launch.device_memory import require_memory

_PRESET = flags.DEFINE_string("preset", "7b", "Size of the random model: tiny, mini, 7b, 8b, 13b or 70b.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A checkpoint in place of a random model; smollm2-135m is one.")
_PEER = flags.DEFINE_list("peer", [], "Any of llama_cpp and transformers, beside a checkpoint with --batch=1.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment that has the peers.")
_PREFILL = flags.DEFINE_integer("prefill", 512, "Tokens of the prompt read, with --checkpoint.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", None, "CPUs for every row, with --checkpoint; default: all.", lower_bound=1)
_ACTIVATION_BITS = flags.DEFINE_list(
    "activation_bits", ["16"], "Any of 16 and 8, of the int4 rows on a CPU, with --checkpoint."
)
_WEIGHTS = flags.DEFINE_list("weights", ["fp", "int4"], "Any of fp and int4.")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "64"], "Batch sizes.")
_CONTEXT = flags.DEFINE_integer(
    "context", 128, "Slots of the cache that are filled before the first step.", lower_bound=1
)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Steps per measured loop.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measured loops; the median counts.", lower_bound=1)
_HEAD = flags.DEFINE_list("head", ["fp"], "Heads of the int4 model: fp (in --dtype), int4; a checkpoint's int8 too.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float16", "float32"],
    "Compute dtype; default: bfloat16, a checkpoint's on a CPU float32.",
)
_GROUP_SIZE = flags.DEFINE_integer("group_size", 128, "Weights per scale.", lower_bound=1)
_BUDGET_S = flags.DEFINE_float("budget_s", float("inf"), "Seconds after which the remaining batches are left out.")
_JSON = flags.DEFINE_string("json", None, "File for the results.")


def step_bytes(config: LlamaConfig, params: dict, batch: int, context: int) -> tuple[int, int]:
    """(bytes of weights, bytes of cache) that one step must read; of an embedding that is no head, only its rows."""
    weights = num_bytes(params)
    if not config.tie_embeddings:
        embedding = params["embed_tokens.weight"].nbytes
        weights += min(0, batch * embedding // config.vocab_size - embedding)
    return weights, cache_bytes(config, batch, context)


def cache_bytes(config: LlamaConfig, batch: int, slots: int) -> int:
    """Bytes of the keys and values of `slots` positions per row."""
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return batch * slots * per_slot


def step_ms(config: LlamaConfig, model, batch: int) -> list[float]:
    """Milliseconds per step of --repeats loops; a first loop, not counted, compiles and warms up."""
    _, decode_fn = jit_generator(model.merge, Sampling())
    start = jnp.full(batch, _CONTEXT.value, jnp.int32)
    one_array = has_loop(model.merge, model.trainable, model.frozen)
    cache = init_cache(config, batch, _CONTEXT.value + _TOKENS.value, one_array=one_array)
    state = DecodeState(cache, jnp.zeros_like(start), start, jnp.zeros(batch, bool), jax.random.key(0))
    times = []
    for _ in range(1 + _REPEATS.value):
        state = jax.block_until_ready(state._replace(position=jnp.copy(start)))  # the same slots again
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(decode_fn(model.trainable, model.frozen, state, _TOKENS.value))
        times.append(1e3 * (time.perf_counter() - begin) / _TOKENS.value)
    return times[1:]


def measured(config: LlamaConfig, weights: str, params: dict, model, batch: int, copy_gbps: float) -> dict:
    """One row of the table."""
    times = step_ms(config, model, batch)
    ms = statistics.median(times)
    filled = _CONTEXT.value + _TOKENS.value // 2  # on average over a loop
    weight_read, cache_read = step_bytes(config, params, batch, filled)
    gbps = (weight_read + cache_read) / ms / 1e6
    return {
        "preset": _PRESET.value,
        "weights": weights,
        "head": _HEAD.value[0] if weights == "int4" else "fp",
        "batch": batch,
        "context": _CONTEXT.value,
        "ms_per_step": ms,
        "ms_min": min(times),
        "ms_max": max(times),
        "tokens_per_s": 1e3 * batch / ms,
        "weight_bytes_held": num_bytes(params),
        "weight_bytes_read": weight_read,
        "cache_bytes_read": cache_read,
        "gbps": gbps,
        "copy_fraction": gbps / copy_gbps,
        "floor_ms": (weight_read + cache_read) / copy_gbps / 1e6,
    }


def line(row: dict) -> str:
    """The row for the screen."""
    return (
        f"{row['preset']:>5} {row['weights']:>4} head {row['head']:4} batch {row['batch']:3} "
        f"context {row['context']:5}: {row['ms_per_step']:9.3f} ms a token (floor {row['floor_ms']:7.3f})  "
        f"{row['tokens_per_s']:9.1f} tokens/s  {row['gbps']:7.1f} GB/s, {row['copy_fraction']:5.2f} of a copy"
    )


def checked_lists() -> tuple[list[str], list[int]]:
    """Weights and batch sizes."""
    heads = ("fp", "int4") if _CHECKPOINT.value is None else ("fp", "int8", "int4")
    for flag, known in (
        (_WEIGHTS, ("fp", "int4")),
        (_HEAD, heads),
        (_PEER, decode_rows.PEERS),
        (_ACTIVATION_BITS, ("16", "8")),
    ):
        if [value for value in flag.value if value not in known] or not (flag.value or flag is _PEER):
            raise ValueError(f"--{flag.name} must be some of {', '.join(known)}, got {','.join(flag.value)!r}")
    try:
        batches = [int(b) for b in _BATCH.value]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch must be positive numbers, got {','.join(_BATCH.value)!r}")
    return _WEIGHTS.value, batches


def checked_config(weights: list[str]) -> LlamaConfig:
    """The random model."""
    config = llama_preset(_PRESET.value, dtype=_DTYPE.value or "bfloat16")
    if _CONTEXT.value + _TOKENS.value > config.max_seq_len:
        raise ValueError(
            f"--context {_CONTEXT.value} + --tokens {_TOKENS.value} exceed the model's max_seq_len {config.max_seq_len}"
        )
    if len(_HEAD.value) > 1:
        raise ValueError(f"--head={','.join(_HEAD.value)}: a random model has one")
    if "int4" in _HEAD.value and "int4" in weights and config.tie_embeddings:
        raise ValueError(f"--head=int4: the head of {_PRESET.value} is its embedding, which cannot be packed")
    if _PEER.value:
        raise ValueError("--peer needs a --checkpoint, which the peer reads too")
    return config


def make_params(config: LlamaConfig, weights: str, key) -> dict:
    """Random parameters in the format `weights`."""
    if weights == "fp":
        return init_params(config, key, dtype=config.dtype)
    return random_int4_params(config, key, group_size=_GROUP_SIZE.value, head=_HEAD.value == ["int4"])


def needed_bytes(config: LlamaConfig, weights: list[str], batches: list[int], platform: str) -> int:
    """Device memory of the largest measurement: the weights, the largest tensor while it is made, the cache.

    XLA's CPU backend computes in float32, from copies of all matrices.
    """
    shapes = [jax.eval_shape(lambda key, w=w: make_params(config, w, key), jax.random.key(0)) for w in weights]
    held = max(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in shapes)
    counts = [math.prod(spec.shape) for spec in param_specs(config).values()]
    copies = 4 * sum(counts) if platform == "cpu" else 0
    return held + 8 * max(counts) + copies + cache_bytes(config, max(batches), _CONTEXT.value + _TOKENS.value)


def main():
    weights, batches = checked_lists()
    if _CHECKPOINT.value is not None:
        measure_checkpoint(_CHECKPOINT.value, weights, batches)
    else:
        measure_preset(checked_config(weights), weights, batches)


def measure_checkpoint(checkpoint: str, weights: list[str], batches: list[int]) -> None:
    """All rows of a checkpoint and the peers, in turn, and how many times as fast each is as our fp and as a peer."""
    if _PEER_PYTHON.value is None and _PEER.value:
        raise ValueError("--peer needs --peer_python")
    sizes = decode_rows.Sizes(context=_CONTEXT.value, tokens=_TOKENS.value, prefill=_PREFILL.value)
    threads = decode_rows.use_threads(_THREADS.value)
    more = [] if _DTYPE.value is None else [f"--dtype={_DTYPE.value}"]
    commands = {}
    for batch in batches:
        beside = f" batch {batch}" if len(batches) > 1 else ""
        if "fp" in weights:
            commands[f"fp{beside}"] = decode_rows.our_command(checkpoint, "fp", "fp", batch, sizes, more)
        for head, bits in itertools.product(_HEAD.value, _ACTIVATION_BITS.value) if "int4" in weights else ():
            name, options = f"int4 head {head}, {bits} bits{beside}", [*more, f"--activation_bits={bits}"]
            commands[name] = decode_rows.our_command(checkpoint, "int4", head, batch, sizes, options)
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(decode_rows.started(command)) for name, command in commands.items()}
        for peer in _PEER.value:
            found = decode_rows.peer_command(peer, str(_PEER_PYTHON.value), checkpoint, sizes, threads)
            try:
                workers[peer] = stack.enter_context(decode_rows.started(stack.enter_context(found)))
            except ValueError as e:
                app.say(f"--peer={peer} is left out: {e}")
        rows = decode_rows.measure_in_turn(workers, _REPEATS.value, app.say)
    references = [name for name in ("fp", *decode_rows.PEERS) if name in workers]
    for name in references:
        for line_ in decode_rows.ratio_lines(rows, name):
            app.say(line_)
    found = {name: decode_rows.ratios(rows, name) for name in references}
    about = {"checkpoint": checkpoint, "threads": threads, "batches": batches, **dataclasses.asdict(sizes)}
    write(about | {"rows": rows, "times_as_fast_as": found})


def measure_preset(config: LlamaConfig, weights: list[str], batches: list[int]) -> None:
    """A random model's rows, beside the floor."""
    device = jax.devices()[0]
    what = f"--preset={_PRESET.value} with --weights={','.join(weights)} and --batch={max(batches)}"
    require_memory(device, needed_bytes(config, weights, batches, device.platform), what)
    begin = time.monotonic()
    copy_gbps = measure.copy_gbps(2**30 if device.platform == "gpu" else 2**26)
    app.say(f"{device.device_kind}: copy {copy_gbps:.0f} GB/s (read + written)")
    results = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "copy_gbps": copy_gbps,
        "dtype": config.dtype,
        "tokens": _TOKENS.value,
        "repeats": _REPEATS.value,
        "rows": [],
        "left_out": [],
    }
    for name in weights:
        params = make_params(config, name, jax.random.key(0))
        model = split(config, params, NoPeftConfig(), key=jax.random.key(0))
        for batch in batches:
            if time.monotonic() - begin > _BUDGET_S.value:
                results["left_out"].append(f"{name} batch {batch}")
                continue
            results["rows"].append(measured(config, name, params, model, batch, copy_gbps))
            app.say(line(results["rows"][-1]))
            write(results)
        del params, model  # the next format takes their room
    if results["left_out"]:
        app.say(f"left out for time: {', '.join(results['left_out'])}")
    write(results)


def write(results: dict) -> None:
    """To --json, after every row: a run that is cut off leaves what it has."""
    if _JSON.value is not None:
        pathlib.Path(_JSON.value).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
