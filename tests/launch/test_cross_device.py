"""launch.cross_device as a user types it: one device gives what eight give, the report, mistakes in one line."""

import json

import numpy as np

from fmfl_jax.experiment.build.classification import make_task
from fmfl_jax.experiment.config.cross_device import CrossDeviceConfig, TaskConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.cross_device import run_cross_device
from tests.commands import run

FLAGS = ["--num_clients=30", "--cohort_size=11", "--num_rounds=4", "--eval_every=2", "--algorithm=fedadam", "--seed=3"]


def test_the_command_on_one_device_gives_what_eight_give(tmp_path):
    status, _, err = run("launch.cross_device", *FLAGS, "--centralized_epochs=2", f"--out={tmp_path / 'one'}")
    assert status == 0, err
    server = ServerConfig(optimizer="fedadam", learning_rate=0.01)
    config = CrossDeviceConfig(num_rounds=4, cohort_size=11, eval_every=2, server=server, seed=3)
    result = run_cross_device(config, *make_task(TaskConfig(num_clients=30, seed=3)), tmp_path / "eight")
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(lines, result.history, strict=True):
        for name in set(a) - {"round_s"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
    row = json.loads((tmp_path / "one" / "row.json").read_text())
    assert row["execution"] == "scan" and row["clients"] == 30 and row["rounds"] == 4
    assert row["accuracy"] == lines[-1]["accuracy"] > row["accuracy_before"] == lines[0]["accuracy"]
    assert row["centralized_accuracy"] > row["accuracy_before"]
    assert (tmp_path / "one" / "accuracy.png").stat().st_size > 5000
    again = [*FLAGS, "--centralized_epochs=2", "--client_lr=0.2", f"--out={tmp_path / 'one'}"]
    status, _, err = run("launch.cross_device", *again)
    assert status == 2 and "other settings (run)" in err and len(err.splitlines()) == 1


def test_mistakes_end_in_one_line(tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text("A goal\tSports\nno label\n")
    flags = ["--task=agnews", f"--train_text={bad}", f"--test_text={bad}", f"--out={tmp_path / 'out'}"]
    status, _, err = run("launch.cross_device", *flags)
    assert status == 2
    assert err.splitlines() == [f"error: {bad}, line 2: expected text<TAB>label, got 'no label'"]
    assert not (tmp_path / "out").exists()


def test_wrong_methods_are_named_by_their_flag(tmp_path):
    status, _, err = run("launch.cross_device", "--aggregator=trimmed_mean:0.9", f"--out={tmp_path / 'out'}")
    assert status == 2 and err.startswith("error: --aggregator=trimmed_mean:0.9: the trimmed fraction must be in")
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
