"""The two searches against brute-force loops over real inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.quant.awq import (
    CLIP_RATIOS,
    QuantConfig,
    product_loss,
    search_clip,
    search_scale,
    search_symmetric_clip,
)
from tests.quant.test_rtn import loop_quantize


def make_layer(k, n, tokens=96, seed=0):
    """x with outlier channels, w [k, n]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, k)) * np.exp(rng.normal(size=k))
    x[:, :3] *= 20
    return x.astype(np.float32), rng.standard_t(4, size=(k, n)).astype(np.float32) * 0.05


@pytest.mark.parametrize(("k", "group_size", "bits"), [(64, 32, 4), (44, 32, 3), (64, -1, 3)])
def test_scale_search_equals_the_loop(k, group_size, bits):
    x, w = make_layer(k, 12)
    x_mean = np.abs(x).mean(0)
    scales, expected = [], []
    for i in range(20):
        s = np.maximum(x_mean ** np.float32(i / 20), 1e-4)
        scales.append((s / np.sqrt(s.max() * s.min())).astype(np.float32))
        rounded = loop_quantize(w * scales[i][:, None], bits, group_size)[3] / scales[i][:, None]
        expected.append(np.square(x @ rounded - x @ w).sum())
    loss = product_loss(jnp.asarray(w), jnp.asarray(x.T @ x))
    assert loss.num_passes == 1
    np.testing.assert_allclose(loss.of(jnp.asarray(rounded), 0).sum(), expected[-1], rtol=1e-3)
    s = search_scale(jnp.asarray(w), jnp.asarray(x_mean), loss, QuantConfig(bits=bits, group_size=group_size))
    best = int(np.argmin([np.abs(s / wanted - 1).max() for wanted in scales]))
    np.testing.assert_allclose(s, scales[best], rtol=1e-4)
    # A weight on the edge between two integers may fall to either side, hence the tolerance.
    assert best > 0 and expected[best] < 1.05 * min(expected) < 0.7 * expected[0]


def best_of_one_group(group, x, others, bits):
    """(the smallest loss over the cuts of a group's range, its rounding error): group [g], x [T, g], others [T]."""
    best = (np.inf, None)
    for low in CLIP_RATIOS:
        for high in CLIP_RATIOS:
            cut = np.clip(group, min(group.min(), 0) * low, max(group.max(), 0) * high)
            error = loop_quantize(cut[:, None], bits, -1)[3][:, 0] - group
            loss = np.square(x @ error + others).sum()
            if loss < best[0]:
                best = (loss, error)
    return best


def test_product_loss_in_passes_is_each_columns_error():
    """192 columns are three passes of 64."""
    x, w = make_layer(24, 192)
    rounded = loop_quantize(w, 3, -1)[3]
    loss = product_loss(jnp.asarray(w), jnp.asarray(x.T @ x))
    assert loss.num_passes == 3
    got = np.concatenate([loss.of(jnp.asarray(rounded), i) for i in range(3)])
    np.testing.assert_allclose(got, np.square(x @ rounded - x @ w).sum(0), rtol=1e-3)


@pytest.mark.parametrize("group_size", [32, -1])
def test_clip_search_reaches_the_loop_over_all_cuts(group_size):
    """Which goes twice over all 100 pairs, on the inputs themselves; 44 rows make a short last group."""
    x, w = make_layer(44, 5, seed=1)
    size = 44 if group_size == -1 else group_size
    clipped = search_clip(jnp.asarray(w), jnp.asarray(x.T @ x), QuantConfig(bits=3, group_size=group_size))
    got = np.square(x @ (loop_quantize(np.asarray(clipped), 3, group_size)[3] - w)).sum(0)
    plain = loop_quantize(w, 3, group_size)[3] - w
    for c in range(5):
        error = plain[:, c].copy()
        for _ in range(2):
            for start in range(0, 44, size):
                rows = slice(start, min(start + size, 44))
                others = x @ error - x[:, rows] @ error[rows]
                error[rows] = best_of_one_group(w[rows, c], x[:, rows], others, 3)[1]
        np.testing.assert_allclose(got[c], np.square(x @ error).sum(), rtol=0.02)
        assert got[c] < 0.95 * np.square(x @ plain[:, c]).sum()


@pytest.mark.parametrize("group_size", [32, -1])
def test_symmetric_clip_equals_the_loop(group_size):
    """The paper's: a group's largest |w| times 1 - i/20, each group by its own part of the product."""
    x, w = make_layer(44, 6, seed=2)
    w[:, 0] = np.abs(w[:, 0])  # groups of one sign are cut on one side
    size = 44 if group_size == -1 else group_size
    quant = QuantConfig(bits=3, group_size=group_size, recipe="paper")
    got = np.asarray(search_symmetric_clip(jnp.asarray(w), jnp.asarray(x), quant))
    cut_somewhere = False
    for c in range(6):
        for start in range(0, 44, size):
            rows = slice(start, min(start + size, 44))
            group, losses, cuts = w[rows, c], [], []
            for ratio in CLIP_RATIOS:
                cuts.append(np.clip(group, -np.abs(group).max() * ratio, np.abs(group).max() * ratio))
                error = loop_quantize(cuts[-1][:, None], 3, -1)[3][:, 0] - group
                losses.append(np.square(x[:, rows] @ error).sum())
            chosen = int(np.argmin([np.abs(got[rows, c] - cut).max() for cut in cuts]))
            np.testing.assert_allclose(got[rows, c], cuts[chosen], rtol=1e-5)
            assert losses[chosen] < 1.02 * min(losses)
            cut_somewhere |= chosen > 0
    assert cut_somewhere


def test_clip_search_of_many_columns_is_that_of_a_few():
    """1025 columns are searched in three parts on a CPU, the last one filled up."""
    x, w = make_layer(32, 1025)
    quant, gram = QuantConfig(bits=3, group_size=16), jnp.asarray(x.T @ x)
    whole = search_clip(jnp.asarray(w), gram, quant)
    assert whole.shape == w.shape
    np.testing.assert_allclose(whole[:, -7:], search_clip(jnp.asarray(w[:, -7:]), gram, quant), rtol=1e-6)
    assert not np.allclose(whole[:, -7:], w[:, -7:])
