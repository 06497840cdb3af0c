"""Windows beyond the context are refused everywhere alike, virtual tokens counted, before anything is read."""

import dataclasses

import jax
import pytest

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.case_study import run_case_study
from fmfl_jax.experiment.config.case_study import CaseStudyConfig, FineTuning
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.config.network import NetworkConfig
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.experiment.plan import Job, plan_all
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
from fmfl_jax.quant.awq import QuantConfig
from tests.commands import run

MODEL = llama_preset("tiny", num_layers=1, max_seq_len=64)
CASES = [
    (LoraConfig(), 64, None),
    (LoraConfig(), 65, "seq_len=65 exceeds the model's context of 64"),
    (PromptConfig(num_tokens=20), 44, None),
    (PromptConfig(num_tokens=20), 45, "seq_len=45 with the 20 virtual tokens of PromptConfig exceeds .* 64"),
    (PrefixConfig(num_tokens=3), 62, "seq_len=62 with the 3 virtual tokens of PrefixConfig exceeds .* 64"),
]


def case_study(peft, seq_len, **fields):
    parts = dict(
        checkpoint=None,
        tokenizer=None,
        model=MODEL,
        pretrain=PretrainConfig(num_steps=1, batch_size=1, learning_rate=1e-3),
        dtype="float32",
        text=TextConfig(seq_len=seq_len),
        partition=PartitionConfig(num_clients=1),
        rounds=RoundsConfig(num_rounds=1, cohort_size=1, local_steps=1, batch_size=1),
        server=ServerConfig(),
        quant=QuantConfig(),
        fine_tuning={
            "first": FineTuning(peft=LoraConfig(), learning_rate=1.0),
            "it": FineTuning(peft=peft, learning_rate=1.0),
        },
        weights=("fp",),
    )
    return CaseStudyConfig(**parts | fields)


@pytest.mark.parametrize("peft, seq_len, refusal", CASES)
def test_training_and_planning(peft, seq_len, refusal):
    ways = (
        lambda: case_study(peft, seq_len),
        lambda: plan_all(
            MODEL,
            {"it": peft},
            ["fp32"],
            [NetworkConfig(network="facts_20")],
            Job(1, 1, seq_len),
            num_clients=2,
            num_rounds=1,
        ),
    )
    for way in ways:
        if refusal is None:
            way()
        else:
            with pytest.raises(ValueError, match=refusal):
                way()


def test_a_checkpoint_s_context_before_any_text(tmp_path):
    """The library refuses before it looks for the text; the command before the run claims its folder."""
    save_checkpoint(tmp_path / "base", MODEL, init_params(MODEL, jax.random.key(0)))
    config = case_study(LoraConfig(), 65, model=None, checkpoint=str(tmp_path / "base"))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, train="nowhere", eval="nowhere"))
    with pytest.raises(ValueError, match="^seq_len=65 exceeds the model's context of 64"):
        run_case_study(config, tmp_path / "library")
    flags = [f"--checkpoint={tmp_path / 'base'}", "--tokenizer=bytes", "--seq_len=45", "--peft=prompt"]
    texts = ["--train_text=nowhere", "--eval_text=nowhere", f"--out={tmp_path / 'run'}"]
    done = run("launch.federated", *flags, *texts)
    assert done.status == 2 and done.err.startswith("error: --seq_len=45 with the 20 virtual tokens")
    assert len(done.err.splitlines()) == 1 and not (tmp_path / "run").exists()
