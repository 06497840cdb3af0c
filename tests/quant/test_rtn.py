"""The group quantizer against a plain loop, and its error bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.quant.rtn import pack_weight, round_weight


def loop_quantize(w, bits, group_size):
    """facts of the paper, one group of one column at a time: q, z, s and the matrix they stand for."""
    k, n = w.shape
    size, top = (k if group_size == -1 else group_size), 2**bits - 1
    groups = -(-k // size)
    q, z = np.zeros((k, n), np.int64), np.zeros((groups, n), np.int64)
    s = np.zeros((groups, n), np.float32)
    for g in range(groups):
        rows = slice(g * size, min((g + 1) * size, k))
        for c in range(n):
            column = w[rows, c]
            spread = np.float32(max(max(column.max(), 0) - min(column.min(), 0), 1e-5))
            s[g, c] = np.float32(np.float16(spread / np.float32(top)))
            z[g, c] = np.clip(-np.rint(min(column.min(), 0) / s[g, c]), 0, top)
            q[rows, c] = np.clip(np.rint(column / s[g, c]) + z[g, c], 0, top)
    of = np.arange(k) // size
    return q, z, s, ((q - z[of]) * s[of]).astype(np.float32)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("k", "group_size"), [(256, 128), (172, 64), (172, 32), (172, -1), (129, 128), (64, 128)])
def test_equals_the_loop(bits, k, group_size):
    w = np.random.default_rng(k).normal(scale=0.1, size=(k, 24)).astype(np.float32)
    w[:, 3] = np.abs(w[:, 3])  # a column of one sign
    w[:, 5] = 0.0
    q, z, s, rounded = loop_quantize(w, bits, group_size)
    settings = dict(bits=bits, group_size=group_size)
    packed = jax.tree.map(np.asarray, jax.jit(functools.partial(pack_weight, **settings))(w))
    got_q, got_s, got_z = packed.unpack()
    assert got_s.dtype == jnp.float16
    np.testing.assert_array_equal(got_q, q)
    np.testing.assert_array_equal(got_z, z)
    np.testing.assert_array_equal(np.asarray(got_s, np.float32), s)
    np.testing.assert_array_equal(jax.jit(lambda packed: packed.dequantize())(packed), rounded)
    np.testing.assert_array_equal(jax.jit(functools.partial(round_weight, **settings))(w), rounded)
    assert packed.group_size == (k if group_size == -1 else group_size)
    assert int(got_q.max()) == 2**bits - 1


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_weight_moves_by_more_than_half_a_step(bits, offset):
    """Groups of one sign included: offset 0.5 makes every weight positive."""
    w = (offset + np.random.default_rng(0).uniform(-0.4, 0.4, size=(172, 64))).astype(np.float32)
    rounded = np.asarray(round_weight(jnp.asarray(w), bits=bits, group_size=64))
    for start in range(0, 172, 64):
        group = w[start : start + 64]
        step = (np.maximum(group.max(0), 0) - np.minimum(group.min(0), 0)) / (2**bits - 1)
        # float16 rounds the step by up to 2^-11 of it, which the largest integer multiplies by 15.
        assert np.all(np.abs(rounded[start : start + 64] - group) <= (0.5 + 15 * 2**-11) * step + 1e-7)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"), [(5, 128, "bits"), (4, 0, "group_size"), (4, -2, "group_size")]
)
def test_settings_out_of_range(bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        pack_weight(jnp.ones((8, 8)), bits=bits, group_size=group_size)
