"""Flower's programs as child processes: their environment, their ends, ports."""

import contextlib
import fcntl
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
APP = ROOT / "launch" / "flower_app"
_STOP_S = 30.0  # for what a program started itself to end first, on a machine under load too


def environment(home: pathlib.Path) -> dict[str, str]:
    """Of Flower's programs: no telemetry, their files in `home`, this project's code, a quick look for tasks."""
    bin_folder = str(pathlib.Path(sys.executable).parent)
    return os.environ | {
        "FLWR_HOME": str(home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]),
    }


def program(name: str) -> str:
    """The path of one of Flower's programs. Raises ValueError where Flower is not in this environment."""
    path = pathlib.Path(sys.executable).parent / name
    if not path.exists():
        raise ValueError(f"there is no {name} beside {sys.executable}: run this in Flower's environment (make flower)")
    return str(path)


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], log: pathlib.Path) -> Iterator[subprocess.Popen]:
    """A program that writes to `log` and ends, with all that it started, at the end of the context."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(command, env=env, process_group=0, **streams)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield process
    finally:
        stop(process)


def _interrupt(number, frame) -> None:
    """SIGTERM as Ctrl-C, so that the children are ended."""
    raise KeyboardInterrupt


def stop(process: subprocess.Popen) -> None:
    """Ends a process group: politely, then not."""
    for how, patience_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, how)
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)


@contextlib.contextmanager
def held(lock: pathlib.Path) -> Iterator[None]:
    """A lock that is freed at the end of the context, or of this process, however it ends. Raises BlockingIOError where
    another process has it."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def end_when_free(lock: pathlib.Path) -> None:
    """Ends this process as soon as nobody holds the lock: Flower starts a ServerApp in a session of its own, so no
    signal to a process group reaches it."""

    def wait():
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(
    host: str, port: int, process: subprocess.Popen, log: pathlib.Path, start: int, limit_s: float = 120.0
) -> None:
    """Until somebody answers there. Raises ValueError where nobody does in time, or the process ends first, with what
    its log says from byte `start` on."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ValueError(f"{log.stem} ended: {reason(log, start)}")
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return
        time.sleep(0.1)
    raise ValueError(f"nobody answers at {host}:{port} after {limit_s:g} s; see {log}")


def size_of(log: pathlib.Path) -> int:
    """In bytes; 0 where there is none yet."""
    return log.stat().st_size if log.exists() else 0


def reason(log: pathlib.Path, start: int) -> str:
    """What a log says of an error in its bytes from `start` on, in a line; its last line where it names none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_bytes()[start:].decode(errors="replace"))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"\[code:|CERTIFICATE|ERROR|Error\b|\berror:", line)]
    return (told or lines or ["it wrote nothing"])[-1][:200]


def last_line(log: pathlib.Path) -> str:
    """The last line with text of a log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"
