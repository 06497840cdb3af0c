"""One run at a time in a folder, with real processes."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from fmfl_jax.experiment.loop.run_lock import NAME, run_lock

HOLD = """
import sys
from fmfl_jax.experiment.loop.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_by_name_and_a_dead_ones_lock_is_taken_over(tmp_path):
    root = pathlib.Path(__file__).parents[3]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"a run of process {holder.pid} on .* goes on there"), run_lock(tmp_path):
            pass
        assert f"process {holder.pid} " in (tmp_path / NAME).read_text()  # the refused one has not touched it
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with run_lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / NAME).read_text()
    with run_lock(tmp_path):  # and it is given back
        pass
