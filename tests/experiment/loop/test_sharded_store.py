"""Clients' states over several processes: two that are killed and go on end as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[3]
JOB = (
    "--algorithm=scaffold --num_clients=6 --cohort_size=4 --num_rounds=12 --eval_every=12 --checkpoint_every=1"
    " --execution=scan"
).split()


def start(out: pathlib.Path, *flags: str, devices: int) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    env |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cross_device", *JOB, *flags, f"--out={out}"]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)


def start_both(out: pathlib.Path) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    return [start(out, *flags, f"--process_id={i}", devices=1) for i in range(2)]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err


def test_two_processes_killed_and_resumed_end_as_one(tmp_path):
    both = start_both(tmp_path / "two")
    end = time.monotonic() + 400
    while not (tmp_path / "two" / "checkpoints" / "4").exists():
        assert time.monotonic() < end and both[0].poll() is None, both[0].communicate()
        time.sleep(0.01)
    for process in both:
        process.kill()
        process.communicate()
    assert not (tmp_path / "two" / "row.json").exists()
    folders = sorted(path.name for path in (tmp_path / "two" / "clients").iterdir())
    assert folders == ["0-of-2", "1-of-2"]
    finish(start_both(tmp_path / "two"))
    finish([start(tmp_path / "one", devices=2)])
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert [record["round"] for record in two] == list(range(13))
    for a, b in zip(one[1:], two[1:]):
        assert a["clients"] == b["clients"] and b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert two[-1]["accuracy"] == pytest.approx(one[-1]["accuracy"], abs=1e-3)
