"""y = x @ W for 4-bit W: the one place that decides how it is computed, with its backward and its vmap rule.

What the shapes allow is decided in Python while tracing; which platform runs it by `jax.lax.platform_dependent`, while
lowering: CUDA takes the Triton kernels, a CPU the compiled ones (`cpu`), everything else the reference. Importing this
file imports no triton.

`jax.custom_vjp` is outermost, around `jax.custom_batching.custom_vmap`: a batch of x over one weight (all clients of a
device) folds into M, so that the packed weight is read once. The residuals of the backward pass are the packed arrays
alone; weights are frozen and get no cotangent. The backward product is linear too, so a second reverse pass works;
forward mode (jvp) does not, and custom_vjp's error says so.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import warnings

import jax
import jax.numpy as jnp

from kernels.w4a16 import batching, configs, layout, reference
from kernels.w4a16.cpu import product as cpu

IMPLEMENTATIONS = (None, "triton", "xla")
FLOAT_TYPES = (jnp.float16, jnp.bfloat16)
ACTIVATION_BITS = (16, 8)
MIN_COMPUTE_CAPABILITY = 8.0  # sm_80: what bf16 pairs and asynchronous copies need, and the least that is compiled for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static part of a product: W's shape [k, n], the rows of K per group, who computes it, how a CPU rounds x."""

    k: int
    n: int
    group_size: int
    implementation: str | None = None
    activation_bits: int = 16


def unsupported_reason(*, k: int, n: int, group_size: int, x_dtype, scale_dtype, zero_dtype=jnp.int32) -> str | None:
    """Why the Triton kernels cannot serve this product, in one line; None where they can."""
    if jnp.issubdtype(zero_dtype, jnp.floating):
        return f"zero_point must be packed integers for the Triton kernels, got {jnp.dtype(zero_dtype).name} minima"
    if jnp.dtype(x_dtype) not in [jnp.dtype(d) for d in FLOAT_TYPES]:
        return f"x must be float16 or bfloat16 for the Triton kernels, got {jnp.dtype(x_dtype).name}"
    if jnp.dtype(scale_dtype) not in [jnp.dtype(d) for d in (*FLOAT_TYPES, jnp.float32)]:
        return f"scale must be float16, bfloat16 or float32 for the Triton kernels, got {jnp.dtype(scale_dtype).name}"
    one_group = group_size >= k
    if not one_group and group_size % layout.SUPERBLOCK and group_size not in (layout.SLICE, 2 * layout.SLICE):
        allowed = f"32, 64, a multiple of 128 or at least k={k}"
        return f"group_size must be {allowed} for the Triton kernels, got {group_size}"
    kp, np_ = layout.padded_shape(k, n)
    if kp * np_ >= 2**31:
        return f"k * n must be under 2^31 for the Triton kernels (32-bit offsets), got {k} * {n}"
    return None


def supported(*, k: int, n: int, group_size: int, x_dtype, scale_dtype, zero_dtype=jnp.int32) -> bool:
    """True where implementation="triton" can serve this product on CUDA."""
    dtypes = dict(x_dtype=x_dtype, scale_dtype=scale_dtype, zero_dtype=zero_dtype)
    return unsupported_reason(k=k, n=n, group_size=group_size, **dtypes) is None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"w4a16: falling back to the reference: {reason}", RuntimeWarning, stacklevel=2)


@functools.cache
def _cuda_installed() -> bool:
    """Whether this jax can lower for CUDA. `platform_dependent` traces every branch, and tracing imports jax_triton."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@functools.cache
def _too_old() -> str | None:
    """Why this process's GPU cannot run the kernels, in one line; None where it can, or where there is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None or float(capability) >= MIN_COMPUTE_CAPABILITY:
        return None
    return f"the Triton kernels need compute capability {MIN_COMPUTE_CAPABILITY}, this GPU has {capability}"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_launch() -> bool:
    """Whether Triton kernels can be lowered here for CUDA and, where there is a GPU, run on it."""
    return interpreting() or (_cuda_installed() and _too_old() is None)


