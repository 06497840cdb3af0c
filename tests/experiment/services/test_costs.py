"""What requests cost, by hand; who serves them in an outage."""

import dataclasses

import pytest

from fmfl_jax.experiment.services import costs
from fmfl_jax.experiment.services.arm import with_fm_figures
from fmfl_jax.experiment.services.config import PlacementConfig
from fmfl_jax.experiment.services.costs import BACKHAUL, NODES, RADIO, FmRound, Request
from fmfl_jax.services.placement import ModelSize, RequestSize

MODEL = ModelSize(num_params=1e9, weight_bytes=1e9)
REQUEST = Request(10, RequestSize(prompt_tokens=100, output_tokens=0, up_bits=8000.0, down_bits=64.0))


def served(config, up, cached, asker="server"):
    return costs.ask(config, MODEL, REQUEST, asker=asker, up=up, cached=cached)


def test_the_cloud_by_hand():
    found = served(PlacementConfig(placement="cloud"), True, False)
    compute_s = 2 * 1e9 * 100 * 10 / NODES["cloud"].compute_flops  # above 1e9 / 3.35e12
    bits = 10 * 8064.0
    assert found.served == "live" and found.placement == "cloud" and found.texts == 10
    assert found.seconds == pytest.approx(bits / 1e9 + 0.050 + compute_s)
    assert found.joules == pytest.approx(700 * compute_s + 1e-8 * bits)
    assert found.price == pytest.approx(4 / 3600 * compute_s + 0.05 / 8e9 * bits)
    assert (found.bytes_up, found.bytes_down) == (10_000, 80)


def test_a_client_reaches_the_cloud_over_both_links_and_its_own_model_over_none():
    link = costs.path("client", "cloud")
    assert link is not None and link.rate_bps == RADIO.rate_bps and link.rtt_s == pytest.approx(0.060)
    assert link.energy_j_per_bit == pytest.approx(RADIO.energy_j_per_bit + BACKHAUL.energy_j_per_bit)
    found = served(PlacementConfig(placement="client"), True, False, asker="client")
    assert found.bytes_up == found.bytes_down == found.price == 0
    assert found.seconds == pytest.approx(2 * 1e9 * 1000 / 4e12)


def test_live_then_cache_then_fallback_then_none():
    cloud = PlacementConfig(placement="cloud", ask_every_round=True)
    assert served(cloud, True, True).served == "live"
    assert served(cloud, False, True).served == "cached"
    assert served(cloud, False, False).served == "none"
    backed = PlacementConfig(placement="cloud", fallback="edge")
    assert served(backed, False, False).placement == "edge" and served(backed, False, False).served == "fallback"
    assert served(backed, True, True) == FmRound("cached")  # once asked, never again


def test_an_answer_that_does_not_come_costs_its_timeout_whatever_comes_instead():
    config = PlacementConfig(placement="cloud", fallback="edge", ask_every_round=True, timeout_s=2.5)
    at_once = served(PlacementConfig(placement="edge"), True, False)
    waited = served(config, False, False)
    assert waited.waited_s == 2.5 and waited.seconds == pytest.approx(2.5 + at_once.seconds)
    assert waited.joules == pytest.approx(50 * 2.5 + at_once.joules) and waited.bytes_up == at_once.bytes_up
    assert served(config, False, True) == FmRound("cached", seconds=2.5, joules=125.0, waited_s=2.5)
    client = served(dataclasses.replace(config, fallback=None), False, False, asker="client")
    assert client == FmRound("none", seconds=2.5, joules=2.5, waited_s=2.5)
    assert served(config, True, True).waited_s == 0


def test_a_broadcast_is_received_by_all_and_takes_its_time_once():
    asked = served(PlacementConfig(), True, False)
    found = costs.with_broadcast(asked, 2e6, 5)
    assert found.seconds == pytest.approx(asked.seconds + 2e6 / 20e6 + 0.010)
    assert found.joules == pytest.approx(asked.joules + 5 * 2e6 * 1e-7)
    assert found.bytes_down == asked.bytes_down + 5 * 2e6 / 8


def test_clients_that_compute_themselves_wait_side_by_side():
    found = costs.at_all_clients(MODEL, REQUEST, 3)
    compute_s = 2 * 1e9 * 100 * 10 / NODES["client"].compute_flops
    assert found.seconds == pytest.approx(compute_s) and found.joules == pytest.approx(3 * 8 * compute_s)
    assert found.texts == 30 and found.bytes_up == found.bytes_down == 0


def test_the_server_has_answers_from_the_first_round_that_the_way_is_up(monkeypatch):
    monkeypatch.setattr(costs, "way_up", lambda config, n, seed: [False, False, True, False])
    config = PlacementConfig(placement="cloud", mean_down_rounds=1.0, mean_up_rounds=1.0)
    there, rounds = costs.server_requests(config, MODEL, REQUEST, num_rounds=4, first_round=1, seed=0)
    assert there.tolist() == [False, False, True, True]
    assert [found.served for found in rounds] == ["", "none", "live", "cached"]


def test_clients_wait_side_by_side_and_pay_together(monkeypatch):
    monkeypatch.setattr(costs, "way_up", lambda config, n, seed: [True, True, False, True])
    nothing = REQUEST._replace(num_texts=0)
    answered, total = costs.client_requests(PlacementConfig(), MODEL, [REQUEST, REQUEST, REQUEST, nothing], seed=0)
    one = served(PlacementConfig(), True, False, asker="client")
    assert answered.tolist() == [True, True, False, False]
    assert total.seconds == max(one.seconds, 1.0) and total.texts == 20  # the third waited for its timeout
    assert total.joules == pytest.approx(2 * one.joules + 1.0) and total.waited_s == 1.0


def test_the_record_has_the_sum_of_network_and_model():
    rounds = (FmRound("live", 2.0, 3.0, 10.0, 5.0, 0.5, 7, "edge"), FmRound("cached"))
    history = [{"round": 0}, {"round": 1, "seconds": 1.0, "joules": 4.0}, {"round": 2, "seconds": 3.0, "joules": 5.0}]
    found = with_fm_figures(history, rounds)
    assert [r["total_seconds"] for r in found] == [0.0, 3.0, 5.0]
    assert [r["total_joules"] for r in found] == [0.0, 7.0, 8.0]
    assert found[1]["fm_bytes"] == 15.0 and found[1]["fm_served"] == "live" and found[2]["fm_served"] == "cached"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "moon"}, "placement=moon: expected one of cloud, edge, client"),
        ({"fallback": "edge"}, "fallback=edge is the placement itself"),
        ({"mean_up_rounds": 0.0}, "outage=0:0: expected UP above 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        PlacementConfig(**changes)
