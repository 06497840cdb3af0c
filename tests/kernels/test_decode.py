"""The decode step's kernels compile for sm_80 and sm_90 without spills; whether they serve; and under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.decode import api, gpu, reference, unfinished
from kernels.w4a16 import layout, predict, sass

pytestmark = pytest.mark.usefixtures("kept_listings")

CAPABILITIES = (80, 90)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_norm_compiles(capability):
    arrays = shape(8, 1, 4096, dtype=jnp.float32), shape(1, 4096), shape(4096, dtype=jnp.float32)
    (launched,) = sass.launches(lambda *a: gpu.add_norm(*a, eps=1e-5, num_zeros=0), *arrays)
    binary = sass.build(launched, capability)
    assert binary.stack == 0 and ".128" in binary.sass


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows, k", [(1, 4096), (16, 11008)])
def test_residual_compiles(rows, k, capability):
    """7B's o and down: one launch with residual and norm, no slower in its loop than the product alone."""
    packed = layout.packed_shapes(k, 4096, 128)
    weight = shape(*packed["qweight"], dtype=jnp.int32), shape(*packed["scale"], dtype=jnp.float16)
    weight = *weight, shape(*packed["zero_point"], dtype=jnp.int32)
    arrays = shape(rows, k), shape(rows, 4096), shape(4096, dtype=jnp.float32), shape(64, dtype=jnp.int32), *weight
    static = {"eps": 1e-5, "first_zero": 32, "num_zeros": 86, "k": k, "n": 4096, "group_size": 128}
    (launched,) = sass.launches(lambda *a: gpu.matmul_norm(*a, **static), *arrays)
    kernel = predict.read(launched, capability)
    assert kernel.stack == 0
    assert kernel.per_weight <= (1.42 if rows <= 8 else 1.98) and kernel.waits <= 3


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "batch, heads, kv_heads, head_dim, slots, parts",
    [(1, 32, 32, 128, 2048, 8), (64, 32, 32, 128, 2048, 1), (1, 32, 8, 128, 8192, 32), (1, 9, 3, 64, 200, 1)],
)
def test_attention_compiles(batch, heads, kv_heads, head_dim, slots, parts, capability):
    """LLaMA-7B alone and in a batch, LLaMA-3-8B, SmolLM2-135M: one launch, whose last program merges split keys."""
    qkv = shape(4, batch, (heads + 2 * kv_heads) * head_dim, dtype=jnp.float32)
    zeros, positions = shape(batch * kv_heads, dtype=jnp.int32), shape(batch, dtype=jnp.int32)
    delta = shape(*qkv.shape[1:]) if batch == 1 else None
    table = shape(batch, head_dim // 2, dtype=jnp.float32)
    cache = shape(batch, kv_heads, slots, head_dim)
    launched = sass.launches(gpu.attend, qkv, zeros, delta, table, table, cache, cache, positions)
    (one,) = launched
    assert one.constants["PARTS"] == parts
    binary = sass.build(one, capability)
    assert binary.stack == 0
    assert binary.shared <= 99 * 1024  # two programs an SM on sm_80 and more on sm_90
    assert "HMMA" in binary.sass and ("ATOM" in binary.sass) == (parts > 1)


def test_parts_of_the_keys():
    """Enough programs for the SMs, and never parts of a few slots."""
    for programs in (1, 8, 32, 256, 2048):
        for slots in (16, 256, 2048, 32768):
            parts = gpu.num_parts(programs, slots)
            assert parts == 1 or (programs * parts <= gpu.PROGRAMS and slots / parts >= gpu.SLOTS_OF_A_PART)
    assert gpu.num_parts(32, 2048) == 8


def test_serves(monkeypatch):
    good = dict(rows=1, dtype=jnp.bfloat16, scale_dtype=jnp.float16, zero_dtype=jnp.int32, k=256, n=64, group_size=128)
    monkeypatch.setattr("kernels.w4a16.api.can_launch", lambda: True)
    assert api.serves(**good, head_dim=64)
    for bad in ({"rows": 257}, {"rows": 0}, {"dtype": jnp.float32}, {"zero_dtype": jnp.float16}, {"head_dim": 48}):
        assert not api.serves(**good | bad)
    monkeypatch.setattr("kernels.w4a16.api.can_launch", lambda: False)
    assert not api.serves(**good)


def test_other_platforms_and_vmap_run_the_definition():
    """What is not CUDA computes `otherwise`, and so does a batch, which folds in its own way."""
    x = jnp.arange(6, dtype=jnp.float32).reshape(3, 2)

    def by_triton(x, w):
        return x @ w, x

    otherwise = lambda x, w: (x @ w + 1, x)
    run = lambda x, w: api._choose(by_triton, otherwise, x, w)
    np.testing.assert_array_equal(jax.jit(run)(x, jnp.eye(2))[0], x + 1)
    batched = jax.jit(jax.vmap(run, in_axes=(0, None)))(x, jnp.eye(2))
    np.testing.assert_array_equal(batched[0], x + 1)


def test_an_unfinished_norm_is_rmsnorm():
    """From the squares of tiles of columns; one that is finished stays what it is, bit for bit."""
    rng = np.random.default_rng(0)
    h, weight = rng.standard_normal((3, 300), np.float32) * 7, rng.standard_normal(300, np.float32)
    squares = np.stack([np.sum(tile**2, axis=1) for tile in np.split(h, [256], axis=1)], axis=1)  # [M, tiles]
    found = unfinished.finish(unfinished.Unfinished(jnp.asarray(h * weight), jnp.asarray(squares)), 1e-5)
    np.testing.assert_allclose(found, reference.norm(jnp.asarray(h), weight, 1e-5), rtol=1e-5)
    x = jnp.asarray(h, jnp.bfloat16)
    norm = unfinished.finished(x, 1e-5)
    assert norm.squares.shape == squares.shape
    np.testing.assert_array_equal(unfinished.finish(norm, 1e-5), x)


def test_the_reference_against_a_loop():
    """Grouped queries, positions at both ends of the cache."""
    b, n, k, h, slots = 3, 4, 2, 16, 10
    rng = np.random.default_rng(0)
    qkv, keys, values = (rng.standard_normal(s, np.float32) for s in ((b, (n + 2 * k) * h), *2 * [(b, k, slots, h)]))
    angles, positions = rng.uniform(0, 6, (b, h // 2)).astype(np.float32), np.array([0, 4, 9], np.int32)
    out, new_keys, new_values = jax.jit(reference.attend)(
        qkv, np.cos(angles), np.sin(angles), keys, values, jnp.asarray(positions)
    )
    heads = qkv.reshape(b, -1, h)
    as_complex = heads[:, : n + k, : h // 2] + 1j * heads[:, : n + k, h // 2 :]
    turned = as_complex * np.exp(1j * angles)[:, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    for row, position in enumerate(positions):
        keys[row, :, position], values[row, :, position] = turned[row, n:], heads[row, n + k :]
        for head in range(n):
            seen = slice(0, position + 1)
            scores = np.exp(keys[row, head // 2, seen] @ turned[row, head] / np.sqrt(h))
            expected = scores @ values[row, head // 2, seen] / scores.sum()
            np.testing.assert_allclose(out[row, head * h : (head + 1) * h], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new_keys, keys, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(new_values, values)


def test_bench_checks_the_step():
    """The check that a GPU begins with runs through, here on what stands in for the kernels."""
    from kernels.w4a16 import bench

    errors = bench.check_decode(2, 4, 2, 32, 40, jnp.float32)
    assert set(errors) == {"out", "k", "v", "h", "norm", "swiglu"} and max(errors.values()) == 0
