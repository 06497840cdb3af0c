"""Small models in the round loop: resume, devices, 10,000 clients, attacks, networks, models of the clients' own."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fmfl_jax.data.batches import poisson_cohort
from fmfl_jax.data.classification import image_task, linear_task
from fmfl_jax.experiment.build.classification import (
    hold_out_rows,
    local_steps,
    make_learner,
    make_source,
    make_task,
    rows_of,
)
from fmfl_jax.experiment.build.federation import make_federation
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.methods.aggregators import Mean, Median
from fmfl_jax.experiment.methods.algorithms import FedBuff, Scaffold
from fmfl_jax.experiment.methods.attacks import LabelFlip, SignFlip
from fmfl_jax.experiment.methods.codecs import TopK
from fmfl_jax.experiment.methods.personalizations import Apfl, Ditto, FedPer
from fmfl_jax.experiment.methods.selections import Deadline, Oort, Poisson
from fmfl_jax.experiment.report.cross_device import write_report
from fmfl_jax.fed.algorithms.fed_opt import fed_opt
from fmfl_jax.fed.attacks import malicious_clients
from fmfl_jax.fed.core.cohort import put_on_devices
from fmfl_jax.fed.core.execution import execution_of, pmap_round
from fmfl_jax.fed.core.round import make_round
from fmfl_jax.fed.core.types import Cohort
from fmfl_jax.models.classifiers import classification_loss, linear_classifier, small_cnn
from fmfl_jax.parallel import replicate
from tests.experiment.toys import assert_finite, assert_same_run, small_task, whole_and_resumed

FED_ADAM = ServerConfig(optimizer="fedadam", learning_rate=0.01)
IDEAL = NetworkConfig(network="facts_20")
LOSSY = NetworkConfig(network="chen", deadline_s=2.0)  # some packets are lost


def tiny_images():
    """Twelve clients of 8 x 8 images, and a CNN of a few hundred parameters."""
    task = image_task(12, num_rows=240, alpha=1.0, image_size=8, num_test=50)
    return small_cnn(8, 10, widths=(2, 3)), task


def federated(network=None, **options):
    return dict(network=network, federation=FederationConfig(**options))


def run(task, directory, num_rounds, **settings):
    fields = dict(cohort_size=7, seed=5, eval_every=2, checkpoint_every=2)
    return run_cross_device(CrossDeviceConfig(num_rounds=num_rounds, **fields | settings), *task, directory)


RESUMED = {
    "fedadam-topk": (small_task, dict(server=FED_ADAM, federation=FederationConfig(uplink=TopK(0.2)))),
    "scaffold-vmap": (small_task, federated(algorithm=Scaffold()) | dict(execution="vmap")),
    "dp": (
        small_task,
        federated(
            privacy=("dp",),
            selection=Poisson(),
            dp=DpConfig(clip=0.3, noise_multiplier=0.3, adaptive_quantile=0.5),
        ),
    ),
    "ditto-network-oort": (small_task, federated(LOSSY, personalization=Ditto(0.5), selection=Oort())),
    "apfl-network-deadline": (
        small_task,
        federated(LOSSY, personalization=Apfl("learned"), selection=Deadline()),
    ),
    "fedbuff-network": (small_task, federated(LOSSY, algorithm=FedBuff(3))),
    "secure-network": (small_task, federated(LOSSY, privacy=("secure",))),
    "median-attack-steps": (
        small_task,
        dict(execution="steps", federation=FederationConfig(aggregator=Median(), attack=SignFlip(3.0))),
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_after_two_rounds_of_four_bit_for_bit(name, tmp_path, only_devices):
    """With all that is kept: the server's optimizer, error feedback, controls, clipping norms, models of the clients'
    own, what the selector learned, the network, and who is on the way to an asynchronous server."""
    make, settings = RESUMED[name]
    if settings.get("execution") == "steps":
        only_devices(2)
    task = make()
    whole, resumed = whole_and_resumed(lambda folder: run(task, folder, 4, **settings), tmp_path, step=2)
    assert_same_run(whole, resumed)
    assert_finite(whole.history)
    last, federation = whole.history[-1], CrossDeviceConfig(**settings).federation
    assert [record["round"] for record in whole.history] == list(range(5)) and last["nll"] != whole.history[0]["nll"]
    assert ("client_accuracy_mean" in last) == (federation.personalization is not None)
    buffered = isinstance(federation.algorithm, FedBuff)
    assert ("sim_seconds" in last) == buffered
    assert ("joules" in last) == (settings.get("network") is not None and not buffered)
    assert ("secure_bytes_up" in last) == ("secure" in federation.privacy)


@pytest.mark.parametrize(
    "options",
    [dict(personalization=Ditto(0.5)), dict(aggregator=Median(), uplink=TopK(0.2))],
    ids=["ditto", "median-topk"],
)
def test_over_an_ideal_network_nothing_changes_bit_for_bit(options, tmp_path):
    plain = run(small_task(), tmp_path / "plain", 2, **federated(**options))
    over = run(small_task(), tmp_path / "network", 2, **federated(IDEAL, **options))
    jax.tree.map(np.testing.assert_array_equal, plain.state, over.state)
    for a, b in zip(plain.history[1:], over.history[1:], strict=True):
        assert b["participation"] == 1.0 and b["seconds"] > 0 and b["joules"] > 0
        shared = (a.keys() & b.keys()) - {"round_s"}
        assert {"loss", "clients", "uplink_bytes", "downlink_bytes"} <= shared
        assert {name: a[name] for name in shared} == {name: b[name] for name in shared}


def test_a_network_that_loses_updates_changes_the_model_and_is_paid_for(tmp_path):
    ideal = run(small_task(), tmp_path / "ideal", 3, **federated(IDEAL))
    lossy = run(small_task(), tmp_path / "lossy", 3, **federated(dataclasses.replace(LOSSY, deadline_s=0.012)))
    delivered = [record["participation"] for record in lossy.history[1:]]
    assert 0 < np.mean(delivered) < 1
    assert np.any(np.asarray(ideal.state.params["w"]) != np.asarray(lossy.state.params["w"]))
    assert all(record["latency_s"] <= 0.012 * (1 + 1e-6) for record in lossy.history[1:])


def test_secure_aggregation_is_the_plain_mean(tmp_path):
    plain = run(small_task(), tmp_path / "plain", 2)
    secure = run(small_task(), tmp_path / "secure", 2, **federated(privacy=("secure",)))
    for name, value in plain.state.params.items():
        np.testing.assert_allclose(secure.state.params[name], value, atol=2e-5)
    assert all(record["secure_survivors"] == 7 for record in secure.history[1:])


def test_fed_per_shares_all_but_the_last_layer_and_clients_start_alike(tmp_path):
    task = tiny_images()
    result = run(task, tmp_path, 2, eval_every=1, execution="scan", **federated(personalization=FedPer(1)))
    assert sorted(result.state.params) == ["bias1", "bias2", "conv1", "conv2"]
    first, *_, last = result.history
    assert first["client_accuracy_mean"] == first["client_shared_accuracy_mean"]
    assert last["client_accuracy_mean"] != last["client_shared_accuracy_mean"]
    shared_bits = sum(x.size for x in jax.tree.leaves(result.state.params)) * 32
    assert last["uplink_bytes"] == 7 * shared_bits / 8


def test_what_a_run_cannot_serve_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cohort_size is 6, but there are 5 clients"):
        run_cross_device(CrossDeviceConfig(cohort_size=6), *small_task(5), tmp_path)


def cohort_of(config, task, ids):
    """The round's cohort of these clients, by hand."""
    source = make_source(config, task.shards)
    batches, num_steps = source.batches(ids, 0)
    return Cohort(ids, np.float32(source.sizes[ids]), batches, num_steps=num_steps)


