"""What docs/results/delivery.md shows: sizes, speeds, damage found, fetches killed, computing while layers arrive,
broadcasts, the base model over the radio.

  python -m launch.benchmark_delivery sizes --checkpoint=CKPT/TinyStories-656K --gguf=smollm2-135m
  python -m launch.benchmark_delivery speeds
  python -m launch.benchmark_delivery damage --trials=100000
  python -m launch.benchmark_delivery kills --trials=100
  python -m launch.benchmark_delivery progressive --gguf=smollm2-135m
  python -m launch.benchmark_delivery broadcast
  python -m launch.benchmark_delivery radio

Speeds are of one core, in CPU seconds. Everything random follows from --seed.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time

import ml_dtypes
import numpy as np
import zstandard
from absl import flags
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.delivery.sources import cast_safetensors, sources
from fmfl_jax.experiment.delivery.streamed import Arrivals, next_token
from fmfl_jax.experiment.network.workload import make_job
from fmfl_jax.experiment.report.delivery import delivery_rows, delivery_table
from fmfl_jax.models.formats.checkpoint import checkpoint_path, load_checkpoint
from fmfl_jax.models.formats.safetensors_io import TensorSpec, map_tensor, read_header, write_tensors
from fmfl_jax.peft.split import NoPeftConfig
from fmfl_jax.transport.weights import coders, fountain
from fmfl_jax.transport.weights.broadcast import arq_sends, fountain_sends, ideal_sends
from fmfl_jax.transport.weights.container import Container, Source, pack
from fmfl_jax.transport.weights.http import fetch, make_server
from fmfl_jax.transport.weights.receive import part_folder
from launch import app

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "sizes: a folder with float32 safetensors.")
_GGUF = flags.DEFINE_string("gguf", "smollm2-135m", "sizes, progressive: a GGUF file.")
_TRIALS = flags.DEFINE_integer("trials", 100, "damage, kills, broadcast: how many.", lower_bound=1)
_RATE = flags.DEFINE_float("rate_bps", 100e6, "progressive: of the link.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Determines everything random.", lower_bound=0)

_KEY = Ed25519PrivateKey.generate()


def main(command: str):
    with tempfile.TemporaryDirectory() as folder:
        COMMANDS[command](pathlib.Path(folder))


def sizes(folder: pathlib.Path) -> None:
    """Coded against plain and against zstd on the same file."""
    app.say(f"{'file':44}{'bytes':>14}{'coded':>14}{'share':>8}{'zstd 3':>8}{'zstd 19':>8}")
    if _CHECKPOINT.value:
        narrow = cast_safetensors(_CHECKPOINT.value, folder / "narrow")
        base = _packed(narrow, folder / "base.fmw")
        _size_line("bf16 safetensors", base, "model.safetensors", narrow)
        wide = _packed(pathlib.Path(_CHECKPOINT.value), folder / "wide.fmw")
        _size_line("float32 safetensors", wide, "model.safetensors", pathlib.Path(_CHECKPOINT.value))
        for change in (1e-2, 1e-3, 1e-4):
            tuned = _tuned(narrow, folder / f"tuned{change}", change)
            delta = _packed(tuned, folder / f"delta{change}.fmw", base=base)
            parts = [p for p in delta.manifest.parts if p.name]
            bits = 8 * sum(p.coded_bytes for p in parts) / (sum(p.nbytes for p in parts) / 2)
            _size_line(f"bf16 delta, change {change}: {bits:.3f} bits a weight", delta, "model.safetensors", tuned)
    file = checkpoint_path(_GGUF.value)
    _size_line(file.name, _packed(file, folder / "gguf.fmw"), file.name, file)


def _size_line(label: str, container: Container, name: str, path: pathlib.Path) -> None:
    parts = [p for p in container.manifest.parts if p.file == name]
    plain, coded = sum(p.nbytes for p in parts), sum(p.coded_bytes for p in parts)
    data = (path / name if path.is_dir() else path).read_bytes()
    zstd = [len(zstandard.ZstdCompressor(level=level).compress(data)) / plain for level in (3, 19)]
    app.say(f"{label:44}{plain:14,}{coded:14,}{coded / plain:8.4f}{zstd[0]:8.4f}{zstd[1]:8.4f}")


def _tuned(narrow: pathlib.Path, folder: pathlib.Path, change: float) -> pathlib.Path:
    """The bfloat16 checkpoint with every tensor moved by `change` times its standard deviation, rounded again."""
    rng = np.random.default_rng(_SEED.value)
    header = read_header(narrow / "model.safetensors")
    tensors = {name: np.asarray(map_tensor(info), np.float32) for name, info in header.items()}
    moved = {n: x + (change * x.std() * rng.normal(size=x.shape)).astype(np.float32) for n, x in tensors.items()}
    folder.mkdir()
    specs = [TensorSpec(n, np.dtype(ml_dtypes.bfloat16), x.shape) for n, x in moved.items()]
    write_tensors(folder / "model.safetensors", specs, (x.astype(ml_dtypes.bfloat16) for x in moved.values()))
    return folder


def speeds(folder: pathlib.Path) -> None:
    """MB/s of decoded bytes and of CPU time."""
    del folder
    rng = np.random.default_rng(_SEED.value)
    values = rng.normal(size=2**25).astype(np.float32) * 0.02
    narrow = values.astype(ml_dtypes.bfloat16)
    moved = (values * (1 + 1e-3 * rng.normal(size=values.size).astype(np.float32))).astype(ml_dtypes.bfloat16)
    blocks = np.clip(rng.normal(128, 40, size=2**25), 0, 255).astype(np.uint8)
    rows = [
        ("BF16", narrow, None),
        ("F32", values, None),
        ("BF16", moved, narrow),
        ("Q4_1", blocks[: blocks.size // 20 * 20], None),
    ]
    app.say(f"{'coder':10}{'dtype':8}{'MB':>8}{'share':>8}{'encode MB/s':>14}{'decode MB/s':>14}")
    for dtype, array, base in rows:
        data = array.view(np.uint8).data
        before = None if base is None else base.view(np.uint8).data
        took = {"encode": [], "decode": []}
        for _ in range(5):
            begin = time.process_time()
            coder, coded = coders.encode(data, dtype, before)
            middle = time.process_time()
            assert coders.decode(coder, coded, dtype, len(data), before) == data
            took["encode"].append(middle - begin)
            took["decode"].append(time.process_time() - middle)
        fast = {way: len(data) / 1e6 / min(seconds) for way, seconds in took.items()}
        share = len(coded) / len(data)
        app.say(f"{coder:10}{dtype:8}{len(data) / 1e6:8.0f}{share:8.3f}{fast['encode']:14.0f}{fast['decode']:14.0f}")


def damage(folder: pathlib.Path) -> None:
    """Containers changed at random, of which none may pass."""
    container = Container(_random_container(folder, 2**17), _KEY.public_key())
    whole, head, found = container.path.read_bytes(), len(container.head), {}
    rng = np.random.default_rng(_SEED.value)
    kinds = (_flip_bit, _change_byte, _overwrite, _cut, _swap, _insert)
    for i in range(_TRIALS.value):
        change = kinds[i % len(kinds)]
        damaged = change(whole, head, rng)
        assert damaged != whole
        container.path.write_bytes(damaged)
        try:
            opened = Container(container.path, _KEY.public_key())
            opened.coded(0, opened.manifest.coded_bytes)
        except ValueError:
            found[change.__name__] = found.get(change.__name__, 0) + 1
    for name, count in found.items():
        app.say(f"{name.strip('_'):12}{count:8,} found")
    app.say(f"{sum(found.values()):,} of {_TRIALS.value:,} found")


def _flip_bit(data: bytes, head: int, rng) -> bytes:
    """Half of the time in the head."""
    at = int(rng.integers(head if rng.random() < 0.5 else len(data)))
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]


def _change_byte(data: bytes, head: int, rng) -> bytes:
    at = int(rng.integers(head, len(data)))
    return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]


def _overwrite(data: bytes, head: int, rng) -> bytes:
    at, size = int(rng.integers(len(data) - 100)), int(rng.integers(8, 100))
    return data[:at] + rng.bytes(size) + data[at + size :]


def _cut(data: bytes, head: int, rng) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _swap(data: bytes, head: int, rng) -> bytes:
    """Two stretches of chunks change places."""
    size = int(rng.integers(16, 4096))
    a, b = sorted(int(x) for x in rng.choice((len(data) - head) // size, 2, replace=False) * size + head)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def _insert(data: bytes, head: int, rng) -> bytes:
    at = int(rng.integers(len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 50))) + data[at:]


def kills(folder: pathlib.Path) -> None:
    """A fetch in a process of its own, killed (SIGKILL) at random moments and started again; what was sent twice."""
    path = _random_container(folder, 2**24)
    container = Container(path, _KEY.public_key())
    out, chunks = folder / "out", part_folder(folder / "out") / "container.chunks"
    rng, requests, context = np.random.default_rng(_SEED.value), [], multiprocessing.get_context("fork")
    killed, resumed, again, total = 0, 0, 0, container.manifest.coded_bytes
    with _served(container, rate_bps=100e6, on_request=requests.append) as url:
        while not out.exists():
            there = chunks.stat().st_size if chunks.exists() else 0
            asked = len(requests)
            child = context.Process(target=fetch, args=(url, _KEY.public_key(), out))
            child.start()
            child.join(float(rng.uniform(0.0, 0.06)) if killed < _TRIALS.value else None)
            if child.is_alive():
                os.kill(child.pid or 0, signal.SIGKILL)
                killed += 1
            child.join()
            resumed += there > 0
            whole = there // container.manifest.chunk_bytes * container.manifest.chunk_bytes
            begins = [begin - len(container.head) for begin in requests[asked:] if begin >= len(container.head)]
            again += sum(max(0, whole - begin) for begin in begins)
    app.say(
        f"killed {killed} times, gone on from {resumed} partial files; of {total:,} bytes {again:,} of verified chunks "
        "were asked for again"
    )


def progressive(folder: pathlib.Path) -> None:
    """A real model over a paced link: when layer 0 starts, when the next token is there, against fetching all first."""
    file = checkpoint_path(_GGUF.value)
    container = _packed(file, folder / "model.fmw")
    prompt = "The capital of France is"
    next_token(_linked(file, folder / "whole"), prompt, _all_there(container))  # compiles
    with _served(container, rate_bps=_RATE.value) as url:
        arrivals = Arrivals(in_use=True)
        thread = threading.Thread(
            target=fetch, args=(url, _KEY.public_key(), folder / "out"), kwargs={"on_part": arrivals.on_part}
        )
        thread.start()
        found = next_token(part_folder(folder / "out"), prompt, arrivals)
        arrivals.release()
        thread.join()
    last = max(arrivals.seconds.values())
    begin = time.perf_counter()
    alone = next_token(folder / "out", prompt, _all_there(container))
    compute_s = time.perf_counter() - begin
    assert alone.text == found.text
    app.say(f"{container.manifest.coded_bytes:,} bytes at {_RATE.value / 1e6:.0f} Mbit/s: the last after {last:.2f} s")
    app.say(f"layer 0 began after {found.begin_s:.2f} s; {found.text!r} after {found.end_s:.2f} s")
    app.say(f"all first, then computed: {last + compute_s:.2f} s")


def broadcast(folder: pathlib.Path) -> None:
    """Sends a chunk: ARQ, an ideal code, random combinations by formula and by decoding."""
    del folder
    app.say(
        f"{'K':>6}{'users':>7}{'loss':>6}{'ARQ':>9}{'ideal':>9}{'GF(256)':>9}{'decoded':>9}{'+-':>8}{'of ideal':>10}"
    )
    for chunks, users, loss in ((100, 20, 0.1), (100, 50, 0.2), (250, 20, 0.1), (1000, 50, 0.2)):
        losses = np.full(users, loss)
        trials = _TRIALS.value if chunks <= 250 else 0
        sent = np.asarray([_sends(chunks, losses, _SEED.value + i) for i in range(trials)]) / chunks
        ideal = ideal_sends(losses, chunks)
        by_formula = fountain_sends(losses, chunks)
        decoded = f"{sent.mean():9.5f}{sent.std() / trials**0.5:8.5f}" if trials else f"{'-':>9}{'-':>8}"
        app.say(
            f"{chunks:6}{users:7}{loss:6.1f}{arq_sends(losses):9.5f}{ideal:9.5f}{by_formula:9.5f}{decoded}"
            f"{by_formula / ideal:10.5f}"
        )


def _sends(num_chunks: int, losses: np.ndarray, seed: int) -> int:
    """Symbols until every receiver has decoded all chunks, which are compared with what was sent."""
    rng = np.random.default_rng((seed, num_chunks))
    chunks = rng.integers(0, 256, (num_chunks, 8), dtype=np.uint8)
    receivers = {u: fountain.Decoder(num_chunks, 8, seed) for u in range(len(losses))}
    number = 0
    while receivers:
        symbol = fountain.symbol(chunks, number, seed)
        for u, lost in enumerate(rng.random(len(losses)) < losses):
            if u in receivers and not lost and receivers[u].add(number, symbol):
                assert np.array_equal(receivers.pop(u).chunks(), chunks)
        number += 1
    return number


def radio(folder: pathlib.Path) -> None:
    """The base model to 20 clients of a cell, by each way of delivery, with and without."""
    del folder
    checkpoint = load_checkpoint(checkpoint_path(_GGUF.value), dtype="bfloat16")
    for network in ("umi_20", "facts_20"):
        config = NetworkConfig(network=network, delivery=("coded", "progressive", "fountain"), devices=("phone",))
        job = make_job(
            config,
            checkpoint.config,
            dict(checkpoint.params),
            {},
            NoPeftConfig(),
            num_clients=20,
            local_steps=1,
            batch_size=4,
            seq_len=128,
        )
        app.say(f"{network}\n{delivery_table(delivery_rows(job, dict(checkpoint.params), _SEED.value))}")


COMMANDS = {f.__name__: f for f in (sizes, speeds, damage, kills, progressive, broadcast, radio)}


def _packed(path: pathlib.Path, out: pathlib.Path, base: Container | None = None) -> Container:
    pack(sources(path), out, _KEY, name=path.name, base=base)
    return Container(out, _KEY.public_key())


def _random_container(folder: pathlib.Path, num_values: int) -> pathlib.Path:
    values = np.random.default_rng(_SEED.value).normal(size=num_values).astype(ml_dtypes.bfloat16).tobytes()
    source = Source("w", "BF16", (num_values,), 0, "w.bin", 0, len(values), lambda: values)
    pack([source], folder / "random.fmw", _KEY, name="random", chunk_bytes=2**16)
    return folder / "random.fmw"


@contextlib.contextmanager
def _served(container: Container, *, rate_bps: float, on_request=None):
    server = make_server(container, "127.0.0.1", 0, rate_bps=rate_bps, on_request=on_request)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _all_there(container: Container) -> Arrivals:
    arrivals = Arrivals(in_use=False)
    for part in container.manifest.parts:
        arrivals.on_part(container.manifest, part)
    return arrivals


def _linked(file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    (folder / file.name).symlink_to(file)
    return folder


if __name__ == "__main__":
    app.run(main, commands=tuple(COMMANDS))
