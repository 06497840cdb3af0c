"""Rounds whose clients are taken on and paid, without any training: budgets, what is recorded, replays, refusals."""

import dataclasses

import numpy as np
import pytest

from fmfl_jax.experiment.loop.market import J_PER_KWH, Market, Recruits, payment_columns
from fmfl_jax.experiment.loop.participation import CohortSchedule
from fmfl_jax.experiment.methods.incentives import Auction, Contract, MarketInputs, Posted, Stackelberg
from fmfl_jax.experiment.network import rounds as network_rounds
from fmfl_jax.fed import selection
from fmfl_jax.wireless import presets
from tests.experiment.toys import CLIENTS, SIZES, lossy, make_toy_job

COHORT, PRICE = 5, 3.0  # USD a joule
COMPUTE_J = np.geomspace(1e-4, 4e-4, CLIENTS, dtype=np.float32)
MECHANISMS = [Auction, Contract, Stackelberg, Posted]


def make_job(network=None, **options):
    return dataclasses.replace(make_toy_job(network or lossy(), **options), compute_j=COMPUTE_J)


def make_schedule(incentive, job, **options):
    market = Market(offers=incentive.make(MarketInputs(COHORT, SIZES / SIZES.mean())), usd_per_j=PRICE, name="it")
    return CohortSchedule(
        selector=selection.uniform(COHORT), sizes=np.float32(SIZES), seed=3, job=job, market=market, **options
    )


def expected(job, state):
    return network_rounds.expected_j(
        job, state.network, round=0, seed=3, cohort_size=COHORT, num_examples=np.float32(SIZES)
    )


def play(schedule, state, rounds):
    """(state, records as the loop writes them) of these rounds."""
    history = []
    for r in rounds:
        state, drawn = schedule.draw(state, r)
        history.append({"round": r + 1, "clients": drawn.client_ids.tolist()} | drawn.record)
    return state, history


@pytest.mark.parametrize("make", MECHANISMS)
def test_payments_keep_the_budget_and_a_replayed_run_pays_the_same(make):
    job = make_job()
    schedule = make_schedule(make(budget_usd=6e-2), job)
    start, opening = schedule.start()
    assert 0 < opening["least_ask_usd"] < opening["most_ask_usd"] < np.inf
    state, history = play(schedule, start, range(12))
    paid = np.asarray([record["paid_usd"] for record in history])
    highest = max(max(record["payments_usd"], default=0) for record in history)
    if make in (Auction, Posted):
        assert paid.max() <= 6e-2 * (1 + 1e-9)
    else:  # a round has at most one client more or less than the mean
        assert np.all(np.abs(paid - 6e-2) <= highest * (1 + 1e-9)) and paid.mean() == pytest.approx(6e-2, rel=0.15)
    for record in history:
        assert record["recruited"] == len(record["clients"]) == len(record["payments_usd"]) <= COHORT
        assert record["cost_usd"] == pytest.approx(PRICE * record["energy_j"], rel=1e-6)
        assert record["client_surplus_usd"] == pytest.approx(record["paid_usd"] - record["cost_usd"], abs=1e-12)
    columns = payment_columns(history)
    assert columns["total_paid_usd"] == pytest.approx(paid.sum())
    resumed, _ = schedule.replay(schedule.start()[0], history[:7])
    _, again = play(schedule, resumed, range(7, 12))
    assert again == history[7:]


def test_what_clients_ask_is_what_they_then_spend():
    """Where no packet is lost and everybody has an equal share of the band, to rounding."""
    job = make_job(presets.facts_20(num_clients=CLIENTS, scheduler="equal"), rings=True)
    schedule = make_schedule(Auction(10.0), job)
    state, opening = schedule.start()
    asked = expected(job, state)
    assert opening["least_ask_usd"] == pytest.approx(PRICE * asked.min())
    _, drawn = schedule.draw(state, 0)
    ids = drawn.client_ids
    assert len(ids) == COHORT
    np.testing.assert_allclose(drawn.outcome.energy_j[ids], asked[ids], rtol=1e-4)
    assert drawn.record["least_surplus_usd"] > 0


def test_the_auction_takes_who_is_cheap_for_its_data_and_a_posted_price_anybody():
    job = make_job(presets.facts_20(num_clients=CLIENTS, scheduler="equal"), rings=True)
    chosen, state = {}, None
    for incentive in (Auction(2e-3), Posted(0.1)):
        schedule = make_schedule(incentive, job)
        state, _ = schedule.start()
        _, history = play(schedule, state, range(8))
        chosen[type(incentive)] = [tuple(record["clients"]) for record in history]
    (winners,) = set(chosen[Auction])  # nobody moves and nothing fades: the same in every round
    assert 0 < len(winners) < COHORT
    assert set(winners) == set(np.argsort(expected(job, state) / SIZES)[: len(winners)])
    assert len(set(chosen[Posted])) > 1


def test_who_cannot_hold_the_job_is_not_asked_and_who_is_not_scheduled_is_not_paid():
    able = np.arange(CLIENTS) % 2 == 0
    schedule = make_schedule(Auction(1.0), make_job(able=able))
    _, history = play(schedule, schedule.start()[0], range(3))
    assert {client for record in history for client in record["clients"]} == {0, 2, 4, 6}
    recruits = Recruits(np.asarray([0, 2, 3]), np.asarray([1.0, 2.0, 3.0]))
    outcome = schedule.draw(schedule.start()[0], 0)[1].outcome
    outcome = outcome._replace(scheduled=np.arange(CLIENTS) % 3 == 0, energy_j=np.float32([0.1, 0, 0, 1.5, 0, 0, 0, 0]))
    found = schedule.market.figures(recruits, outcome)
    assert found["payments_usd"] == [1.0, 0.0, 3.0] and found["paid_usd"] == 4.0
    assert found["least_surplus_usd"] == pytest.approx(3 - 1.5 * PRICE)


def test_analog_uploads_have_a_price_too():
    job = make_job(presets.facts_20(num_clients=CLIENTS, scheduler="equal"), rings=True, aggregation="over_the_air")
    schedule = make_schedule(Auction(10.0), job)
    state, _ = schedule.start()
    _, drawn = schedule.draw(state, 0)
    asked = expected(job, state)
    np.testing.assert_allclose(drawn.outcome.energy_j[drawn.client_ids], asked[drawn.client_ids], rtol=1e-5)


@pytest.mark.parametrize("make", [Auction, Posted])
def test_a_budget_that_buys_nobody_is_said_before_the_first_round(make):
    with pytest.raises(ValueError, match="incentive=it takes on nobody: 8 clients ask .* to .* USD for a round"):
        make_schedule(make(1e-9), make_job()).start()


def test_a_network_without_anybody_to_take_on_is_said():
    with pytest.raises(ValueError, match="no client is in reach with a device that can hold the job"):
        make_schedule(Auction(1.0), make_job(able=np.zeros(CLIENTS, bool))).start()
    with pytest.raises(ValueError, match="for the energy of a network's round"):
        make_schedule(Auction(1.0), None)


def test_without_a_market_there_are_no_columns_and_a_kwh_has_its_joules():
    assert payment_columns([{"round": 1}]) == {} and J_PER_KWH == 1000 * 3600
