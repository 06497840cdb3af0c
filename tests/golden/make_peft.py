"""Makes peft_<name>/ (what peft itself saves) and peft_logits.npz: case "gqa_tied" tuned in Hugging Face PEFT.

cd tests/golden && /tmp/golden/bin/python make_peft.py         (the environment of make_llama.py)
"""

import json
import pathlib

import make_llama
import numpy as np
import peft
import torch
import weights

HERE = pathlib.Path(__file__).parent
CASE = "gqa_tied"
CONFIGS = {
    "lora": peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM"
    ),
    # Factors on some projections of one layer, and peft's other scale: alpha / sqrt(r).
    "lora_some": peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        task_type="CAUSAL_LM",
        target_modules=["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"],
    ),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


def main() -> None:
    found = {}
    for name, config in CONFIGS.items():
        model = peft.get_peft_model(make_llama.build(CASE), config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = key.replace(".default", "")
                    parameter.copy_(torch.from_numpy(weights.draw(f"{name} {key}", tuple(parameter.shape), 0.3)))
        logits = make_llama.logits(model, weights.tokens(CASE))
        # A soft prompt's own positions are in peft's output; the tokens' are the last.
        found[name] = logits[:, -weights.tokens(CASE).shape[1] :]
        folder = HERE / f"peft_{name}"
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config_file = folder / "adapter_config.json"
        raw = json.loads(config_file.read_text())  # sets have no order: make the file the same every time
        if isinstance(raw.get("target_modules"), list):
            raw["target_modules"] = sorted(raw["target_modules"])
        config_file.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    np.savez_compressed(HERE / "peft_logits.npz", **found)


if __name__ == "__main__":
    main()