def _takes_triton(spec: Spec, x, scale, zero_point) -> bool:
    """Whether CUDA gets the Triton kernels. Raises NotImplementedError where they were asked for and cannot serve."""
    if spec.implementation == "xla" or _rows(x) == 0:
        return False
    dtypes = dict(x_dtype=x.dtype, scale_dtype=scale.dtype, zero_dtype=zero_point.dtype)
    reason = unsupported_reason(**_shape(spec), **dtypes) or _too_old()
    if reason is None:
        if interpreting() or _cuda_installed():
            return True
        reason = "the Triton kernels need a jax with CUDA (pip install jax[cuda13]), this one has none"
        if spec.implementation is None:
            return False  # the reference is this platform's implementation, not a fallback
    if spec.implementation == "triton":
        raise NotImplementedError(f"w4a16: {reason}")
    if jax.default_backend() == "gpu":
        _warn_once(reason)
    return False


def takes_cpu(spec: Spec, x) -> bool:
    """Whether a CPU gets the compiled kernels. They are built only where the CPU is what this process computes on."""
    if spec.implementation is not None or _rows(x) == 0 or x.dtype not in (*FLOAT_TYPES, jnp.float32):
        return False
    return jax.default_backend() == "cpu" and cpu.available()


def _dispatch(spec: Spec, by_triton, by_cpu, by_reference, *args):
    """by_triton on CUDA (or in Triton's interpreter, TRITON_INTERPRET=1), by_cpu on a CPU, by_reference elsewhere.

    args are x, anything, qweight, scale and zero_point.
    """
    takes_triton = _takes_triton(spec, args[0], *args[-2:])
    if takes_triton and interpreting():
        return by_triton(*args)
    if spec.implementation == "triton" and takes_triton:
        return jax.lax.platform_dependent(*args, cuda=by_triton)
    branches = {"cuda": by_triton} if takes_triton else {}
    if takes_cpu(spec, args[0]):
        branches["cpu"] = by_cpu
    return jax.lax.platform_dependent(*args, **branches, default=by_reference) if branches else by_reference(*args)


def _rows(x) -> int:
    return math.prod(x.shape[:-1])


def _shape(spec: Spec) -> dict[str, int]:
    return {"k": spec.k, "n": spec.n, "group_size": spec.group_size}


def _forward_impl(spec: Spec, x, bias, residual, qweight, scale, zero_point):
    """x [..., K] -> [..., N]; bias [N] or None, residual [..., N] or None."""

    def by_reference(x, bias, residual, *weight):
        return reference.matmul(x, *weight, **_shape(spec), bias=bias, residual=residual)

    def by_cpu(x, bias, residual, *weight):
        bits = spec.activation_bits
        return cpu.matmul(x, *weight, **_shape(spec), activation_bits=bits, bias=bias, residual=residual)

    def by_triton(x, bias, residual, qweight, scale, zero_point):
        from kernels.w4a16 import gpu

        rows = None if residual is None else residual.reshape(-1, spec.n)
        y = gpu.matmul(x.reshape(-1, spec.k), bias, rows, qweight, scale, zero_point, **_shape(spec))
        return y.reshape(*x.shape[:-1], spec.n)

    return _dispatch(spec, by_triton, by_cpu, by_reference, x, bias, residual, qweight, scale, zero_point)


def _backward_impl(spec: Spec, dy, qweight, scale, zero_point):
    """dy [..., N] -> dx [..., K] = dy @ W^T."""

    def by_reference(dy, *weight):
        return reference.matmul_transposed(dy, *weight, **_shape(spec))

    def by_cpu(dy, *weight):
        return cpu.matmul_transposed(dy, *weight, **_shape(spec))

    def by_triton(dy, qweight, scale, zero_point):
        from kernels.w4a16 import gpu

        dx = gpu.matmul_transposed(dy.reshape(-1, spec.n), qweight, scale, zero_point, **_shape(spec))
        return dx.reshape(*dy.shape[:-1], spec.k)

    return _dispatch(spec, by_triton, by_cpu, by_reference, dy, qweight, scale, zero_point)


