"""Adds a LoRA to its base model and writes the sum as a Hugging Face checkpoint, which any other program loads.

  python -m launch.merge --checkpoint=DIR --peft_dir=DIR --out=DIR

The base must not be 4-bit: its words cannot hold the sum. Weights keep the base's dtype.
"""

from absl import flags

from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
from fmfl_jax.peft.export import load_peft
from fmfl_jax.peft.lora import LoraConfig, merge_lora
from launch import app

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The base: a Hugging Face folder or a llama2.c .bin.", required=True
)
_PEFT_DIR = flags.DEFINE_string("peft_dir", None, "The LoRA: a folder with adapter_config.json.", required=True)
_OUT = flags.DEFINE_string("out", None, "The folder to write.", required=True)


def main():
    checkpoint = load_checkpoint(_CHECKPOINT.value)
    peft, tuned = load_peft(_PEFT_DIR.value, checkpoint.config)
    if not isinstance(peft, LoraConfig):
        raise ValueError(
            f"peft_dir={_PEFT_DIR.value} holds no LoRA: only low-rank products are weights of the base's shape"
        )
    merged = merge_lora(dict(checkpoint.params), tuned, checkpoint.config, peft)
    save_checkpoint(_OUT.value, checkpoint.config, merged, tokenizer_path=checkpoint.tokenizer_path)
    app.say(f"{_OUT.value}: the base with {len(tuned) // 2} low-rank products added")


if __name__ == "__main__":
    app.run(main)
