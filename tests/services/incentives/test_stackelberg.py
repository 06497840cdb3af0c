"""Prices against a fine grid, efforts against every client's best response, the leader against a grid of rewards."""

import math

import numpy as np
import pytest

from fmfl_jax.services.incentives.stackelberg import (
    best_reward,
    demand,
    effort_equilibrium,
    log_value,
    price_service,
)

COSTS = [0.5, 0.8, 0.9, 1.4, 3.0]


def test_the_golden_price():
    found = price_service([2, 3, 5, 8], unit_cost_usd=0.5)
    assert found.price_usd == pytest.approx(1.5) and found.profit_usd == pytest.approx(8)
    np.testing.assert_allclose(found.amounts, [1 / 3, 1, 7 / 3, 13 / 3])


def test_the_price_is_the_best_of_a_fine_grid_whoever_it_prices_out():
    rng, priced_out = np.random.default_rng(0), 0
    for _ in range(50):
        willing = np.exp(rng.normal(scale=1.5, size=rng.integers(1, 8)))
        cost = float(willing.max() * rng.uniform(0.01, 0.9))
        found = price_service(willing, unit_cost_usd=cost)
        grid = np.linspace(cost, willing.max(), 20001)[1:]
        profits = (grid - cost) * np.maximum(willing[:, None] / grid[None] - 1, 0).sum(axis=0)
        assert found.profit_usd >= profits.max() * (1 - 1e-12)
        assert found.profit_usd == pytest.approx(profits.max(), rel=1e-5)
        assert found.profit_usd == pytest.approx((found.price_usd - cost) * demand(willing, found.price_usd).sum())
        priced_out += bool(np.any(found.amounts == 0))
    assert 5 < priced_out < 45


def test_the_golden_efforts():
    found = effort_equilibrium(6.0, COSTS)
    np.testing.assert_allclose(found.effort, [2.975207, 1.487603, 0.991736, 0, 0], atol=5e-7)
    assert found.total == pytest.approx(found.effort.sum()) and found.unit_usd == pytest.approx(6 / found.total)


def test_no_client_gains_by_another_effort():
    rng, bounded = np.random.default_rng(1), 0
    for _ in range(60):
        costs = np.exp(rng.normal(size=rng.integers(2, 9)))
        reward, most = float(np.exp(rng.normal())), float(np.exp(rng.normal(scale=2)))
        found = effort_equilibrium(reward, np.append(costs, np.inf), most=most)
        assert found.effort[-1] == 0 and found.effort.max() <= most and np.all(found.utility_usd >= -1e-12)
        for i, cost in enumerate(costs):
            others = found.total - found.effort[i]
            best = min(max(math.sqrt(reward * others / cost) - others, 0), most)  # of a concave utility
            assert found.effort[i] == pytest.approx(best, abs=1e-9 * max(found.total, 1))
        bounded += bool(np.any(found.effort == most))
    assert 5 < bounded < 55


def test_the_golden_reward():
    found = best_reward(log_value(10.0), COSTS)
    assert found.reward_usd == pytest.approx(4.72, abs=0.006) and found.profit_usd == pytest.approx(7.971050, abs=1e-6)
    grid = np.arange(0.01, 15, 0.01)
    profits = [log_value(10.0)(effort_equilibrium(r, COSTS).effort) - r for r in grid]
    assert found.profit_usd >= max(profits) and grid[np.argmax(profits)] == pytest.approx(4.72)


def test_a_bound_on_the_effort_bounds_the_reward():
    free, bound = (best_reward(log_value(1000.0), COSTS, most=most) for most in (math.inf, 0.5))
    assert bound.reward_usd < free.reward_usd and np.all(bound.answer.effort <= 0.5)
    grid = np.arange(0.005, 20, 0.005)
    best = max(log_value(1000.0)(effort_equilibrium(r, COSTS, most=0.5).effort) - r for r in grid)
    assert best - 1e-5 <= bound.profit_usd <= best + 0.01


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: price_service([1.0, 2.0], unit_cost_usd=2.0), "nobody buys: the most willing pays 2"),
        (lambda: price_service([1.0, 0.0], unit_cost_usd=0.1), "must be positive"),
        (lambda: price_service([1.0], unit_cost_usd=0.0), "unit_cost_usd must be above 0"),
        (lambda: effort_equilibrium(1.0, [1.0, math.inf]), "needs two clients that can take part, got 1"),
        (lambda: effort_equilibrium(1.0, [1.0, -1.0]), "cost_usd must be positive"),
        (lambda: effort_equilibrium(0.0, [1.0, 1.0]), "reward_usd must be above 0"),
        (lambda: best_reward(lambda effort: 2 * effort.sum(), [1.0, 1.0]), "no reward pays|without an end"),
        (lambda: best_reward(lambda effort: 1e-3 * effort.sum(), [1.0, 1.0]), "no reward pays"),
    ],
)
def test_bad_input_is_refused(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()
