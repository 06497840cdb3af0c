"""The server's own training after the mean, against plain loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmfl_jax.fed.aggregators.distillation import client_models, distillation, reweighted_mean, reweighting
from fmfl_jax.fed.core.types import GatheredUpdates

W = np.asarray([1.0, -1.0, 0.5], np.float32)
DELTAS = np.asarray([[0.2, 0.0, 0.1], [-0.4, 0.6, 0.0], [9.0, 9.0, 9.0]], np.float32)
WEIGHTS = np.asarray([1.0, 3.0, 0.0], np.float32)  # the last is absent


def gathered(**extras):
    deltas = {"w": jnp.asarray(np.where(WEIGHTS[:, None] > 0, DELTAS, 0.0))}
    return GatheredUpdates(deltas, jnp.asarray(WEIGHTS), jnp.asarray(WEIGHTS), extras, params={"w": jnp.asarray(W)})


def test_steps_after_the_mean():
    """Teacher: the weighted mean of the clients' models; loss 1/2 |w - teacher - 1|^2."""

    def teach(models, weights):
        return jnp.einsum("c,cd->d", weights, models["w"]) / jnp.sum(weights)

    def loss(params, teacher, key):
        return 0.5 * jnp.sum((params["w"] - teacher - 1.0) ** 2)

    aggregator = distillation(loss, optax.sgd(0.25), num_steps=3, teach=teach)
    update, metrics = jax.jit(aggregator.aggregate)(gathered(), (), jax.random.key(0))
    mean = W - (DELTAS[0] + 3 * DELTAS[1]) / 4
    want = mean.copy()
    for _ in range(3):
        loss_value = 0.5 * np.sum((want - mean - 1.0) ** 2)
        want -= 0.25 * (want - mean - 1.0)
    np.testing.assert_allclose(W - update["w"], want, rtol=1e-6)
    np.testing.assert_allclose(metrics["distillation_loss"], loss_value, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    aggregator = distillation(
        lambda params, teacher, key: jnp.log(-jnp.sum(params["w"] ** 2)), optax.sgd(1.0), num_steps=2
    )
    update, metrics = aggregator.aggregate(gathered(), (), jax.random.key(0))
    np.testing.assert_allclose(update["w"], (DELTAS[0] + 3 * DELTAS[1]) / 4, rtol=1e-6)
    assert np.isnan(metrics["distillation_loss"])
    with pytest.raises(ValueError, match="num_steps"):
        distillation(lambda params, teacher, key: 0.0, optax.sgd(1.0), num_steps=0)


def test_clients_weigh_by_their_score():
    """exp(score) on top of the number of examples; the absent client stays out though it scores best."""

    def score(params):
        return jnp.sum(params["w"])

    mean = reweighted_mean(score, lambda weights, scores: weights * jnp.exp(scores))
    malicious = jnp.asarray([True, False, False])
    update, metrics = reweighting(mean).aggregate(gathered(malicious=malicious), (), jax.random.key(0))
    a = WEIGHTS[:2] * np.exp((W - DELTAS[:2]).sum(1))
    np.testing.assert_allclose(update["w"], (a[:, None] * DELTAS[:2]).sum(0) / a.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["malicious_share"], a[0] / a.sum(), rtol=1e-6)
    np.testing.assert_allclose(client_models(gathered())["w"][2], W)
