"""Launches of the decode step's kernels. Imports triton."""

import functools
import math

import jax
import jax.numpy as jnp

from kernels.decode import kernels
from kernels.decode.residual import residual_kernel
from kernels.decode.unfinished import ROWS, finished, num_tiles
from kernels.w4a16 import configs, gpu, launch, layout

BLOCK_S = 64  # slots of one step
SLOTS_OF_A_PART = 256
PROGRAMS = 2 * configs.SMS


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def num_parts(programs: int, num_slots: int) -> int:
    """Into how many parts the keys are split: enough for about PROGRAMS programs, SLOTS_OF_A_PART slots at least."""
    return max(1, min(PROGRAMS // programs, num_slots // SLOTS_OF_A_PART))


def add_norm(parts, residual, weight, *, eps: float, num_zeros: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """parts [splits, M, N], residual [M, N], weight [N] -> h = residual + sum of parts and RMSNorm(h) * weight.

    And zeros as of `configs.zeros_written`.
    """
    splits, m, n = parts.shape
    out = jax.ShapeDtypeStruct((m, n), residual.dtype)
    zeros, constants = gpu.step_outputs(num_zeros)
    return launch.call(
        kernels.norm_kernel,
        parts,
        residual,
        weight,
        splits,
        m,
        n,
        out_shape=(out, out, zeros),
        grid=(m, 1, 1),
        num_warps=8,
        num_stages=1,
        EPS=eps,
        BLOCK=_power(n),
        **constants,
    )


def num_counts(b: int, kv_heads: int, n: int) -> int:
    """How many counters `matmul_attend` zeroes: of the heads, for split keys, then of the tiles of [B, N] after it."""
    return b * kv_heads + num_tiles(b, n)


def matmul_norm(
    x,
    residual,
    norm_weight,
    counts,
    qweight,
    scale,
    zero_point,
    *,
    eps: float,
    first_zero: int,
    num_zeros: int,
    k: int,
    n: int,
    group_size: int,
):
    """x [M, K], residual [M, N] -> h = residual + x @ W [M, N] and `Unfinished` RMSNorm(h) * norm_weight, and zeros: 4
    arrays.

    M at most configs.MAX_ROWS; counts int32 with num_tiles zeros from first_zero on, or None; the zeros as of
    `configs.zeros_written`.
    """
    m = x.shape[0]
    config = configs.choose(configs.MATMUL, m)
    assert config is not None
    static = {"k": k, "n": n, "group_size": group_size}
    if not config.few_rows or n % layout.N_ALIGN:
        parts, _ = gpu.partial_sums(x, qweight, scale, zero_point, **static)
        h, norm, zeros = add_norm(parts, residual, norm_weight, eps=eps, num_zeros=num_zeros)
        return h, *finished(norm, eps), zeros
    tiles, steps = num_tiles(m, n), -(-k // config.step_rows)
    splits, per_split = configs.splits(rows=m, tiles=tiles, steps=steps, config=config)
    group_slices, blocks_per_group = gpu.group_constants(k, group_size)
    if counts is None:
        counts = jnp.zeros(first_zero + tiles, jnp.int32)
    zeros, of_zeros = gpu.step_outputs(num_zeros)
    constants = gpu.loop_constants(k, config, even_tiles=n % config.block_n == 0)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = jax.ShapeDtypeStruct((m, n), residual.dtype)
    counted = jax.ShapeDtypeStruct(counts.shape, counts.dtype)
    _, h, norm, squares, _, zeros = launch.call(
        residual_kernel,
        x,
        qweight,
        scale,
        zero_point,
        residual,
        norm_weight,
        counts,
        first_zero,
        m,
        k // constants["K_UNIT"],
        n // layout.N_ALIGN,
        scale.shape[0],
        blocks_per_group,
        steps,
        per_split,
        splits,
        out_shape=(float32((splits, m, n)), out, out, float32((m, tiles)), counted, zeros),
        aliases={6: 4},
        grid=(tiles, 1, splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_SLICES=group_slices,
        **constants,
        **of_zeros,
        INTERPRET=launch.interpreting(),
    )
    return h, norm, squares, zeros


def matmul_attend(
    x, squares, delta, cos, sin, keys, values, positions, qweight, scale, zero_point, *, eps: float, k: int, **static
):
    """`Unfinished` x [B, D], W [D, (N + 2 K) H] -> out [B, N H], and keys, values [B, K, S, H] with the token's at
    `positions`, and int32 [num_counts(B, K, D) or more], of which those from B K on are zero.

    delta [B, (N + 2 K) H] or None is added to x @ W.
    """
    b, kv_heads = keys.shape[:2]
    if b > ROWS:
        squares = None
    more = {"squares": squares, "eps": eps, "num_zeros": num_counts(b, kv_heads, k)}
    qkv, zeros = gpu.partial_sums(x, qweight, scale, zero_point, k=k, **static, **more)
    return attend(qkv, zeros, delta, cos, sin, keys, values, positions)


def matmul_swiglu(x, squares, counts, qweight, scale, zero_point, *, eps: float, k: int, **static):
    """`Unfinished` x [M, K], M at most ROWS -> [M, N / 2] as `w4a16.gpu.swiglu_step`, and num_tiles(M, K) zeros or
    more."""
    more = {"squares": squares, "eps": eps, "num_zeros": num_tiles(x.shape[0], k)}
    return gpu.swiglu_step(x, counts, qweight, scale, zero_point, k=k, **static, **more)


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
    out, keys, values, _, _, counts = launch.call(
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
    return out.reshape(b, n * h), keys, values, counts if split else zeros
