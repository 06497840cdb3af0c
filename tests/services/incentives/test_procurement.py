"""The auction at a budget: the rule by a plain loop, payments by search, no misreport that pays, never over budget."""

import itertools

import numpy as np
import pytest

from fmfl_jax.services.incentives.procurement import buy


def by_the_rule(asks, values, budget, most):
    """Who is bought, client by client."""
    bought, worth = set(), 0.0
    for i in sorted(range(len(asks)), key=lambda i: (asks[i] / values[i], i)):
        if len(bought) == most or asks[i] / values[i] * (worth + values[i]) > budget:
            break
        bought.add(i)
        worth += values[i]
    return bought


def random_market(rng):
    n = int(rng.integers(1, 8))
    asks, values = np.exp(rng.normal(size=n)), np.exp(rng.normal(scale=0.7, size=n))
    if rng.random() < 0.3:
        asks[rng.integers(n)] = np.inf
    return asks, values, float(np.exp(rng.normal(scale=1.5))), int(rng.integers(1, n + 1))


def test_equal_clients_share_the_budget():
    bought = buy([1, 2, 3, 9], [1, 1, 1, 1], budget_usd=6)
    assert bought.winners.tolist() == [True, True, False, False]
    assert bought.payments_usd.tolist() == [3, 3, 0, 0]


def test_the_rule_the_budget_and_the_critical_asks():
    rng, sizes = np.random.default_rng(0), []
    for _ in range(200):
        asks, values, budget, most = random_market(rng)
        bought = buy(asks, values, budget_usd=budget, most=most)
        winners = np.flatnonzero(bought.winners)
        assert set(winners) == by_the_rule(asks, values, budget, most)
        assert bought.payments_usd.sum() <= budget * (1 + 1e-12)
        assert np.all(bought.payments_usd[winners] >= asks[winners]) and not bought.payments_usd[~bought.winners].any()
        for i in winners:
            for factor, wins in ((1 - 1e-9, True), (1 + 1e-9, False)):
                told = asks.copy()
                told[i] = bought.payments_usd[i] * factor
                assert (i in by_the_rule(told, values, budget, most)) == wins
        sizes.append(len(winners))
    assert {0, 1, 3} <= set(sizes)


def test_no_misreport_on_a_grid_pays():
    rng = np.random.default_rng(1)
    for _ in range(25):
        costs, values, budget, most = random_market(rng)
        honest = buy(costs, values, budget_usd=budget, most=most)
        gains = np.where(honest.winners, honest.payments_usd - costs, 0.0)
        for i, factor in itertools.product(np.flatnonzero(np.isfinite(costs)), np.geomspace(0.05, 20, 31)):
            told = costs.copy()
            told[i] *= factor
            sale = buy(told, values, budget_usd=budget, most=most)
            assert not sale.winners[i] or sale.payments_usd[i] - costs[i] <= gains[i] + 1e-9


def test_a_duplicated_client_is_paid_alike():
    bought = buy([1.0, 1.0, 1.5], [2.0, 2.0, 2.0], budget_usd=20)
    assert bought.winners.all() and bought.payments_usd[0] == bought.payments_usd[1]


def test_a_budget_that_buys_nobody_buys_nobody():
    bought = buy([2.0, 3.0], [1.0, 1.0], budget_usd=1.0)
    assert not bought.winners.any() and not bought.payments_usd.any()


@pytest.mark.parametrize(
    "asks, values, options, expected",
    [
        ([1.0], [1.0, 2.0], {}, "asks_usd 1, values 2"),
        ([-1.0], [1.0], {}, "asks_usd must be numbers of 0 or more"),
        ([np.nan], [1.0], {}, "asks_usd must be numbers of 0 or more"),
        ([1.0], [0.0], {}, "values must be above 0"),
        ([1.0], [1.0], dict(budget_usd=0.0), "budget_usd must be above 0"),
        ([1.0], [1.0], dict(most=0), "most must be above 0"),
    ],
)
def test_bad_input_is_refused(asks, values, options, expected):
    with pytest.raises(ValueError, match=expected):
        buy(asks, values, **dict(budget_usd=1.0) | options)
