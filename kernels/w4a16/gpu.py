"""The Triton path of `api.py`: picks a configuration, computes the grid, launches, and adds split sums. Imports triton.

Every function takes 2-D x or dy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.w4a16 import configs, few_rows_kernels, kernels, launch, layout, reference


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def group_constants(k: int, group_size: int) -> tuple[int, int]:
    """(GROUP_SLICES, blocks_per_group) of kernels.py for a group size that `api.unsupported_reason` lets through."""
    if group_size >= k:
        return 0, 2**30
    if group_size > layout.SUPERBLOCK:
        return 0, group_size // layout.SUPERBLOCK
    return group_size // layout.SLICE, 1


def _k_unit(k: int) -> int:
    return 16 if k % 16 == 0 else 1


def loop_constants(k: int, config: configs.Config, *, even_tiles: bool) -> dict[str, Any]:
    """What the loop over K needs to know when it is compiled. even_tiles: no tile of N has columns beyond the last."""
    constants = {"EVEN_K": k % config.step_rows == 0, "K_UNIT": _k_unit(k)}
    if config.few_rows:
        constants |= {"STRIPS": config.strips, "STEP": config.step_rows // layout.SUPERBLOCK}
        constants |= {"EVEN_TILES": even_tiles}
    return constants


def matmul(x, bias, residual, qweight, scale, zero_point, *, k: int, n: int, group_size: int, config=None) -> jax.Array:
    """x [M, K] @ W + bias [N] + residual [M, N] -> [M, N] in x's dtype. `config` overrides the table (tune.py)."""
    m = x.shape[0]
    config = config or configs.choose(configs.MATMUL, m)
    if config is None:
        w = dequantize(qweight, scale, zero_point, k=k, n=n, group_size=group_size, dtype=x.dtype)
        if bias is None and residual is None:
            return jnp.dot(x, w)  # accumulated in fp32 all the same; an fp32 result would double the bytes written
        return reference.epilogue(jnp.dot(x, w, preferred_element_type=jnp.float32), bias, residual, x.dtype)
    static = {"k": k, "n": n, "group_size": group_size}
    y, _ = _launch_matmul(x, bias, residual, qweight, scale, zero_point, **static, config=config)
    if y.shape[0] == 1:
        return y[0]
    return reference.epilogue(y.sum(axis=0), bias, residual, x.dtype)