def test_memory_is_the_rows_and_one_cohort():
    """10,000 clients: a device needs the rows of all, once, and little more."""
    model, task = linear_classifier(4, 10), linear_task(10_000, num_features=4)
    config = CrossDeviceConfig(cohort_size=20)
    start = model.init(jax.random.key(0))
    parts = make_federation(
        config.federation,
        config.rounds(local_steps(config, task.shards)),
        config.server,
        make_learner(model, start, config.client_lr),
        sizes=task.shards.sizes,
        execution=execution_of("scan"),
    ).round
    cohort = put_on_devices(cohort_of(config, task, np.arange(0, 10_000, 500, dtype=np.int32)), clients_per_pass=1)
    frozen, state = replicate(rows_of(config, task), copy=False), replicate(parts.init(start, 0))
    compiled = pmap_round(parts).lower(state, frozen, cohort).compile()
    memory = compiled.memory_analysis()
    rows = task.train.x.nbytes + task.train.y.nbytes
    assert rows > 10e6
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < rows + 200_000
    before = np.asarray(state.params["w"])
    state, metrics, _ = compiled(state, frozen, cohort)
    assert np.any(np.asarray(state.params["w"]) != before) and np.isfinite(metrics["loss"])


def test_a_robust_aggregator_stands_an_attack(tmp_path):
    accuracy = {}
    for aggregator in (Mean(), Median()):
        config = CrossDeviceConfig(
            num_rounds=30,
            cohort_size=16,
            eval_every=30,
            client_lr=0.3,
            federation=FederationConfig(aggregator=aggregator, attack=SignFlip(20.0), attack_fraction=0.25),
        )
        name = type(aggregator).__name__
        accuracy[name] = run_cross_device(config, *small_task(), tmp_path / name).history[-1]["accuracy"]
    assert accuracy["Median"] > accuracy["Mean"] + 0.1


