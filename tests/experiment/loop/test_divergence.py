"""Rounds that drop everybody, and runs that nothing comes of: on the linear task of small models."""

import json
import math

import pytest

from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from fmfl_jax.experiment.loop.divergence import finite_metrics, mark_divergence, require_some_round

MODEL, TASK = make_task(TaskConfig(num_clients=6))


def run(directory, learning_rate, said):
    config = CrossDeviceConfig(
        num_rounds=3,
        cohort_size=3,
        batch_size=1000,  # a single step
        client_lr=learning_rate,
        execution="scan",
        eval_every=1,
        checkpoint_every=3,
    )
    return run_cross_device(config, MODEL, TASK, directory, say=said.append)


def test_a_round_that_drops_everybody_has_no_loss_and_says_so(tmp_path):
    said = []
    history = run(tmp_path, 1e38, said).history
    assert history[1]["counted_clients"] > 0 and "loss" in history[1] and history[1]["diverged"]
    dropped = [record for record in history[1:] if record["counted_clients"] == 0]
    assert dropped and all("loss" not in record and record["diverged"] for record in dropped)
    assert len(said) == len(dropped) and said[0].startswith(f"round {dropped[0]['round']}: all 3 clients diverged")
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in {line}"))


def test_a_run_in_which_every_round_drops_everybody_is_an_error(tmp_path):
    task = TASK._replace(train=TASK.train._replace(x=TASK.train.x + math.nan))
    config = CrossDeviceConfig(num_rounds=2, cohort_size=3, execution="scan", checkpoint_every=2)
    for _ in range(2):  # again when it is read from disk
        with pytest.raises(ValueError, match="every one of the 2 rounds dropped all its clients"):
            run_cross_device(config, MODEL, task, tmp_path, say=lambda line: None)


def test_an_ordinary_run_says_nothing(tmp_path):
    said = []
    history = run(tmp_path, 0.05, said).history
    assert not said and not any("diverged" in record for record in history)


def test_a_loss_far_above_the_start_is_divergence():
    for loss, nats, diverged in ((4.9, 4.0, True), (4.0, 6.1, True), (4.8, 4.8, False)):
        record = {"round": 1, "loss": loss, "nats_per_token": nats, "counted_clients": 4, "dropped_clients": 0}
        mark_divergence(record, {"round": 0, "nats_per_token": 4.2})
        assert record.get("diverged", False) == diverged
    assert finite_metrics({"loss": math.nan, "delta_norm": math.inf, "examples": 3}) == {"examples": 3.0}


def test_rounds_that_nobody_was_heard_in_are_no_error():
    require_some_round([{"round": 0}, {"round": 1, "counted_clients": 0.0, "dropped_clients": 0.0}])
