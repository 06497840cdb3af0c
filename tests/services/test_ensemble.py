"""The ensemble's teacher: the golden that is not the mean of softmaxes, mixtures by hand, NaN of some and of all."""

import jax
import numpy as np
import pytest
from scipy.special import softmax

from fmfl_jax.services import ensemble, teach

ensemble_logits = jax.jit(ensemble.ensemble_logits)
mixed_teacher = jax.jit(ensemble.mixed_teacher, static_argnames=("fm_weight", "temperature"))


def test_golden_is_the_softmax_of_the_mean():
    logits = np.float32([[[2, 0, 0]], [[0, 1, 0]]])
    found = softmax(np.asarray(ensemble_logits(logits)), axis=1)[0]
    np.testing.assert_allclose(found, [0.506480, 0.307196, 0.186324], atol=1e-6)
    np.testing.assert_allclose(softmax(logits, axis=2).mean(axis=0)[0], [0.499464, 0.341312, 0.159224], atol=1e-6)


def test_clients_that_are_absent_or_broken_have_no_part():
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    logits[1, 0, 2] = np.nan
    logits[:3, 2] = np.inf
    found = np.asarray(ensemble_logits(logits, np.float32([1, 2, 3, 0])))
    np.testing.assert_allclose(found[0], (logits[0, 0] + 3 * logits[2, 0]) / 4, rtol=1e-5)
    np.testing.assert_allclose(found[1], (logits[0, 1] + 2 * logits[1, 1] + 3 * logits[2, 1]) / 6, rtol=1e-5)
    assert np.isnan(found[2]).all()  # the fourth was not delivered


def test_mixtures_by_hand():
    rng = np.random.default_rng(1)
    fm, clients = rng.normal(size=(2, 4, 5)).astype(np.float32)
    fm[1], clients[2], fm[3], clients[3] = np.nan, np.nan, np.nan, np.nan
    for weight in (0.3, 1.0):
        found = np.exp(np.asarray(mixed_teacher(fm, clients, fm_weight=weight, temperature=2.0)))
        p, q = softmax(fm / 2, axis=1), softmax(clients / 2, axis=1)
        np.testing.assert_allclose(found[0], weight * p[0] + (1 - weight) * q[0], rtol=1e-5)
        if weight < 1:
            np.testing.assert_allclose(found[1], q[1], rtol=1e-5)
        np.testing.assert_allclose(found[2], p[2], rtol=1e-5)
        assert np.isnan(found[3]).all()
        assert np.isnan(found[1]).all() == (weight == 1)


def test_the_mixture_times_the_temperature_is_a_teacher_for_the_loss():
    fm, clients, student = np.random.default_rng(2).normal(size=(3, 1, 5)).astype(np.float32)
    teacher = np.asarray(mixed_teacher(fm, clients, fm_weight=0.3, temperature=2.0))
    loss = jax.jit(teach.distillation_loss, static_argnames="temperature")(student, 2.0 * teacher, temperature=2.0)
    p, q = np.exp(teacher[0].astype(float)), softmax(student[0].astype(float) / 2)
    assert float(loss.loss) == pytest.approx(4 * np.sum(p * np.log(p / q)), rel=1e-4)
