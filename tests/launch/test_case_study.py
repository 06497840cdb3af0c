"""The commands as a user types them, on a very small model: results, resuming, refusals, two processes."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from fmfl_jax.data.corpora import python_topics, split_documents
from tests.commands import run, start

ROOT = pathlib.Path(__file__).parents[2]
AS_A_USER = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # compiled with all optimizations, on one device
SMALL = [
    "--model=tiny",
    "--pretrain_steps=30",
    "--seq_len=32",
    "--num_clients=4",
    "--num_rounds=4",
    "--local_steps=1",
    "--batch_size=2",
    "--peft=lora",
    "--weights=fp,awq",
    "--group_size=32",
    "--max_eval_windows=64",
    "--checkpoint_every=1",
    "--lora_lr=1e-2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run in a process of its own, and the folder it left."""
    out = tmp_path_factory.mktemp("case_study") / "whole"
    done = subprocess.run(
        [sys.executable, "-m", "launch.case_study", *SMALL, f"--out={out}"],
        cwd=ROOT,
        env=os.environ | AS_A_USER,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def results(out):
    """The figures of a run that do not depend on the machine's speed."""
    rows = json.loads((out / "table.json").read_text())
    return [
        {k: v for k, v in row.items() if "_s_" not in k and "latency" not in k and "repeats" not in k} for row in rows
    ]


def test_table_and_report(finished):
    out, printed = finished
    rows = json.loads((out / "table.json").read_text())
    assert [(row["weights"], row["peft"]) for row in rows] == [("fp", "lora"), ("awq", "lora")]
    for row in rows:
        # tiny has q [64, 64] and v [64, 32] in each of 2 layers; rank 8
        assert row["trainable_params"] == 2 * 8 * (64 + 64 + 64 + 32)
        assert row["uplink_bytes_per_client_round"] == 4 * row["trainable_params"]
        assert row["ppl"] < row["ppl_before"]
        assert row["fine_tune_s_per_client_round"] > 0 and row["latency_ms_per_token"] > 0
        assert row["peak_memory_bytes"] > row["weight_bytes"]
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"]
    assert (out / "table.md").read_text() in printed
    for name in ("perplexity.png", "costs.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard" / "lora-fp").glob("events.*"))


def test_evaluate_finds_the_tables_perplexity(finished, tmp_path):
    """From the base and the exported LoRA, read back through the published formats."""
    out, _ = finished
    held_out = split_documents(split_documents(python_topics(), 0.5, seed=0)[1], 0.9, seed=1)[1]
    text = tmp_path / "held_out.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in held_out))
    status, line, err = run(
        "launch.evaluate",
        f"--checkpoint={out / 'base'}",
        f"--text={text}",
        "--seq_len=32",
        "--tokenizer=bytes",
        f"--peft_dir={out / 'setups' / 'lora-fp' / 'peft'}",
    )
    assert status == 0, err
    found = json.loads(line)
    # the table's figure is that of the first 64 windows only, this one of the whole held-out text
    assert found["tokens"] > 64 * 32
    status, line, _ = run(
        "launch.evaluate", f"--checkpoint={out / 'base'}", f"--text={text}", "--seq_len=32", "--tokenizer=bytes"
    )
    assert found["ppl"] < json.loads(line)["ppl"]


def test_the_same_command_again_prints_the_same_table_without_work(finished):
    out, printed = finished
    begin = time.time()
    status, again, err = run("launch.case_study", *SMALL, f"--out={out}")
    assert status == 0, err
    assert (out / "table.md").read_text() in again and (out / "table.md").read_text() in printed
    assert all(path.stat().st_mtime < begin for path in out.glob("setups/*/row.json"))


def test_killed_and_continued_gives_the_same_table(finished, tmp_path):
    shutil.copytree(finished[0] / "base", tmp_path / "killed" / "base")  # it is killed after that was made
    killed = lambda: start("launch.case_study", *SMALL, f"--out={tmp_path / 'killed'}", **AS_A_USER)
    process = killed()
    deadline = time.time() + 200
    while not (tmp_path / "killed/setups/lora-fp/checkpoints/2").exists():
        assert process.running and time.time() < deadline, process.wait()
        time.sleep(0.02)
    process.kill()
    assert not (tmp_path / "killed/setups/lora-fp/row.json").exists()
    status, _, err = killed().wait()
    assert status == 0, err
    assert results(tmp_path / "killed") == results(finished[0])


def test_two_processes_give_the_table_of_one(finished, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = [*SMALL, "--weights=fp", "--num_rounds=2", "--pretrain_steps=3", "--max_eval_windows=16"]
    both = [*flags, f"--coordinator=localhost:{port}", "--num_processes=2", f"--out={tmp_path / 'two'}"]
    processes = [start("launch.case_study", *both, f"--process_id={i}") for i in range(2)]
    for process in processes:
        status, _, err = process.wait()
        assert status == 0, err
    status, _, err = run("launch.case_study", *flags, f"--out={tmp_path / 'one'}", devices=2)
    assert status == 0, err
    one, two = results(tmp_path / "one")[0], results(tmp_path / "two")[0]
    assert two["ppl"] == pytest.approx(one["ppl"], rel=1e-5) and two["weight_bytes"] == one["weight_bytes"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--peft=lora,lroa"], "--peft=lroa: expected some of lora, adapter"),
        (["--weights=int4"], "weights must be among fp, awq, gptq, rtn"),
        (["--lora_targets=q_prj"], "LoRA target 'q_prj' matches no projection"),
        (["--checkpoint=/nowhere", "--train_text=README.md", "--eval_text=README.md"], "/nowhere: no such checkpoint"),
        (["--num_rounds=3"], "holds a run with other settings (rounds)"),
    ],
)
def test_mistakes_are_one_line(finished, tmp_path, flags, expected):
    out = finished[0] if flags == ["--num_rounds=3"] else tmp_path / "new"
    status, _, err = run("launch.case_study", *SMALL, *flags, f"--out={out}")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and expected in lines[0], err
    assert "Traceback" not in err and not (tmp_path / "new" / "base").exists()  # before a model is trained
