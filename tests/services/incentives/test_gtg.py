"""GTG-Shapley against exact values; rounds and orders that are cut short; rounds that do harm."""

import numpy as np
import pytest

from fmfl_jax.services.incentives.gtg import gtg_shapley
from fmfl_jax.services.incentives.shapley import exact_shapley


def federated_average(models, weights, before=0.0, target=2.5):
    """v of the weighted mean of the coalition's scalar models, before the round `before`."""
    models, weights = np.asarray(models, float), np.asarray(weights, float)

    def game(coalition):
        mean = np.average(models[coalition], weights=weights[coalition]) if coalition.any() else before
        return -((mean - target) ** 2)

    return game


def test_close_to_exact_and_it_sums_to_the_rounds_gain():
    rng = np.random.default_rng(0)
    for seed in range(5):
        game = federated_average(rng.normal(2, 1, 6), rng.uniform(1, 5, 6))
        found = gtg_shapley(game, 6, rng=seed, convergence=0.0, most_cycles=250)
        exact = exact_shapley(game, 6)
        np.testing.assert_allclose(found.values, exact, atol=0.06 * np.abs(exact).max())
        gain = game(np.ones(6, bool)) - game(np.zeros(6, bool))
        assert found.values.sum() == pytest.approx(gain) and not found.converged


def test_sampling_ends_once_it_has_settled():
    game = federated_average([2.0, 2.1, 2.2, 2.3], [1, 1, 1, 1])
    quick, slow = (gtg_shapley(game, 4, rng=0, convergence=c, most_cycles=50) for c in (0.3, 0.01))
    assert quick.converged and slow.converged and quick.evaluations <= slow.evaluations <= 16


def test_a_round_that_made_the_model_worse_is_divided_too():
    game = federated_average([2.4, 2.5, 9.0], [1, 1, 4], before=2.3)
    found = gtg_shapley(game, 3, rng=0)
    assert not found.skipped and found.values.sum() < 0 and np.argmin(found.values) == 2
    assert found.values[2] < 0 < found.values[:2].min()


def test_a_round_that_changed_nothing_gives_nothing_but_is_recorded():
    game = federated_average([1.0, 1.0], [1, 1], before=1.0)
    found = gtg_shapley(game, 2, rng=0)
    assert found.skipped and found.values.tolist() == [0, 0] and found.evaluations == 2
    barely = federated_average([1.01, 1.0], [1, 1], before=1.0)
    assert not gtg_shapley(barely, 2, rng=0).skipped
    assert gtg_shapley(barely, 2, rng=0, round_tolerance=0.1).skipped


def test_truncation_stays_within_its_tolerance():
    rng = np.random.default_rng(3)
    game = federated_average(rng.normal(2.5, 0.3, 10), np.ones(10))
    whole, cut = (gtg_shapley(game, 10, rng=1, tolerance=t, most_cycles=3) for t in (None, 0.2))
    assert cut.evaluations < whole.evaluations
    assert abs(cut.values.sum() - whole.values.sum()) <= 0.2


def test_one_client_gets_all_twins_alike():
    game = federated_average([2.0], [1.0])
    assert gtg_shapley(game, 1, rng=0).values == pytest.approx([2.5**2 - 0.25])
    twins = gtg_shapley(federated_average([2.0, 2.0, 4.0], [1, 1, 1]), 3, rng=0, convergence=0.0, most_cycles=300)
    assert twins.values[0] == pytest.approx(twins.values[1], rel=0.03)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_clients must be at least 1"):
        gtg_shapley(lambda c: 0.0, 0, rng=0)
    with pytest.raises(ValueError, match="convergence must be at least 0"):
        gtg_shapley(lambda c: 0.0, 2, rng=0, convergence=-1)
