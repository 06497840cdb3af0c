"""Clients' states over several processes: two that are killed and go on end as one process does."""

import json
import pathlib
import socket
import time

import pytest

from tests import commands

JOB = (
    "--algorithm=scaffold --num_clients=6 --cohort_size=4 --num_rounds=12 --eval_every=12 --checkpoint_every=1"
    " --execution=scan"
).split()


def start_one(out: pathlib.Path, *flags: str, devices: int) -> commands.Started:
    return commands.start("launch.cross_device", *JOB, *flags, f"--out={out}", devices=devices)


def start_both(out: pathlib.Path) -> list[commands.Started]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    return [start_one(out, *flags, f"--process_id={i}", devices=1) for i in range(2)]


def finish(processes: list[commands.Started]) -> None:
    for process in processes:
        status, _, err = process.wait(timeout_s=400)
        assert status == 0, err


def test_two_processes_killed_and_resumed_end_as_one(tmp_path):
    both = start_both(tmp_path / "two")
    end = time.monotonic() + 400
    while not (tmp_path / "two" / "checkpoints" / "4").exists():
        assert time.monotonic() < end and both[0].running, both[0].wait()
        time.sleep(0.01)
    for process in both:
        process.kill()
    assert not (tmp_path / "two" / "row.json").exists()
    folders = sorted(path.name for path in (tmp_path / "two" / "clients").iterdir())
    assert folders == ["0-of-2", "1-of-2"]
    finish(start_both(tmp_path / "two"))
    finish([start_one(tmp_path / "one", devices=2)])
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert [record["round"] for record in two] == list(range(13))
    for a, b in zip(one[1:], two[1:]):
        assert a["clients"] == b["clients"] and b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert two[-1]["accuracy"] == pytest.approx(one[-1]["accuracy"], abs=1e-3)
