"""The storage layout: exact inverses, the documented nibble order, byte count, concatenation and slicing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.w4a16 import api, layout, reference, shapes

SHAPES = [(172, 37, 128), (256, 64, 64), (128, 16, 128), (300, 8, 300), (64, 24, 32), (172, 48, 17), (600, 16, 256)]


def quantized(k, n, group_size, seed=0):
    """(q uint8 [k, n], zero uint8 [G, n], scale fp16 [G, n], W fp32 [k, n])."""
    rng = np.random.default_rng(seed)
    groups = layout.num_groups(k, group_size)
    q = rng.integers(0, 16, (k, n)).astype(np.uint8)
    zero = rng.integers(0, 16, (groups, n)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    row = np.arange(k) // group_size
    return q, zero, scale, (q.astype(np.float32) - zero[row]) * scale[row].astype(np.float32)


dequantize = jax.jit(reference.dequantize, static_argnames=("k", "n", "group_size", "dtype"))


def dense(packed, k, n, group_size):
    return np.asarray(dequantize(*packed, k=k, n=n, group_size=group_size, dtype=jnp.float32))


@pytest.mark.parametrize("k, n, group_size", SHAPES)
def test_pack_and_unpack_are_exact_inverses(k, n, group_size):
    q, zero, scale, w = quantized(k, n, group_size)
    packed = layout.pack(q, zero, scale, group_size=group_size)
    assert {name: a.shape for name, a in zip(("qweight", "scale", "zero_point"), packed, strict=True)} == (
        layout.packed_shapes(k, n, group_size)
    )
    q_again, zero_again = layout.unpack(packed[0], packed[2], k=k, n=n, group_size=group_size)
    np.testing.assert_array_equal(q_again, q)
    np.testing.assert_array_equal(zero_again, zero)
    np.testing.assert_array_equal(dense(packed, k, n, group_size), w)


def test_device_arrays_are_packed_alike():
    k, n, group_size = SHAPES[0]
    arrays = quantized(k, n, group_size)[:3]
    packed = layout.pack(*arrays, group_size=group_size)
    on_device = layout.pack(*map(jnp.asarray, arrays), group_size=group_size)
    for a, b in zip(packed, on_device, strict=True):
        assert isinstance(b, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    again = layout.unpack(on_device[0], on_device[2], k=k, n=n, group_size=group_size)
    jax.tree.map(np.testing.assert_array_equal, again, arrays[:2])


@pytest.mark.parametrize("k, n, group_size", [SHAPES[i] for i in (0, 3, 5, 6)])
def test_minima(k, n, group_size):
    """A float zero_point is the minimum: W = q * s + m, packed, joined, cut and multiplied like integers."""
    q, _, scale, _ = quantized(k, n, group_size)
    minimum = np.random.default_rng(1).normal(0, 0.3, scale.shape).astype(np.float16)
    row = np.arange(k) // group_size
    w = q.astype(np.float32) * scale[row].astype(np.float32) + minimum[row].astype(np.float32)
    packed = layout.pack(q, minimum, scale, group_size=group_size)
    assert packed[2].shape == packed[1].shape and packed[2].dtype == np.float16
    np.testing.assert_array_equal(dense(packed, k, n, group_size), w)
    np.testing.assert_array_equal(layout.unpack(packed[0], packed[2], k=k, n=n, group_size=group_size)[1], minimum)
    joined = layout.concatenate([packed, packed], [n, n], k=k, group_size=group_size)
    np.testing.assert_array_equal(dense(joined, k, 2 * n, group_size), np.concatenate([w, w], axis=1))
    halves, size = layout.shard_k(*packed, k=k, n=n, group_size=group_size, parts=2)
    cut = [dense([array[i] for array in halves], k // 2, n, size) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(cut), w)
    x = np.random.default_rng(2).normal(size=(3, k)).astype(np.float32)
    static = {"k": k, "n": n, "group_size": group_size, "implementation": "xla"}

    def product_and_pullback(x):
        y, pull = jax.vjp(lambda x: api.matmul(x, *packed, **static), x)
        return y, pull(y)[0]

    y, dx = jax.jit(product_and_pullback)(x)
    np.testing.assert_allclose(y, x @ w, atol=1e-4)
    np.testing.assert_allclose(dx, np.asarray(y) @ w.T, rtol=1e-4, atol=1e-3)
    with pytest.raises(NotImplementedError, match="float16 minima"):
        api.matmul(jnp.asarray(x, jnp.float16), *packed, k=k, n=n, group_size=group_size, implementation="triton")


@pytest.mark.parametrize("minima", [False, True])
def test_columns_are_those_of_the_whole(minima):
    k, n, group_size = 172, 37, 48  # an odd number of groups, the last of them short
    q, zero, scale, _ = quantized(k, n, group_size)
    zero = scale[::-1] if minima else zero
    columns = np.random.default_rng(2).integers(0, n, 50).astype(np.int32)
    packed = layout.pack(q, zero, scale, group_size=group_size)
    found = layout.take_columns(*packed, columns, k=k, n=n, group_size=group_size)
    jax.tree.map(np.testing.assert_array_equal, found, (q[:, columns], scale[:, columns], zero[:, columns]))


def test_documented_order():
    """k = 128 b + 32 i + r sits in word 32 b + r at bits 4 i; zero points of groups 2 p, 2 p + 1 share a byte."""
    q = np.zeros((512, 32), np.uint8)
    q[128 * 3 + 32 * 2 + 5, 9] = 13  # b = 3, i = 2, r = 5; column 9 is the high half of int32 column 4
    zero = np.zeros((4, 32), np.uint8)
    zero[3, 6] = 11  # p = 1, high nibble, column 6 is byte 2 of int32 column 1
    qweight, _, zero_point = layout.pack(q, zero, np.ones((4, 32), np.float16), group_size=128)
    expected = np.zeros((128, 16), np.int32)
    expected[32 * 3 + 5, 4] = 13 << (16 + 8)
    np.testing.assert_array_equal(qweight, expected)
    expected = np.zeros((2, 8), np.uint32)
    expected[1, 1] = 11 << (16 + 4)
    np.testing.assert_array_equal(zero_point.view(np.uint32), expected)


def test_bytes_of_7b():
    """6.476 B weights of the linear layers at group 128 in at most 3.37 GB (4.156 bits a weight)."""
    total = 0
    for k, n in shapes.projections("7b").values():
        packed = layout.packed_shapes(k, n, 128)
        size = sum(4 * np.prod(packed[name]) for name in ("qweight", "zero_point")) + 2 * np.prod(packed["scale"])
        assert size == shapes.packed_bytes(k, n)
        total += 32 * size
    assert total == round(6_476_005_376 * (4 + 20 / 128) / 8) <= 3.37e9


def test_concatenate():
    parts = [quantized(172, n, 128, seed=n) for n in (37, 16, 9)]
    packed = [layout.pack(q, z, s, group_size=128) for q, z, s, _ in parts]
    joined = layout.concatenate(packed, [37, 16, 9], k=172, group_size=128)
    np.testing.assert_array_equal(dense(joined, 172, 62, 128), np.concatenate([w for *_, w in parts], axis=1))


@pytest.mark.parametrize("group_size, local_size", [(128, 64), (704, 352), (32, 32)])
def test_shards(group_size, local_size):
    """K = 704 in two parts of 352 rows: the cut falls inside a group of 128, as 11008 / 4 = 2752 does."""
    if group_size == 128:
        local_size = 32  # gcd(128, 352)
    q, zero, scale, w = quantized(704, 48, group_size)
    packed = layout.pack(q, zero, scale, group_size=group_size)
    by_k, size = layout.shard_k(*packed, k=704, n=48, group_size=group_size, parts=2)
    assert size == local_size
    pieces = [dense([a[p] for a in by_k], 352, 48, size) for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(pieces), w)
    by_n = layout.shard_n(*packed, k=704, n=48, group_size=group_size, parts=2)
    pieces = [dense([a[p] for a in by_n], 704, 24, group_size) for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), w)


def test_bad_input():
    q, zero, scale, _ = quantized(172, 37, 128)
    with pytest.raises(ValueError, match="q must hold integers 0..15"):
        layout.pack(q + np.uint8(1), zero, scale, group_size=128)
    with pytest.raises(ValueError, match="zero_point has shape"):
        layout.pack(q, zero[:1], scale, group_size=128)
    packed = layout.pack(q, zero, scale, group_size=128)
    with pytest.raises(ValueError, match=r"qweight has shape .* expected .* for k=300"):
        layout.unpack(packed[0], packed[2], k=300, n=37, group_size=128)
    with pytest.raises(ValueError, match="no multiple of parts"):
        layout.shard_k(*packed, k=172, n=37, group_size=128, parts=3)
    with pytest.raises(ValueError, match="one of"):
        shapes.projections("9b")
