"""Makes llama_<case>.npz and tinystories_656k.npz: logits of transformers' LlamaForCausalLM, in float32 on a CPU.

    python3.11 -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6
    cd tests/golden && /tmp/golden/bin/python make_llama.py [FOLDER OF TinyStories-656K]

A file of a case holds logits [B, T, V], the config.json that transformers wrote, and the names and shapes of its state
dictionary. The TinyStories file holds tokens [B, T], every 8th position's logits and the mean loss.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import weights
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent


def build(case: str) -> LlamaForCausalLM:
    """The model of a case, eager attention, float32."""
    model = LlamaForCausalLM(LlamaConfig(**(weights.SHAPE | weights.CASES[case]), attn_implementation="eager"))
    missing, unexpected = model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in weights.base_weights(case).items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()


def main() -> None:
    for case in weights.CASES:
        model = build(case)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = (pathlib.Path(folder) / "config.json").read_text()
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        np.savez_compressed(
            HERE / f"llama_{case}.npz",
            logits=logits(model, weights.tokens(case)),
            config=config,
            shapes=json.dumps(shapes),
        )
    if len(sys.argv) > 1:
        model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
        tokens = np.random.RandomState(0).randint(3, model.config.vocab_size, (2, 64)).astype(np.int32)
        tokens[:, 0] = 1
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            out = model(input_ids=ids, labels=ids)
        np.savez_compressed(
            HERE / "tinystories_656k.npz", tokens=tokens, loss=out.loss.numpy(), logits=out.logits[:, ::8].numpy()
        )


if __name__ == "__main__":
    main()
