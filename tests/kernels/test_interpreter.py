"""The kernels' own source, through the public op, in Triton's interpreter, against fp32 on the dequantized weights."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.kernels import interpreter_cases

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors():
    """Case name -> relative error, from one process with TRITON_INTERPRET=1."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.kernels.interpreter_cases"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", interpreter_cases.CASES)
def test_relative_error_in_fp16(errors, name):
    assert errors[name] < 1e-3
