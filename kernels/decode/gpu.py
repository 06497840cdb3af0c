"""Launches of the decode step's kernels. Imports triton."""

import math

import jax
import jax.numpy as jnp

from kernels.decode import kernels
from kernels.w4a16 import configs, gpu, launch

BLOCK_S = 64  # slots of one step
SLOTS_OF_A_PART = 256
PROGRAMS = 2 * configs.SMS


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def num_parts(programs: int, num_slots: int) -> int:
    """Into how many parts the keys are split: enough for about PROGRAMS programs, SLOTS_OF_A_PART slots at least."""
    return max(1, min(PROGRAMS // programs, num_slots // SLOTS_OF_A_PART))


def add_norm(parts, residual, weight, eps: float) -> tuple[jax.Array, jax.Array]:
    """parts [splits, M, N], residual [M, N], weight [N] -> h = residual + sum of parts and RMSNorm(h) * weight."""
    splits, m, n = parts.shape
    out = jax.ShapeDtypeStruct((m, n), residual.dtype)
    return launch.call(
        kernels.norm_kernel,
        parts,
        residual,
        weight,
        splits,
        m,
        n,
        out_shape=(out, out),
        grid=(m, 1, 1),
        num_warps=8,
        num_stages=1,
        EPS=eps,
        BLOCK=_power(n),
    )


def matmul_norm(x, residual, norm_weight, qweight, scale, zero_point, *, eps: float, **static):
    """x [M, K], residual [M, N] -> h = residual + x @ W and RMSNorm(h) * norm_weight, M at most configs.MAX_ROWS."""
    parts = gpu.partial_sums(x, qweight, scale, zero_point, **static)
    return add_norm(parts, residual, norm_weight, eps)


def matmul_attend(x, delta, cos, sin, keys, values, positions, qweight, scale, zero_point, **static):
    """x [B, D], W [D, (N + 2 K) H] -> out [B, N H], and keys, values [B, K, S, H] with the token's at `positions`.

    delta [B, (N + 2 K) H] or None is added to x @ W.
    """
    parts = gpu.partial_sums(x, qweight, scale, zero_point, **static)
    return attend(parts, delta, cos, sin, keys, values, positions)


def attend(qkv, delta, cos, sin, keys, values, positions):
    """As `matmul_attend`, of qkv [splits, B, (N + 2 K) H]."""
    splits, b, width = qkv.shape
    _, k, slots, h = keys.shape
    n = width // h - 2 * k
    parts = num_parts(b * k, slots)
    whole = parts == 1
    out = jax.ShapeDtypeStruct((b, n, h), keys.dtype) if whole else jax.ShapeDtypeStruct((b, n, parts, h), jnp.float32)
    stats = jax.ShapeDtypeStruct((1,) if whole else (b, n, parts, 2), jnp.float32)
    cache = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
    out, keys, values, stats = launch.call(
        kernels.attention_kernel,
        qkv,
        qkv if delta is None else delta,
        cos,
        sin,
        positions,
        keys,
        values,
        splits,
        b,
        slots,
        out_shape=(out, cache, cache, stats),
        aliases={5: 1, 6: 2},
        grid=(b, k, parts),
        num_warps=4,
        num_stages=3,
        KV_HEADS=k,
        GROUP=n // k,
        HEAD_DIM=h,
        BLOCK_G=max(8, _power(n // k)),
        BLOCK_S=BLOCK_S,
        PARTS=parts,
        SCALE=1 / math.sqrt(h),
        HAS_DELTA=delta is not None,
    )
    if not whole:
        out = launch.call(
            kernels.merge_kernel,
            out,
            stats,
            out_shape=jax.ShapeDtypeStruct((b, n, h), keys.dtype),
            grid=(b * n, 1, 1),
            num_warps=4,
            num_stages=1,
            HEAD_DIM=h,
            PARTS=parts,
            BLOCK_P=_power(parts),
        )
    return out.reshape(b, n * h), keys, values
