"""Steps by least squares against NumPy's, and the sweep over integers against trying all sixteen."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.quant.awq import QuantConfig, search_clip
from fmfl_jax.quant.gptq import compensated_integers, pack_compensated
from fmfl_jax.quant.refine import damped, pack_clipped, refine
from fmfl_jax.quant.rtn import group_rows, pack_weight
from tests.quant.test_awq import make_layer


def make_rounded(k=48, n=6, size=16, bits=3):
    """weight, the damped Gram matrix, q, s, z."""
    x, w = make_layer(k, n, seed=5)
    w, gram = jnp.asarray(w), jnp.asarray(x.T @ x)
    return w, damped(gram, k), *compensated_integers(w, gram, bits=bits, group_size=size)


def squared(gram, q, s, z, w):
    """The error of each column, float64 [N]."""
    size = len(q) // len(s)
    e = (np.asarray(q) - np.repeat(z, size, 0)) * np.repeat(np.asarray(s, np.float64), size, 0) - np.asarray(w)
    return np.einsum("kn,kl,ln->n", e, np.asarray(gram, np.float64), e)


def test_steps_are_those_of_least_squares():
    w, gram, q, s, z = make_rounded()
    kept, got = refine(w, gram, q, s, z, bits=3, num_sweeps=0)
    assert jnp.all(kept == q)
    got = np.asarray(got, np.float64)
    root = np.linalg.cholesky(np.asarray(gram, np.float64)).T  # |root e|^2 = e' gram e
    u = np.asarray(q - jnp.repeat(z, 16, axis=0), np.float64)
    for n in range(w.shape[1]):
        of_groups = np.zeros((48, 3))
        for g in range(3):
            of_groups[16 * g : 16 * (g + 1), g] = u[16 * g : 16 * (g + 1), n]
        wanted = np.linalg.lstsq(root @ of_groups, root @ np.asarray(w[:, n], np.float64))[0]
        np.testing.assert_allclose(got[:, n], wanted, rtol=2e-3)  # float16, and drawn a little to what they were
    assert not np.allclose(got, s, rtol=5e-3)
    assert (squared(gram, q, got, z, w) < squared(gram, q, s, z, w)).mean() > 0.8


def test_a_group_without_a_weight_keeps_its_step():
    w, gram, q, s, z = make_rounded()
    q, w = q.at[:16, 0].set(z[0, 0]), w.at[:, 1].set(0.0)
    _, got = refine(w, gram, q.at[:, 1].set(jnp.repeat(z[:, 1], 16)), s, z, bits=3, num_sweeps=0)
    assert got[0, 0] == s[0, 0] and jnp.all(got[:, 1] == s[:, 1]) and jnp.all(got > 0)


def test_a_sweep_sets_each_integer_to_the_best_of_all():
    w, gram, q, s, z = make_rounded()
    _, s = refine(w, gram, q, s, z, bits=3, num_sweeps=0)
    got, steps_after = map(np.asarray, refine(w, gram, q, s, z, bits=3, num_sweeps=1))
    wanted, exact = np.array(q), np.asarray(gram, np.float64)
    steps, zeros = np.repeat(np.asarray(s, np.float64), 16, 0), np.repeat(z, 16, 0)
    for k in range(48):
        for n in range(w.shape[1]):
            costs = []
            for integer in range(8):
                wanted[k, n] = integer
                e = (wanted[:, n] - zeros[:, n]) * steps[:, n] - np.asarray(w[:, n])
                costs.append(e @ exact @ e)
            wanted[k, n] = np.argmin(costs)
    assert np.mean(got != wanted) < 0.01 < np.mean(got != np.asarray(q))
    _, of_these = refine(w, gram, jnp.asarray(got), s, z, bits=3, num_sweeps=0)
    np.testing.assert_allclose(steps_after, of_these, rtol=2e-3)  # the products of the sweep are those of its result


@pytest.mark.parametrize(("k", "group_size", "bits"), [(44, 16, 3), (40, -1, 4)])
def test_refined_is_better_than_compensated(k, group_size, bits):
    """44 rows make a short last group."""
    x, w = make_layer(k, 6, seed=3)
    w, gram = jnp.asarray(w), jnp.asarray(x.T @ x)
    q, s, z = compensated_integers(w, gram, bits=bits, group_size=group_size)
    size = k if group_size == -1 else group_size
    rounded = group_rows(q - jnp.repeat(z, size, axis=0)[:k], size) * s.astype(jnp.float32)[:, None]
    before = rounded.reshape(-1, 6)[:k] - w
    after = pack_compensated(w, gram, bits=bits, group_size=group_size).dequantize() - w
    error = lambda e: float(jnp.sum((jnp.asarray(x) @ e) ** 2))
    assert error(after) < 0.97 * error(before)


def test_a_clipped_weight_is_better_refined():
    x, w = make_layer(44, 6, seed=3)
    w, gram, quant = jnp.asarray(w), jnp.asarray(x.T @ x), QuantConfig(bits=3, group_size=16)
    clipped = search_clip(w, gram, quant)
    error = lambda packed: float(jnp.sum((jnp.asarray(x) @ (packed.dequantize() - w)) ** 2))
    before = error(pack_weight(clipped, bits=3, group_size=16))
    assert error(pack_clipped(w, clipped, gram, bits=3, group_size=16)) < 0.8 * before
