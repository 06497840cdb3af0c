"""What the decode step's kernels compute, in plain jax.numpy: what bench.py holds them to on a GPU."""

import math

import jax
import jax.numpy as jnp


def norm(h, weight, eps: float) -> jax.Array:
    """RMSNorm of h [M, N] with weight [N], in fp32, in h's dtype."""
    h32 = h.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(h32 * h32, axis=-1, keepdims=True) + eps)
    return (h32 * scale * weight.astype(jnp.float32)[None]).astype(h.dtype)


def attend(qkv, cos, sin, keys, values, positions):
    """qkv [B, (N + 2 K) H], cos, sin [B, H / 2], keys, values [B, K, S, H], positions int32 [B] within the slots.

    Returns (out [B, N H], keys, values) as `api.matmul_attend`; RoPE in half-rotation form, softmax in fp32.
    """
    b, k, slots, h = keys.shape
    heads = qkv.reshape(b, -1, h)  # [B, N + 2 K, H]
    left, right = jnp.split(heads[:, :-k].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(qkv.dtype)
    rows = jnp.arange(b)
    keys = keys.at[rows, :, positions].set(turned[:, -k:])
    values = values.at[rows, :, positions].set(heads[:, -k:])
    q = turned[:, :-k].reshape(b, k, -1, h)  # [B, K, N / K, H]
    scores = jnp.einsum("bkgh,bksh->bkgs", q, keys, preferred_element_type=jnp.float32) / math.sqrt(h)
    seen = jnp.arange(slots)[None] <= positions[:, None]  # [B, S]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, values, preferred_element_type=jnp.float32)
    return out.astype(qkv.dtype).reshape(b, -1), keys, values