def partial_sums(
    x,
    qweight,
    scale,
    zero_point,
    *,
    k: int,
    n: int,
    group_size: int,
    squares=None,
    eps: float = 0.0,
    num_zeros: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """x [M, K] @ W -> [splits, M, N], to be summed: in x's dtype where there is one split, else fp32. And zeros.

    M is at most configs.MAX_ROWS. The zeros are int32, at least num_zeros (a kernel that follows counts in them), made
    by the same launch where M is at most 16. squares: None, or (M at most 16) fp32 [M, parts], whose sum over K and eps
    are the mean square by whose root each row of the product is divided, as RMSNorm does.
    """
    config = configs.choose(configs.MATMUL, x.shape[0])
    assert config is not None
    static = {"k": k, "n": n, "group_size": group_size}
    more = {"squares": squares, "eps": eps, "num_zeros": num_zeros}
    return _launch_matmul(x, None, None, qweight, scale, zero_point, **static, config=config, **more)


def _launch_matmul(
    x,
    bias,
    residual,
    qweight,
    scale,
    zero_point,
    *,
    k: int,
    n: int,
    group_size: int,
    config: configs.Config,
    squares=None,
    eps: float = 0.0,
    num_zeros: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """[splits, M, N]: the product with bias and residual in x's dtype where there is one split; else fp32 sums.

    And zeros; these and squares as in `partial_sums`.
    """
    m = x.shape[0]
    np_ = layout.padded_shape(k, n)[1]
    steps = _ceil(k, config.step_rows)
    tiles = (_ceil(n, config.block_n), _ceil(m, config.block_m))
    num_splits, per_split = configs.splits(rows=m, tiles=tiles[0] * tiles[1], steps=steps, config=config)
    group_slices, blocks_per_group = group_constants(k, group_size)
    whole = num_splits == 1
    out_shape = jax.ShapeDtypeStruct((num_splits, m, n), x.dtype if whole else jnp.float32)
    epilogue = (scale if bias is None else bias, x if residual is None else residual)
    run = functools.partial(
        launch.call,
        grid=(*tiles, num_splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_SLICES=group_slices,
        **loop_constants(k, config, even_tiles=np_ % config.block_n == 0),
        EVEN_N=n == np_,
        HAS_BIAS=whole and bias is not None,
        HAS_RESIDUAL=whole and residual is not None,
        INTERPRET=launch.interpreting(),
    )
    sizes = (m, k // _k_unit(k), n, np_ // 16, scale.shape[0], blocks_per_group, steps, per_split)
    if config.few_rows:
        zeros, constants = step_outputs(num_zeros)
        constants |= _norm_constants(squares, eps)
        arrays = (x, qweight, scale, zero_point, *epilogue, x if squares is None else squares)
        return run(few_rows_kernels.matmul_kernel, *arrays, *sizes, out_shape=(out_shape, zeros), **constants)
    assert squares is None
    y = run(kernels.matmul_kernel, x, qweight, scale, zero_point, *epilogue, *sizes, out_shape=out_shape)
    return y, jnp.zeros(configs.zeros_written(num_zeros), jnp.int32)


def step_outputs(num_zeros: int) -> tuple[jax.ShapeDtypeStruct, dict[str, Any]]:
    """Shape of a launch's zeros and its constant ZEROS."""
    zeros = configs.zeros_written(num_zeros)
    return jax.ShapeDtypeStruct((zeros,), jnp.int32), {"ZEROS": zeros if num_zeros else 0}


def _norm_constants(squares, eps: float) -> dict[str, Any]:
    """The constants by which a product is divided as RMSNorm does."""
    return {"SQUARES": 0 if squares is None else squares.shape[1], "EPS": eps}


def matmul_swiglu(x, qweight, scale, zero_point, *, k: int, n: int, group_size: int, config=None) -> jax.Array:
    """silu(x @ W[:, :N/2]) * (x @ W[:, N/2:]) -> [M, N/2]; one launch and a fill where N/2 is a multiple of 16."""
    m, half = x.shape[0], n // 2
    if half % layout.N_ALIGN or m > configs.DECODE_ROWS:
        y = matmul(x, None, None, qweight, scale, zero_point, k=k, n=n, group_size=group_size)
        return reference.swiglu(y)
    return swiglu_step(x, None, qweight, scale, zero_point, k=k, n=n, group_size=group_size, config=config)[0]


def swiglu_step(
    x,
    counts,
    qweight,
    scale,
    zero_point,
    *,
    k: int,
    n: int,
    group_size: int,
    squares=None,
    eps: float = 0.0,
    num_zeros: int = 0,
    config=None,
) -> tuple[jax.Array, jax.Array]:
    """`matmul_swiglu` in one launch, M at most configs.DECODE_ROWS and N / 2 a multiple of 16, and zeros.

    counts: int32 [configs.swiglu_tiles(M, N) or more], zero, or None, which costs a launch; zeros and squares as in
    `partial_sums`.
    """
    m, half = x.shape[0], n // 2
    config = config or configs.choose(configs.SWIGLU, m)
    assert config is not None and m <= config.block_m  # DECODE_ROWS is the last entry's
    tiles, steps = _ceil(half, config.block_n // 2), _ceil(k, config.step_rows)
    splits, per_split = configs.splits(rows=m, tiles=tiles, steps=steps, config=config)
    group_slices, blocks_per_group = group_constants(k, group_size)
    zeros, constants = step_outputs(num_zeros)
    counts = jnp.zeros(tiles, jnp.int32) if counts is None else counts
    y, _, _, zeros = launch.call(
        few_rows_kernels.swiglu_kernel,
        x,
        qweight,
        scale,
        zero_point,
        x if squares is None else squares,
        counts,
        m,
        k // _k_unit(k),
        n // 16,
        scale.shape[0],
        blocks_per_group,
        steps,
        per_split,
        splits,
        out_shape=(
            jax.ShapeDtypeStruct((m, half), x.dtype),
            jax.ShapeDtypeStruct((splits, m, n), jnp.float32),
            jax.ShapeDtypeStruct(counts.shape, counts.dtype),
            zeros,
        ),
        aliases={5: 2},
        grid=(tiles, 1, splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_SLICES=group_slices,
        **loop_constants(k, config, even_tiles=n % config.block_n == 0),
        **constants,
        **_norm_constants(squares, eps),
        INTERPRET=launch.interpreting(),
    )
    return y, zeros


def dequantize(qweight, scale, zero_point, *, k: int, n: int, group_size: int, dtype) -> jax.Array:
    """W [K, N] in `dtype`."""
    config = configs.DEQUANTIZE
    np_ = layout.padded_shape(k, n)[1]
    group_slices, blocks_per_group = group_constants(k, group_size)
    return launch.call(
        kernels.dequantize_kernel,
        qweight,
        scale,
        zero_point,
        k,
        n,
        np_ // 16,
        scale.shape[0],
        blocks_per_group,
        out_shape=jax.ShapeDtypeStruct((k, n), dtype),
        grid=(_ceil(k, layout.SUPERBLOCK), _ceil(n, config.block_n), 1),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_N=config.block_n,
        GROUP_SLICES=group_slices,
        EVEN_N=n == np_,
    )


def matmul_transposed(dy, qweight, scale, zero_point, *, k: int, n: int, group_size: int, config=None) -> jax.Array:
    """dy [M, N] @ W^T -> [M, K] in dy's dtype: fused for small M, dequantize and XLA's dot above."""
    m = dy.shape[0]
    config = config or configs.choose(configs.TRANSPOSED, m)
    if config is None:
        w = dequantize(qweight, scale, zero_point, k=k, n=n, group_size=group_size, dtype=dy.dtype)
        return jax.lax.dot_general(dy, w, (((1,), (1,)), ((), ())))
    np_ = layout.padded_shape(k, n)[1]
    tiles = (_ceil(k, layout.SUPERBLOCK), _ceil(m, config.block_m))
    steps = _ceil(n, config.block_n)
    num_splits, per_split = configs.splits(rows=m, tiles=tiles[0] * tiles[1], steps=steps, config=config)
    group_slices, blocks_per_group = group_constants(k, group_size)
    dx = launch.call(
        kernels.transposed_kernel,
        dy,
        qweight,
        scale,
        zero_point,
        m,
        k,
        n,
        np_ // 16,
        scale.shape[0],
        blocks_per_group,
        steps,
        per_split,
        out_shape=jax.ShapeDtypeStruct((num_splits, m, k), dy.dtype if num_splits == 1 else jnp.float32),
        grid=(*tiles, num_splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_SLICES=group_slices,
        EVEN_N=n == np_,
        INTERPRET=launch.interpreting(),
    )
    return dx[0] if num_splits == 1 else dx.sum(axis=0).astype(dy.dtype)