def _swiglu_impl(spec: Spec, x, qweight, scale, zero_point):
    """x [..., K] -> silu(x @ W[:, :N/2]) * (x @ W[:, N/2:]) [..., N/2], for small M."""

    def by_reference(x, *weight):
        return reference.swiglu(reference.matmul(x, *weight, **_shape(spec)))

    def by_cpu(x, *weight):
        return reference.swiglu(cpu.matmul(x, *weight, **_shape(spec), activation_bits=spec.activation_bits))

    def by_triton(x, qweight, scale, zero_point):
        from kernels.w4a16 import gpu

        y = gpu.matmul_swiglu(x.reshape(-1, spec.k), qweight, scale, zero_point, **_shape(spec))
        return y.reshape(*x.shape[:-1], spec.n // 2)

    return _dispatch(spec, by_triton, by_cpu, by_reference, x, qweight, scale, zero_point)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(spec, x, bias, residual, qweight, scale, zero_point):
    impl = batching.fold_epilogue(functools.partial(_forward_impl, spec))
    return impl(x, bias, residual, qweight, scale, zero_point)


def _matmul_fwd(spec, x, bias, residual, qweight, scale, zero_point):
    dtypes = jax.tree.map(lambda a: jnp.zeros((), a.dtype), (bias, residual))
    y = _matmul(spec, x, bias, residual, qweight, scale, zero_point)
    return y, (dtypes, qweight, scale, zero_point)


def _matmul_bwd(spec, residuals, dy):
    (bias, residual), qweight, scale, zero_point = residuals
    dx = _matmul_transposed(spec, dy, qweight, scale, zero_point)
    dbias = None
    if bias is not None:
        dbias = dy.astype(jnp.float32).reshape(-1, spec.n).sum(axis=0).astype(bias.dtype)
    dresidual = None if residual is None else dy.astype(residual.dtype)
    return dx, dbias, dresidual, None, None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_transposed(spec, dy, qweight, scale, zero_point):
    return batching.fold(functools.partial(_backward_impl, spec))(dy, qweight, scale, zero_point)


def _matmul_transposed_fwd(spec, dy, qweight, scale, zero_point):
    return _matmul_transposed(spec, dy, qweight, scale, zero_point), (qweight, scale, zero_point)


def _matmul_transposed_bwd(spec, residuals, ddx):
    return _matmul(spec, ddx, None, None, *residuals), None, None, None


_matmul_transposed.defvjp(_matmul_transposed_fwd, _matmul_transposed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_swiglu(spec, x, qweight, scale, zero_point):
    return batching.fold(functools.partial(_swiglu_impl, spec))(x, qweight, scale, zero_point)


def _matmul_swiglu_fwd(spec, x, qweight, scale, zero_point):
    return _matmul_swiglu(spec, x, qweight, scale, zero_point), (x, qweight, scale, zero_point)


def _matmul_swiglu_bwd(spec, residuals, dy):
    x, *weights = residuals
    h = _matmul(spec, x, None, None, *weights)  # recomputed: the fused kernel keeps no pre-activations
    (dh,) = jax.vjp(reference.swiglu, h)[1](dy)
    return _matmul_transposed(spec, dh, *weights), None, None, None


_matmul_swiglu.defvjp(_matmul_swiglu_fwd, _matmul_swiglu_bwd)


def _spec(x, qweight, scale, zero_point, k, n, group_size, implementation, activation_bits) -> Spec:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"w4a16: implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"w4a16: activation_bits must be one of {ACTIVATION_BITS}, got {activation_bits!r}")
    layout.check(qweight, scale, zero_point, k=k, n=n, group_size=group_size)
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"w4a16: x has shape {tuple(x.shape)}, expected [..., {k}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"w4a16: x has dtype {x.dtype}, expected a float type")
    return Spec(k=k, n=n, group_size=group_size, implementation=implementation, activation_bits=activation_bits)


def matmul(
    x,
    qweight,
    scale,
    zero_point,
    *,
    k: int,
    n: int,
    group_size: int,
    implementation=None,
    activation_bits: int = 16,
    bias=None,
    residual=None,
) -> jax.Array:
    """x @ W (+ bias + residual), W = (q - z) * s packed by `layout.pack`; differentiable in x, bias and residual.

    Args:
      x: [..., K] float16, bfloat16 or float32 (the Triton kernels take the first two; on a GPU float32 runs the
        reference).
      qweight: int32 [Kp/4, Np/2]; scale: float [G, Np]; zero_point: int32 [ceil(G/2), Np/4], or float minima [G, Np]
        (W = q * s + m; the Triton kernels refuse them).
      k, n, group_size: W's shape and the rows of K per group (K for one group).
      implementation: None (kernels on CUDA and on a CPU where they can serve, else the reference), "triton" or "xla".
      activation_bits: 16 or 8, to which a CPU's kernel rounds x (`cpu.product`); no other uses it.
      bias: [N] or None. residual: [..., N] or None, added after the bias, in fp32.

    Returns:
      [..., N] in x's dtype, accumulated in fp32.

    Raises:
      ValueError: arrays of another shape or dtype than stated.
      NotImplementedError: implementation="triton" cannot serve this product (the message says why).
    """
    spec = _spec(x, qweight, scale, zero_point, k, n, group_size, implementation, activation_bits)
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"w4a16: bias has shape {tuple(bias.shape)}, expected {(n,)}")
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], n):
        raise ValueError(f"w4a16: residual has shape {tuple(residual.shape)}, expected {(*x.shape[:-1], n)}")
    return _matmul(spec, x, bias, residual, qweight, scale, zero_point)


