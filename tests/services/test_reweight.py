"""Accuracy weights: the golden, the floor's promise, and models that broke."""

import functools

import jax
import numpy as np
import pytest

from fmfl_jax.services.reweight import accuracy_weights


def test_golden():
    found = accuracy_weights([5, 5, 5], [0.8, 0.5, 0.25], temperature=0.1, floor=0.0)
    np.testing.assert_allclose(found, [0.948880, 0.047242, 0.003878], atol=5e-7)


def test_the_floor_keeps_a_share_and_its_ends_are_known():
    rng = np.random.default_rng(0)
    for floor in (0.0, 0.3, 1.0):
        n, accuracies = rng.integers(0, 50, size=9), rng.random(9)
        found = accuracy_weights(n, accuracies, temperature=0.05, floor=floor)
        assert found.sum() == pytest.approx(1) and np.all(found >= floor * n / n.sum() - 1e-6)
    np.testing.assert_allclose(found, n / n.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        found, jax.jit(functools.partial(accuracy_weights, temperature=0.05, floor=1.0))(n, accuracies)
    )
    np.testing.assert_allclose(accuracy_weights(n, np.full(9, 0.4), temperature=0.1, floor=0.0), n / n.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        accuracy_weights([1, 1], [-1e9, 0.0], temperature=1e-3, floor=0.2), [0.1, 0.9], rtol=1e-5
    )


def test_a_broken_model_has_no_weight():
    found = accuracy_weights([3, 1, 1], [np.nan, 0.5, 0.5], temperature=1.0, floor=0.5)
    np.testing.assert_allclose(found, [0, 0.5, 0.5])
    assert not accuracy_weights([3, 1], [np.nan, -np.inf], temperature=1.0, floor=0.5).any()
    with pytest.raises(ValueError, match="floor must be"):
        accuracy_weights([1], [0.5], temperature=1.0, floor=1.5)
    with pytest.raises(ValueError, match="num_examples must be at least 0"):
        accuracy_weights([-1], [0.5], temperature=1.0, floor=0.5)
