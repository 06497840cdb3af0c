"""The measuring commands on a CPU: benchmark_decode's figures, a case study of a random model, refusals, gpu_check."""

import json

import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.params import param_specs
from launch import device_memory, gpu_check
from tests.commands import run


def test_benchmark_decode(tmp_path):
    out = tmp_path / "decode.json"
    status, printed, err = run(
        "launch.benchmark_decode",
        "--preset=tiny",
        "--batch=2",
        "--context=10",
        "--tokens=4",
        "--repeats=2",
        f"--json={out}",
    )
    assert status == 0, err
    results = json.loads(out.read_text())
    fp, int4 = results["rows"]
    assert (fp["weights"], int4["weights"]) == ("fp", "int4") and not results["left_out"]
    config = llama_preset("tiny")
    specs = param_specs(config).values()
    assert fp["weight_bytes_read"] == sum(spec.size * (4 if spec.ndim == 1 else 2) for spec in specs)
    # keys and values of 2 layers, 2 rows, 12 slots on average, 2 heads of 16, in bfloat16
    assert fp["cache_bytes_read"] == int4["cache_bytes_read"] == 2 * 2 * 2 * 12 * 2 * 16 * 2
    assert int4["weight_bytes_read"] < fp["weight_bytes_read"]
    for row in results["rows"]:
        read = row["weight_bytes_read"] + row["cache_bytes_read"]
        assert row["ms_min"] <= row["ms_per_step"] <= row["ms_max"]
        assert row["gbps"] == pytest.approx(read / row["ms_per_step"] / 1e6)
        assert row["floor_ms"] / row["ms_per_step"] == pytest.approx(row["copy_fraction"])
        assert f"{row['ms_per_step']:.3f} ms a token" in printed


def test_random_case_study_leaves_perplexities_out(tmp_path):
    status, printed, err = run(
        "launch.case_study",
        "--flagfile=launch/presets/table2_7b.flags",
        "--model=tiny",
        "--seq_len=32",
        "--num_clients=2",
        "--local_steps=1",
        "--batch_size=1",
        "--num_rounds=1",
        "--peft=lora",
        "--clients_per_pass=1",
        "--weights=rtn",
        "--group_size=32",
        f"--out={tmp_path}",
    )
    assert status == 0, err
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["ppl"] is row["ppl_before"] is row["bits_per_byte"] is None and "are left out" in printed
    assert row["weight_bytes"] < 2 * row["base_params"]
    assert row["fine_tune_s_per_client_round"] > 0 and row["latency_ms_per_token"] > 0
    assert not (tmp_path / "base").exists() and not (tmp_path / "perplexity.png").exists()


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        ("launch.benchmark_decode", ["--preset=70b"], "--preset=70b with --weights=fp,int4 and --batch=64 needs about"),
        ("launch.benchmark_decode", ["--preset=tiny", "--weights=awq"], "--weights must be some of fp, int4"),
        ("launch.benchmark_decode", ["--preset=tiny", "--batch=1,x"], "--batch must be positive numbers"),
        ("launch.benchmark_decode", ["--preset=tiny", "--head=int4"], "--head=int4: the head of tiny is its embedding"),
        ("launch.benchmark_decode", ["--preset=tiny", "--context=600"], "exceed the model's max_seq_len 512"),
        (
            "launch.case_study",
            ["--random_init", "--model=70b", "--out=/nowhere"],
            "--random_init of this --model needs",
        ),
    ],
)
def test_refusals_are_one_line(module, flags, expected):
    assert_refused(run(module, *flags), expected)


def assert_refused(result, expected):
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and expected in lines[0] and "Traceback" not in err, err


def test_gpu_check_ends_at_the_first_failure(tmp_path):
    assert_refused(run("launch.gpu_check", "--steps=bench,decode", f"--out={tmp_path}"), "bench failed")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["bench"] and summary["bench"]["status"] == 1
    assert "needs an NVIDIA GPU" in (tmp_path / "bench.log").read_text()


def test_gpu_check_ends_a_step_at_its_limit(tmp_path):
    step = gpu_check.Step(
        arguments=["timeit", "-n1", "-r1", "import time; print('begun', flush=True); time.sleep(60)"], share=1.0
    )
    ended = gpu_check.run_step("slow", step, 2.0, tmp_path)
    assert ended["status"] == "ended at its time limit" and 2 <= ended["seconds"] < 20
    assert (tmp_path / "slow.log").read_text() == "begun\n"


def test_gpu_check_names_the_wheels_that_are_missing(monkeypatch):
    monkeypatch.setattr(gpu_check, "_is_installed", lambda name: name not in ("tensorboardX", "jinja2"))
    found = [wheel.split("==")[0] for wheel in gpu_check.missing_wheels()]
    assert found in (["jinja2", "tensorboardX"], ["jinja2", "tensorboardX", "jax[cuda13]"])


def test_memory_is_asked_for_beforehand(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "small GPU"

        def memory_stats(self):
            return {"bytes_limit": 10, "bytes_in_use": 4}

    device_memory.require_memory(Device(), 6, "it")
    with pytest.raises(ValueError, match="it needs about 0.0 GB of memory, small GPU has 0.0 GB free"):
        device_memory.require_memory(Device(), 7, "it")
