"""GPTQ against its definition: after every row that is rounded, the free rows are found anew by least squares."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.attention import attend
from fmfl_jax.models.calibration import INPUT_NORM, QKV, attention_given_and_received, gram_bands, gram_of
from fmfl_jax.models.gptq import gptq_block
from fmfl_jax.models.params import is_weight
from fmfl_jax.models.quantize import awq_block, quantize
from fmfl_jax.models.rope import apply_rope, rope_frequencies, rope_tables
from fmfl_jax.peft.split import NoPeftConfig, split
from fmfl_jax.quant.awq import CLIP_RATIOS, QuantConfig
from fmfl_jax.quant.gptq import compensated_integers
from fmfl_jax.quant.refine import DAMPING
from tests.quant.test_awq import make_layer
from tests.quant.test_quantize_llama import block_of, logits_of, outlier_params, tokens_of
from tests.quant.test_rtn import loop_quantize

CONFIG = llama_preset("tiny", hidden_dim=172)
QUANT = QuantConfig(method="gptq", bits=3, group_size=32)


def damped_gram(x):
    gram = (x.T @ x).astype(np.float64)
    return gram + DAMPING * np.mean(np.diag(gram)) * np.eye(len(gram))


def free_rows_cost(gram, rows, free):
    """The matrix C of the least x-error e' C e that an error e in `rows` costs when `free` make up for it."""
    inner, across = gram[np.ix_(rows, rows)], gram[np.ix_(free, rows)]
    return inner - across.T @ np.linalg.solve(gram[np.ix_(free, free)], across) if len(free) else inner


def order_of_rounding(gram, size):
    """Groups by the mean of their diagonal of the Gram matrix, largest first, and each group's rows likewise."""
    power = np.diag(gram)
    starts = sorted(range(0, len(power), size), key=lambda start: -np.sum(power[start : start + size]) / size)
    return [sorted(range(s, min(s + size, len(power))), key=lambda row: -power[row]) for s in starts]


