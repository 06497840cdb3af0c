"""launch.serve --requests on a tiny random model: answers equal one at a time, with and without adapters; mistakes."""

import json

import jax
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.export import save_peft
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import split
from fmfl_jax.services.scheduling.trace import TraceRequest, read_trace, write_trace
from tests.commands import run

CONFIG = llama_preset("tiny", num_layers=1, embed_dim=32, hidden_dim=64, num_heads=2, num_kv_heads=1, max_seq_len=64)
LORA = LoraConfig(rank=2, targets=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, adapters of clients 0 and 2, and a trace of theirs."""
    path = tmp_path_factory.mktemp("serving")
    params = init_params(CONFIG, jax.random.key(0))
    save_checkpoint(path / "base", CONFIG, params)
    trainable = split(CONFIG, params, LORA, key=jax.random.key(1)).trainable
    for client in (0, 2):
        keys = jax.random.split(jax.random.key(client), len(trainable))
        tuned = {name: jax.random.normal(k, x.shape) for k, (name, x) in zip(keys, trainable.items())}
        save_peft(path / "personal" / str(client), LORA, jax.device_get(tuned), CONFIG, base_model_name="base")
    trace = [
        TraceRequest(
            arrival_s=0.02 * i, prompt="Once upon a time"[: 3 * i + 1], max_tokens=4 + i, client=str(2 * (i % 2))
        )
        for i in range(5)
    ]
    write_trace(str(path / "trace.jsonl"), trace)
    return path


def serve(folder, *flags, trace="trace.jsonl"):
    base = [f"--checkpoint={folder / 'base'}", "--tokenizer=bytes", f"--requests={folder / trace}"]
    return run("launch.serve", *base, "--slots=2", "--chunk_tokens=4", *flags)


def test_answers_equal_one_at_a_time_and_clients_differ(folder, tmp_path):
    texts = {}
    for name, flags in (("base", []), ("personal", [f"--personal_dir={folder / 'personal'}"])):
        answers = tmp_path / f"{name}.jsonl"
        status, printed, err = serve(folder, *flags, "--alone", "--clock=cpu", f"--answers={answers}")
        assert status == 0, err
        assert "5 of 5 answers are those of one request at a time" in printed
        header, continuous, static = (line.split() for line in printed.splitlines()[1:4])
        assert header[0] == "batching" and continuous[0] == "continuous" and static[0] == "static"
        read = read_trace(str(answers))
        assert [request.output_tokens for request in read] == [4, 5, 6, 7, 8]
        texts[name] = [json.loads(line)["text"] for line in answers.read_text(encoding="utf-8").splitlines()]
    assert texts["base"] != texts["personal"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--batching=dynamic"], "--batching=dynamic: expected continuous or static"),
        (["--policy=priority:preemptive=true"], "does not preempt"),
        (["--slot_tokens=10"], "the request at 0.08 s has 21 tokens of prompt and answer, a slot holds 10"),
        (["--kv_memory_mb=0.0001"], "--kv_memory_mb=0.0001: one slot of"),
    ],
)
def test_mistakes_are_one_line(folder, flags, said):
    status, _, err = serve(folder, *flags)
    assert status == 2 and said in err and len(err.splitlines()) == 1, err


def test_requests_that_cannot_be_served(folder):
    write_trace(str(folder / "stranger.jsonl"), [TraceRequest(arrival_s=0.0, prompt="x", max_tokens=2, client="1")])
    status, _, err = serve(folder, f"--personal_dir={folder / 'personal'}", trace="stranger.jsonl")
    assert status == 2 and "has no adapter of client '1'" in err
    (folder / "late.jsonl").write_text('{"arrival_s": 3, "prompt": "x", "max_tokens": 1, "deadline_s": 2}\n')
    status, _, err = serve(folder, trace="late.jsonl")
    assert status == 2 and "late.jsonl, line 1: deadline_s is 2, not after the arrival at 3" in err
