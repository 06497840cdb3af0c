"""Runs the public op in Triton's interpreter and prints one JSON object: case name -> relative error.

Started by test_interpreter.py with TRITON_INTERPRET=1, in a process of its own: Triton reads that variable on import,
and compiling for a GPU (test_compile.py) is not possible in the same process. fp16 only: bf16 is garbage there.
"""

import dataclasses
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.quant.int4 import Int4Weight
from kernels.decode import api as decode
from kernels.decode.unfinished import finish, finished
from kernels.w4a16 import api, layout

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
EPS = 1e-5  # of the norms


def weight(k, n, group_size, seed=0):
    """(packed arrays, W fp32 [k, n], the static arguments of the op)."""
    rng = np.random.default_rng(seed)
    groups = layout.num_groups(k, group_size)
    q = rng.integers(0, 16, (k, n)).astype(np.uint8)
    zero = rng.integers(0, 16, (groups, n)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    row = np.arange(k) // group_size
    w = (q.astype(np.float32) - zero[row]) * scale[row].astype(np.float32)
    return layout.pack(q, zero, scale, group_size=group_size), w, {"k": k, "n": n, "group_size": group_size}


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def error(actual, expected):
    actual = np.asarray(actual, np.float32)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def forward(m, k, n, group_size):
    packed, w, static = weight(k, n, group_size)
    x = normal(m, k)
    y = jax.jit(lambda x: api.matmul(x, *packed, **static, implementation="triton"))(x)
    return error(y, x.astype(np.float32) @ w)


def backward(m, k, n, group_size):
    packed, w, static = weight(k, n, group_size)
    dy = normal(m, n)
    x = jnp.zeros((m, k), jnp.float16)
    _, vjp = jax.vjp(lambda x: api.matmul(x, *packed, **static, implementation="triton"), x)
    return error(vjp(jnp.asarray(dy))[0], dy.astype(np.float32) @ w.T)


def epilogue(m, k, n):
    packed, w, static = weight(k, n, 128)
    x, bias, residual = normal(m, k), normal(n, seed=2), normal(m, n, seed=3)
    added = {"bias": jnp.asarray(bias), "residual": jnp.asarray(residual)}
    y = api.matmul(x, *packed, **static, implementation="triton", **added)
    return error(y, x.astype(np.float32) @ w + bias[None, :] + residual)


def swiglu(m, k, half):
    packed, w, static = weight(k, 2 * half, 128)
    x = normal(m, k) / np.float16(8)
    y = api.matmul_swiglu(x, *packed, **static, implementation="triton")
    gate, up = np.split(x.astype(np.float32) @ w, 2, axis=1)
    return error(y, gate / (1 + np.exp(-gate)) * up)


def vmapped_gradient():
    """Two levels of vmap and a leading dimension over one weight, gradient of a scalar, under jit."""
    packed, w, static = weight(172, 24, 128)
    x, target = normal(2, 2, 3, 172), normal(2, 2, 3, 24, seed=5)

    def loss(x, target):
        y = api.matmul(x, *packed, **static, implementation="triton")
        return jnp.sum(y.astype(jnp.float32) * target.astype(jnp.float32))

    dx = jax.jit(jax.vmap(jax.vmap(jax.grad(loss))))(x, target)
    return error(dx, target.astype(np.float32) @ w.T)


def residual_norm(m, k, n):
    """h = residual + x @ W over K splits, and its RMSNorm, against plain sums."""
    packed, w, static = weight(k, n, 128)
    x, residual, norm_weight = normal(m, k), normal(m, n, seed=2), normal(n, seed=3)

    def run(*arrays):
        h, norm, _ = decode.matmul_norm(refuse, *arrays, None, *packed, eps=EPS, **static)
        return h, finish(norm, EPS)

    h, normalized = jax.jit(run)(x, residual, norm_weight)
    expected = x.astype(np.float32) @ w + residual
    scale = 1 / np.sqrt(np.mean(expected**2, axis=-1, keepdims=True) + EPS)
    return max(error(h, expected), error(normalized, expected * scale * norm_weight[None, :].astype(np.float32)))


def refuse(*arrays):
    raise AssertionError("the kernels were not taken")


def attention(heads, kv_heads, head_dim, slots, positions, *, with_delta=False, k=300):
    """One token's attention by a loop over rows and heads; a position may lie beyond the cache."""
    b, positions = len(positions), np.array(positions, np.int32)
    packed, w, static = weight(k, (heads + 2 * kv_heads) * head_dim, 128)
    x = normal(b, k) / np.float16(30)
    delta = normal(b, static["n"], seed=8) if with_delta else None
    angles = np.random.default_rng(5).uniform(0, 6, (b, head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    keys, values = (normal(b, kv_heads, slots, head_dim, seed=seed) for seed in (6, 7))
    run = lambda x, *arrays: decode.matmul_attend(refuse, finished(x, EPS), *arrays, *packed, eps=EPS, **static)[:3]
    found = jax.jit(run)(x, delta, cos, sin, keys, values, positions)
    qkv = (
        (x.astype(np.float32) @ w + (0 if delta is None else delta))
        .astype(np.float16)
        .astype(np.float32)
        .reshape(b, heads + 2 * kv_heads, head_dim)
    )
    left, right = np.split(qkv, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    out = np.zeros((b, heads, head_dim), np.float32)
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    for row, head in np.ndindex(b, heads):
        of = head // (heads // kv_heads)
        p = min(positions[row], slots)
        own_key, own_value = turned[row, heads + of], qkv[row, heads + kv_heads + of]
        if p < slots:
            keys[row, of, p], values[row, of, p] = own_key, own_value
        seen = np.concatenate([keys[row, of, :p], own_key[None]])
        scores = seen @ turned[row, head] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[row, head] = weights / weights.sum() @ np.concatenate([values[row, of, :p], own_value[None]])
    expected = out.reshape(b, -1), keys, values
    return max(error(a, e) for a, e in zip(found, expected, strict=True))


def model_step(peft):
    """A step of decoding a 4-bit model, by the fused pieces and by what every other platform runs."""
    from fmfl_jax.config import llama_preset
    from fmfl_jax.models import llama
    from fmfl_jax.models.generate import init_cache
    from fmfl_jax.models.random_init import random_int4_params
    from fmfl_jax.peft.adapter import AdapterConfig
    from fmfl_jax.peft.lora import LoraConfig
    from fmfl_jax.peft.split import NoPeftConfig, split

    small = {"embed_dim": 32, "hidden_dim": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    config = llama_preset("tiny", num_layers=1, dtype="float16", **small)
    params = random_int4_params(config, jax.random.key(0), group_size=32, head=False)
    params = {  # scales at which the layer counts beside the embedding
        name: dataclasses.replace(p, scale=p.scale * jnp.float16(8)) if isinstance(p, Int4Weight) else p
        for name, p in params.items()
    }
    targets = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    configs = {"none": NoPeftConfig(), "lora": LoraConfig(targets=targets), "adapter": AdapterConfig()}
    s = split(config, params, configs[peft], key=jax.random.key(1))
    trained = jax.tree.map(lambda a: a + 0.1 * normal(*a.shape, seed=a.size).astype(np.float32), s.trainable)
    tokens = jnp.array([[3], [5]], jnp.int32)

    def decoded(fused):
        llama.decodes_fused = lambda *weights: fused
        model = s.merge(trained, s.frozen)
        model.prepare_decoding()
        cache = jax.tree.map(lambda a: jnp.asarray(normal(*a.shape)), init_cache(config, 2, 5))
        hidden, cache = model.hidden_cached(tokens, jnp.array([[0], [3]], jnp.int32), cache)
        return np.asarray(hidden, np.float32), np.asarray(cache.keys[0], np.float32)

    kept = llama.decodes_fused
    try:
        with mock.patch.object(decode, "_choose", side_effect=decode._choose) as chosen:
            hidden, keys = decoded(True)
        assert chosen.call_count == (3 if peft == "lora" else 4)  # attention, SwiGLU without LoRA, two norms
        return max(map(error, (hidden, keys), decoded(False)))
    finally:
        llama.decodes_fused = kept


CASES = {
    "residual + RMSNorm over K splits": lambda: residual_norm(3, 2048, 48),
    "residual + RMSNorm, ragged N": lambda: residual_norm(2, 172, 40),
    "attention of one token": lambda: attention(2, 2, 32, 70, [0, 65, 70]),
    "attention, grouped queries": lambda: attention(6, 2, 16, 20, [7, 19]),
    "attention, split keys": lambda: attention(4, 2, 16, 600, [0, 300, 599]),
    "attention with LoRA's term": lambda: attention(2, 1, 16, 20, [3, 11], with_delta=True),
    "decode step of a model": lambda: model_step("none"),
    "decode step with LoRA everywhere": lambda: model_step("lora"),
    "decode step with adapters": lambda: model_step("adapter"),
    "M=1": lambda: forward(1, 512, 32, 128),
    "M=1, K splits": lambda: forward(1, 2048, 16, 128),
    "M=9, K splits, ragged K": lambda: forward(9, 2290, 16, 128),
    "M=5, short last group, N=40": lambda: forward(5, 172, 40, 128),
    "M=3, group 64": lambda: forward(3, 512, 48, 64),
    "M=2, group 32, odd N": lambda: forward(2, 300, 37, 32),
    "M=16, group 256": lambda: forward(16, 640, 24, 256),
    "M=16, one group": lambda: forward(16, 300, 64, 300),
    "M=17, tensor-core family": lambda: forward(17, 172, 80, 128),
    "M=70, tensor-core family": lambda: forward(70, 256, 136, 128),
    "M=257, dequantize": lambda: forward(257, 172, 40, 128),
    "dequantize, group 64": lambda: forward(257, 172, 40, 64),
    "dequantize, group 32": lambda: forward(257, 172, 40, 32),
    "dequantize, group 256": lambda: forward(257, 600, 16, 256),
    "backward M=1": lambda: backward(1, 172, 40, 128),
    "backward M=5, N splits": lambda: backward(5, 200, 600, 128),
    "backward M=16, group 64": lambda: backward(16, 256, 37, 64),
    "backward M=2, group 32": lambda: backward(2, 256, 32, 32),
    "backward M=2, group 256": lambda: backward(2, 600, 32, 256),
    "backward M=2, one group": lambda: backward(2, 300, 32, 300),
    "backward M=40, dequantize": lambda: backward(40, 172, 40, 128),
    "epilogue": lambda: epilogue(3, 256, 40),
    "epilogue after K splits": lambda: epilogue(1, 2048, 32),
    "epilogue after dequantize": lambda: epilogue(260, 128, 32),
    "swiglu": lambda: swiglu(3, 256, 48),
    "swiglu M=12, two tiles": lambda: swiglu(12, 300, 80),
    "swiglu, K splits": lambda: swiglu(2, 1100, 48),
    "swiglu, three tiles of N, ragged": lambda: swiglu(1, 140, 272),
    "swiglu, N/2 not aligned": lambda: swiglu(3, 256, 20),
    "vmap of vmap of grad under jit": vmapped_gradient,
}

if __name__ == "__main__":
    results = {name: case() for name, case in CASES.items()}
    assert "triton" in sys.modules, "the public op did not reach the kernels"
    print(json.dumps(results))