@pytest.mark.parametrize(("k", "group_size", "bits"), [(44, 16, 3), (40, -1, 4)])
def test_rows_are_rounded_as_the_definition_has_it(k, group_size, bits):
    """Steps and zero points as found; 44 rows make a short last group."""
    x, w = make_layer(k, 6, seed=3)
    size, top = k if group_size == -1 else group_size, 2**bits - 1
    q, s, z = map(
        np.asarray, compensated_integers(jnp.asarray(w), jnp.asarray(x.T @ x), bits=bits, group_size=group_size)
    )
    gram, left = damped_gram(x), w.astype(np.float64)
    free = [row for group in order_of_rounding(x.T @ x, size) for row in group]
    different = 0
    for row in list(free):
        step, zero = s[row // size].astype(np.float64), z[row // size]
        wanted = np.clip(np.round(left[row] / step) + zero, 0, top)
        different += np.sum(wanted != q[row])
        free.remove(row)
        change = (q[row] - zero) * step - left[row]
        if free:
            left[free] -= np.linalg.solve(gram[np.ix_(free, free)], gram[free, row][:, None] * change[None])
    assert different <= 0.01 * q.size  # a weight on the edge between two integers may fall to either side
    plain = loop_quantize(w, bits, group_size)[3] - w
    error = (q - np.repeat(z, size, 0)[:k]) * np.repeat(s.astype(np.float32), size, 0)[:k] - w
    assert np.square(x @ error).sum() < 0.6 * np.square(x @ plain).sum()


@pytest.mark.parametrize("group_size", [16, -1])
def test_a_groups_range_is_the_best_cut_with_the_rows_after_it_free(group_size):
    """Of the group that is rounded first."""
    x, w = make_layer(48, 8, seed=4)
    size = 48 if group_size == -1 else group_size
    _, s, z = map(np.asarray, compensated_integers(jnp.asarray(w), jnp.asarray(x.T @ x), bits=3, group_size=group_size))
    rows = order_of_rounding(x.T @ x, size)[0]
    cost = free_rows_cost(damped_gram(x), rows, [row for row in range(48) if row not in rows])
    shrunk = False
    for column, (step, zero) in enumerate(zip(s[rows[0] // size].astype(np.float32), z[rows[0] // size])):
        group, losses = w[rows, column], []
        for low in CLIP_RATIOS:
            for high in CLIP_RATIOS:
                cut = np.clip(group, min(group.min(), 0) * low, max(group.max(), 0) * high)
                error = loop_quantize(cut[:, None], 3, -1)[3][:, 0] - group
                losses.append(error @ cost @ error)
        error = (np.clip(np.rint(group / step) + zero, 0, 7) - zero) * step - group
        assert error @ cost @ error < 1.02 * min(losses)
        shrunk |= min(losses) < 0.9 * losses[0]
    assert shrunk


def test_it_recovers_where_activations_have_outliers():
    params, tokens = outlier_params(CONFIG), tokens_of(CONFIG, (8, 32), seed=1)
    wanted, errors = logits_of(CONFIG, params, tokens), {}
    for method in ("rtn", "gptq"):
        quant = dataclasses.replace(QUANT, method=method)
        packed = quantize(CONFIG, params, tokens_of(CONFIG, (4, 32)), quant)
        errors[method] = float(jnp.mean((logits_of(CONFIG, packed, tokens) - wanted) ** 2))
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_the_next_block_is_given_the_quantized_blocks_output():
    block, h = block_of(CONFIG)
    out, after = gptq_block(block, jnp.array(h), config=CONFIG, quant=QUANT)
    one = llama_preset("tiny", hidden_dim=172, num_layers=1)
    params = outlier_params(one) | {"norm.weight": jnp.ones(one.embed_dim)}
    params |= {f"layers.0.{name}": value.dequantize() if is_weight(value) else value for name, value in out.items()}
    model = split(
        one, params | {"embed_tokens.weight": h.reshape(-1, one.embed_dim)}, NoPeftConfig(), key=jax.random.key(0)
    )
    tokens = jnp.arange(h.shape[0] * h.shape[1], dtype=jnp.int32).reshape(h.shape[:2])  # each looks up its own input
    hidden = jax.jit(lambda frozen: model.merge({}, frozen).hidden(tokens))(model.frozen)
    normed = after / jnp.sqrt(jnp.mean(after**2, axis=-1, keepdims=True) + one.norm_eps)
    np.testing.assert_allclose(hidden, normed, atol=2e-4)


def test_attention_received_is_what_attend_gives_a_one_hot_value():
    n, k, d, t = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim, 12
    x = jax.random.normal(jax.random.key(0), (2, t, CONFIG.embed_dim))
    qkv = jax.random.normal(jax.random.key(1), (CONFIG.embed_dim, (n + 2 * k) * d)) / 4
    heads = (x @ qkv).reshape(2, t, n + 2 * k, d)
    rope = rope_tables(jnp.arange(t, dtype=jnp.int32)[None], rope_frequencies(d, CONFIG.rope_theta, None))
    q, key = jnp.split(apply_rope(heads[:, :, : n + k], *rope), [n], axis=2)
    places = jnp.broadcast_to(jnp.eye(t, d)[None, :, None], (2, t, k, d))  # d >= t
    shares = attend(q, key, places)[..., :t]  # [2, queries, heads, keys]
    wanted = jnp.sum(jnp.mean(shares, axis=2), axis=1)
    given, received = attention_given_and_received(qkv, x, CONFIG)
    received = received[..., 0]
    np.testing.assert_allclose(given, attend(q, key, heads[:, :, n + k :]).reshape(2, t, n * d), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(received, wanted, rtol=1e-5)
    assert float(received.max()) > 2 and abs(float(jnp.mean(received)) - 1) < 1e-5


@pytest.mark.parametrize("k", [10, 3])
def test_bands_put_together_are_the_gram_matrix(k):
    """10 columns make a short last band, 3 fewer bands than usual."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(7, k)).astype(np.float32), rng.random((7, 1)).astype(np.float32)
    np.testing.assert_allclose(gram_of(gram_bands(jnp.asarray(x), jnp.asarray(weight))), x.T @ (x * weight), atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_first_tokens_keys_and_values_are_kept(method):
    """In trained models the first token lies apart, its h is a thousand times the others', and all attend to it."""
    block, h = block_of(CONFIG)
    block[INPUT_NORM] = jnp.ones_like(block[INPUT_NORM])
    first = jnp.ones(CONFIG.embed_dim) / math.sqrt(CONFIG.embed_dim)
    h = h - (h @ first)[..., None] * first[None, None]
    h = h.at[:, 0].set(1000.0 * jnp.broadcast_to(first[None], h[:, 0].shape))
    quantize_block = {"gptq": gptq_block, "awq": awq_block}[method]
    out, _ = quantize_block(block, jnp.array(h), config=CONFIG, quant=dataclasses.replace(QUANT, method=method))
    x = h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True))
    folded = x * out[INPUT_NORM][None, None]  # AWQ's scales
    error = jnp.linalg.norm(folded @ out[QKV].dequantize() - x @ block[QKV], axis=-1)  # [4, 32]
    assert float(jnp.mean(error[:, 0])) < 0.6 * float(jnp.mean(error[:, 1:]))
