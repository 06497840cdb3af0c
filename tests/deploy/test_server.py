"""Rounds whose clients stand on nodes against the simulator's, and what goes wrong between them."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from fmfl_jax.deploy.envelope import Envelope
from fmfl_jax.deploy.server import refusals, secagg_plus_refusals
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.methods.aggregators import FLTrust, Median
from fmfl_jax.experiment.methods.algorithms import FedBuff, FedIt, FedProx, FlexLora, Flora, Scaffold
from fmfl_jax.experiment.methods.attacks import SignFlip
from fmfl_jax.experiment.methods.codecs import Qsgd, TopK
from fmfl_jax.experiment.methods.personalizations import Ditto
from fmfl_jax.experiment.methods.selections import Poisson
from tests.deploy.links import Losing, nearby
from tests.experiment.toys import llama_run, llama_settings, small_task

FED_ADAM = ServerConfig(optimizer="fedadam", learning_rate=0.01)
DP = FederationConfig(privacy=("dp",), dp=DpConfig(clip=0.1, noise_multiplier=0.5), selection=Poisson())
SCAFFOLD = FederationConfig(algorithm=Scaffold())


@pytest.fixture(autouse=True)
def one_device(only_devices):
    only_devices(1)


def small_run(directory, elsewhere=None, *, num_rounds=3, federation=FederationConfig(), **settings):
    fields = {"cohort_size": 4, "seed": 5, "eval_every": 1, "checkpoint_every": 1} | settings
    config = CrossDeviceConfig(num_rounds=num_rounds, federation=federation, **fields)
    return run_cross_device(config, *small_task(6), directory, elsewhere=elsewhere)


def assert_close(a, b):
    """The server's whole state to 1e-6, and the records; payloads to the byte that holds their last bits."""
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-6)
    jax.tree.map(close, a.state._asdict(), b.state._asdict())
    for x, y in zip(a.history[1:], b.history[1:], strict=True):
        assert x["clients"] == y["clients"] and x["counted_clients"] == y["counted_clients"]
        close(x.get("loss", 0), y.get("loss", 0))
        assert 0 <= y.get("payload_bits", 0) - x.get("payload_bits", 0) < 8
        assert y["silent"] == [] and y["dropped"] == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"server": FED_ADAM},
        {"federation": SCAFFOLD},
        {"federation": FederationConfig(aggregator=Median(), uplink=TopK(0.2))},
        {"federation": DP},
        {"execution": "steps"},
    ],
    ids=["fedadam", "scaffold", "median-topk", "dp", "steps"],
)
def test_small_models_end_as_in_the_simulator(settings, tmp_path):
    here = small_run(tmp_path / "here", **settings)
    there = small_run(tmp_path / "there", nearby(tmp_path / "nodes"), **settings)
    assert_close(here, there)


@pytest.mark.parametrize(
    "federation",
    [
        FederationConfig(algorithm=FedProx(0.1), uplink=Qsgd(16, coding="elias")),
        FederationConfig(algorithm=FedIt(), aggregator=FLTrust()),
        FederationConfig(algorithm=FlexLora(), lora_ranks=(2, 4)),
        FederationConfig(algorithm=Flora()),
    ],
    ids=["fedprox-qsgd", "fedit-fltrust", "flexlora", "flora"],
)
def test_language_models_end_as_in_the_simulator(federation, tmp_path):
    config = llama_settings(federation)
    config = dataclasses.replace(config, rounds=dataclasses.replace(config.rounds, num_rounds=2))
    here = llama_run(config, tmp_path / "here")
    there = llama_run(config, tmp_path / "there", elsewhere=nearby(tmp_path / "nodes", num_nodes=3))
    assert_close(here, there)


def test_a_node_that_falls_silent_comes_back_and_error_feedback_owes_what_was_lost(tmp_path):
    """Against the simulator with the same update lost: its cohort says who is delivered."""
    lines = []

    def spoil(head, node, answer):
        return None if head["kind"] == "train" and head["round"] == 1 and node == 1 else answer

    federation = FederationConfig(uplink=TopK(0.1))
    settings = {"cohort_size": 6, "federation": federation}
    there = small_run(tmp_path / "there", nearby(tmp_path / "nodes", spoil=spoil, say=lines.append), **settings)
    records = there.history[1:]
    assert [r["silent"] for r in records] == [[], [1, 3, 5], []]
    assert [r["counted_clients"] for r in records] == [6, 3, 6]
    assert any("round 2: 3 of 6 counted" in line and "client 5 was silent" in line for line in lines)

    lost = iter([[], [1, 3, 5], []])
    here = small_run(tmp_path / "here", lambda work: work._replace(schedule=Losing(work.schedule, lost)), **settings)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), here.state.params, there.state.params)


