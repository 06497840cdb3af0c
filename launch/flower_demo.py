"""A federation by Flower on this machine beside the same federation in the simulator.

Runs the simulator's command, then a SuperLink with the same command and two SuperNodes on loopback, all under TLS with
fresh keys, and prints both rows. Without words of your own after --: LoRA on a small base that is pre-trained on the
spot, two clients, three rounds. Everything that was started is stopped at the end.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import safetensors.numpy
from absl import flags

from fmfl_jax.deploy.keys import make_keys
from fmfl_jax.deploy.secure import SECAGG
from launch import app, flower_job
from launch.flower_processes import ROOT, free_port, last_line, program, running

_DEMO = flags.DEFINE_string("demo_dir", "runs/flower_demo", "Folder to make; it must not exist.")

SMALL: str = (
    "launch.federated --model=tiny --pretrain_steps=60 --num_clients=2 --num_rounds=3 --local_steps=2 --seq_len=64 "
    "--max_eval_windows=40"
)
_COLUMNS = (
    "ppl",
    "accuracy",
    "loss",
    "uplink_bytes",
    "received_bytes",
    "sent_bytes",
    "round_s",
    "exchange_s",
    "client_s",
)


def run_simulator(words: list[str], out: pathlib.Path, log: pathlib.Path) -> None:
    """The command in this environment's Python. Raises ValueError with its last line where it fails."""
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", *words, f"--out={out}"]
        done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, env=environment(), check=False)
    if done.returncode:
        raise ValueError(f"the simulator failed: {last_line(log)}")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run_flower(
    words: list[str],
    out: pathlib.Path,
    folder: pathlib.Path,
    *,
    num_clients: int,
    num_nodes: int = 2,
    secure_protocol: str = SECAGG,
) -> None:
    """Server and nodes. Raises ValueError with the server's last line where it fails."""
    keys, port = folder / "keys", free_port()
    make_keys(keys, ["localhost", "127.0.0.1"], num_nodes=num_nodes, num_clients=num_clients, days=1)
    me, env = [sys.executable, "-m"], environment()
    address, job = f"127.0.0.1:{port}", [f"--secure_protocol={secure_protocol}", "--", *words, f"--out={out}"]
    server = [*me, "launch.flower_server", f"--port={port}", f"--keys={keys}/server", *job]
    log = folder / "server.txt"
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(running(server, env, log))
        while process.poll() is None and "listening" not in log.read_text(encoding="utf-8"):
            time.sleep(0.1)  # it knows the nodes' keys then
        for i in range(num_nodes):
            node = [*me, "launch.flower_node", f"--superlink={address}", f"--keys={keys}/node{i}"]
            stack.enter_context(running([*node, f"--state={folder}/node{i}", *job], env, folder / f"node{i}.txt"))
        if process.wait():
            raise ValueError(f"the server failed: {last_line(log)}")


def rows_of(out: pathlib.Path) -> list[dict]:
    """The rounds of a run."""
    (path,) = out.rglob("setups/*/metrics.jsonl") if (out / "setups").exists() else [out / "metrics.jsonl"]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def largest_difference(one: pathlib.Path, other: pathlib.Path) -> float | None:
    """Between the tuned parameters of two runs; None where they export none."""
    paths = [sorted(out.rglob("peft/adapter_model.safetensors")) for out in (one, other)]
    if not all(paths):
        return None
    first, second = (safetensors.numpy.load_file(found[0]) for found in paths)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def table(simulator: dict, flower: dict) -> str:
    """The last rounds side by side, as far as they have the same figures."""
    names = [name for name in _COLUMNS if name in flower]
    show = lambda row: " | ".join(f"{row[name]:,.6g}" if name in row else "" for name in names)
    lines = [("", " | ".join(names)), ("---", "|".join("---" for _ in names)), ("simulator", show(simulator))]
    return "\n".join(f"| {head} | {rest} |" for head, rest in [*lines, ("Flower", show(flower))])


def main(words: list[str]):
    program("flower-superlink")
    folder = pathlib.Path(_DEMO.value).absolute()
    if folder.exists():
        raise ValueError(f"--demo_dir={_DEMO.value} exists: remove it or choose another")
    there = [*(words or SMALL.split())]
    here, num_clients = folder / "simulator", flower_job.num_clients(there)
    protocol = flower_job.secure_protocol()
    flower_job.checked_settings(flower_job.parse(there), protocol)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    app.say("the simulator ...")
    run_simulator(there, here, folder / "simulator.txt")
    if not words:  # nodes and server take the base that the simulator pre-trained
        there = [*(word for word in there if "pretrain" not in word and "model" not in word)]
        there += [f"--checkpoint={here}/base", "--tokenizer=bytes"]
    app.say(f"the simulator took {time.perf_counter() - began:.0f} s; Flower: a SuperLink, two SuperNodes, TLS ...")
    began = time.perf_counter()
    run_flower(there, folder / "flower", folder, num_clients=num_clients, secure_protocol=protocol)
    app.say(f"Flower took {time.perf_counter() - began:.0f} s\n")
    app.say(table(rows_of(here)[-1], rows_of(folder / "flower")[-1]))
    difference = largest_difference(here, folder / "flower")
    if difference is not None:
        app.say(f"\nlargest difference between the tuned parameters: {difference:.1e}")


if __name__ == "__main__":
    app.run(main, flower_job, takes_words=True)
