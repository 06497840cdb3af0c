"""What the server does after the mean: teachers teach, attackers lose weight, without answers the mean is plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.experiment.services import teachers
from fmfl_jax.experiment.services.config import Bits, Full, TopK
from fmfl_jax.fed.core.reduce import gathered_mean
from fmfl_jax.fed.core.types import GatheredUpdates
from fmfl_jax.models.classifiers import linear_text_classifier

MODEL = linear_text_classifier(12, 3)
X = jnp.asarray([[1, 2, 0], [3, 4, 0], [5, 6, 7], [8, 9, 0]], jnp.int32)
LABELS = np.asarray([0, 1, 2, 0])
LOG_PROBS = np.where(np.eye(3, dtype=bool)[LABELS], np.log(0.8), np.log(0.1))
THERE = np.asarray([True, False])


def gathered():
    """Two clients that took a step towards the labels, and one that sends the opposite."""
    params = MODEL.init(jax.random.key(0))

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(MODEL.apply(params, X))[np.arange(4), LABELS])

    grad = jax.grad(loss)(params)
    updates = jax.tree.map(lambda g: jnp.stack([g, 2 * g, -g]), grad)
    return GatheredUpdates(updates, jnp.ones(3), jnp.ones(3), {}, None, params)


def outcome(aggregator, rounds_played=0):
    found = gathered()
    state = aggregator.init(None)._replace(round=jnp.int32(rounds_played))
    assert aggregator.aggregate is not None
    update, metrics = jax.jit(aggregator.aggregate)(found, state, jax.random.key(0))
    params = jax.tree.map(jnp.subtract, found.params, update)
    answers = np.asarray(jax.nn.log_softmax(MODEL.apply(params, X)))
    return update, metrics, float(-(np.exp(LOG_PROBS) * answers).sum(1).mean())


@pytest.mark.parametrize("form", [Full(), TopK(k=1)])
def test_a_teacher_teaches_whatever_its_format(form):
    sent = teachers.sent(LOG_PROBS, form)
    aggregator = teachers.taught(MODEL, np.asarray(X), sent, THERE, learning_rate=1.0, num_steps=20)
    _, metrics, loss = outcome(aggregator)
    _, plain_metrics, plain_loss = outcome(aggregator, rounds_played=1)
    assert np.isfinite(metrics["distillation_loss"]) and np.isnan(plain_metrics["distillation_loss"])
    assert loss < plain_loss - 0.2
    assert sent.bits == {Full: 192, TopK: 4 * 2 + 4 * 2 * 16}[type(form)]


def test_six_bits_a_logit_by_hand():
    sent = teachers.sent(LOG_PROBS, Bits(bits=6))
    assert sent.bits == 72 and sent.logits is not None
    expected = LOG_PROBS - LOG_PROBS.max(axis=1, keepdims=True)
    assert np.abs(sent.logits - expected).max() <= 10 / (2 * 63) + 1e-6


def test_without_answers_the_mean_is_plain():
    aggregator = teachers.reweighted(MODEL, np.asarray(X), LABELS, THERE, temperature=0.1, floor=0.0)
    update, _, _ = outcome(aggregator, rounds_played=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), update, gathered_mean(gathered()))


def test_ensemble_and_mixture_lie_between_the_mean_and_the_teacher():
    settings = {"learning_rate": 1.0, "num_steps": 20}
    loss = lambda logits, weight: outcome(
        teachers.taught_by_ensemble(MODEL, np.asarray(X), logits, THERE, fm_weight=weight, **settings)
    )[2]
    fm, half, ensemble = loss(LOG_PROBS, 1.0), loss(LOG_PROBS, 0.5), loss(None, 0.5)
    assert fm < half < ensemble


@pytest.mark.parametrize("name", ["reweighted", "trusting"])
def test_who_sends_the_opposite_loses_weight(name):
    if name == "reweighted":
        aggregator = teachers.reweighted(MODEL, np.asarray(X), LABELS, THERE, temperature=0.1, floor=0.2)
    else:
        aggregator = teachers.trusting(MODEL, np.asarray(X), LABELS, THERE, learning_rate=1.0, num_steps=1)
    assert outcome(aggregator)[2] < outcome(aggregator, rounds_played=1)[2]


def test_a_nan_of_the_teacher_reaches_nobody():
    broken = LOG_PROBS.copy()
    broken[1, 0] = np.nan
    sent = teachers.sent(broken, Full())
    update, metrics, _ = outcome(teachers.taught(MODEL, np.asarray(X), sent, THERE, learning_rate=1.0, num_steps=3))
    assert np.isfinite(metrics["distillation_loss"]) and all(np.isfinite(x).all() for x in jax.tree.leaves(update))
