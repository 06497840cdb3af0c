"""A decode step's fused pieces over 4-bit weights, for CUDA: each stands beside what every other platform runs.

`otherwise` is that: a function of the same arrays, traced too, which defines what is right. A function here returns
otherwise(*arrays) where the kernels cannot serve (`serves`), and under vmap, where there is no kernel for it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.decode.unfinished import ROWS, Unfinished, finish, finished, num_tiles
from kernels.w4a16 import api, configs, layout


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


def _zeros(count: int):
    """What a launch gives that is asked for so many zeros."""
    return jnp.zeros(configs.zeros_written(count), jnp.int32)


def matmul_norm(
    otherwise: Callable,
    x,
    residual,
    norm_weight,
    zeros,
    *packed,
    eps: float,
    first_zero: int = 0,
    num_zeros: int = 0,
    k: int,
    n: int,
    group_size: int,
):
    """h = residual + x @ W and RMSNorm(h) * norm_weight in one launch (in two for more than `unfinished.ROWS` rows).

    Args:
      otherwise: of (x, residual, norm_weight, *packed) as below -> (h, the norm), [M, N] each.
      x: [M, K]; residual: [M, N] in x's dtype; norm_weight: [N] float; packed, k, n, group_size: as in `w4a16.api`.
      zeros: int32, from first_zero on as many as the launch has tiles, as a function here returns them; or None, which
        costs a launch.
      num_zeros: how many zeros the launch after this one needs (`swiglu_zeros`), 0 for none.

    Returns:
      h [M, N] in x's dtype, rounded before it is normalized, the norm as `Unfinished`, and zeros or None.
    """
    static = {"k": k, "n": n, "group_size": group_size}
    arrays = (x, residual, norm_weight, zeros, *packed)

    def definition(x, residual, norm_weight, zeros, *packed):
        del zeros
        h, norm = otherwise(x, residual, norm_weight, *packed)
        return h, *finished(norm, eps)

    if serves(rows=x.shape[0], dtype=x.dtype, scale_dtype=packed[1].dtype, zero_dtype=packed[2].dtype, **static):
        from kernels.decode import gpu

        static |= {"eps": eps, "first_zero": first_zero, "num_zeros": num_zeros}
        with_zeros = lambda *arrays: (*definition(*arrays), _zeros(num_zeros))
        h, *norm, zeros = _choose(functools.partial(gpu.matmul_norm, **static), with_zeros, *arrays)
        return h, Unfinished(*norm), zeros if num_zeros else None
    h, *norm = definition(*arrays)
    return h, Unfinished(*norm), None


def add_norm(otherwise: Callable, x, residual, norm_weight, *, eps: float, num_zeros: int = 0):
    """h = residual + x and RMSNorm(h) * norm_weight in one launch; x [M, N], the rest as for `matmul_norm`."""
    if not (0 < x.shape[0] <= configs.MAX_ROWS and x.dtype in api.FLOAT_TYPES and api.can_launch()):
        h, norm = otherwise(x, residual, norm_weight)
        return h, finished(norm, eps), None
    from kernels.decode import gpu

    def run(x, residual, weight):
        return gpu.add_norm(x[None], residual, weight, eps=eps, num_zeros=num_zeros)

    with_zeros = lambda *arrays: (*otherwise(*arrays), _zeros(num_zeros))
    h, norm, zeros = _choose(run, with_zeros, x, residual, norm_weight)
    return h, finished(norm, eps), zeros if num_zeros else None


def matmul_attend(
    otherwise: Callable,
    x: Unfinished,
    delta,
    cos,
    sin,
    keys,
    values,
    positions,
    *packed,
    eps: float,
    k: int,
    n: int,
    group_size: int,
):
    """Queries, key and value of one token a row, RoPE, the cache's update and attention, in two launches.

    Args:
      otherwise: of (x, delta, cos, sin, keys, values, positions, *packed) as below, x finished -> the first three.
      x: [B, D]; delta: [B, (N + 2 K) H] in x's dtype, added to x @ W (what LoRA computes), or None; cos, sin: fp32
        [B, H / 2]; keys, values: [B, K, S, H] in x's dtype; positions: int32 [B], the token's slot; it sees the slots
        up to it. eps: of x's norm. packed, k = D, n = (N + 2 K) H, group_size: as in `w4a16.api`.

    Returns:
      (out [B, N H], keys, values, zeros or None); a position beyond the last slot writes nothing to the cache. The
      zeros are for `matmul_norm` with N = D, from B K on.
    """
    static = {"k": k, "n": n, "group_size": group_size}
    arrays = (*x, delta, cos, sin, keys, values, positions, *packed)
    served = serves(
        rows=x.x.shape[0],
        dtype=x.x.dtype,
        scale_dtype=packed[1].dtype,
        zero_dtype=packed[2].dtype,
        head_dim=keys.shape[-1],
        **static,
    )

    def definition(x, squares, *arrays):
        return otherwise(finish(Unfinished(x, squares), eps), *arrays)

    if not served or keys.dtype != x.x.dtype or cos.dtype != jnp.float32:
        return *definition(*arrays), None
    from kernels.decode import gpu

    num_zeros = gpu.num_counts(keys.shape[0], keys.shape[1], k)
    with_zeros = lambda *arrays: (*definition(*arrays), _zeros(num_zeros))
    return _choose(functools.partial(gpu.matmul_attend, eps=eps, **static), with_zeros, *arrays)


def swiglu_zeros(rows: int, n: int) -> int:
    """How many zeros `matmul_swiglu` of so many rows and N columns takes from the launch before."""
    return configs.swiglu_tiles(rows, n)


def matmul_swiglu(otherwise: Callable, x: Unfinished, zeros, *packed, eps: float, k: int, n: int, group_size: int):
    """silu(x @ gate) * (x @ up) in one launch; packed, k, n (of both together), group_size: as in `w4a16.api`.

    Args:
      otherwise: of (x, *packed), x finished -> [M, N / 2].
      zeros: int32, at least `swiglu_zeros`, as a function here returns them; or None, which costs a launch.

    Returns:
      ([M, N / 2], zeros or None); the zeros are for `matmul_norm` with N = k, from 0 on.
    """
    static = {"k": k, "n": n, "group_size": group_size}
    m, dtype = x.x.shape[0], x.x.dtype
    served = serves(rows=m, dtype=dtype, scale_dtype=packed[1].dtype, zero_dtype=packed[2].dtype, **static)
    if not served or m > ROWS or (n // 2) % layout.N_ALIGN:
        return otherwise(finish(x, eps), *packed), None
    from kernels.decode import gpu

    def definition(x, squares, zeros, *packed):
        del zeros
        return otherwise(finish(Unfinished(x, squares), eps), *packed), _zeros(num_tiles(m, k))

    return _choose(functools.partial(gpu.matmul_swiglu, eps=eps, **static), definition, *x, zeros, *packed)
