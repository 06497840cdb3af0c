"""How --dtype, --head and --activation_bits reach a model. In a process of its own: flags are a process's."""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
import jax, numpy as np
from absl import flags
from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import Checkpoint
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.quant.int4 import Int4Weight
from fmfl_jax.quant.int8 import Int8Weight
from fmfl_jax.quant.linear import matmul
from kernels.w4a16.cpu import product
from launch.flags import checkpoint

config = llama_preset("tiny")
params = random_int4_params(config, jax.random.key(0), group_size=32, head=False)
checkpoint.open_checkpoint = lambda *args, **options: Checkpoint(config, params, None)
flags.FLAGS(["test", "--checkpoint=x", "--tokenizer=bytes", "--activation_bits=8", "--head=int8"])
model = checkpoint.load_model()
assert model.config.dtype == "float32" and model.config.tie_embeddings
packed = jax.tree.leaves(model.split.frozen, is_leaf=lambda x: isinstance(x, Int4Weight))
bits = [x.activation_bits for x in packed if isinstance(x, Int4Weight)]
assert bits == [8] * (4 * config.num_layers + 1), bits
assert isinstance(model.split.frozen["embed_tokens.weight"], Int8Weight)
if product.available():  # the products are made with them
    weight = model.split.frozen["layers.0.self_attn.o_proj.weight"]
    x = jax.random.normal(jax.random.key(1), (1, weight.shape[0]))
    exact = x @ weight.dequantize()
    assert 1e-3 < np.linalg.norm(matmul(x, weight) - exact) / np.linalg.norm(exact) < 3e-2
jax.default_backend = lambda: "gpu"
assert checkpoint.load_model().config.dtype == "bfloat16"
flags.FLAGS.dtype = "float16"
assert checkpoint.load_model().config.dtype == "float16"
"""


def test_flags_reach_the_model():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=env, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