def test_nan_truncated_and_foreign_messages_are_dropped_by_name(tmp_path):
    def spoil(head, node, answer):
        if head["kind"] != "train":
            return answer
        fields, blobs = dict(answer.head["clients"]), dict(answer.blobs)
        for client in blobs:
            if client == "0":
                blobs[client] = blobs[client][:-1]
            if client == "1":
                blobs[client] = b"\xff" + blobs[client][1:]
            if client == "2":
                fields[client] = fields[client] | {"metrics": {"loss": float("nan")}}
            if client == "3":
                fields[client] = fields[client] | {"metrics": {"los": 1.0}}
        return Envelope({"clients": fields}, blobs)

    result = small_run(tmp_path / "there", nearby(tmp_path / "nodes", spoil=spoil), num_rounds=1, cohort_size=6)
    record = result.history[1]
    assert sorted(record["dropped"]) == ["0", "1", "2", "3"] and record["arrived"] == [4, 5]
    assert "truncated" in record["dropped"]["0"] or "payload" in record["dropped"]["0"]
    assert record["dropped"]["2"] == "its update is not finite" and record["dropped_clients"] == 1
    assert record["counted_clients"] == 2
    json.dumps(result.history, allow_nan=False)


def test_server_and_nodes_stopped_anywhere_end_alike(tmp_path):
    """The server dies after a round was trained and before it is kept: nodes go back with it."""
    whole = small_run(tmp_path / "whole", nearby(tmp_path / "nodes"), num_rounds=4, federation=SCAFFOLD)
    asked = itertools.count()

    def dies(head, node, answer):
        if head["kind"] == "train" and next(asked) == 5:  # the last node of the third round has trained
            raise KeyboardInterrupt
        return answer

    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "part", nearby(tmp_path / "again", spoil=dies), num_rounds=4, federation=SCAFFOLD)
    part = small_run(tmp_path / "part", nearby(tmp_path / "again"), num_rounds=4, federation=SCAFFOLD)
    jax.tree.map(np.testing.assert_array_equal, whole.state, part.state)


def test_a_client_that_lost_its_state_is_dropped_by_name(tmp_path):
    small_run(tmp_path / "run", nearby(tmp_path / "nodes"), num_rounds=1, cohort_size=6, federation=SCAFFOLD)
    result = small_run(tmp_path / "run", nearby(tmp_path / "new"), num_rounds=2, cohort_size=6, federation=SCAFFOLD)
    assert "client 0: its state on this node is of round 0" in result.history[2]["dropped"]["0"]


@pytest.mark.parametrize(
    ("federation", "network", "says"),
    [
        (FederationConfig(), NetworkConfig(network="umi_20"), "network=umi_20 needs the simulator"),
        (FederationConfig(attack=SignFlip(2.0)), None, "attack=sign_flip needs the simulator"),
        (FederationConfig(algorithm=FedBuff()), None, "algorithm=fedbuff needs the simulator"),
        (FederationConfig(personalization=Ditto(0.1)), None, "personal models need"),
        (SCAFFOLD, None, None),
    ],
)
def test_what_needs_the_simulator_is_refused_by_name(federation, network, says):
    found = list(refusals(federation, network))
    assert found == [] if says is None else len(found) == 1 and says in found[0]


def test_secagg_plus_is_refused_without_secure_and_with_noise_for_another_fixed_point():
    assert ["belongs to privacy=secure" in found for found in secagg_plus_refusals(FederationConfig())] == [True]
    noisy = dataclasses.replace(DP, privacy=("secure", "dp"))
    assert ["with privacy=dp" in found for found in secagg_plus_refusals(noisy)] == [True]
    assert list(secagg_plus_refusals(FederationConfig(privacy=("secure",)))) == []
