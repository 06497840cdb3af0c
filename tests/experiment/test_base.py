"""What a case study starts from."""

import jax
import numpy as np

from fmfl_jax.config import llama_preset
from fmfl_jax.experiment.base import prepare_base, quantized
from fmfl_jax.experiment.config.case_study import CaseStudyConfig, FineTuning
from fmfl_jax.experiment.config.data import PartitionConfig, TextConfig
from fmfl_jax.experiment.config.pretrain import PretrainConfig
from fmfl_jax.experiment.config.rounds import RoundsConfig
from fmfl_jax.experiment.config.server import ServerConfig
from fmfl_jax.models.calibration import QKV
from fmfl_jax.models.formats.checkpoint import save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.models.quantize import quantize
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.quant.awq import QuantConfig


def test_a_checkpoint_of_4_bits_stays_as_it_is(tmp_path):
    model = llama_preset("tiny", hidden_dim=96)
    rounding = QuantConfig(method="rtn", group_size=32)
    packed = quantize(model, init_params(model, jax.random.key(0)), None, rounding)
    save_checkpoint(tmp_path / "model", model, packed)
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 100)
    config = CaseStudyConfig(
        checkpoint=str(tmp_path / "model"),
        tokenizer="bytes",
        model=None,
        pretrain=PretrainConfig(num_steps=1, batch_size=1, learning_rate=1e-3),
        dtype="float32",
        text=TextConfig(train=str(tmp_path / "text.txt"), eval=str(tmp_path / "text.txt"), seq_len=32),
        partition=PartitionConfig(num_clients=2),
        rounds=RoundsConfig(num_rounds=1, cohort_size=2, local_steps=1, batch_size=1),
        server=ServerConfig(),
        quant=rounding,
        fine_tuning={"lora": FineTuning(peft=LoraConfig(), learning_rate=1e-3)},
        weights=("rtn",),
    )
    said = []
    base = quantized(config, prepare_base(config, tmp_path, said.append), "rtn", said.append)
    name = f"layers.1.{QKV}"
    np.testing.assert_array_equal(base.params[name].qweight, packed[name].qweight)
    dense = sum(x.size for x in jax.tree.leaves(init_params(model, jax.random.key(0))))
    assert f"{dense:,} parameters" in said[0]
