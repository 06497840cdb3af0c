"""The table of goals from results as a GPU would leave them, and gpu_check's second call."""

import json

import pytest

from launch import gpu_check, gpu_goals
from tests.commands import run

TABLE = [
    {"projection": "qkv", "m": 1, "copy_fraction": 0.8, "speedup": 3.0, "us": 7, "bf16_dot_us": 21},
    {"projection": "qkv", "m": 64, "copy_fraction": 0.3, "speedup": 0.9, "us": 30, "bf16_dot_us": 27},
    {"projection": "down", "m": 16, "copy_fraction": 0.6, "speedup": 2.6, "us": 9, "bf16_dot_us": 23.4},
    {"projection": "o", "m": 1, "copy_fraction": 0.4, "speedup": 1.5, "us": 4, "bf16_dot_us": 6},
    {"projection": "o", "m": 4096, "copy_fraction": 0.1, "speedup": 0.95, "us": 105, "bf16_dot_us": 100},
]


def test_goals(tmp_path):
    """Worst cases count: o is no fused shape, and of decoding the faster of both ways."""
    table = [{"model": "7b", **row} for row in TABLE] + [TABLE[0] | {"model": "70b", "copy_fraction": 0.1}]
    bench = {"correctness": [{"passed": True}, {"passed": True}], "table": table, "extras": []}
    decode = [{"weights": "int4", "batch": 1, "ms_per_step": 1.5}, {"weights": "fp", "batch": 1, "ms_per_step": 3.0}]
    files = {"bench": bench, "decode": {"rows": decode}, "decode_graphs": {"rows": [decode[0] | {"ms_per_step": 1.2}]}}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    goals = gpu_goals.found(tmp_path)
    assert [goal.measured for goal in goals] == [1.0, 0.6, None, 2.6, 0.9, 1.05, 1.2, 2.5, None]
    assert [goal.met for goal in goals] == [True, False, None, True, False, True, True, True, None]
    assert gpu_goals.line(goals[1]).split()[-2:] == ["0.600", "MISSED"]
    assert gpu_goals.line(goals[2]).endswith("not measured")


def test_an_h100_has_the_time_that_its_memory_allows(tmp_path):
    (tmp_path / "decode.json").write_text(
        json.dumps({"device": "NVIDIA H100 80GB HBM3", "copy_gbps": 2950.0, "rows": []})
    )
    goal = next(goal for goal in gpu_goals.found(tmp_path) if "ms a token" in goal.name)
    assert goal.goal == pytest.approx(1.3 * 4300 / 2950)
    assert "NVIDIA H100 80GB HBM3, a copy of 2950 GB/s" in gpu_goals.title(tmp_path)
    assert "no GPU" in gpu_goals.title(tmp_path / "empty")


def test_rounds_compare_lora_alone(tmp_path):
    rows = [("fp", "lora", 2.0), ("rtn", "lora", 2.1), ("rtn", "adapter", 9.0)]
    rows = [{"weights": w, "peft": p, "fine_tune_s_per_client_round": s} for w, p, s in rows]
    (tmp_path / "case_study.json").write_text(json.dumps(rows))
    assert gpu_goals.found(tmp_path)[-1].measured == 1.05


def test_a_second_call_leaves_out_what_is_done(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"decode": {"status": 0, "seconds": 12.5}}))
    done = run("launch.gpu_check", "--steps=decode", f"--out={tmp_path}")
    assert done.status == 0 and "decode: done before, 12.5 s" in done.out
    goals = json.loads((tmp_path / "goals.json").read_text())
    assert all(goal["measured"] is None for goal in goals)


def test_what_was_left_out_is_measured_last(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps({"left_out": ["7b o M=1"]}))
    (tmp_path / "decode.json").write_text(json.dumps({"left_out": []}))
    (tmp_path / "case_study.json").write_text("[]")
    summary = {"bench": {"status": 0}, "decode": {"status": 0}, "graphs": {"status": "ended at its time limit"}}
    names = ["bench", "decode", "case_study", "graphs"]
    assert gpu_check.left_to_do(names, summary, tmp_path) == ["case_study", "graphs", "bench"]
