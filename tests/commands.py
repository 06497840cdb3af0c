"""Commands as a user types them, in processes forked from one that has imported what they need.

`python -m launch.x` spends two seconds of CPU on imports, more than most of these tests on anything else. A fork starts
without JAX's backend and without any flag. `launch/test_case_study.py` and `models/test_generate.py` start a real one.
"""

import gc
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import sys
import tempfile
import time
from typing import NamedTuple

import jax

ROOT = pathlib.Path(__file__).parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "fmfl_jax.experiment.case_study",
        "fmfl_jax.experiment.cross_device",
        "fmfl_jax.models.serve",
        "absl.app",
        "kernels.w4a16.api",
        "matplotlib.pyplot",
        "numba",
    ]
)


class Done(NamedTuple):
    """What is left of a command."""

    status: int
    out: str
    err: str


class Started:
    """A command under way."""

    def __init__(self, module: str, flags: tuple[str, ...], environment: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [os.path.join(self._folder.name, name) for name in ("out", "err")]
        for name in self._files:
            pathlib.Path(name).touch()
        self._process = _context.Process(target=_command, args=(module, flags, self._files, environment))
        self._process.start()
        self._interrupted = False

    def line(self, pattern: str, timeout_s: float = 60) -> str:
        """The first group of `pattern` in what it has printed, as soon as it is there."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, pathlib.Path(self._files[0]).read_text(encoding="utf-8"))):
            assert self._process.is_alive() and time.monotonic() < end, pathlib.Path(self._files[1]).read_text()
            time.sleep(0.02)
        return found[1]

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL: it has no time to tidy up."""
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def interrupt(self) -> None:
        """Ctrl-C."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGINT)
        self._interrupted = True

    def wait(self, timeout_s: float = 300) -> Done:
        """What it left; one that takes longer is killed, which fails the test."""
        self._process.join(timeout_s / 3)
        if self._interrupted and self.running:  # Python loses a Ctrl-C that comes within a callback of its collector
            self.interrupt()
        self._process.join(timeout_s * 2 / 3)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        out, err = (pathlib.Path(name).read_text(encoding="utf-8") for name in self._files)
        self._folder.cleanup()
        status = self._process.exitcode
        assert status is not None and status >= 0, f"ended by signal\n{err}"
        return Done(status, out, err)


def start(module: str, *flags, devices: int = 1, **environment: str) -> Started:
    """`python -m module flags`, in the repository's root, on so many CPU devices, with these variables besides."""
    xla_flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    inherited = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    return Started(module, tuple(str(flag) for flag in flags), inherited | environment)


def run(module: str, *flags, devices: int = 1) -> Done:
    """The same to its end."""
    return start(module, *flags, devices=devices).wait()


def _command(module: str, flags: tuple[str, ...], files: list[str], environment: dict[str, str]) -> None:
    """In the fork. What it inherits is left out of garbage collections, as in tests/conftest.py."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    for descriptor, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # a fork runs no atexit functions, by which JAX's processes wait for each other
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
