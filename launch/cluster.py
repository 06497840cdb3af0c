"""Joining a cluster of processes, with a line every few seconds that says for whom this one waits."""

import contextlib
import os
import socket
import sys
import threading
import time

import jax
from absl import flags

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, to run as one of several processes; 'auto' asks the cluster (SLURM, "
    "TPU pods, Open MPI, Kubernetes).",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, with --coordinator=host:port.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "This process's number, from 0, with --coordinator=host:port.", lower_bound=0
)
_TIMEOUT = flags.DEFINE_integer(
    "join_timeout_s", 300, "Seconds to wait for the other processes, with --coordinator.", lower_bound=1
)
_EVERY_S = 10.0  # between the lines of a process that waits
_MARGIN_S = 60  # jax.distributed aborts with a stack trace where its own limit is over: ours comes first


def join_cluster() -> None:
    """jax.distributed, where --coordinator asks for it.

    While it waits it says for whom; after --join_timeout_s the process ends with one line and status 2. Raises
    ValueError for flags that do not fit together.
    """
    coordinator, count, number = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if coordinator is None:
        for flag in (_NUM_PROCESSES, _PROCESS_ID, _TIMEOUT):
            if flag.present:
                raise ValueError(f"--{flag.name} needs --coordinator=host:port")
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # several CPU processes; ignored on accelerators
    if coordinator == "auto":
        with time_limit(lambda: "the cluster's other processes", _TIMEOUT.value):
            jax.distributed.initialize(initialization_timeout=_TIMEOUT.value + _MARGIN_S)
        return
    host, port = host_and_port(coordinator)
    if count is None or number is None:
        raise ValueError(f"--coordinator={coordinator} needs --num_processes and --process_id")
    if number >= count:
        raise ValueError(f"--process_id={number}: expected 0 to {count - 1}, as --num_processes={count}")
    awaited = lambda: awaited_processes(host, port, number, count)
    with time_limit(awaited, _TIMEOUT.value):
        jax.distributed.initialize(coordinator, count, number, initialization_timeout=_TIMEOUT.value + _MARGIN_S)


def host_and_port(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 host in brackets. Raises ValueError, naming the flag, otherwise."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"--coordinator={address}: expected host:port, with a port from 1 to 65535, or auto")
    return host.strip("[]"), int(port)


def awaited_processes(host: str, port: int, number: int, count: int) -> str:
    """Whom process `number` of `count` waits for, as far as it can tell from here."""
    if number and not answers(host, port):
        return f"process 0, which does not answer at {host}:{port}"
    return f"the other {count - 1} of {count} processes to join at {host}:{port}"


def answers(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2.0):
        return True
    return False


@contextlib.contextmanager
def time_limit(awaited, limit_s: float, *, every_s: float = _EVERY_S, leave=os._exit):
    """Within the context, a line on stderr every `every_s` seconds, for whom this process waits; after `limit_s` an
    error line and leave(2).

    awaited() -> text. From a thread, because jax.distributed waits in C++, and when its own limit is over aborts the
    process with a stack trace.
    """
    done, began = threading.Event(), time.monotonic()

    def watch():
        next_s = every_s
        while not done.wait(max(0.0, began + min(next_s, limit_s) - time.monotonic())):
            if time.monotonic() - began >= limit_s:
                print(f"error: --join_timeout_s={limit_s:g}: waited for {awaited()}", file=sys.stderr, flush=True)
                leave(2)
                return
            print(f"waiting for {awaited()}: {next_s:g} of {limit_s:g} s", file=sys.stderr, flush=True)
            next_s += every_s

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
