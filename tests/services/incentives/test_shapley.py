"""Shapley values against orders written out, their four axioms on random games, estimates within their errors."""

import itertools
import math

import numpy as np
import pytest

from fmfl_jax.services.incentives.shapley import exact_shapley, leave_one_out, permutation_shapley


def table_game(worth):
    """The game whose worths stand in a table [2^n], player i's bit being 2^i."""
    return lambda coalition: worth[int(np.sum(coalition << np.arange(len(coalition))))]


def random_game(rng, n):
    worth = rng.normal(size=2**n)
    return worth, table_game(worth)


def over_all_orders(game, n):
    total, orders = np.zeros(n), list(itertools.permutations(range(n)))
    for order in orders:
        present = np.zeros(n, bool)
        for player in order:
            before = game(present)
            present[player] = True
            total[player] += game(present) - before
    return total / len(orders)


def data_game(data):
    return lambda coalition: math.sqrt(np.asarray(data)[coalition].sum())


def models_game(coalition):
    """The mean of scalar models that should be 2.5; nothing is worth nothing."""
    models = np.asarray([1.0, 2.0, 6.0])[coalition]
    return 2.5**2 - (models.mean() - 2.5) ** 2 if len(models) else 0.0


def test_the_golden_values():
    np.testing.assert_allclose(
        exact_shapley(data_game([1, 4, 9, 16]), 4), [0.345267, 0.906032, 1.653859, 2.572067], atol=5e-7
    )
    airport = lambda coalition: np.asarray([3.0, 5.0, 8.0])[coalition].max(initial=0.0)
    np.testing.assert_allclose(exact_shapley(airport, 3), [1, 2, 5])
    np.testing.assert_allclose(exact_shapley(models_game, 3), [3.75, 4.125, -1.875])


def test_exact_values_are_the_mean_over_all_orders():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5):
        _, game = random_game(rng, n)
        np.testing.assert_allclose(exact_shapley(game, n), over_all_orders(game, n), atol=1e-12)


def test_efficiency_symmetry_null_player_duplicate_and_sum():
    rng = np.random.default_rng(1)
    worth, game = random_game(rng, 4)
    values = exact_shapley(game, 4)
    assert values.sum() == pytest.approx(worth[-1] - worth[0])
    null = exact_shapley(lambda c: game(c[:4]), 5)  # the fifth changes nothing
    np.testing.assert_allclose(null, np.append(values, 0), atol=1e-12)
    twins = exact_shapley(lambda c: game(np.append(c[:3], c[3] | c[4])), 5)  # the fifth is the fourth again
    assert twins[3] == pytest.approx(twins[4])
    other, second = random_game(rng, 4)
    both = exact_shapley(lambda c: game(c) + 2 * second(c), 4)
    np.testing.assert_allclose(both, values + 2 * exact_shapley(second, 4), atol=1e-12)
    assert other is not worth


def test_permutations_come_within_their_errors_and_sum_exactly():
    rng = np.random.default_rng(2)
    for seed in range(5):
        worth, game = random_game(rng, 6)
        found = permutation_shapley(game, 6, num_permutations=400, rng=seed)
        error = np.abs(found.values - exact_shapley(game, 6)) / found.standard_errors
        assert error.max() < 4 and found.evaluations <= 2**6
        assert found.values.sum() == pytest.approx(worth[-1] - worth[0])


def test_truncation_spares_evaluations_and_costs_no_more_than_its_tolerance():
    data = np.asarray([16.0, 9, 4, 1, 0.01, 0.01, 0.01, 0.01])
    whole, cut = (
        permutation_shapley(data_game(data), 8, num_permutations=50, rng=0, tolerance=t) for t in (None, 0.05)
    )
    assert cut.evaluations < whole.evaluations
    assert np.abs(cut.values - whole.values).max() < 0.05 and abs(cut.values.sum() - whole.values.sum()) <= 0.05


def test_what_is_truncated_is_not_asked_for():
    asked = []

    def game(coalition):
        asked.append(int(coalition.sum()))
        return float(coalition[0])

    permutation_shapley(game, 5, num_permutations=20, rng=0, tolerance=0.0)
    first_alone = [size for size in asked if size == 1]
    assert first_alone and len(asked) < 2**5


def test_leave_one_out_of_an_additive_game_is_its_terms():
    terms = np.asarray([1.0, -2.0, 0.0, 4.0])
    np.testing.assert_allclose(leave_one_out(lambda c: terms[c].sum(), 4), terms)
    np.testing.assert_allclose(leave_one_out(models_game, 3), [2, 0.75, 0.75])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="21 players have 2\\^21 coalitions"):
        exact_shapley(lambda c: 0.0, 21)
    with pytest.raises(ValueError, match="num_permutations must be at least 2"):
        permutation_shapley(lambda c: 0.0, 2, num_permutations=1, rng=0)
    with pytest.raises(ValueError, match="num_players must be at least 1"):
        leave_one_out(lambda c: 0.0, 0)
