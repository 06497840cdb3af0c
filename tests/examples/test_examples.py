"""Every program in examples/ runs and reaches what it says."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from fmfl_jax.peft.lora import LoraConfig

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_example_is_tested_here_and_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        "fedavg_by_hand",
        "lora_to_peft",
        "new_aggregator",
        "new_channel",
        "perplexity_over_joules",
        "selling_the_service",
    }
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60 for name in names)


def test_fedavg_by_hand_finds_the_weighted_optimum():
    assert load("fedavg_by_hand").main() < 1e-5


def test_the_new_aggregator_stands_an_attack_and_the_mean_does_not():
    plain, robust = load("new_aggregator").main()
    assert robust < 1.0 < plain / 10


def test_the_new_channel_loses_less_with_more_time():
    reached = load("new_channel").main()
    assert list(reached) == [0.05, 0.5, 5.0] and reached[0.05] > reached[0.5] > reached[5.0]
    # Everybody arrives: 30 steps of gradient descent that leave 0.9 of the distance to the mean of the optima each.
    optima = np.random.default_rng(0).normal(size=(10, 200))
    assert reached[5.0] == pytest.approx(0.9**30 * np.linalg.norm(optima.mean(axis=0)), rel=1e-4)


def test_the_service_sells_and_buys():
    reached = load("selling_the_service").main()
    assert reached["profit"] > 0 and reached["greedy"] <= reached["welfare"] and 0 < reached["spent"] <= 6


def test_the_exported_lora_reads_back(tmp_path):
    assert load("lora_to_peft").main(tmp_path / "lora") == LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size > 1000


def test_perplexity_over_joules_is_plotted_from_the_records(tmp_path):
    example, folder = load("perplexity_over_joules"), tmp_path / "run" / "setups" / "lora-fp"
    folder.mkdir(parents=True)
    records = [
        {"round": 0, "joules": 0.0, "ppl": 9.0},
        {"round": 1, "joules": 1.5},  # not evaluated
        {"round": 2, "joules": 3.0, "ppl": 7.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert example.history(tmp_path / "run") == ([0.0, 3.0], [9.0, 7.5])
    example.main([str(tmp_path / "run")], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    (folder / "metrics.jsonl").write_text('{"round": 0, "ppl": 9.0}\n')
    with pytest.raises(SystemExit, match="holds no run over a network"):
        example.history(tmp_path / "run")
