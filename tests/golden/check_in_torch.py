"""Loads what this project saved in transformers and peft, and compares logits. Not a test: it needs torch.

    cd tests/golden
    ../../.venv/bin/python check_in_torch.py write DIR     saves models and tuned parameters, and our logits
    /tmp/golden/bin/python check_in_torch.py check DIR               (the environment of make_llama.py)

Prints the largest difference of each and fails above 1e-4.
"""

import pathlib
import sys

import numpy as np
import weights


def write(folder: pathlib.Path) -> None:
    """Runs with the project's environment."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
    from fmfl_jax.peft.export import save_peft
    from fmfl_jax.peft.lora import LoraConfig
    from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig
    from fmfl_jax.peft.split import NoPeftConfig, split

    tunings = {
        "base": NoPeftConfig(),
        "lora": LoraConfig(rank=3, alpha=5.0, targets=("*_proj",)),
        "lora_layer": LoraConfig(rank=2, alpha=3.5, targets=("layers.1.self_attn.*", "gate_proj")),
        "prompt": PromptConfig(num_tokens=4),
        "prefix": PrefixConfig(num_tokens=4),
    }
    for case in weights.CASES:
        raw = folder / f"{case}_raw"
        raw.mkdir(parents=True)
        (raw / "config.json").write_text(str(np.load(pathlib.Path(__file__).parent / f"llama_{case}.npz")["config"]))
        save_file(weights.base_weights(case), raw / "model.safetensors")
        loaded = load_checkpoint(raw)
        config, params = loaded.config, loaded.params
        save_checkpoint(folder / case, config, params, shard_bytes=20_000)
        for name, tuning in tunings.items():
            s = split(config, params, tuning, key=jax.random.key(0))
            trainable = {
                key: jnp.asarray(weights.draw(f"{name} {key}", x.shape, 0.3)) for key, x in s.trainable.items()
            }
            np.save(folder / f"{case}.{name}.npy", s.merge(trainable, s.frozen)(jnp.asarray(weights.tokens(case))))
            if name != "base":
                save_peft(folder / f"{case}.{name}", tuning, trainable, config, folder / case)


def check(folder: pathlib.Path) -> None:
    """Runs with torch, transformers and peft."""
    import make_llama
    import peft
    import torch
    from transformers import LlamaForCausalLM

    for file in sorted(folder.glob("*.npy")):
        case, name, _ = file.name.split(".")
        model = LlamaForCausalLM.from_pretrained(folder / case, dtype=torch.float32, attn_implementation="eager").eval()
        if name != "base":
            model = peft.PeftModel.from_pretrained(model, folder / f"{case}.{name}").eval()
        tokens = weights.tokens(case)
        difference = np.abs(make_llama.logits(model, tokens)[:, -tokens.shape[1] :] - np.load(file)).max()
        print(f"{case} {name}: largest difference {difference:.2e}, largest logit {np.abs(np.load(file)).max():.2f}")
        assert difference < 1e-4


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
