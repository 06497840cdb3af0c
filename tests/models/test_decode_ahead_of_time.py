"""What XLA makes of decoding on an H200, compiled here without one: launches, CUDA graphs and temporaries."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)"
)


@pytest.fixture(scope="module")
def found():
    """What XLA makes of a step without and with LoRA: two layers, batch 1 and 8, 256 slots; from one process."""
    command = [sys.executable, "-m", "tests.models.ahead_of_time", "none,2,1,256", "lora,2,8,256"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(("none", "lora"), map(json.loads, done.stdout.splitlines()[-2:]), strict=True))


def test_the_whole_step_is_one_command_buffer_of_five_nodes_a_layer(found):
    """qkv, attention, o, gate and up, down; 14 more a token. No cache or value is copied or turned."""
    found = found["none"]
    assert found["buffers"] == 1 and found["captured"] == found["nodes"]
    assert found["nodes"] <= 2 * 5 + 14
    assert not found["transposes"]
    assert found["temp_bytes"] < 256 * 4096 * 2  # one layer's keys


def test_lora_takes_the_kernels_too(found):
    """A layer with factors on q and v is 9 nodes, the small products and their input's norm among them."""
    found = found["lora"]
    assert found["buffers"] == 1 and found["captured"] == found["nodes"]
    assert found["nodes"] <= 2 * 9 + 13
    assert found["temp_bytes"] < 8 * 256 * 4096 * 2
