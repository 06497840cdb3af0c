"""Offers for a round: budgets, nobody below its cost, nobody better off by another story, chances as said."""

import itertools

import numpy as np
import pytest

from fmfl_jax.services.incentives.recruit import (
    Offers,
    auction_offers,
    contract_offers,
    posted_offers,
    stackelberg_offers,
    taken_on,
)

MECHANISMS = {
    "auction": lambda costs, **options: auction_offers(costs, np.ones(len(costs)), **options),
    "contract": contract_offers,
    "stackelberg": stackelberg_offers,
    "posted": posted_offers,
}


def random_costs(rng, n):
    costs = np.exp(rng.normal(size=n))
    costs[rng.random(n) < 0.15] = np.inf
    return costs


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_budget_holds_and_nobody_works_below_its_cost(name):
    rng, spent = np.random.default_rng(0), []
    for _ in range(40):
        costs, most = random_costs(rng, 12), int(rng.integers(2, 13))
        budget = float(np.exp(rng.normal(scale=1.5)) * 6)
        offers = MECHANISMS[name](costs, budget_usd=budget, most=most)
        assert np.all((0 <= offers.chance) & (offers.chance <= 1)) and offers.chance.sum() <= most * (1 + 1e-9)
        drawn = offers.chance > 0
        assert np.all(np.isfinite(costs[drawn])) and np.all(offers.payment_usd[drawn] >= costs[drawn] * (1 - 1e-9))
        mean = float(np.sum(offers.chance * offers.payment_usd))
        assert mean <= budget * (1 + 1e-9)
        spent.append(mean / budget)
    assert max(spent) == pytest.approx(1, rel=1e-6)
    if name == "stackelberg":
        assert min(spent) == pytest.approx(1)


def test_no_other_ask_pays_at_the_auction():
    rng = np.random.default_rng(1)
    for _ in range(8):
        costs, options = np.exp(rng.normal(size=5)), dict(budget_usd=float(rng.uniform(1, 10)), most=3)

        def gain(i, asks, costs=costs, options=options):
            offers = MECHANISMS["auction"](asks, **options)
            return offers.chance[i] * (offers.payment_usd[i] - costs[i])

        for i, factor in itertools.product(range(5), np.geomspace(0.1, 10, 15)):
            told = costs.copy()
            told[i] *= factor
            assert gain(i, told) <= gain(i, costs) + 1e-9


def test_the_posted_price_takes_on_as_many_as_any_price_could():
    rng = np.random.default_rng(2)
    for _ in range(30):
        costs, most, budget = random_costs(rng, 9), int(rng.integers(1, 10)), float(rng.uniform(0.1, 12))
        offers = posted_offers(costs, budget_usd=budget, most=most)
        prices = np.linspace(0.01, 12, 2000)  # at each the budget bounds how many
        possible = np.minimum(np.minimum(budget // prices, most), (costs[None] <= prices[:, None]).sum(axis=1))
        assert offers.chance.sum() >= possible.max() - 1e-9
        price = offers.payment_usd.max()
        assert np.all((offers.payment_usd > 0) == (costs <= price)) and offers.chance.sum() * price <= budget + 1e-9


def test_of_the_contract_the_efficient_work_more_and_keep_more():
    costs = np.geomspace(1, 8, 20)
    offers = contract_offers(costs, most=20, budget_usd=10.0)
    assert np.all(np.diff(offers.chance) <= 0) and offers.chance[0] > offers.chance[-1]
    kept = offers.chance * (offers.payment_usd - costs)
    assert np.all(np.diff(kept) <= 1e-12) and kept[-1] == pytest.approx(0, abs=1e-12)
    one_type = contract_offers(costs, most=20, budget_usd=10.0, num_types=1)
    assert np.ptp(one_type.chance) == 0 and one_type.payment_usd[0] == pytest.approx(8)


def test_without_a_budget_the_server_offers_what_serves_it():
    costs = np.geomspace(1, 8, 20)
    for name, low, high in (("contract", 0.3, 3.0), ("stackelberg", 3.0, 300.0)):
        few, many = (MECHANISMS[name](costs, most=20, value=value) for value in (low, high))
        assert 0 < few.chance.sum() < many.chance.sum() <= 20
        dear = MECHANISMS[name](1000 * costs, most=20, value=low)  # values are in mean costs
        np.testing.assert_allclose(dear.chance, few.chance, rtol=1e-5)
        np.testing.assert_allclose(dear.payment_usd, 1000 * few.payment_usd, rtol=1e-5)


def test_everybody_is_taken_on_as_often_as_its_chance_says():
    offers = Offers(np.asarray([0.0, 0.05, 0.4, 1.0, 0.75, 0.8]), np.zeros(6))
    rng = np.random.default_rng(3)
    drawn = np.asarray([taken_on(offers, rng) for _ in range(4000)])
    error = np.sqrt(offers.chance * (1 - offers.chance) / len(drawn))
    assert np.all(np.abs(drawn.mean(axis=0) - offers.chance) <= 4 * error)
    assert set(drawn.sum(axis=1)) == {3}  # the chances add up to 3
    assert not taken_on(Offers(np.zeros(3), np.zeros(3)), rng).any()


@pytest.mark.parametrize("name", MECHANISMS)
def test_where_nobody_can_take_part_nobody_is_taken_on(name):
    offers = MECHANISMS[name](np.full(3, np.inf), budget_usd=1.0, most=2)
    assert not offers.chance.any() and not offers.payment_usd.any()
    with pytest.raises(ValueError, match="costs_usd must be positive numbers"):
        MECHANISMS[name](np.asarray([1.0, 0.0]), budget_usd=1.0, most=2)


def test_one_client_alone_shares_no_reward():
    assert not stackelberg_offers(np.asarray([1.0, np.inf]), budget_usd=5.0, most=2).chance.any()
