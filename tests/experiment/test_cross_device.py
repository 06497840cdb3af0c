"""Cross-device runs: resume, numbers of devices, 10,000 clients, attacks, the command."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from fmfl_jax.experiment.cross_device import (CrossDeviceConfig, TaskConfig, cohort_of, run_cross_device,
                                              write_report)
from fmfl_jax.fed.algorithm import Delivery
from fmfl_jax.fed.attacks import scaling
from fmfl_jax.fed.execution import execute_fed_opt
from fmfl_jax.fed.robust import fltrust, median
from fmfl_jax.fed.sharding import replicate
from fmfl_jax.fed.uplink import top_k
from fmfl_jax.small.batches import max_steps
from fmfl_jax.small.data import linear_task
from fmfl_jax.small.models import classification_grad, linear_classifier

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["--num_clients=30", "--cohort_size=11", "--num_rounds=4", "--eval_every=2", "--algorithm=fedadam", "--seed=3"]


def small_task(num_clients=30):
    return linear_classifier(8, 10), linear_task(num_clients, num_features=8, num_test=400, seed=1)


def command(*arguments, devices=1):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run([sys.executable, "-m", "launch.cross_device", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)


def test_stopped_and_continued_is_bit_identical(tmp_path):
    """With the state of the server's optimizer and of the clients' error feedback."""
    model, task = small_task()

    def run(directory, num_rounds):
        config = CrossDeviceConfig(num_rounds=num_rounds, cohort_size=7, algorithm="fedadam", seed=5, eval_every=2,
                                   checkpoint_every=2)
        return run_cross_device(config, model, task, tmp_path / directory, delivery=Delivery(uplink=top_k(0.2)))

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
    config = CrossDeviceConfig(num_rounds=4, cohort_size=11, eval_every=2, algorithm="fedadam", seed=3)
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


@pytest.mark.parametrize("make, message", [
    (lambda: TaskConfig(name="agnews"), "needs train_text and test_text"),
    (lambda: TaskConfig(train_text="x"), "train_text is for task agnews"),
    (lambda: TaskConfig(alpha=0.0), "alpha must be above 0"),
    (lambda: CrossDeviceConfig(algorithm="scaffold"), "expected one of fedavg, fedprox"),
    (lambda: CrossDeviceConfig(proximal=0.1), "proximal belongs to fedprox"),
    (lambda: CrossDeviceConfig(client_lr=0.0), "must be above 0"),
    (lambda: CrossDeviceConfig(execution="fast"), "expected one of auto, vmap, scan, steps"),
])
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_run_cannot_serve_is_refused(tmp_path):
    model, task = small_task(5)
    with pytest.raises(ValueError, match="cohort_size is 6, but there are 5 clients"):
        run_cross_device(CrossDeviceConfig(cohort_size=6), model, task, tmp_path)
    with pytest.raises(ValueError, match="server's own data"):
        run_cross_device(CrossDeviceConfig(cohort_size=2), model, task, tmp_path,
                         delivery=Delivery(aggregator=fltrust()))


def test_memory_is_the_rows_and_one_cohort():
    """10,000 clients: a device needs the rows of all, once, and little more."""
    model, task = linear_classifier(4, 10), linear_task(10_000, num_features=4)
    execution = execute_fed_opt("scan", classification_grad(model), optax.sgd(0.1))
    cohort = cohort_of(np.arange(0, 10_000, 500), task.shards, 0, seed=0, batch_size=10, epochs=1,
                       num_steps=max_steps(task.shards, batch_size=10, epochs=1), clients_per_pass=1)
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
    config = CrossDeviceConfig(num_rounds=10, cohort_size=16, eval_every=10)
    malicious = np.arange(30) % 4 == 0
    accuracy = {}
    for name, aggregator in (("mean", Delivery().aggregator), ("median", median())):
        delivery = Delivery(attack=scaling(-20.0), aggregator=aggregator)
        result = run_cross_device(config, model, task, tmp_path / name, delivery=delivery,
                                  extras={"malicious": malicious})
        accuracy[name] = result.history[-1]["accuracy"]
    assert accuracy["median"] > accuracy["mean"] + 0.1


def test_ag_news_with_skewed_clients_is_learnt(shared_data, tmp_path):
    """Four classes; after 25 rounds the clients have seen as many rows as 1.3 epochs."""
    folder = shared_data / "agnews"
    model, task = TaskConfig(name="agnews", train_text=str(folder / "dev.tsv"), test_text=str(folder / "test.tsv"),
                             num_clients=300, alpha=0.3).make()
    config = CrossDeviceConfig(num_rounds=25, cohort_size=16, client_lr=0.3, algorithm="fedadam", eval_every=25)
    row = write_report(tmp_path, config, task, run_cross_device(config, model, task, tmp_path), None)
    assert row["accuracy_before"] < 0.3 and row["accuracy"] > 0.6
