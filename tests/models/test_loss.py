"""The chunked cross-entropy against the plain one, and that frozen heads cost nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models import loss
from fmfl_jax.models.loss import cross_entropy, token_nll
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import FullConfig, split

M, D, V = 7, 4, 11


def plain(hidden, weight, targets, tied):
    logits = hidden @ (weight.T if tied else weight)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def inputs():
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((M, D), (V, D)))
    return (
        3 * hidden,
        weight,
        jnp.asarray(rng.integers(0, V, M), jnp.int32),
        jnp.asarray(rng.normal(size=M), jnp.float32),
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [3, 7, 512])  # 3: three chunks, the last one filled up
def test_values_and_gradients(monkeypatch, tied, chunk):
    for name in ("CHUNK_TOKENS", "CPU_CHUNK_TOKENS"):
        monkeypatch.setattr(loss, name, chunk)
    hidden, weight, targets, cotangent = inputs()
    weight = weight if tied else weight.T

    def pulled(f):
        value, pull = jax.vjp(lambda h, w: f(h, w, targets, tied), hidden, weight)
        return value, *pull(cotangent)

    both = [jax.jit(lambda f=f: (f(hidden, weight, targets, tied), *pulled(f)))() for f in (cross_entropy, plain)]
    for got, expected in zip(*both, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, weight, targets, _ = inputs()
    value, grad = jax.value_and_grad(lambda h: cross_entropy(h, weight, targets, True).sum())(1e4 * hidden)
    assert np.isfinite(value) and np.isfinite(grad).all()


@functools.cache
def tiny(peft):
    config = llama_preset("tiny", num_layers=1)
    model = split(config, init_params(config, jax.random.key(0)), peft, key=jax.random.key(1))
    return model, np.random.default_rng(0).integers(0, 256, (3, 2, 10)).astype(np.int32)


def plain_nll(model, windows):
    hidden = model.hidden(windows[:, :-1])
    weight, tied = model.head()
    return plain(hidden.reshape(-1, hidden.shape[-1]), weight, windows[:, 1:].reshape(-1), tied).reshape(2, -1)


@pytest.mark.parametrize("peft", [LoraConfig(), FullConfig()])
def test_gradient_of_the_model_over_clients(peft):
    """vmap over clients; with full tuning the tied embedding collects the head's gradient and the input's."""
    model, windows = tiny(peft)
    trainable = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x, 0.9 * x]), model.trainable)

    def grads(nll):
        grad = jax.grad(lambda t, f, w: jnp.mean(nll(model.merge(t, f), w)))
        return jax.jit(jax.vmap(grad, in_axes=(0, None, 0)))(trainable, model.frozen, windows)

    got, expected = grads(token_nll), grads(plain_nll)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5 * np.abs(expected[name]).max())


def test_a_frozen_head_costs_two_products():
    """Logits once and their way back once: nothing for a weight that is not trained."""
    m, d, v = 64, 128, 32  # large enough that the products are nearly all of the work
    hidden, weight = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((m, d), (v, d)))

    def products(argnums):
        grad = jax.jit(jax.grad(lambda h, w: cross_entropy(h, w, jnp.zeros(m, jnp.int32), True).sum(), argnums=argnums))
        return grad.lower(hidden, weight).compile().cost_analysis()["flops"] / (2 * m * d * v)

    assert 2 <= products(0) < 2.5
    assert products((0, 1)) >= 3  # the weight's own; 4 where there are several chunks, whose logits are made twice
