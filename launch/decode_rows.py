"""The rows of `launch.benchmark_decode --checkpoint`: each a process of its own, all measured in turn in one run.

Other work on the machine then slows all rows alike, and a row's memory is its own. The workers and the peers' scripts
answer as launch/peers/turns.py says.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from fmfl_jax.models.formats.checkpoint import checkpoint_path

PEERS = ("llama_cpp", "transformers")
_FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """context: slots filled before the first step; tokens: steps a round; prefill: tokens of the prompt."""

    context: int
    tokens: int
    prefill: int

    def flags(self) -> list[str]:
        return [f"--{name}={value}" for name, value in dataclasses.asdict(self).items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """A row's process, loaded and warm. about: what it said of itself."""

    process: subprocess.Popen
    about: dict

    def round(self) -> dict:
        """One round of its measurements."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or "null") or {}


def our_command(checkpoint: str, weights: str, head: str, batch: int, sizes: Sizes, more: Sequence[str]) -> list[str]:
    """The command of a row of ours; weights is fp (4-bit ones are unpacked) or int4 (as the checkpoint has them)."""
    command = [sys.executable, "-m", "launch.decode_worker", f"--checkpoint={checkpoint}", f"--batch={batch}"]
    command += ["--dequantize"] if weights == "fp" else [f"--head={head}"]
    return [*command, *sizes.flags(), *more]


@contextlib.contextmanager
def peer_command(peer: str, python: str, checkpoint: str, sizes: Sizes, threads: int) -> Iterator[list[str]]:
    """The command of a peer's row; transformers gets a folder that is written for it where the checkpoint is none.

    Raises ValueError where the peer cannot read the checkpoint.
    """
    model = checkpoint_path(checkpoint)
    with contextlib.ExitStack() as stack:
        if peer == "llama_cpp" and model.is_dir():
            raise ValueError(f"--peer=llama_cpp needs a GGUF file, --checkpoint={checkpoint} is a folder")
        if peer == "transformers" and not model.is_dir():
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            export = [sys.executable, "-m", "launch.export", f"--checkpoint={checkpoint}", "--dequantize"]
            _checked([*export, "--dtype=float32", "--to=huggingface", f"--out={folder}"])
            model = folder
        script = _FOLDER / "peers" / f"{peer}_decode.py"
        yield [python, str(script), f"--model={model}", *sizes.flags(), f"--threads={threads}"]


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[Worker]:
    """The row's process, ended on leaving. Raises ValueError, with the last line that it said, where it fails."""
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait()
                err.seek(0)
                raise ValueError(_last_line(err.read()))
            yield Worker(process=process, about=json.loads(line))
        finally:
            process.kill()
            process.wait()


def use_threads(threads: int | None) -> int:
    """Keeps this process and all it starts to as many CPUs (Linux); returns how many there are."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if threads > len(allowed):
            raise ValueError(f"--threads={threads}: there are {len(allowed)} CPUs")
        os.sched_setaffinity(0, allowed[:threads])
    return threads or len(allowed)


def measure_in_turn(workers: dict[str, Worker], rounds: int, say: Callable[[str], None]) -> list[dict]:
    """One row of results per worker, after `rounds` rounds of all of them."""
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            one = worker.round()
            if not one:
                raise ValueError(f"{name} ended before its time (status {worker.process.wait()})")
            found[name].append(one)
    rows = [_row(name, workers[name].about, found[name]) for name in workers]
    for row in rows:
        say(_line(row))
    return rows


def _row(name: str, about: dict, rounds: list[dict]) -> dict:
    values = {key: [one[key] for one in rounds] for key in rounds[0]}
    row = about | {"row": name, "rounds": rounds}
    for key in ("decode_ms", "decode_cpu_ms", "prefill_ms", "prefill_cpu_ms"):
        row |= {key: statistics.median(values[key]), f"{key}_min": min(values[key])}
    row["peak_bytes"] = max(values["peak_bytes"])
    row["model_bytes"] = row["peak_bytes"] - about["base_bytes"]
    return row


def ratios(rows: list[dict], reference: str) -> dict[str, dict[str, float]]:
    """{row: how many times as fast as `reference`}: the median over rounds of the ratio within a round, of wall and of
    CPU time, for decoding and for reading a prompt."""
    other = next(row for row in rows if row["row"] == reference)["rounds"]
    out = {}
    for row in rows:
        if row["row"] != reference:
            keys = ("decode_ms", "decode_cpu_ms", "prefill_ms", "prefill_cpu_ms")
            pairs = {key: [b[key] / a[key] for a, b in zip(row["rounds"], other)] for key in keys}
            out[row["row"]] = {key: statistics.median(pairs[key]) for key in keys}
    return out


def _line(row: dict) -> str:
    held = f", weights {row['weight_bytes'] / 1e6:.0f}" if "weight_bytes" in row else ""
    return (
        f"{row['row']:22} {row['decode_ms']:8.2f} ms a token (least {row['decode_ms_min']:.2f}, "
        f"CPU {row['decode_cpu_ms']:.2f})  prompt {row['prefill_ms']:8.1f} ms (least {row['prefill_ms_min']:.1f}, "
        f"CPU {row['prefill_cpu_ms']:.1f})  peak {row['peak_bytes'] / 1e6:.0f} MB, {row['model_bytes'] / 1e6:.0f} over "
        f"the empty process{held}"
    )


def ratio_lines(rows: list[dict], reference: str) -> list[str]:
    """For the screen."""
    return [
        f"{name} over {reference}: decoding {found['decode_ms']:.2f} (CPU {found['decode_cpu_ms']:.2f}), "
        f"prompt {found['prefill_ms']:.2f} (CPU {found['prefill_cpu_ms']:.2f})"
        for name, found in ratios(rows, reference).items()
    ]
