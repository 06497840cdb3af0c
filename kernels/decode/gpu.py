"""Launches of the decode step's kernels. Imports triton."""

import functools
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
    parts, _ = gpu.partial_sums(x, qweight, scale, zero_point, **static)
    return add_norm(parts, residual, norm_weight, eps)


def matmul_attend(x, delta, cos, sin, keys, values, positions, qweight, scale, zero_point, **static):
    """x [B, D], W [D, (N + 2 K) H] -> out [B, N H], and keys, values [B, K, S, H] with the token's at `positions`.

    delta [B, (N + 2 K) H] or None is added to x @ W.
    """
    b, k, slots, _ = keys.shape
    num_counts = b * k if num_parts(b * k, slots) > 1 else 0
    qkv, zeros = gpu.partial_sums(x, qweight, scale, zero_point, **static, num_zeros=num_counts)
    return attend(qkv, zeros, delta, cos, sin, keys, values, positions)


def attend(qkv, zeros, delta, cos, sin, keys, values, positions):
    """As `matmul_attend`, of qkv [splits, B, (N + 2 K) H]; zeros int32 [B K or more], unused with one part."""
    splits, b, width = qkv.shape
    _, k, slots, h = keys.shape
    n = width // h - 2 * k
    parts = num_parts(b * k, slots)
    split = parts > 1
    lead = (b, n, parts) if split else (1, 1, 1)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    cache = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
    out, keys, values, *_ = launch.call(
        kernels.attention_kernel,
        qkv,
        qkv if delta is None else delta,
        cos,
        sin,
        positions,
        keys,
        values,
        zeros if split else positions,
        splits,
        b,
        slots,
        out_shape=(
            jax.ShapeDtypeStruct((b, n, h), keys.dtype),
            cache,
            cache,
            float32((*lead, h)),
            float32((*lead, 2)),
            jax.ShapeDtypeStruct(zeros.shape if split else (1,), jnp.int32),
        ),
        aliases={5: 1, 6: 2} | ({7: 5} if split else {}),
        grid=(b, k, parts),
        num_warps=4,
        num_stages=3,
        KV_HEADS=k,
        GROUP=n // k,
        HEAD_DIM=h,
        BLOCK_G=max(8, _power(n // k)),
        BLOCK_S=BLOCK_S,
        PARTS=parts,
        BLOCK_P=_power(parts),
        SCALE=1 / math.sqrt(h),
        HAS_DELTA=delta is not None,
    )
    return out.reshape(b, n * h), keys, values
