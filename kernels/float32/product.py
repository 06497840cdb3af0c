"""x @ W in float32 on the matrix unit of a CPU (AMX), for products of many rows with a large W.

A float is nearly the sum of two bfloat16, and three products of those, summed in fp32, take the place of one (XLA calls
the scheme BF16_BF16_F32_X3): relative error 6e-6 where an fp32 dot has 5e-7, in about half the time. The library of
`kernels.w4a16.cpu` computes it; this file says when it serves, and gives it a gradient and a vmap rule.

Reverse mode only: the product is a `jax.custom_vjp`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels.w4a16.cpu import product as cpu

MIN_ROWS = 64
MIN_MULTIPLICATIONS = 2**23  # below, a call takes longer than it saves


def serves(x, w) -> bool:
    """Whether `matmul` is the faster way for x [..., K] and w of two dimensions: float32, large, and `available`."""
    rows = math.prod(x.shape[:-1])
    large = rows >= MIN_ROWS and rows * w.size >= MIN_MULTIPLICATIONS
    return x.dtype == w.dtype == jnp.float32 and w.ndim == 2 and large and available()


def available() -> bool:
    """Whether this process computes on a CPU with a matrix unit, and `jax.default_matmul_precision` allows it."""
    precise = jax.config.jax_default_matmul_precision not in (None, "default", "high")
    return not precise and jax.default_backend() == "cpu" and cpu.has_matrix_unit()


def matmul(x, w, *, turned: bool = False) -> jax.Array:
    """x [..., K] @ w -> [..., N], all float32; w is [K, N], or [N, K] where it is turned.

    Differentiable in both, in reverse mode. Under vmap over x alone the batch folds into the rows.
    """
    return _matmul(turned, x, w)


def _dot(turned: bool, x, w):
    return x @ (w.T if turned else w)


def _product(turned: bool, x, w):
    def by_matrix_unit(x, w):
        width = w.shape[0] if turned else w.shape[1]
        out = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), width), jnp.float32)
        rows = jax.ffi.ffi_call("float_product", out)(x.reshape(-1, x.shape[-1]), w, turned=turned)
        return rows.reshape(*x.shape[:-1], width)

    return jax.lax.platform_dependent(x, w, cpu=by_matrix_unit, default=functools.partial(_dot, turned))


def _foldable(turned: bool):
    fn = jax.custom_batching.custom_vmap(functools.partial(_product, turned))

    @fn.def_vmap
    def rule(axis_size, in_batched, x, w):
        x_batched, w_batched = in_batched
        if x_batched and not w_batched:
            return fn(x, w), True
        axes = tuple(0 if batched else None for batched in in_batched)
        return jax.vmap(functools.partial(_dot, turned), axes)(x, w), True

    return fn


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(turned, x, w):
    return _foldable(turned)(x, w)


def _forward(turned, x, w):
    return _matmul(turned, x, w), (x, w)


def _backward(turned, residuals, dy):
    x, w = residuals
    left, right = (dy, x) if turned else (x, dy)
    dw = left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])  # dropped where w is frozen
    return _matmul(not turned, dy, w), dw


_matmul.defvjp(_forward, _backward)
