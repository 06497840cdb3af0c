"""y = x @ W for W in 8 bits, kept as two 4-bit weights: x @ W = [x, x] @ halves.

W[k, n] = q[k, n] * scale[k // group_size, n] with q = 16 high + low - 128; halves [2 K, N] has 16 (high - 8) above low.
So all of `api.matmul` computes with it. A CPU whose kernels multiply 8 bits themselves (x86-64) does half of that
work, for many rows.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.w4a16 import api, batching, layout
from kernels.w4a16.cpu import product as cpu

MIN_ROWS = 16  # from which on 8 bits at once are faster


def matmul(x, qweight, scale, zero_point, *, k: int, n: int, group_size: int, activation_bits: int = 16) -> jax.Array:
    """x [..., K] @ W -> [..., N] in x's dtype; differentiable in x.

    qweight, scale, zero_point are those of the halves [2 k, n]; the rest is as for `api.matmul`.
    """
    spec = api.Spec(k=k, n=n, group_size=group_size, activation_bits=activation_bits)
    return _matmul(spec, x, qweight, scale, zero_point)


def _at_once(spec: api.Spec, x) -> bool:
    whole = spec.k % layout.SLICE == 0 and spec.group_size % layout.SLICE == 0 and spec.k % spec.group_size == 0
    many = x.size >= MIN_ROWS * x.shape[-1] and spec.activation_bits == 16
    return whole and many and api.takes_cpu(spec, x) and cpu.multiplies_bytes()


def _halves(spec: api.Spec) -> dict[str, int]:
    return {"k": 2 * spec.k, "n": spec.n, "group_size": spec.group_size, "activation_bits": spec.activation_bits}


def _forward(spec: api.Spec, x, *weight):
    doubled = lambda x, *weight: api.matmul(jnp.concatenate([x, x], axis=-1), *weight, **_halves(spec))
    if not _at_once(spec, x):
        return doubled(x, *weight)
    at_once = functools.partial(cpu.matmul, k=spec.k, n=spec.n, group_size=spec.group_size, bits=8)
    return jax.lax.platform_dependent(x, *weight, cpu=at_once, default=doubled)


def _backward(spec: api.Spec, dy, *weight):
    def doubled(dy, *weight):
        x = jnp.zeros((*dy.shape[:-1], 2 * spec.k), dy.dtype)
        (dx,) = jax.vjp(lambda x: api.matmul(x, *weight, **_halves(spec)), x)[1](dy)
        return dx[..., : spec.k] + dx[..., spec.k :]

    if not _at_once(spec, dy):
        return doubled(dy, *weight)
    at_once = functools.partial(cpu.matmul_transposed, k=spec.k, n=spec.n, group_size=spec.group_size, bits=8)
    return jax.lax.platform_dependent(dy, *weight, cpu=at_once, default=doubled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(spec, x, qweight, scale, zero_point):
    return batching.fold(functools.partial(_forward, spec))(x, qweight, scale, zero_point)


def _matmul_fwd(spec, x, *weight):
    return _matmul(spec, x, *weight), weight


def _matmul_bwd(spec, weight, dy):
    return _matmul_transposed(spec, dy, *weight), None, None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_transposed(spec, dy, qweight, scale, zero_point):
    return batching.fold(functools.partial(_backward, spec))(dy, qweight, scale, zero_point)


def _matmul_transposed_fwd(spec, dy, *weight):
    return _matmul_transposed(spec, dy, *weight), weight


def _matmul_transposed_bwd(spec, weight, ddx):
    return _matmul(spec, ddx, *weight), None, None, None


_matmul_transposed.defvjp(_matmul_transposed_fwd, _matmul_transposed_bwd)
