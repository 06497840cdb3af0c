"""Reserves and revenues in closed form and by simulation, and no misreport that pays."""

import numpy as np
import pytest
import scipy.stats

from fmfl_jax.services.incentives.myerson import (
    expected_revenue,
    optimal_auction,
    reserve_price,
    second_price_auction,
)

UNIFORM = scipy.stats.uniform()


def test_the_golden_revenues():
    assert reserve_price(UNIFORM) == pytest.approx(0.5)
    assert expected_revenue(UNIFORM, 3, 0.5) == pytest.approx(17 / 32)
    assert expected_revenue(UNIFORM, 3, 0.0) == pytest.approx(1 / 2)


def test_reserves_in_closed_form():
    assert reserve_price(scipy.stats.expon(scale=4.0)) == pytest.approx(4.0)  # memoryless: phi(v) = v - scale
    assert reserve_price(scipy.stats.uniform(2.0, 1.0)) == 2.0  # everybody's virtual value is above 0
    assert reserve_price(UNIFORM, kept_usd=0.4) == pytest.approx(0.7)  # phi(v) = 2 v - 1


def test_the_reserve_is_the_best_of_a_grid_and_revenue_what_sales_bring():
    rng = np.random.default_rng(0)
    for distribution in (scipy.stats.expon(), scipy.stats.beta(2, 3)):
        best = reserve_price(distribution)
        grid = np.linspace(0.1, 2, 20) * best
        assert max(expected_revenue(distribution, 2, r) for r in grid) <= expected_revenue(distribution, 2, best) + 1e-9
        bids = np.sort(distribution.rvs((20000, 2), random_state=rng), axis=1)
        sold = np.where(bids[:, 1] >= best, np.maximum(bids[:, 0], best), 0.0)
        error = sold.std() / np.sqrt(len(sold))
        assert expected_revenue(distribution, 2, best) == pytest.approx(sold.mean(), abs=4 * error)


def test_alike_bidders_meet_in_a_second_price_auction_with_the_reserve():
    rng = np.random.default_rng(1)
    for bids in rng.random((20, 3)):
        optimal, second = optimal_auction(bids, [UNIFORM] * 3), second_price_auction(bids, reserve_usd=0.5)
        assert optimal.winner == second.winner and optimal.price_usd == pytest.approx(second.price_usd)


def test_unlike_bidders_gain_nothing_by_a_misreport():
    distributions = [UNIFORM, scipy.stats.uniform(0, 2), scipy.stats.expon()]
    rng = np.random.default_rng(2)
    for _ in range(5):
        values = np.asarray([d.rvs(random_state=rng) for d in distributions])
        for i in range(3):

            def gain(bid, i=i):
                bids = values.copy()
                bids[i] = bid
                award = optimal_auction(bids, distributions)
                return values[i] - award.price_usd if award.winner == i else 0.0

            honest = gain(values[i])
            assert honest >= -1e-9 and all(gain(bid) <= honest + 1e-9 for bid in np.linspace(0, 2, 9))


def test_a_bid_beyond_what_was_thought_possible_still_wins_and_pays_no_more():
    award = optimal_auction([3.0, 0.9], [UNIFORM, UNIFORM])
    assert award.winner == 0 and award.price_usd == pytest.approx(0.9)
    assert optimal_auction([-1.0, 0.9], [UNIFORM, UNIFORM]).winner == 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="do not rise"):
        reserve_price(scipy.stats.beta(0.3, 0.3))  # most are near 0 or 1
    with pytest.raises(ValueError, match="the good is never sold"):
        reserve_price(UNIFORM, kept_usd=1.5)
    with pytest.raises(ValueError, match="bids_usd 1, distributions 2"):
        optimal_auction([0.5], [UNIFORM, UNIFORM])
    assert second_price_auction([0.2], reserve_usd=0.5) == (None, 0.0)
    assert optimal_auction([0.2, 0.4], [UNIFORM, UNIFORM]) == (None, 0.0)
