"""What Flower costs by the megabyte: full fine-tuning with updates of given sizes, in the simulator and by Flower.

  .venv/flower/bin/python -m tools.flower_scale FOLDER MB [MB ...] [--FLAG=... of launch.federated]

One client on one node under TLS, three rounds of one step of SGD on eight tokens, so that nearly all is copying. The
model is a LLaMA whose size is its vocabulary's. Prints the same run's seconds and CPU seconds in both, and what each
program used: its CPU seconds (of all its processes) and the peak memory of its largest process.
"""

import contextlib
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from launch.flower_demo import rows_of, run_flower, run_simulator

JOB = (
    "launch.federated --tokenizer=bytes --peft=full --client_optimizer=sgd --num_clients=1 --num_rounds=3 "
    "--local_steps=1 --batch_size=1 --seq_len=8 --max_eval_windows=1 --checkpoint_every=1"
)
PROGRAMS = (
    *("flower-superlink", "flower-superexec", "flower-supernode", "flwr-clientapp", "flwr-serverapp"),
    *("launch.flower_server", "launch.flower_node", "launch.federated"),
)
_EMBED_DIM = 256
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Of a process: its program, CPU seconds until now, peak resident bytes."""

    program: str
    cpu_s: float
    peak_bytes: int


def usage_of(process: pathlib.Path, folder: str) -> Usage | None:
    """Of /proc/PID; None for a process that has nothing to do with `folder`."""
    words = (process / "cmdline").read_bytes().decode(errors="replace")
    if folder not in words and folder.encode() not in (process / "environ").read_bytes():
        return None
    program = next((name for name in PROGRAMS if name in words), None)
    status = (process / "status").read_text(encoding="utf-8")
    if program is None or "VmHWM:" not in status:
        return None
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    user, system = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    return Usage(program, (int(user) + int(system)) / _TICKS_PER_S, 1024 * peak_kib)


@contextlib.contextmanager
def watched(folder: pathlib.Path) -> Iterator[tuple[dict[str, Usage], list[int]]]:
    """({PID: the last that was seen of it}, [the most resident bytes of all together]) of the processes that name the
    folder, looked at ten times a second."""
    seen, most, over = {}, [0], threading.Event()

    def look():
        while not over.wait(0.1):
            resident = 0
            for process in pathlib.Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    usage = usage_of(process, str(folder))
                    if usage is not None:
                        seen[process.name] = usage
                        resident += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            most[0] = max(most[0], resident)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen, most
    finally:
        over.set()
        thread.join()


def make_model(path: pathlib.Path, megabytes: float) -> None:
    """A checkpoint of so many MB in float32."""
    vocab_size = round(megabytes * 1e6 / 4 / _EMBED_DIM)
    small = dict(hidden_dim=64, num_layers=1, num_kv_heads=1, max_seq_len=64)
    config = llama_preset("tiny", vocab_size=vocab_size, embed_dim=_EMBED_DIM, **small)
    save_checkpoint(path, config, init_params(config, jax.random.key(0)))


def report(label: str, row: dict, seen: dict[str, Usage], most: list[int]) -> None:
    """The row's seconds, then a line for each program."""
    shown = {name: round(value, 3) for name, value in row.items() if name.endswith("_s")}
    total_s = sum(usage.cpu_s for usage in seen.values())
    print(f"{label}: {shown}, {total_s:.1f} CPU s, at most {most[0] / 1e6:,.0f} MB in all", flush=True)
    for program in PROGRAMS:
        of_it = [usage for usage in seen.values() if usage.program == program]
        if of_it:
            cpu_s, peak = sum(usage.cpu_s for usage in of_it), max(usage.peak_bytes for usage in of_it)
            print(f"  {program:22} {len(of_it):2} processes {cpu_s:7.1f} CPU s, peak {peak / 1e6:7,.0f} MB", flush=True)


def main(folder: pathlib.Path, sizes_mb: list[float], flags: list[str]) -> None:
    for size_mb in sizes_mb:
        place = folder / f"{size_mb:g}"
        place.mkdir(parents=True)
        make_model(place / "model", size_mb)
        words = [*JOB.split(), f"--checkpoint={place}/model", *flags]
        with watched(place) as used:
            run_simulator(words, place / "simulator", place / "simulator.txt")
        report(f"{size_mb:g} MB, simulator", rows_of(place / "simulator")[-1], *used)
        with watched(place) as used:
            run_flower(words, place / "flower", place, num_nodes=1, num_clients=1)
        report(f"{size_mb:g} MB, Flower", rows_of(place / "flower")[-1], *used)


if __name__ == "__main__":
    own = [word for word in sys.argv[2:] if word.startswith("--")]
    main(pathlib.Path(sys.argv[1]).absolute(), [float(word) for word in sys.argv[2:] if word not in own], own)
