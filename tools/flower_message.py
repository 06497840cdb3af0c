"""One message of any size through Flower's programs alone: seconds, CPU seconds and memory, without a model.

  .venv/flower/bin/python -m tools.flower_message FOLDER MB [MB ...]

For each size a SuperLink, a SuperNode and this project's ClientApp, whose node is this process (not counted). A
ServerApp sends one message of so many random MB and gets a short answer, then sends a short one and gets so many MB.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time

from fmfl_jax.deploy import channel
from fmfl_jax.deploy.envelope import Envelope
from launch.flower_processes import APP, environment, free_port, program, running, wait_for_port
from launch.flower_server import connection, flwr
from tools.flower_scale import report, watched

SERVER = """
import json, os, pathlib, time
from flwr.serverapp import ServerApp
from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.flower import GridLink

app = ServerApp()


@app.main()
def main(grid, context):
    job = json.loads(pathlib.Path(context.run_config["job"]).read_text())
    link, row = GridLink(grid), {}
    while not link.nodes():
        time.sleep(0.1)
    (node,) = link.nodes()
    for way, down, up in (("short", 0, 0), ("down", job["bytes"], 0), ("up", 0, job["bytes"])):
        request = Envelope({"kind": "echo", "bytes": up}, {"blob": os.urandom(down)})
        began = time.perf_counter()
        answer = link.exchange({node: request}, 900.0)[node]
        row[f"{way}_s"] = time.perf_counter() - began
        assert (answer.head["bytes"], len(answer.blobs["blob"])) == (down, up)
        del request, answer
    pathlib.Path(job["out"]).write_text(json.dumps(row))
"""


def answer(request: Envelope) -> Envelope:
    """The node's: how much came, and as much as was asked for."""
    return Envelope({"bytes": len(request.blobs["blob"])}, {"blob": os.urandom(request.head["bytes"])})


def measure(folder: pathlib.Path, size: int) -> dict[str, float]:
    """Seconds of an exchange with no, so many bytes down and up. Raises ValueError where a program ends first."""
    port, home, out = free_port(), folder / "home", folder / "row.json"
    shutil.copytree(APP, folder / "app")
    (folder / "app" / "fmfl_server.py").write_text(SERVER, encoding="utf-8")
    (folder / "job.json").write_text(json.dumps({"bytes": size, "out": str(out)}), encoding="utf-8")
    connection(home, f"127.0.0.1:{port}", None)
    env = environment(home)
    os.environ.update(env)
    channel.serve(str(folder / "channel"), answer)
    superlink = [program("flower-superlink"), "--insecure", "--port", str(port)]
    supernode = [program("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
    supernode += ["--port", str(free_port()), "--node-config", f'channel="{folder}/channel"']
    with contextlib.ExitStack() as stack:
        log = folder / "superlink.log"
        superlink.append("--disable-runtime-dependency-installation")
        process = stack.enter_context(running(superlink, env, log))
        wait_for_port("127.0.0.1", port, process, log, 0)
        node = stack.enter_context(running(supernode, env, folder / "supernode.log"))
        flwr("run", str(folder / "app"), "here", "--run-config", f'job="{folder}/job.json"')
        while not out.exists():
            if process.poll() is not None or node.poll() is not None:
                raise ValueError(f"a program ended before the answer came: see the logs in {folder}")
            time.sleep(0.2)
    return json.loads(out.read_text(encoding="utf-8"))


def main(folder: pathlib.Path, sizes_mb: list[float]) -> None:
    for size_mb in sizes_mb:
        place = folder / f"{size_mb:g}"
        place.mkdir(parents=True)
        with watched(place) as used:
            row = measure(place, round(size_mb * 1e6))
        report(f"{size_mb:g} MB", row, *used)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute(), [float(size) for size in sys.argv[2:]])
