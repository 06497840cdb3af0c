"""The definition of correctness for the W4A16 product, in plain jax.numpy: what CPU, TPU and the tests use.

W = cast((q - z) * s in fp32), or cast(q * s + m in fp32) where `zero_point` holds minima m (see `layout`);
y = x @ W (+ bias + residual) with fp32 accumulation, cast to x's dtype.
"""

import jax
import jax.numpy as jnp

from kernels.w4a16 import layout


def dequantize(qweight, scale, zero_point, *, k: int, n: int, group_size: int, dtype) -> jax.Array:
    """W [K, N] in `dtype`: (q - z) * s, or q * s + m, computed in fp32, then cast.

    q * s is exact in fp32 (4 bits times a 16-bit float's 11), so q * s + m is rounded once, fused or not.

    Args:
      qweight: int32 [Kp/4, Np/2]; scale: float [G, Np]; zero_point: int32 [ceil(G/2), Np/4], or float minima
        [G, Np] (`layout.pack`).
      k, n, group_size: the weight's shape and the rows of K per group.

    Raises:
      ValueError: arrays that are not the packed form of a [k, n] weight.
    """
    layout.check(qweight, scale, zero_point, k=k, n=n, group_size=group_size)
    groups = layout.num_groups(k, group_size)
    q = layout.unpack_rows(jnp.asarray(qweight))[:k, :n]
    q = jnp.pad(q, ((0, groups * group_size - k), (0, 0))).reshape(groups, group_size, n)  # [G, group_size, N]
    z = layout.unpack_zero_point(jnp.asarray(zero_point), groups=groups, n=n)[:, None, :]
    s = jnp.asarray(scale)[:, None, :n].astype(jnp.float32)
    q, z = q.astype(jnp.float32), z.astype(jnp.float32)
    w = q * s + z if layout.is_minimum(zero_point) else (q - z) * s
    return w.astype(dtype).reshape(groups * group_size, n)[:k]  # [K, N]


def matmul(x, qweight, scale, zero_point, *, k: int, n: int, group_size: int, bias=None, residual=None) -> jax.Array:
    """y [..., N] = x [..., K] @ W (+ bias [N] + residual [..., N]), fp32 accumulation, in x's dtype."""
    w = dequantize(qweight, scale, zero_point, k=k, n=n, group_size=group_size, dtype=x.dtype)
    y = jnp.dot(x, w, preferred_element_type=jnp.float32)
    return epilogue(y, bias, residual, x.dtype)


def epilogue(y, bias, residual, dtype) -> jax.Array:
    """Adds bias [N] and residual [..., N] (either may be None) to the fp32 product y [..., N] and casts to `dtype`."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(dtype)


def matmul_transposed(dy, qweight, scale, zero_point, *, k: int, n: int, group_size: int) -> jax.Array:
    """dx [..., K] = dy [..., N] @ W^T, fp32 accumulation, in dy's dtype: the backward pass of `matmul`."""
    w = dequantize(qweight, scale, zero_point, k=k, n=n, group_size=group_size, dtype=dy.dtype)
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(dy.dtype)


def swiglu(h) -> jax.Array:
    """[..., 2 F] (gate then up) -> silu(gate) * up [..., F], in fp32, cast to h's dtype (Shazeer, 2020)."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(h.dtype)
