"""Secure aggregation between Flower's processes with a client that drops out in mid-protocol, twice.

  .venv/flower/bin/python -m tools.flower_dropout FOLDER

Six clients, five on one node and one on the other, three rounds. In the first round the node with one client is killed
after it sent its masked integers, and started again, which takes until the second; in the third it is killed before it
sends them. Prints what the server's records say, beside the simulator without any loss: they agree until a round that
does not count all clients.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from fmfl_jax.deploy.keys import make_keys
from launch.flower_demo import environment, rows_of, run_simulator
from launch.flower_processes import free_port, running

WORDS: list[str] = [
    *"launch.cross_device --num_clients=6 --cohort_size=6 --num_rounds=3 --eval_every=1 --privacy=secure".split()
]
MASKED, SHARED = 5, 3  # messages that a node has sent by then in its first round: the hello, then one a phase


def sent(log: pathlib.Path) -> int:
    return log.read_text(encoding="utf-8", errors="replace").count("Sent successfully") if log.exists() else 0


def kill(node: subprocess.Popen, folder: pathlib.Path) -> None:
    """SIGKILL for a node and its SuperNode, as if its machine lost power."""
    node.kill()
    node.wait()
    for status in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = status.read_text(encoding="utf-8").split("\0")
            if any("flower-supernode" in word for word in words) and f"{folder}/keys/node1/ca.pem" in words:
                os.killpg(int(status.parent.name), signal.SIGKILL)


def deal_keys(keys: pathlib.Path) -> None:
    """All clients but the last to node 0."""
    paths = [keys / f"node{i}" / "signing.json" for i in range(2)]
    all_keys = {client: key for path in paths for client, key in json.loads(path.read_text(encoding="utf-8")).items()}
    last = {"5": all_keys.pop("5")}
    for path, own in zip(paths, (all_keys, last)):
        path.write_text(json.dumps(own), encoding="utf-8")


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True)
    run_simulator(WORDS, folder / "simulator", folder / "simulator.txt")
    make_keys(folder / "keys", ["localhost", "127.0.0.1"], num_nodes=2, num_clients=6, days=1)
    deal_keys(folder / "keys")
    port, env, log = free_port(), environment(), folder / "server.txt"
    job = ["--", *WORDS, f"--out={folder}/flower"]
    server = [sys.executable, "-m", "launch.flower_server", f"--port={port}", "--round_timeout_s=30"]
    node = [sys.executable, "-m", "launch.flower_node", f"--superlink=127.0.0.1:{port}"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(running([*server, f"--keys={folder}/keys/server", *job], env, log))

        def start(number: int, state: str) -> subprocess.Popen:
            flags = [f"--keys={folder}/keys/node{number}", f"--state={folder}/{state}"]
            return stack.enter_context(running([*node, *flags, *job], env, folder / f"{state}.txt"))

        def until(condition) -> None:
            while process.poll() is None and not condition():
                time.sleep(0.05)

        until(lambda: "listening" in log.read_text(encoding="utf-8"))
        start(0, "node0")
        first = start(1, "node1")
        until(lambda: sent(folder / "node1" / "supernode.log") >= MASKED)
        kill(first, folder)
        print(f"{time.strftime('%X')} killed after masking", flush=True)
        again = start(1, "node1again")
        until(lambda: "round 2:" in log.read_text(encoding="utf-8"))
        before = sent(folder / "node1again" / "supernode.log")
        until(lambda: sent(folder / "node1again" / "supernode.log") >= before + SHARED - 1)
        kill(again, folder)
        print(f"{time.strftime('%X')} killed before masking", flush=True)
        process.wait()
    for one, other in zip(rows_of(folder / "simulator"), rows_of(folder / "flower")):
        shown = {name: other.get(name) for name in ("arrived", "silent", "dropped", "round_s", "counted_clients")}
        print(other["round"], *((name, one[name], other[name]) for name in ("accuracy", "nll")), shown)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
