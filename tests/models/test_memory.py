"""Loading holds the weights and one tensor more, saving one tensor more; measured in a process apart."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.formats.config_json import config_json
from fmfl_jax.models.formats.huggingface import published_parts
from fmfl_jax.models.params import param_specs

CONFIG = LlamaConfig(
    vocab_size=1024,
    embed_dim=1024,
    hidden_dim=2816,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_seq_len=64,
    tie_embeddings=True,
)
SLACK = 24e6  # bytes: allocator, threads, jitted helpers

SCRIPT = """
import pathlib, sys
import jax, jax.numpy as jnp
from fmfl_jax.models.formats.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def growth(run):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from what is held now
    before = status("VmRSS")
    result = run()
    return result, status("VmHWM") - before

jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
folder = pathlib.Path(sys.argv[1])
growths = [growth(lambda: open_checkpoint(folder))[1]]
checkpoint, grown = growth(lambda: load_checkpoint(folder))
growths += [grown, growth(lambda: save_checkpoint(folder / "out", checkpoint.config, checkpoint.params))[1]]
print(*growths)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory(tmp_path):
    header, offset = {}, 0
    specs = param_specs(CONFIG)
    parts = published_parts(CONFIG)
    for name, spec in specs.items():
        matrix = name.removesuffix(".weight")
        for part, shape in (
            [(f"{part}.weight", (p.out_dim, p.in_dim)) for part, p in parts[matrix]]
            if matrix in parts
            else [(f"model.{name}", spec.shape)]
        ):
            size = 2 * math.prod(shape)
            header[part] = dict(dtype="F16", shape=shape, data_offsets=[offset, offset + size])
            offset += size
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + offset)  # zeros that take no room on the disk
    (tmp_path / "config.json").write_text(json.dumps(config_json(CONFIG, dtype="float16")))
    root = pathlib.Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    opening, loading, saving = map(int, out.stdout.split())
    largest = max(2 * math.prod(spec.shape) for spec in jax.tree.leaves(specs))
    print(
        f"weights {offset / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB; growth of the peak while opening "
        f"{opening / 1e6:.1f}, loading {loading / 1e6:.1f}, saving {saving / 1e6:.1f} MB"
    )
    assert offset > 200e6
    assert opening < SLACK
    assert loading < offset + largest + SLACK
    assert saving < largest + SLACK
