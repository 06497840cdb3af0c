"""The attention with its own backward pass against the formula written out in float64, and under the transforms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.models.attention import attend, attend_cached

B, T, N, K, H, P = 2, 6, 6, 2, 4, 3


def inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (P, K, H), (P, K, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def plain(q, key, value, prefix_key, prefix_value):
    """Head by head, keys repeated, in q's dtype; prefix_key None is no prefix."""
    out = []
    for n in range(N):
        k, v = key[:, :, n * K // N], value[:, :, n * K // N]  # [B, T, H]
        scores = jnp.where(np.tril(np.ones((T, T), bool))[None], q[:, :, n] @ k.transpose(0, 2, 1), -np.inf)
        if prefix_key is not None:
            pk, pv = (jnp.broadcast_to(p[None, :, n * K // N], (B, P, H)) for p in (prefix_key, prefix_value))
            scores = jnp.concatenate([q[:, :, n] @ pk.transpose(0, 2, 1), scores], axis=-1)
            v = jnp.concatenate([pv, v], axis=1)
        out.append(jax.nn.softmax(scores / math.sqrt(H), axis=-1) @ v)
    return jnp.stack(out, axis=2)


def ours(q, key, value, prefix_key, prefix_value):
    return attend(q, key, value, prefix=None if prefix_key is None else (prefix_key, prefix_value))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_values_and_gradients_equal_the_plain_formula(with_prefix):
    *args, cotangent = inputs()
    if not with_prefix:
        args[3:] = [None, None]

    def pulled(f, args, cotangent):
        out, pull = jax.vjp(f, *args)
        return out, pull(cotangent)

    got = jax.jit(lambda args: pulled(ours, args, cotangent))(args)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, cotangent))
        expected = jax.device_get(pulled(plain, *wide))
    assert len(jax.tree.leaves(got)) == (6 if with_prefix else 4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_clients_side_by_side_and_recomputation():
    """vmap over clients, under checkpoint, gives each client's own gradients."""
    q, key, value, *_ = inputs()
    clients = [jnp.stack([x, 2 * x, -x]) for x in (q, key, value)]

    def grad(remat):
        f = jax.checkpoint(attend) if remat else attend
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v))), argnums=(0, 1, 2))

    got = jax.jit(jax.vmap(grad(True)))(*clients)
    for c in range(3):
        for a, b in zip(got, grad(False)(*(x[c] for x in clients))):
            np.testing.assert_allclose(a[c], b, rtol=1e-5, atol=1e-6)


def test_bfloat16():
    """Inputs rounded to bfloat16 give the float32 result up to bfloat16's rounding, in values and gradients."""
    args = inputs("bfloat16")[:3]
    loss = lambda *a: jnp.sum(jnp.sin(attend(*a).astype(jnp.float32)))
    got, expected = (jax.grad(loss, argnums=(0, 1, 2))(*a) for a in (args, [x.astype(jnp.float32) for x in args]))
    for a, b in zip(got, expected):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert error < 0.02


def test_cached_equals_uncached():
    """Slots beyond a query's position are not seen, whatever they hold."""
    q, key, value, *_ = inputs()
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    cache = [
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=50.0) for x in (key, value)
    ]  # [B, K, S, H]
    np.testing.assert_allclose(attend_cached(q, *cache, positions), attend(q, key, value), rtol=1e-5, atol=1e-6)
