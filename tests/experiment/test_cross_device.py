"""Cross-device runs: resume, numbers of devices, 10,000 clients, attacks, the command."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from fmfl_jax.data.batches import poisson_cohort
from fmfl_jax.data.classification import linear_task
from fmfl_jax.data.shards import max_steps
from fmfl_jax.experiment.config.case_study import ServerConfig
from fmfl_jax.experiment.config.federation import DpConfig, FederationConfig
from fmfl_jax.experiment.cross_device import (
    CrossDeviceConfig,
    TaskConfig,
    cohort_of,
    rows_of,
    run_cross_device,
    write_report,
)
from fmfl_jax.fed.attacks import malicious_clients
from fmfl_jax.fed.core.cohort import replicate, spread
from fmfl_jax.fed.core.execution import execute_fed_opt
from fmfl_jax.models.classifiers import classification_grad, linear_classifier

ROOT = pathlib.Path(__file__).parents[2]
FED_ADAM = ServerConfig(optimizer="fedadam", learning_rate=0.01)
FLAGS = ["--num_clients=30", "--cohort_size=11", "--num_rounds=4", "--eval_every=2", "--algorithm=fedadam", "--seed=3"]


def small_task(num_clients=30):
    return linear_classifier(8, 10), linear_task(num_clients, num_features=8, num_test=400, seed=1)


def federated(**options):
    return CrossDeviceConfig(federation=FederationConfig(**options))


def command(*arguments, devices=1):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run(
        [sys.executable, "-m", "launch.cross_device", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(server=FED_ADAM, uplink="topk:0.2"),
        dict(federation=FederationConfig(algorithm="scaffold")),
        dict(
            federation=FederationConfig(
                privacy=("dp",), selection="poisson", dp=DpConfig(clip=0.3, noise_multiplier=0.3, adaptive_quantile=0.5)
            )
        ),
    ],
    ids=["fedadam", "scaffold", "dp"],
)
def test_stopped_and_continued_is_bit_identical(settings, tmp_path):
    """With the state of the server's optimizer, the clients' error feedback or controls, the clipping norm."""
    model, task = small_task()

    def run(directory, num_rounds):
        config = CrossDeviceConfig(
            num_rounds=num_rounds, cohort_size=7, seed=5, eval_every=2, checkpoint_every=2, **settings
        )
        return run_cross_device(config, model, task, tmp_path / directory)

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert {k: v for k, v in a.items() if k != "round_s"} == {k: v for k, v in b.items() if k != "round_s"}
    written = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert written == parts.history and [r["round"] for r in written] == list(range(5))


def test_the_command_on_one_device_gives_what_eight_give(tmp_path):
    done = command(*FLAGS, "--centralized_epochs=2", f"--out={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    task_config = TaskConfig(num_clients=30, seed=3)
    config = CrossDeviceConfig(num_rounds=4, cohort_size=11, eval_every=2, server=FED_ADAM, seed=3)
    model, task = task_config.make()
    result = run_cross_device(config, model, task, tmp_path / "eight")
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(lines, result.history, strict=True):
        for name in set(a) - {"round_s"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
    row = json.loads((tmp_path / "one" / "row.json").read_text())
    assert row["execution"] == "scan" and row["clients"] == 30 and row["rounds"] == 4
    assert row["accuracy"] == lines[-1]["accuracy"] > row["accuracy_before"] == lines[0]["accuracy"]
    assert row["centralized_accuracy"] > row["accuracy_before"]
    assert (tmp_path / "one" / "accuracy.png").stat().st_size > 5000
    again = command(*FLAGS, "--centralized_epochs=2", "--client_lr=0.2", f"--out={tmp_path / 'one'}")
    assert again.returncode == 2 and "other settings (run)" in again.stderr and len(again.stderr.splitlines()) == 1


def test_mistakes_end_in_one_line(tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text("A goal\tSports\nno label\n")
    done = command("--task=agnews", f"--train_text={bad}", f"--test_text={bad}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {bad}, line 2: expected text<TAB>label, got 'no label'"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TaskConfig(name="agnews"), "needs train_text and test_text"),
        (lambda: TaskConfig(train_text="x"), "train_text is for task agnews"),
        (lambda: TaskConfig(alpha=0.0), "alpha must be above 0"),
        (lambda: federated(algorithm="fedbuff"), "small models take fedavg, fedprox, scaffold"),
        (lambda: federated(personalization="ditto:1"), "here all clients share one model"),
        (lambda: federated(aggregator="fltrust"), "server's own data"),
        (lambda: federated(selection="oort"), "uniform or poisson"),
        (lambda: federated(privacy=("secure",)), "small models take dp"),
        (
            lambda: CrossDeviceConfig(execution="steps", federation=FederationConfig(algorithm="scaffold")),
            "use scan or vmap",
        ),
        (lambda: CrossDeviceConfig(client_lr=0.0), "must be above 0"),
        (lambda: CrossDeviceConfig(execution="fast"), "expected one of auto, vmap, scan, steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_run_cannot_serve_is_refused(tmp_path):
    model, task = small_task(5)
    with pytest.raises(ValueError, match="cohort_size is 6, but there are 5 clients"):
        run_cross_device(CrossDeviceConfig(cohort_size=6), model, task, tmp_path)


def test_memory_is_the_rows_and_one_cohort():
    """10,000 clients: a device needs the rows of all, once, and little more."""
    model, task = linear_classifier(4, 10), linear_task(10_000, num_features=4)
    execution = execute_fed_opt("scan", classification_grad(model), optax.sgd(0.1))
    cohort = cohort_of(
        np.arange(0, 10_000, 500),
        task.shards,
        0,
        seed=0,
        batch_size=10,
        epochs=1,
        num_steps=max_steps(task.shards, batch_size=10, epochs=1),
        clients_per_pass=1,
    )
    frozen = replicate({"x": task.train.x, "y": task.train.y}, copy=False)
    state = replicate(execution.algorithm.init(model.init(None), 0))
    memory = execution.round.lower(state, frozen, cohort).compile().memory_analysis()
    rows = task.train.x.nbytes + task.train.y.nbytes
    assert rows > 10e6
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < rows + 200_000
    before = np.asarray(state.params["w"])
    state, metrics, _ = execution.round(state, frozen, cohort)
    assert np.any(np.asarray(state.params["w"]) != before) and np.isfinite(metrics["loss"])


def test_a_robust_aggregator_stands_an_attack(tmp_path):
    model, task = small_task()
    accuracy = {}
    for name in ("mean", "median"):
        config = CrossDeviceConfig(
            num_rounds=30,
            cohort_size=16,
            eval_every=30,
            client_lr=0.3,
            federation=FederationConfig(aggregator=name, attack="sign_flip:20", attack_fraction=0.25),
        )
        accuracy[name] = run_cross_device(config, model, task, tmp_path / name).history[-1]["accuracy"]
    assert accuracy["median"] > accuracy["mean"] + 0.1


def test_flipped_labels_are_those_of_the_malicious_clients_rows():
    _, task = small_task()
    config = federated(attack="label_flip", attack_fraction=0.3)
    y, malicious = rows_of(config, task)["y"], malicious_clients(30, 0.3, config.seed)
    assert malicious.sum() == 9
    for client in range(30):
        rows = task.shards.rows[task.shards.starts[client] : task.shards.starts[client + 1]]
        expected = 9 - task.train.y[rows] if malicious[client] else task.train.y[rows]
        np.testing.assert_array_equal(y[rows], expected)


def test_private_cohorts_are_poissons_and_epsilon_grows(tmp_path):
    """Without noise and with a clip nobody reaches, DP-FedAvg is the sum over the expected cohort: a plain loop."""
    model, task = small_task()
    federation = FederationConfig(privacy=("dp",), selection="poisson", dp=DpConfig(clip=1e6, noise_multiplier=0.0))
    config = CrossDeviceConfig(num_rounds=1, cohort_size=7, federation=federation, seed=2)
    result = run_cross_device(config, model, task, tmp_path / "free")
    assert "epsilon" not in result.history[-1]
    ids = poisson_cohort(30, 7 / 30, round=0, seed=2)
    total = {"w": np.zeros((8, 10)), "b": np.zeros(10)}
    for client in ids:
        one = execute_fed_opt("scan", classification_grad(model), optax.sgd(config.client_lr))
        cohort = cohort_of(
            np.asarray([client]),
            task.shards,
            0,
            seed=2,
            batch_size=10,
            epochs=1,
            clients_per_pass=1,
            num_steps=max_steps(task.shards, batch_size=10, epochs=1),
        )
        frozen = replicate({"x": task.train.x, "y": task.train.y}, copy=False)
        start = model.init(jax.random.key(2))
        after, _, _ = one.round(replicate(one.algorithm.init(start, 2)), frozen, spread(cohort))
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
    model, task = TaskConfig(
        name="agnews",
        train_text=str(folder / "dev.tsv"),
        test_text=str(folder / "test.tsv"),
        num_clients=300,
        alpha=0.3,
    ).make()
    config = CrossDeviceConfig(num_rounds=25, cohort_size=16, client_lr=0.3, server=FED_ADAM, eval_every=25)
    row = write_report(tmp_path, config, task, run_cross_device(config, model, task, tmp_path), None)
    assert row["accuracy_before"] < 0.3 and row["accuracy"] > 0.6