def test_flipped_labels_are_those_of_the_malicious_clients_rows():
    _, task = small_task()
    config = CrossDeviceConfig(federation=FederationConfig(attack=LabelFlip(), attack_fraction=0.3))
    y, malicious = rows_of(config, task)["y"], malicious_clients(30, 0.3, config.seed)
    assert malicious.sum() == 9
    for client in range(30):
        rows = task.shards.rows[task.shards.starts[client] : task.shards.starts[client + 1]]
        expected = 9 - task.train.y[rows] if malicious[client] else task.train.y[rows]
        np.testing.assert_array_equal(y[rows], expected)


def test_held_out_rows_are_nobodys_training_rows():
    _, task = small_task()
    train, held = hold_out_rows(task.shards, 0.2, most=5, seed=1)
    for client in range(30):
        of = lambda shards: set(shards.rows[shards.starts[client] : shards.starts[client + 1]].tolist())
        assert of(train) | of(held) == of(task.shards) and not of(train) & of(held)
        assert 1 <= len(of(held)) <= 5 and of(train)
    again = hold_out_rows(task.shards, 0.2, most=5, seed=2)[1]
    assert len(again.rows) == len(held.rows) and np.any(again.rows != held.rows)
    with pytest.raises(ValueError, match="client 0 has a single row"):
        hold_out_rows(task.shards._replace(starts=np.asarray([0, 1, 5])), 0.2, most=5, seed=1)


def test_private_cohorts_are_poissons_and_epsilon_grows(tmp_path):
    """Without noise and with a clip nobody reaches, DP-FedAvg is the sum over the expected cohort: a plain loop."""
    model, task = small_task()
    federation = FederationConfig(privacy=("dp",), selection=Poisson(), dp=DpConfig(clip=1e6, noise_multiplier=0.0))
    config = CrossDeviceConfig(num_rounds=1, cohort_size=7, federation=federation, seed=2)
    result = run_cross_device(config, model, task, tmp_path / "free")
    assert "epsilon" not in result.history[-1]
    ids, start = poisson_cohort(30, 7 / 30, round=0, seed=2), model.init(jax.random.key(2))
    learner = make_learner(model, start, config.client_lr)
    parts = make_round(
        fed_opt(jax.value_and_grad(classification_loss(model)), optax.sgd(config.client_lr)),
        execution=execution_of("scan"),
    )
    one, frozen = pmap_round(parts), replicate(rows_of(config, task), copy=False)
    total = {"w": np.zeros((8, 10)), "b": np.zeros(10)}
    for client in ids:
        cohort = put_on_devices(cohort_of(config, task, np.asarray([client], np.int32)), clients_per_pass=1)
        after, _, _ = one(replicate(parts.init(learner.trainable, 2)), frozen, cohort)
        total = {name: total[name] + np.asarray(after.params[name]) - np.asarray(start[name]) for name in total}
    for name, value in total.items():
        np.testing.assert_allclose(result.state.params[name], np.asarray(start[name]) + value / 7, atol=1e-6)
    noisy = dataclasses.replace(
        config,
        num_rounds=4,
        eval_every=1,
        federation=dataclasses.replace(federation, dp=DpConfig(clip=0.3, target_epsilon=3.0)),
    )
    spent = [record["epsilon"] for record in run_cross_device(noisy, model, task, tmp_path / "noisy").history]
    assert spent[0] == 0 and np.all(np.diff(spent) > 0) and 2.7 < spent[-1] <= 3.0


def test_ag_news_with_skewed_clients_is_learnt(shared_data, tmp_path):
    """Four classes; after 25 rounds the clients have seen as many rows as 1.3 epochs."""
    folder = shared_data / "agnews"
    model, task = make_task(
        TaskConfig(
            name="agnews",
            train_text=str(folder / "dev.tsv"),
            test_text=str(folder / "test.tsv"),
            num_clients=300,
            alpha=0.3,
        )
    )
    config = CrossDeviceConfig(num_rounds=25, cohort_size=16, client_lr=0.3, server=FED_ADAM, eval_every=25)
    row = write_report(tmp_path, config, task, run_cross_device(config, model, task, tmp_path), None)
    assert row["accuracy_before"] < 0.3 and row["accuracy"] > 0.6
