"""One run at a time in a folder: a lock file with the number of the process that works there."""

import contextlib
import fcntl
import os
import pathlib
import socket

import jax

NAME = "run.lock"


@contextlib.contextmanager
def run_lock(directory: str | pathlib.Path):
    """Within the context, no other process has the lock of `directory` (made if missing); of several processes of one
    run the first takes it.

    The system's lock on the open file decides, and it goes with the process: what a dead one left is taken over,
    without asking whether its number is in use again. The file's text is for people. It stays: removing it would let a
    third process lock another file of the same name. Raises ValueError, naming the holder, where a run is going on.
    """
    if jax.process_index() != 0:
        yield
        return
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"--out={directory}: a run of {holder} goes on there: choose another --out, or wait for it"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
