"""Federations that pay their clients and value what they did: budgets, resuming, a planted flipper, refusals."""

import dataclasses

import numpy as np
import pytest

from fmfl_jax.data.classification import Rows, Task
from fmfl_jax.data.shards import shards_of
from fmfl_jax.experiment.build.contributions import Sent, coalition_game, totals
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.methods.aggregators import Median
from fmfl_jax.experiment.methods.algorithms import FedBuff, Scaffold
from fmfl_jax.experiment.methods.attacks import LabelFlip
from fmfl_jax.experiment.methods.contributions import ComFedSV, Gtg, LeaveOneOut
from fmfl_jax.experiment.methods.incentives import Auction, Contract
from fmfl_jax.experiment.methods.personalizations import Ditto
from fmfl_jax.experiment.methods.selections import Oort, Poisson
from fmfl_jax.fed.attacks import malicious_clients
from fmfl_jax.models.classifiers import linear_classifier
from tests.experiment.toys import assert_finite, assert_same_run, whole_and_resumed

NETWORK = NetworkConfig(network="chen", deadline_s=0.012, devices=("phone", "vehicle"))  # some packets are lost


def alike_task():
    """Six clients of 40 rows each, all of the same kind."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(8, 4))
    x = rng.normal(size=(640, 8)).astype(np.float32)
    y = (x @ teacher).argmax(axis=1).astype(np.int32)
    rows = shards_of(np.split(np.arange(240), 6))
    return linear_classifier(8, 4), Task(Rows(x[:240], y[:240]), rows, Rows(x[240:], y[240:]))


def run(directory, num_rounds, *, network=NETWORK, cohort_size=6, **options):
    config = CrossDeviceConfig(
        num_rounds=num_rounds,
        cohort_size=cohort_size,
        network=network,
        federation=FederationConfig(**options),
        seed=5,
        eval_every=2,
        checkpoint_every=2,
    )
    return run_cross_device(config, *alike_task(), directory)


def test_a_resumed_run_pays_the_same(tmp_path):
    settings = dict(incentive=Contract(), cohort_size=4)
    whole, resumed = whole_and_resumed(lambda folder: run(folder, 3, **settings), tmp_path, step=2)
    assert_same_run(whole, resumed)
    assert_finite(whole.history)
    assert whole.history[0]["least_ask_usd"] > 0
    for record in whole.history[1:]:
        assert record["recruited"] == len(record["payments_usd"]) <= 4
        assert record["cost_usd"] == pytest.approx(0.30 / 3.6e6 * record["energy_j"], rel=1e-5)


# Contributions.
FLIPPER = dict(attack=LabelFlip(), attack_fraction=1 / 6)


@pytest.fixture(scope="module")
def valued(tmp_path_factory):
    """{method: (history, contributions)} of six clients, one of which flips its labels."""
    found = {}
    for method in (Gtg(), LeaveOneOut(), ComFedSV(permutations=12)):
        folder = tmp_path_factory.mktemp("valued")
        cohort = 4 if isinstance(method, ComFedSV) else 6
        result = run(folder, 4, network=None, cohort_size=cohort, contribution=method, **FLIPPER)
        found[type(method)] = (result.history, totals(method, result.history, num_clients=6, seed=5))
    return found


def test_the_planted_flipper_did_harm_by_every_measure(valued):
    flipper = np.flatnonzero(malicious_clients(6, 1 / 6, 5))
    assert len(flipper) == 1
    for method, (_, values) in valued.items():
        assert values[flipper[0]] < 0 and np.argmin(values) == flipper[0], method
        assert np.sum(values > 0) >= 4, method


def test_shapley_values_of_a_round_sum_to_what_the_round_gained(valued):
    history, _ = valued[Gtg]
    assert sum(map(sum, (record["contribution"] for record in history[1:]))) == pytest.approx(
        history[0]["nll"] - history[-1]["nll"], abs=2e-4
    )


def test_everybody_is_there_in_comfedsvs_first_round_and_four_are_after(valued):
    history, _ = valued[ComFedSV]
    assert [len(record["clients"]) for record in history[1:]] == [6, 4, 4, 4]
    known = [len(record["coalitions"]) for record in history[1:]]
    assert known[0] > max(known[1:]) and min(known[1:]) > 0


def test_measuring_changes_nothing_and_a_resumed_run_measures_the_same(valued, tmp_path):
    settings = dict(network=None, **FLIPPER)
    plain = run(tmp_path / "plain", 4, **settings)
    history, _ = valued[Gtg]
    for a, b in zip(plain.history, history, strict=True):
        assert a.get("nll") == pytest.approx(b.get("nll"), abs=1e-5) and a.get("clients") == b.get("clients")
    run(tmp_path / "parts", 2, contribution=Gtg(), **settings)
    resumed = run(tmp_path / "parts", 4, contribution=Gtg(), **settings)
    assert [r.get("contribution") for r in resumed.history] == [r.get("contribution") for r in history]


def test_over_a_network_the_lost_contribute_nothing(tmp_path):
    result = run(tmp_path, 3, contribution=LeaveOneOut())
    lost = 0
    for record in result.history[1:]:
        assert sum(value != 0 for value in record["contribution"]) <= record["delivered"]
        lost += len(record["clients"]) - record["delivered"]
    assert lost > 0


def test_a_coalitions_model_is_the_mean_of_its_updates():
    rng = np.random.default_rng(0)
    updates = {"w": rng.normal(size=(4, 3)).astype(np.float32)}
    sent = Sent(updates, np.asarray([2, 0, 1, 3], np.float32), {"w": np.ones(3, np.float32)})
    seen = []
    game = coalition_game(sent, np.asarray([0, 2, 3]), lambda params: seen.append(params["w"]) or np.inf)
    assert game(np.asarray([True, False, True])) == -100.0  # a model that diverged is worth something finite
    np.testing.assert_allclose(seen[0], 1 - (2 * updates["w"][0] + 3 * updates["w"][3]) / 5, rtol=1e-6)
    game(np.zeros(3, bool))
    np.testing.assert_array_equal(seen[1], 1)


DP = DpConfig(clip=0.1, noise_multiplier=1.0)
REFUSED = [
    (dict(incentive=Auction(1.0)), dict(network=None), "incentive=auction needs a network"),
    (dict(incentive=Auction(1.0), algorithm=FedBuff()), {}, "incentive=auction with algorithm=fedbuff"),
    (dict(incentive=Contract(), selection=Oort()), {}, "incentive=contract with selection=oort"),
    (dict(incentive=Contract(), privacy=("dp",), dp=DP, selection=Poisson()), {}, "incentive=contract with privacy=dp"),
    (dict(incentive=Contract(), contribution=ComFedSV()), {}, "contribution=comfedsv with incentive"),
    (dict(contribution=Gtg(), privacy=("secure",)), {}, "contribution=gtg with privacy=secure"),
    (dict(contribution=Gtg(), algorithm=Scaffold()), {}, "contribution=gtg with algorithm=scaffold"),
    (dict(contribution=Gtg(), aggregator=Median()), {}, "contribution=gtg with aggregator=median"),
    (dict(contribution=Gtg(), personalization=Ditto(0.1)), {}, "contribution=gtg with personalization"),
    (dict(contribution=Gtg()), dict(server=ServerConfig(optimizer="fedadam")), "with server_optimizer=fedadam"),
    (
        dict(contribution=Gtg()),
        dict(network=dataclasses.replace(NETWORK, aggregation="unbiased")),
        "aggregation=unbiased with contribution=gtg",
    ),
    (dict(energy_usd_per_kwh=0.0), {}, "energy_usd_per_kwh=0.0: expected a price above 0"),
]


@pytest.mark.parametrize("federation, more, expected", REFUSED, ids=[expected for _, _, expected in REFUSED])
def test_what_makes_no_sense_is_refused(federation, more, expected):
    with pytest.raises(ValueError) as error:
        CrossDeviceConfig(**dict(network=NETWORK, federation=FederationConfig(**federation)) | more)
    assert expected in str(error.value) and "--" not in str(error.value)
