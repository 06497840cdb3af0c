"""launch.merge as a user types it: the merged checkpoint's logits are those of the base with its LoRA beside it."""

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import llama_preset
from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
from fmfl_jax.models.params import init_params
from fmfl_jax.peft.export import save_peft
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.prompt import PromptConfig
from fmfl_jax.peft.split import NoPeftConfig, split
from tests.commands import run

CONFIG = llama_preset("tiny", num_layers=2, embed_dim=16, hidden_dim=32, num_heads=2, num_kv_heads=1, vocab_size=64)
LORA = LoraConfig(rank=3, alpha=7.0, targets=("q_proj", "v_proj", "down_proj"))


def logits(config, params, peft, trainable, tokens):
    model = split(config, params, peft, key=jax.random.key(0))
    return jax.jit(lambda trainable, frozen: model.merge(trainable, frozen)(tokens))(trainable, model.frozen)


def test_merged_equals_unmerged(tmp_path):
    params = init_params(CONFIG, jax.random.key(0))
    trainable = split(CONFIG, params, LORA, key=jax.random.key(1)).trainable
    keys = jax.random.split(jax.random.key(2), len(trainable))
    trainable = {name: 0.2 * jax.random.normal(k, x.shape) for k, (name, x) in zip(keys, trainable.items())}
    save_checkpoint(tmp_path / "base", CONFIG, params)
    save_peft(tmp_path / "lora", LORA, jax.device_get(trainable), CONFIG, base_model_name="base")
    flags = [f"--checkpoint={tmp_path / 'base'}", f"--peft_dir={tmp_path / 'lora'}", f"--out={tmp_path / 'merged'}"]
    status, printed, err = run("launch.merge", *flags)
    assert status == 0 and "6 low-rank products" in printed, err
    merged = load_checkpoint(tmp_path / "merged")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    whole = logits(merged.config, dict(merged.params), NoPeftConfig(), {}, tokens)
    beside = logits(CONFIG, params, LORA, trainable, tokens)
    np.testing.assert_allclose(whole, beside, atol=1e-5)
    assert np.abs(whole - logits(CONFIG, params, NoPeftConfig(), {}, tokens)).max() > 0.1  # the LoRA is no small one


def test_what_is_no_lora_is_refused_in_one_line(tmp_path):
    params, prompt = init_params(CONFIG, jax.random.key(0)), PromptConfig(num_tokens=2)
    trainable = split(CONFIG, params, prompt, key=jax.random.key(1)).trainable
    save_checkpoint(tmp_path / "base", CONFIG, params)
    save_peft(tmp_path / "prompt", prompt, jax.device_get(trainable), CONFIG, base_model_name="base")
    flags = [f"--checkpoint={tmp_path / 'base'}", f"--peft_dir={tmp_path / 'prompt'}", f"--out={tmp_path / 'merged'}"]
    status, _, err = run("launch.merge", *flags)
    assert status == 2 and err.startswith("error: --peft_dir=") and "holds no LoRA" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "merged").exists()
