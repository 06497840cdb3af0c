"""Flower's own processes on loopback under TLS, in the environment that make flower sets up; skipped without it.

One scenario, because every program of Flower's takes seconds to start: small models on two nodes; a third node that
trusts another authority never gets in; in mid-round one node's SuperNode is killed, and the node is started again; then
the SuperLink is killed in mid-run and the same command goes on. The rounds with everybody are the simulator's.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from fmfl_jax.deploy.keys import make_keys
from launch.flower_processes import free_port, stop

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = pathlib.Path(os.environ.get("FMFL_FLOWER_PYTHON", ROOT / ".venv" / "flower" / "bin" / "python"))
JOB = "launch.cross_device --num_clients=2 --cohort_size=2 --eval_every=1 --uplink=topk:0.5".split()
_LIMIT_S = 280.0  # on a machine that six others use too; alone it is a third

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make flower sets up the environment of Flower's tests")


class Scene:
    """Commands under way, their output in files, all ended at the end."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.port, self.started = folder, free_port(), {}
        make_keys(folder / "keys", ["localhost", "127.0.0.1"], num_nodes=2, num_clients=2, days=1)
        make_keys(folder / "others", ["localhost"], num_nodes=1, num_clients=1, days=1)

    def start(self, name: str, module: str, *flags: str, rounds: int):
        out = f"--out={self.folder}/run"
        command = [str(PYTHON), "-m", module, *flags, "--", *JOB, f"--num_rounds={rounds}", out]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with open(self.folder / f"{name}.txt", "ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=env, process_group=0)
        self.started[name] = process
        return process

    def node(self, name: str, number: int, keys: str, rounds: int):
        flags = [f"--superlink=127.0.0.1:{self.port}", f"--keys={self.folder}/{keys}", f"--state={self.folder}/{name}"]
        return self.start(name, "launch.flower_node", *flags, f"--clients={number}", rounds=rounds)

    def server(self, name: str, rounds: int):
        flags = [f"--port={self.port}", f"--keys={self.folder}/keys/server", "--round_timeout_s=60"]
        return self.start(name, "launch.flower_server", *flags, rounds=rounds)

    def text(self, name: str) -> str:
        path = self.folder / f"{name}.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def history(self) -> list[dict]:
        path = self.folder / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def until(self, condition, what: str):
        end = time.monotonic() + _LIMIT_S
        while not condition():
            if time.monotonic() > end:
                shown = "".join(f"\n== {name}\n{self.text(name)[-1500:]}" for name in self.started)
                raise AssertionError(f"{what} did not come in {_LIMIT_S:g} s{shown}")
            time.sleep(0.1)

    def close(self):
        for process in self.started.values():
            stop(process)


@pytest.fixture
def scene(tmp_path):
    with contextlib.closing(Scene(tmp_path)) as made:
        yield made


def kill(scene: Scene, program: str, keys: str):
    """SIGKILL for a program of Flower's that was given this folder of keys, and what it started: their whole process
    group."""
    for status in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = status.read_text(encoding="utf-8").split("\0")
            if any(program in word for word in words) and f"{scene.folder}/keys/{keys}/ca.pem" in words:
                os.killpg(int(status.parent.name), signal.SIGKILL)
                return
    raise AssertionError(f"there is no {program} with {keys}")


def test_two_nodes_under_tls_a_stranger_a_killed_supernode_and_a_killed_superlink(scene):
    rounds = 4
    first = scene.server("server", rounds)
    scene.until(lambda: "listening" in scene.text("server"), "the server")
    scene.node("node0", 0, "keys/node0", rounds)
    scene.node("node1", 1, "keys/node1", rounds)
    scene.node("stranger", 0, "others/node0", rounds)
    scene.until(lambda: "round 1:" in scene.text("server"), "round 1")
    kill(scene, "flower-supernode", "node1")  # the second round is under way; the node starts another
    scene.until(lambda: "client 1 was silent" in scene.text("server"), "the round without client 1")
    scene.until(lambda: scene.history()[-1]["round"] >= 2, "its record")
    kill(scene, "flower-superlink", "server")  # the third round is under way
    scene.until(lambda: first.poll() is not None, "the end of the first server")
    assert first.returncode == 2 and "flower-superlink ended" in scene.text("server")
    last = scene.server("server2", rounds)
    scene.until(lambda: last.poll() is not None, "the end of the second server")
    assert last.returncode == 0, scene.text("server2")
    records = scene.history()
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4]
    assert records[1]["arrived"] == [0, 1] and records[2]["arrived"] == [0] and records[2]["silent"] == [1]
    assert records[4]["arrived"] == [0, 1]
    assert "CERTIFICATE_VERIFY_FAILED" in (scene.folder / "stranger" / "supernode.log").read_text(encoding="utf-8")
    simulator = simulated(scene.folder / "simulator")
    assert records[1]["loss"] == pytest.approx(simulator[1]["loss"], abs=1e-6)
    assert records[1]["accuracy"] == simulator[1]["accuracy"]


def test_what_imports_flwr_passes_in_its_environment():
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    tests = str(ROOT / "tests" / "deploy" / "in_flower")
    command = [str(PYTHON), "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def simulated(out: pathlib.Path) -> list[dict]:
    """The first round without Flower."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", *JOB, "--num_rounds=1", f"--out={out}"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
