"""A whole decode step and a LoRA training step lower for CUDA with the Triton kernels in them, and for CPU without.

Needs jax's CUDA plugin, no GPU: `pip install --no-deps jax-cuda13-plugin==X jax-cuda13-pjrt==X` with jax's version X.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.generate import DecodeState, Sampling, init_cache, jit_generator
from fmfl_jax.models.loss import token_nll
from fmfl_jax.models.params import init_params
from fmfl_jax.models.random_init import random_int4_params
from fmfl_jax.peft.adapter import AdapterConfig
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import NoPeftConfig, split

LAYERS = 2
CONFIG = llama_preset("mini", num_layers=LAYERS, dtype="bfloat16", tie_embeddings=False)
SLOTS = 200

needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)"
)


@functools.cache
def params_of(head):
    return random_int4_params(CONFIG, jax.random.key(0), group_size=128, head=head)


def model(peft, head=False):
    return split(CONFIG, params_of(head), peft, key=jax.random.key(1))


def trace_decode(s, cache, batch):
    _, decode_fn = jit_generator(s.merge, Sampling())
    zeros = jnp.zeros(batch, jnp.int32)
    state = DecodeState(cache, zeros, zeros, zeros.astype(bool), jax.random.key(0))
    return decode_fn.trace(s.trainable, s.frozen, state, 4)


def on_sm_90(monkeypatch):
    from kernels.w4a16 import launch

    monkeypatch.setattr(launch, "call", functools.partial(launch.call, compute_capability=90))


@needs_cuda_plugin
@pytest.mark.parametrize(
    "peft, batch, head, calls",
    [
        (NoPeftConfig(), 1, False, 5),  # qkv, attention, o with the norm, gate|up with SwiGLU, down with the norm
        (NoPeftConfig(), 8, True, 5),
        (LoraConfig(), 1, False, 5),
        (AdapterConfig(), 64, False, 7),  # each norm is a launch
    ],
)
def test_decode_step_lowers_for_cuda(monkeypatch, peft, batch, head, calls):
    on_sm_90(monkeypatch)
    traced = trace_decode(model(peft, head), init_cache(CONFIG, batch, SLOTS), batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == calls * LAYERS + head
    # The memory of every array of the state is used again.
    assert text.count("tf.aliasing_output") == 2 * LAYERS + 4
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@needs_cuda_plugin
@pytest.mark.parametrize("remat", [False, True])
def test_lora_training_step_lowers_for_cuda(monkeypatch, remat):
    """Two clients side by side: one product for both in each direction."""
    on_sm_90(monkeypatch)
    s = model(LoraConfig())

    def loss(trainable, windows):
        return token_nll(s.merge(trainable, s.frozen), windows, remat=remat).mean()

    def step(trainable, windows):
        return jax.vmap(jax.value_and_grad(loss), (None, 0))(trainable, windows)

    traced = jax.jit(step).trace(s.trainable, jax.ShapeDtypeStruct((2, 2, 65), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # 2 x 128 tokens: fused forward, dequantized backward; the first block's q, k, v need no input gradient
    assert text.count("@triton_kernel_call") >= 8 * LAYERS - 1
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_holds_no_copy_of_the_cache(batch):
    """All temporaries together are smaller than one layer's keys, and the state's memory is used again."""
    config = dataclasses.replace(CONFIG, dtype="float32", num_kv_heads=CONFIG.num_heads)
    s = split(config, init_params(config, jax.random.key(0)), NoPeftConfig(), key=jax.random.key(1))
    cache = init_cache(config, batch, SLOTS)
    memory = trace_decode(s, cache, batch).lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.keys[0].nbytes
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in (*cache.keys, *cache.values))
