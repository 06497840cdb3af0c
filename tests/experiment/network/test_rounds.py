"""Rounds over a network: ideal links, no links, unbiasedness, resuming, what is counted."""

import math

import jax
import numpy as np
import pytest

from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.network import rounds as network_rounds
from fmfl_jax.fed import selection
from fmfl_jax.transport.sparsify import top_k
from fmfl_jax.wireless import presets
from tests.experiment.toys import (
    CLIENTS,
    SIZES,
    assert_finite,
    assert_same_run,
    lossy,
    make_toy_job,
    toy_run,
    whole_and_resumed,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Three rounds without a network."""
    return toy_run(tmp_path_factory.mktemp("plain"), 3)


@pytest.mark.parametrize("aggregation", ["survivors", "unbiased", "last_delta"])
def test_an_ideal_link_is_plain_fedavg_bit_for_bit(aggregation, plain, tmp_path):
    over = toy_run(tmp_path / "air", 3, make_toy_job(presets.facts_20(num_clients=CLIENTS), aggregation=aggregation))
    jax.tree.map(np.testing.assert_array_equal, plain.state, over.state)
    for a, b in zip(plain.history[1:], over.history[1:]):
        assert a["loss"] == b["loss"] and b["participation"] == 1.0 and b["outage"] == 0.0
        assert b["uplink_bytes"] == 6 * 2e4 / 8 and b["energy_j"] > 0
    seconds = [record["seconds"] for record in over.history]
    assert seconds[0] == over.history[0]["base_delivery_s"] > 0 and np.all(np.diff(seconds) > 0)
    assert_finite(over.history)


@pytest.mark.parametrize("aggregation", ["survivors", "unbiased", "last_delta"])
def test_a_deadline_that_nobody_meets_leaves_the_model_as_it_was(aggregation, tmp_path):
    network = presets.facts_20(num_clients=CLIENTS, deadline_s=2e-3)
    result = toy_run(tmp_path, 2, make_toy_job(network, bits=1e8, aggregation=aggregation))
    assert np.all(np.asarray(result.state.params["w"]) == 0)
    for record in result.history[1:]:
        assert record["delivered"] == 0 and record["outage"] == 1.0 and "loss" not in record
        assert record["latency_s"] == pytest.approx(2e-3)
    assert_finite(result.history)


def test_devices_that_are_too_small_are_not_selected(tmp_path):
    able = np.arange(CLIENTS) % 2 == 0
    result = toy_run(tmp_path, 3, make_toy_job(presets.facts_20(num_clients=CLIENTS), able=able))
    assert any(record["cannot_hold"] > 0 for record in result.history[1:])
    for record in result.history[1:]:
        assert record["participation"] + record["cannot_hold"] == pytest.approx(1.0)
    assert not np.any(result.outcome.scheduled[~able])


def test_clients_out_of_reach_get_the_base_before_their_first_round_within_reach():
    """All clients walk: who holds no base takes no part, and every delivery costs time and bytes once."""
    network = presets.umi_20(
        num_clients=CLIENTS,
        mobility="random_waypoint",
        speed_mps=10.0,
        cell_radius_m=900.0,
        bs_power_dbm=20.0,
        max_uplink_s=5.0,
    )
    job = make_toy_job(network, bits=2e6)
    state, ids = network_rounds.start(job, 3), np.arange(CLIENTS)
    held, first, reached = state.holds_base, state, state.base_reached
    assert 0 < reached == held.sum() < CLIENTS
    for r in range(15):
        state, outcome = network_rounds.play_round(
            job, state, round=r, seed=3, client_ids=ids, num_examples=np.ones(CLIENTS, np.float32)
        )
        assert not np.any(outcome.scheduled & ~state.holds_base) and np.all(held <= state.holds_base)
        assert (state.base_delivery_s > 0) == (state.base_reached > 0) == bool(np.any(held < state.holds_base))
        found = network_rounds.record(job, state, outcome, ids)
        assert found["base_downlink_bytes"] == state.base_reached * job.base_bits / 8
        held, reached = state.holds_base, reached + state.base_reached
    assert reached == held.sum() > first.holds_base.sum()


@pytest.mark.parametrize("mode", ["static", "slots"])
def test_of_an_upload_that_is_cut_off_only_what_was_sent_is_counted(mode):
    whole, cut = (
        make_toy_job(
            presets.facts_20(num_clients=CLIENTS, scheduler="equal", wait_for=count, transfer_mode=mode),
            bits=1e6,
            rings=True,
        )
        for count in (None, 4)
    )
    sent = []
    for job in (whole, cut):
        state, outcome = network_rounds.play_round(
            job,
            network_rounds.start(job, 0),
            round=0,
            seed=0,
            client_ids=np.arange(CLIENTS),
            num_examples=np.ones(CLIENTS, np.float32),
        )
        sent.append(outcome)
    assert np.all(sent[0].delivered) and np.all(sent[0].uplink_bits == 1e6)
    lost = sent[1].scheduled & ~sent[1].delivered
    assert np.sum(lost) == 4 and np.all(sent[1].uplink_bits[~lost] == 1e6)
    share = sent[1].uplink_s / sent[0].uplink_s  # the same links, plan and fades
    np.testing.assert_allclose(sent[1].uplink_bits[lost], 1e6 * share[lost], rtol=1e-3)


def test_inverse_probability_weights_are_unbiased_and_the_survivors_mean_is_not():
    """Sum of weight x value over the denominators, in 1000 rounds of lossy links, against the mean with everybody."""
    job = make_toy_job(lossy(), aggregation="unbiased", rings=True)
    ids, examples = np.arange(CLIENTS), np.asarray([1, 2, 3, 4, 1, 2, 3, 4], np.float32)
    state = network_rounds.start(job, 0)
    values = np.arange(1, CLIENTS + 1) / CLIENTS  # the farther, the larger
    found, survivors = [], []
    for r in range(1000):
        state, outcome = network_rounds.play_round(job, state, round=r, seed=0, client_ids=ids, num_examples=examples)
        p = outcome.delivery_probability
        # Both rules of cohort_weights, written out.
        weights = np.where(outcome.delivered, examples / np.where(outcome.delivered, p, 1), 0)
        if r == 0:
            got, denominators, delivered = network_rounds.cohort_weights(job, outcome, ids, examples)
            np.testing.assert_allclose(got, weights, rtol=1e-6)
            np.testing.assert_array_equal(denominators, examples)
            np.testing.assert_array_equal(delivered, outcome.delivered)
        found.append(np.sum(weights * values) / examples.sum())
        arrived = examples * outcome.delivered
        if arrived.any():
            survivors.append(np.sum(arrived * values) / arrived.sum())
    target = np.sum(examples * values) / examples.sum()
    error = np.std(found) / math.sqrt(len(found))
    assert 0.2 < np.mean(p) < 0.95 and error < 0.1 * target
    assert abs(np.mean(found) - target) < 4 * error
    assert abs(np.mean(survivors) - target) > 5 * np.std(survivors) / math.sqrt(len(survivors))


@pytest.mark.parametrize(
    "codec, aggregation, selector",
    [
        (top_k(0.5), "unbiased", None),
        (None, "last_delta", None),
        (None, "survivors", selection.oort(6, np.float32(SIZES))),
        (None, "survivors", selection.deadline_aware(6, 0.5)),
    ],
    ids=["unbiased-topk", "last_delta", "oort", "deadline"],
)
def test_resumed_over_a_network_is_bit_identical(codec, aggregation, selector, tmp_path):
    job = make_toy_job(lossy(mobility="gauss_markov", speed_mps=3.0), aggregation=aggregation)
    whole, resumed = whole_and_resumed(lambda folder: toy_run(folder, 4, job, codec, selector), tmp_path, step=2)
    assert_same_run(whole, resumed)
    assert any(record["participation"] < 1 for record in whole.history[1:])


def test_the_network_must_have_the_datas_clients(tmp_path):
    with pytest.raises(ValueError, match="the network has 20 clients, the data 8"):
        toy_run(tmp_path, 1, make_toy_job(presets.facts_20()))


def test_the_timeline_adds_up_and_puts_the_slowest_first():
    job = make_toy_job(presets.tran(num_clients=CLIENTS))  # TDMA: they wait for the channel
    _, outcome = network_rounds.play_round(
        job,
        network_rounds.start(job, 0),
        round=0,
        seed=0,
        client_ids=np.arange(CLIENTS),
        num_examples=np.ones(CLIENTS, np.float32),
    )
    found = network_rounds.timeline(job, outcome)
    total = sum(np.asarray(found[phase]) for phase in ("downlink", "compute", "wait", "uplink"))
    assert np.all(np.diff(total) <= 1e-6) and total[0] == pytest.approx(found["latency_s"], rel=1e-4)
    assert sorted(found["client_ids"]) == list(range(CLIENTS)) and max(found["wait"]) > 0


def test_the_names_of_a_network_are_checked():
    with pytest.raises(ValueError, match="network=umi: expected none or one of umi_20"):
        NetworkConfig(network="umi")
    with pytest.raises(ValueError, match="deadline_s must be above 0"):
        NetworkConfig(network="umi_20", deadline_s=0.0)
    with pytest.raises(ValueError, match="aggregation=all: expected one of survivors"):
        NetworkConfig(network="umi_20", aggregation="all")
    with pytest.raises(ValueError, match="penetration=car needs a network with TR 38.901"):
        NetworkConfig(network="yang", penetration="car")
