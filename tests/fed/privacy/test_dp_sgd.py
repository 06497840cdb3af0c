"""Per-example clipping against a plain Python loop; masked rows are as good as absent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort
from fmfl_jax.fed.privacy.dp_sgd import MaskedBatch, private_grad, private_grad_fn
from fmfl_jax.parallel import replicate

PARAMS = {"w": jnp.asarray([0.3, -0.2, 0.1]), "b": jnp.asarray(0.05)}  # a scalar leaf among them
FROZEN = jnp.float32(1.5)
B = 7


def loss_fn(params, frozen, batch, key):
    """Mean over the batch of a nonlinear regression with a random scale of each input, as dropout would have it."""
    scale = jnp.float32(1.0) if key is None else jax.random.uniform(key, minval=0.5, maxval=2.0)
    x, y = batch[:, :3] * scale, batch[:, 3]
    return jnp.mean((jnp.tanh(x @ params["w"] * frozen) + params["b"] - y) ** 2)


gradient = jax.jit(jax.value_and_grad(loss_fn))


def plain_loss(params, frozen, batch, key):
    del key
    return loss_fn(params, frozen, batch, None)


def examples(seed=0, size=B):
    drawn = np.random.default_rng(seed).normal(size=(size, 4)) * np.geomspace(0.1, 5, size)[:, None]
    return drawn.astype(np.float32)


MASK = np.asarray([True, True, False, True, False, True, True])


@pytest.mark.parametrize("microbatch", [None, 1, 2, 3, 7, 50])
def test_per_example_clipping_equals_a_python_loop(microbatch):
    batch, key, clip = examples(), jax.random.key(3), 0.4
    args = {"clip_norm": clip, "noise_multiplier": 0.0, "expected_batch_size": 4.5, "microbatch": microbatch}
    loss, grad = jax.jit(lambda batch, key: private_grad(loss_fn, PARAMS, FROZEN, batch, MASK, key, **args))(batch, key)
    total, losses, norms = jax.tree.map(np.zeros_like, PARAMS), [], []
    for i in np.flatnonzero(MASK):
        own_loss, own = gradient(PARAMS, FROZEN, batch[i : i + 1], jax.random.fold_in(key, i))
        norms.append(np.sqrt(sum(np.sum(np.square(g)) for g in own.values())))
        factor = min(1.0, clip / norms[-1])
        total = {name: total[name] + factor * np.asarray(own[name]) for name in total}
        losses.append(float(own_loss))
    assert min(norms) < clip < max(norms)
    jax.tree.map(lambda g, t: np.testing.assert_allclose(g, t / 4.5, rtol=1e-5, atol=1e-7), grad, total)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_masked_rows_change_nothing_bit_for_bit(microbatch):
    args = {"clip_norm": 0.4, "noise_multiplier": 1.0, "expected_batch_size": 4.0, "microbatch": microbatch}
    grad_of = jax.jit(lambda batch, mask: private_grad(loss_fn, PARAMS, FROZEN, batch, mask, jax.random.key(0), **args))
    expected = grad_of(examples(), MASK)
    for value in (0.0, 1e30, np.nan, np.inf):
        batch = np.where(MASK[:, None], examples(), np.float32(value))
        jax.tree.map(np.testing.assert_array_equal, grad_of(batch, MASK), expected)
    if microbatch:  # nor does a larger capacity, where the sums run in the same order
        longer = np.concatenate([examples(), examples(1, 5)])
        jax.tree.map(np.testing.assert_array_equal, grad_of(longer, np.append(MASK, np.zeros(5, bool))), expected)


def test_no_clip_and_no_noise_is_the_plain_gradient():
    batch = examples()
    loss, grad = private_grad(
        plain_loss,
        PARAMS,
        FROZEN,
        batch,
        np.ones(B, bool),
        jax.random.key(0),
        clip_norm=np.inf,
        noise_multiplier=0.0,
        expected_batch_size=B,
    )
    expected = jax.value_and_grad(plain_loss)(PARAMS, FROZEN, batch, None)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), (loss, grad), expected)


def test_one_example_moves_the_gradient_by_at_most_the_sensitivity():
    """Adding or removing any one, one whose gradient is not finite too: clip / m."""
    batch, clip, m = examples(), 0.4, 4.0
    batch[3] = np.inf
    args = {"clip_norm": clip, "noise_multiplier": 0.0, "expected_batch_size": m}
    grad_of = jax.jit(lambda mask: private_grad(plain_loss, PARAMS, FROZEN, batch, mask, jax.random.key(0), **args)[1])
    moved = []
    for i in range(B):
        difference = jax.tree.map(lambda a, b: np.asarray(a - b), grad_of(MASK), grad_of(MASK ^ (np.arange(B) == i)))
        moved.append(np.sqrt(sum(np.sum(np.square(d)) for d in difference.values())))
    assert max(moved) <= clip / m * (1 + 1e-5) and max(moved) > 0.999 * clip / m
    assert moved[3] == 0 and np.isfinite(moved).all()


def test_noise_once_per_step_of_the_stated_standard_deviation():
    """An empty batch gives noise alone, of z clip / m, whatever the microbatches."""
    std = 1.5 * 0.4 / 4.0
    for microbatch in (None, 2):
        args = {"clip_norm": 0.4, "noise_multiplier": 1.5, "expected_batch_size": 4.0, "microbatch": microbatch}
        empty = np.zeros(B, bool)
        many = jax.jit(jax.vmap(lambda key: private_grad(loss_fn, PARAMS, FROZEN, examples(), empty, key, **args)))
        losses, noise = many(jax.random.split(jax.random.key(1), 3000))
        assert (losses == 0).all()
        for leaf in noise.values():
            assert abs(np.mean(leaf)) < 4 * std / np.sqrt(leaf.size)
            assert abs(np.var(leaf) - std**2) < 4 * std**2 * np.sqrt(2 / leaf.size)


def test_in_a_round_of_clients():
    """As an algorithm's grad_fn: with all examples there, no clip and no noise it is FedAvg; with noise, steps and
    clients draw their own."""
    rng = np.random.default_rng(4)
    batches = rng.normal(size=(5, 3, B, 4)).astype(np.float32)
    plain = Cohort(np.arange(5, dtype=np.int32), np.ones(5, np.float32), batches)
    masked = plain._replace(batches=MaskedBatch(batches, np.ones((5, 3, B), bool)))

    def run(grad_fn, cohort):
        whole = make_round(fed_opt(grad_fn, optax.sgd(0.1)))
        state, metrics, _ = pmap_round(whole)(
            replicate(whole.init(PARAMS, 0)), replicate(FROZEN), put_on_devices(cohort)
        )
        return jax.device_get(state.params), metrics

    make = lambda z, clip: private_grad_fn(plain_loss, clip_norm=clip, noise_multiplier=z, expected_batch_size=B)
    expected, metrics = run(jax.value_and_grad(plain_loss), plain)
    private, private_metrics = run(make(0.0, np.inf), masked)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), private, expected)
    np.testing.assert_allclose(private_metrics["loss"], metrics["loss"], rtol=1e-5)
    clipped, _ = run(make(0.0, 0.1), masked)
    noisy, _ = run(make(2.0, 0.1), masked)
    std = 0.1 * 2.0 * 0.1 / B * np.sqrt(3 / 5)  # learning rate x z clip / m over 3 steps, mean of 5 clients
    drift = np.concatenate([np.ravel(noisy[name] - clipped[name]) for name in noisy])
    assert 0.2 * std < np.sqrt(np.mean(drift**2)) < 2.5 * std


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"clip_norm": np.inf}, "without clipping no noise is enough"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1"),
        ({"expected_batch_size": 0.0}, "expected_batch_size is 0"),
        ({"microbatch": 0}, "microbatch is 0"),
    ],
)
def test_bad_numbers(bad, message):
    with pytest.raises(ValueError, match=message):
        private_grad_fn(loss_fn, **{"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0} | bad)
