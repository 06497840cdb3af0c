"""A decode step's fused pieces over 4-bit weights, for CUDA: each stands beside what every other platform runs.

`otherwise` is that: a function of the same arrays, traced too, which defines what is right. A function here returns
otherwise(*arrays) where the kernels cannot serve (`serves`), and under vmap, where there is no kernel for it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.w4a16 import api, configs


def serves(*, rows: int, dtype, scale_dtype, zero_dtype, k: int, n: int, group_size: int, head_dim: int = 16) -> bool:
    """Whether these kernels can serve on CUDA: the product's (`w4a16.api`), few rows, heads of 16, 32, ... numbers."""
    if not 0 < rows <= configs.MAX_ROWS or head_dim < 16 or head_dim & (head_dim - 1):
        return False
    dtypes = dict(x_dtype=dtype, scale_dtype=scale_dtype, zero_dtype=zero_dtype)
    return api.can_launch() and api.supported(k=k, n=n, group_size=group_size, **dtypes)


def _choose(by_triton: Callable, otherwise: Callable, *arrays):
    """by_triton(*arrays) on CUDA or in Triton's interpreter, otherwise(*arrays) elsewhere and under vmap."""

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        if api.interpreting():
            return by_triton(*arrays)
        return jax.lax.platform_dependent(*arrays, cuda=by_triton, default=otherwise)

    @run.def_vmap
    def _(axis_size, in_batched, *arrays):
        axes = tuple(0 if batched else None for batched in in_batched)
        out = jax.vmap(otherwise, in_axes=axes, axis_size=axis_size)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return run(*arrays)


def matmul_norm(otherwise: Callable, x, residual, norm_weight, *packed, eps: float, k: int, n: int, group_size: int):
    """h = residual + x @ W and RMSNorm(h) * norm_weight in two launches.

    Args:
      otherwise: of (x, residual, norm_weight, *packed) as below, with the same results.
      x: [M, K]; residual: [M, N] in x's dtype; norm_weight: [N] float; packed, k, n, group_size: as in `w4a16.api`.

    Returns:
      (h, normalized), [M, N] each in x's dtype; h is rounded before it is normalized.
    """
    static = {"k": k, "n": n, "group_size": group_size}
    arrays = (x, residual, norm_weight, *packed)
    if not serves(rows=x.shape[0], dtype=x.dtype, scale_dtype=packed[1].dtype, zero_dtype=packed[2].dtype, **static):
        return otherwise(*arrays)
    from kernels.decode import gpu

    return _choose(functools.partial(gpu.matmul_norm, eps=eps, **static), otherwise, *arrays)


def add_norm(otherwise: Callable, x, residual, norm_weight, *, eps: float):
    """h = residual + x and RMSNorm(h) * norm_weight in one launch; x [M, N], the rest as for `matmul_norm`."""
    served = 0 < x.shape[0] <= configs.MAX_ROWS and x.dtype in api.FLOAT_TYPES and api.can_launch()
    if not served:
        return otherwise(x, residual, norm_weight)
    from kernels.decode import gpu

    return _choose(lambda x, *arrays: gpu.add_norm(x[None], *arrays, eps), otherwise, x, residual, norm_weight)


def matmul_attend(
    otherwise: Callable, x, delta, cos, sin, keys, values, positions, *packed, k: int, n: int, group_size: int
):
    """Queries, key and value of one token a row, RoPE, the cache's update and attention, in two or three launches.

    Args:
      otherwise: of (x, delta, cos, sin, keys, values, positions, *packed) as below, with the same results.
      x: [B, D]; delta: [B, (N + 2 K) H] in x's dtype, added to x @ W (what LoRA computes), or None; cos, sin: fp32
        [B, H / 2]; keys, values: [B, K, S, H] in x's dtype; positions: int32 [B], the token's slot; it sees the slots
        up to it. packed, k = D, n = (N + 2 K) H, group_size: as in `w4a16.api`.

    Returns:
      (out [B, N H], keys, values); a position beyond the last slot writes nothing to the cache.
    """
    static = {"k": k, "n": n, "group_size": group_size}
    arrays = (x, delta, cos, sin, keys, values, positions, *packed)
    served = serves(
        rows=x.shape[0],
        dtype=x.dtype,
        scale_dtype=packed[1].dtype,
        zero_dtype=packed[2].dtype,
        head_dim=keys.shape[-1],
        **static,
    )
    if not served or keys.dtype != x.dtype or cos.dtype != jnp.float32:
        return otherwise(*arrays)
    from kernels.decode import gpu

    return _choose(functools.partial(gpu.matmul_attend, **static), otherwise, *arrays)
