"""ComFedSV: the exact values where all is known, equal clients alike where little is, what was never seen refused."""

import itertools

import numpy as np
import pytest

from fmfl_jax.services.incentives.comfedsv import Columns, complete, completed_shapley, draw_columns
from fmfl_jax.services.incentives.shapley import exact_shapley


def all_orders(n):
    drawn = draw_columns(n, num_permutations=1, rng=0)
    orders = np.asarray(list(itertools.permutations(range(n))))
    member = np.arange(n)[None, None] == orders[:, :, None]
    prefixes = np.cumsum(member, axis=1).astype(bool).reshape(-1, n)
    coalitions, prefix = np.unique(prefixes, axis=0, return_inverse=True)
    assert drawn.orders.shape == (1, n)
    return Columns(orders, coalitions, prefix.reshape(orders.shape))


def saturating(strength):
    """Worth of a coalition by its clients' strengths."""
    return lambda coalition: float(np.sqrt(np.asarray(strength)[coalition].sum()))


def observed(columns, game, gains, cohorts):
    """Utilities [T, U] of rounds that gain less and less, known within each cohort alone."""
    utilities = np.full((len(gains), len(columns.coalitions)), np.nan)
    for t, (gain, cohort) in enumerate(zip(gains, cohorts)):
        present = np.isin(np.arange(columns.coalitions.shape[1]), cohort)
        known = columns.within(present)
        utilities[t, known] = [gain * game(columns.coalitions[c]) for c in known]
    return utilities


def test_with_everybody_in_every_round_it_is_the_shapley_value():
    game, columns = saturating([1, 4, 9, 16]), all_orders(4)
    utilities = observed(columns, game, [1.0, 0.5], [range(4), range(4)])
    np.testing.assert_allclose(completed_shapley(columns, utilities), 1.5 * exact_shapley(game, 4))


def test_the_drawn_orders_pass_through_their_coalitions():
    columns = draw_columns(6, num_permutations=13, rng=1)
    assert columns.orders.shape == columns.prefix.shape == (13, 6)
    for order, prefix in zip(columns.orders, columns.prefix):
        assert sorted(order) == list(range(6))
        for step, column in enumerate(prefix):
            assert set(np.flatnonzero(columns.coalitions[column])) == set(order[: step + 1])
    assert len(np.unique(columns.coalitions, axis=0)) == len(columns.coalitions)
    present = np.asarray([True, True, False, True, False, True])
    assert all(
        (c in columns.within(present)) == (not columns.coalitions[c][~present].any())
        for c in range(len(columns.coalitions))
    )


def test_equal_clients_are_valued_alike_though_one_was_seldom_there():
    """Clients 0 and 1 are the same; 1 is drawn in the first round only. Counting a client's own rounds alone gives it a
    third of what 0 gets; the completed matrix nearly the same."""
    rng = np.random.default_rng(0)
    strength, gains = [3.0, 3.0, 1.0, 2.0, 1.0, 4.0], np.geomspace(1, 0.2, 12)
    cohorts = [range(6)] + [np.append([0], rng.choice(np.arange(2, 6), 3, replace=False)) for _ in gains[1:]]
    columns = draw_columns(6, num_permutations=60, rng=2)
    utilities = observed(columns, saturating(strength), gains, cohorts)
    assert np.isnan(utilities).mean() > 0.5
    values = completed_shapley(columns, utilities)
    exact = gains.sum() * exact_shapley(saturating(strength), 6)
    assert values[0] == pytest.approx(values[1], rel=0.1)
    np.testing.assert_allclose(values, exact, rtol=0.15)
    own_rounds = np.zeros(6)
    for gain, cohort in zip(gains, cohorts):
        cohort = np.sort(np.asarray(cohort))
        game = saturating(np.asarray(strength)[cohort])
        own_rounds[cohort] += gain * exact_shapley(game, len(cohort))
    assert own_rounds[1] < 0.4 * own_rounds[0]


def test_a_matrix_of_low_rank_is_completed():
    rng = np.random.default_rng(4)
    whole = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 30))
    known = rng.random(whole.shape) < 0.6
    found = complete(np.where(known, whole, np.nan), rank=2, ridge=1e-6, sweeps=300)
    np.testing.assert_array_equal(found[known], whole[known])
    assert np.abs(found - whole).max() < 0.02 * np.abs(whole).max()


def test_bad_input_is_refused():
    columns = draw_columns(3, num_permutations=3, rng=0)
    with pytest.raises(ValueError, match="never seen together"):
        completed_shapley(columns, np.where(np.arange(len(columns.coalitions)) == 0, np.nan, 1.0)[None])
    with pytest.raises(ValueError, match="utilities must be"):
        completed_shapley(columns, np.zeros((2, 1)))
    with pytest.raises(ValueError, match="rank must be above 0"):
        complete(np.ones((2, 2)), rank=0, ridge=1e-3, sweeps=1)