def runs_layers() -> bool:
    """Whether `matmul_layer` can serve: a CPU computes, has the compiled kernels, and nothing is lowered for CUDA."""
    return not can_launch() and jax.default_backend() == "cpu" and cpu.available()


def matmul_layer(x, layer, weights, *, k: int, n: int, group_size: int, activation_bits: int = 16) -> jax.Array:
    """x @ W with the weight of one layer: layer int32 [], weights (qweight, scale, zero_point) of each.

    For a loop over layers, which so takes no copy of a weight. Not differentiable; for a CPU alone (`runs_layers`).
    """

    def impl(x, layer, *arrays):
        arrays = [arrays[i : i + 3] for i in range(0, len(arrays), 3)]
        return cpu.matmul_layer(x, layer, arrays, k=k, n=n, group_size=group_size, activation_bits=activation_bits)

    return batching.fold(impl)(x, layer, *(array for weight in weights for array in weight))


def attend_layer(q, layer, positions, keys, values) -> jax.Array:
    """Attention of one token a row in one layer of a cache of all layers (`cpu.product.attend`), where `runs_layers`.

    Under vmap a batch of caches is more rows.
    """
    fn = jax.custom_batching.custom_vmap(cpu.attend)

    @fn.def_vmap
    def rule(axis_size, in_batched, q, layer, *arrays):
        batched = in_batched[0], *in_batched[2:]
        assert not in_batched[1]  # one loop over layers runs for all of the batch
        arrays = [a if b else jnp.broadcast_to(a, (axis_size, *a.shape)) for a, b in zip((q, *arrays), batched)]
        q, *arrays = (a.reshape(-1, *a.shape[2:]) for a in arrays)
        return attend_layer(q, layer, *arrays).reshape(axis_size, -1, *q.shape[1:]), True

    return fn(q, layer, positions, keys, values)


def matmul_swiglu(
    x,
    qweight,
    scale,
    zero_point,
    *,
    k: int,
    n: int,
    group_size: int,
    implementation=None,
    activation_bits: int = 16,
) -> jax.Array:
    """silu(x @ gate) * (x @ up) for one packed weight [K, N] = gate | up (`layout.concatenate`); differentiable in x.

    Where M is a decode step's (at most `configs.DECODE_ROWS`) the activation is fused into the kernel and the backward
    pass recomputes the product; above, it is `matmul` and XLA's elementwise operations.

    Args and raises as for `matmul`; n is the width of both parts together, so it must be even.

    Returns:
      [..., N / 2] in x's dtype.
    """
    if n % 2:
        raise ValueError(f"w4a16: matmul_swiglu needs an even n (gate and up side by side), got n={n}")
    spec = _spec(x, qweight, scale, zero_point, k, n, group_size, implementation, activation_bits)
    if _rows(x) > configs.DECODE_ROWS:
        return reference.swiglu(_matmul(spec, x, None, None, qweight, scale, zero_point))
    return _matmul_swiglu(spec, x, qweight, scale, zero_point)
