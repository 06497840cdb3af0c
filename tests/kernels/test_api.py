"""The public op on the CPU: values, gradients, transforms, sharding, dispatch and bad input."""

import functools
import importlib.util
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.w4a16 import api, layout, lora, reference

K, N, GROUP = 172, 40, 128
STATIC = {"k": K, "n": N, "group_size": GROUP}


def make(k=K, n=N, group_size=GROUP):
    """(packed arrays on the device, W fp32 [k, n])."""
    rng = np.random.default_rng(0)
    groups = layout.num_groups(k, group_size)
    q = rng.integers(0, 16, (k, n)).astype(np.uint8)
    zero = rng.integers(0, 16, (groups, n)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    row = np.arange(k) // group_size
    w = (q.astype(np.float32) - zero[row]) * scale[row].astype(np.float32)
    return tuple(map(jnp.asarray, layout.pack(q, zero, scale, group_size=group_size))), w


def normal(*shape, seed=1, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def close(actual, expected, tolerance=5e-5):
    """The default is what the CPU kernel's rounding of x to 16 bits allows (2e-5)."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 5e-5), (jnp.bfloat16, 1e-2), (jnp.float16, 1e-3)])
def test_value_gradient_and_dtypes(dtype, tolerance):
    packed, w = make()
    x, bias, residual = normal(2, 3, K, dtype=dtype), normal(N, seed=2), normal(2, 3, N, seed=3)
    cotangent = normal(2, 3, N, seed=4, dtype=dtype)

    def op(x, bias, residual):
        return api.matmul(x, *packed, **STATIC, bias=bias, residual=residual)

    y, vjp = jax.vjp(op, x, bias, residual)
    dx, dbias, dresidual = vjp(cotangent)
    assert (y.dtype, dx.dtype, dbias.dtype, dresidual.dtype) == (dtype, dtype, jnp.float32, jnp.float32)
    wide = np.asarray(x, np.float32) @ w
    close(y, wide + np.asarray(bias)[None, None, :] + np.asarray(residual), tolerance)
    close(dx, np.asarray(cotangent, np.float32) @ w.T, tolerance)
    close(dbias, np.asarray(cotangent, np.float32).sum((0, 1)))
    close(dresidual, np.asarray(cotangent, np.float32))


def test_backward_keeps_only_packed_weights():
    """7 GB became 18 GB in another project that kept the dequantized weight."""
    packed, _ = make()
    _, vjp = jax.vjp(lambda x: api.matmul(x, *packed, **STATIC), normal(5, K))
    kept = [a for a in jax.tree.leaves(vjp) if hasattr(a, "size") and a.size > 1]
    assert kept and sum(a.size * a.dtype.itemsize for a in kept) <= sum(a.size * a.dtype.itemsize for a in packed)


def loss(x, packed, bias=None):
    return jnp.sum(api.matmul(x, *packed, **STATIC, bias=bias) ** 2)


def plain_loss(x, w, bias=None):
    return jnp.sum((x @ w + (0.0 if bias is None else bias[None, :])) ** 2)


def test_vmap_folds_clients_into_one_product():
    packed, w = make()
    x = normal(4, 3, K)
    fold = jax.vmap(jax.vmap(lambda x: api.matmul(x, *packed, **STATIC)))
    products = [e for e in jax.make_jaxpr(fold)(x[:, :, None]).pretty_print().split() if "dot_general" in e]
    assert len(products) <= 2  # one per branch of the dispatch
    close(fold(x[:, :, None])[:, :, 0], np.asarray(x) @ w)
    close(jax.vmap(jax.grad(loss), (0, None))(x, packed), jax.vmap(jax.grad(plain_loss), (0, None))(x, jnp.asarray(w)))


def test_vmap_over_bias_residual_and_weights():
    packed, w = make()
    x, bias, residual = normal(4, 3, K), normal(4, N, seed=2), normal(4, 3, N, seed=3)
    op = functools.partial(api.matmul, **STATIC)
    y = jax.vmap(lambda x, b, r: op(x, *packed, bias=b, residual=r))(x, bias, residual)
    close(y, np.asarray(x) @ w + np.asarray(bias)[:, None] + np.asarray(residual))
    y = jax.vmap(lambda r: op(x[0], *packed, residual=r))(residual)
    close(y, (np.asarray(x[0]) @ w)[None] + np.asarray(residual))
    stacked = jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a)]), packed)
    y = jax.vmap(lambda x, p: op(x, *p))(x[:2], stacked)
    close(y, np.stack([np.asarray(x[0]) @ w, np.zeros((3, N), np.float32)]))


def test_second_reverse_pass():
    packed, w = make()
    x, v = normal(3, K), normal(3, K, seed=2)
    hessian_vector = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x, packed), v))(x)
    close(hessian_vector, 2 * np.asarray(v) @ w @ w.T)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: loss(x, packed), (x,), (v,))


def test_inside_remat_map_and_pmap():
    packed, w = make()
    x = normal(4, 3, K)
    expected = jax.vmap(jax.grad(plain_loss), (0, None))(x, jnp.asarray(w))
    gradient = jax.grad(jax.checkpoint(loss))
    close(jax.jit(lambda x: jax.lax.map(lambda x: gradient(x, packed), x))(x), expected)
    close(jax.lax.map(lambda x: gradient(x, packed), x, batch_size=2), expected)
    close(jax.pmap(lambda x: gradient(x, packed))(x), expected)


def test_sharded_over_n_and_over_k():
    """A column-parallel and a row-parallel product on 4 devices; K = 704 / 4 = 176 cuts groups of 128."""
    packed, w = make(704, 64)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(5, 704)

    def run(body, arrays, x_spec, out_spec):
        specs = (x_spec, *(P("model") for _ in arrays))
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False))(x, *arrays)

    by_n = layout.shard_n(*packed, k=704, n=64, group_size=128, parts=4)

    def column_parallel(x, *p):
        return api.matmul(x, *(a[0] for a in p), k=704, n=16, group_size=128)

    close(run(column_parallel, by_n, P(), P(None, "model")), np.asarray(x) @ w)
    by_k, size = layout.shard_k(*packed, k=704, n=64, group_size=128, parts=4)

    def row_parallel(x, *p):
        return jax.lax.psum(api.matmul(x, *(a[0] for a in p), k=176, n=64, group_size=size), "model")

    close(run(row_parallel, by_k, P(None, "model"), P()), np.asarray(x) @ w)


@pytest.mark.parametrize("rows", [3, 40])
def test_swiglu(rows):
    """Below and above the fused kernel's number of rows."""
    packed, w = make()
    x, cotangent = normal(rows, K) / 8, normal(rows, N // 2, seed=2)

    def plain(x):
        gate, up = jnp.split(x @ jnp.asarray(w), 2, axis=1)
        return jax.nn.silu(gate) * up

    y, vjp = jax.vjp(lambda x: api.matmul_swiglu(x, *packed, **STATIC), x)
    expected, plain_vjp = jax.vjp(plain, x)
    close(y, expected)
    close(vjp(cotangent)[0], plain_vjp(cotangent)[0], 2e-4)  # of many rows 6e-5, where AVX-512 rounds dy too


def test_lora_of_a_batch_of_clients():
    packed, w = make()
    x, a, b, scale = normal(3, 2, K), normal(2, K, 4, seed=2), normal(2, 4, N, seed=3), normal(2, seed=4)
    adapter = jnp.asarray([1, 0, 1])

    def op(x, a, b):
        return lora.matmul(x, *packed, a, b, scale, adapter, **STATIC)

    y, vjp = jax.vjp(op, x, a, b)
    dense = [w + float(scale[i]) * np.asarray(a[i] @ b[i]) for i in (1, 0, 1)]
    close(y, np.stack([np.asarray(x[c]) @ dense[c] for c in range(3)]))
    cotangent = normal(3, 2, N, seed=5)
    dx, da, _ = vjp(cotangent)
    close(dx, np.stack([np.asarray(cotangent[c]) @ dense[c].T for c in range(3)]))
    close(da[0], float(scale[0]) * np.asarray(x[1]).T @ np.asarray(cotangent[1]) @ np.asarray(b[0]).T)
    with pytest.raises(ValueError, match="2 adapters for 3 clients"):
        lora.matmul(x, *packed, a, b, scale, **STATIC)


def test_bad_input():
    packed, _ = make()
    half = normal(2, K, dtype=jnp.float16)
    op = functools.partial(api.matmul, half, *packed)
    with pytest.raises(ValueError, match="implementation must be one of"):
        op(**STATIC, implementation="cuda")
    with pytest.raises(ValueError, match="qweight has shape"):
        op(k=K + 256, n=N, group_size=GROUP)
    with pytest.raises(ValueError, match=rf"x has shape \(2, 100\), expected \[..., {K}\]"):
        api.matmul(half[:, :100], *packed, **STATIC)
    with pytest.raises(ValueError, match="x has dtype int32"):
        api.matmul(half.astype(jnp.int32), *packed, **STATIC)
    with pytest.raises(ValueError, match="bias has shape"):
        op(**STATIC, bias=normal(N + 1))
    with pytest.raises(ValueError, match="residual has shape"):
        op(**STATIC, residual=normal(N))
    with pytest.raises(ValueError, match="even n"):
        odd, _ = make(n=N + 1)
        api.matmul_swiglu(half, *odd, k=K, n=N + 1, group_size=GROUP)


def test_triton_that_cannot_serve_says_why():
    packed, _ = make()
    with pytest.raises(NotImplementedError, match="float16 or bfloat16 .* got float32"):
        api.matmul(normal(2, K), *packed, **STATIC, implementation="triton")
    odd, _ = make(group_size=48)
    with pytest.raises(NotImplementedError, match="group_size must be 32, 64, a multiple of 128 .* got 48"):
        api.matmul(normal(2, K, dtype=jnp.float16), *odd, k=K, n=N, group_size=48, implementation="triton")
    with pytest.raises(NotImplementedError, match="CUDA|platform"):  # nothing is swapped in silently on a CPU
        jax.jit(lambda x: api.matmul(x, *packed, **STATIC, implementation="triton"))(normal(2, K, dtype=jnp.float16))
    reason = api.unsupported_reason(k=65536, n=65536, group_size=128, x_dtype=jnp.float16, scale_dtype=jnp.float16)
    assert "2^31" in reason
    assert api.supported(k=2752, n=4096, group_size=64, x_dtype=jnp.bfloat16, scale_dtype=jnp.float16)


def test_falls_back_once_aloud_on_a_gpu_and_silently_elsewhere(monkeypatch):
    odd, w = make(group_size=48)
    x = normal(2, K, dtype=jnp.float16)
    run = functools.partial(api.matmul, x, *odd, k=K, n=N, group_size=48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(run(), np.asarray(x, np.float32) @ w, 1e-3)
    api._warn_once.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(RuntimeWarning, match="falling back to the reference: group_size"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_no_triton_off_cuda():
    """The CPU path neither imports triton nor jax_triton, and CPU and TPU programs contain no call to them."""
    code = (
        "import importlib.util, sys, jax, jax.numpy as jnp, kernels.w4a16.lora\n"
        "find = importlib.util.find_spec\n"  # as on a machine without jax's CUDA plugin, which the tests may have
        "importlib.util.find_spec = lambda name, *a: None if 'cuda' in name else find(name, *a)\n"
        "from kernels.w4a16 import api\n"
        "z = jnp.zeros; p = (z((64, 16), jnp.int32), z((2, 32), jnp.float16), z((1, 8), jnp.int32))\n"
        "f = lambda x, implementation: api.matmul(x, *p, k=256, n=32, group_size=128, implementation=implementation)\n"
        "for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):\n"
        "    jax.jit(f, static_argnums=1)(z((3, 256), dtype), None)\n"
        "assert not {'triton', 'jax_triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin and -pjrt")
@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_lowers_for_cuda_with_the_kernels_in_it(monkeypatch, rows):
    from kernels.w4a16 import launch

    monkeypatch.setattr(launch, "call", functools.partial(launch.call, compute_capability=90))
    packed, _ = make(256, 64)
    static = {"k": 256, "n": 64, "group_size": 128}

    def step(x):
        y, vjp = jax.vjp(lambda x: api.matmul(x, *packed, **static), x)
        return api.matmul_swiglu(x, *packed, **static), vjp(y)

    traced = jax.jit(jax.vmap(step)).trace(jax.ShapeDtypeStruct((1, rows, 256), jnp.bfloat16))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call") == 3
    for platform in ("cpu", "tpu"):
        assert "triton" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_reference_of_symmetric_weights():
    """Zero point 8 everywhere is the symmetric form: W = s * (q - 8)."""
    q = np.arange(16, dtype=np.uint8).reshape(16, 1).repeat(16, axis=1)
    packed = layout.pack(q, np.full((1, 16), 8, np.uint8), np.full((1, 16), 0.5, np.float16), group_size=16)
    w = reference.dequantize(*packed, k=16, n=16, group_size=16, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(w[:, 3], np.float32), (np.arange(16) - 8) / 2)
