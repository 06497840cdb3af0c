"""Writes a checkpoint in another format, for other programs.

python -m launch.export --checkpoint=smollm2-135m --dequantize --dtype=float16 --to=huggingface --out=DIR
python -m launch.export --checkpoint=DIR --to=gguf --type=Q4_1 --out=FILE.gguf
"""

import pathlib

from absl import flags

from fmfl_jax.models.formats import gguf_saving
from fmfl_jax.models.formats.checkpoint import load_checkpoint, save_checkpoint
from launch import app

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A Hugging Face folder, a GGUF or a llama2.c file, or smollm2-135m.", required=True
)
_TO = flags.DEFINE_enum("to", None, ["huggingface", "gguf"], "The format to write.", required=True)
_OUT = flags.DEFINE_string("out", None, "The folder (huggingface) or file (gguf) to write.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer file, where the checkpoint has none.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Dtype of huggingface's matrices; default: the checkpoint's."
)
_TYPE = flags.DEFINE_enum("type", None, gguf_saving.TYPES, "Type of gguf's matrices; default: F16.")
_DEQUANTIZE = flags.DEFINE_bool("dequantize", False, "Unpack the checkpoint's 4-bit weights first.")


def main():
    to_gguf = _TO.value == "gguf"
    for flag, belongs in ((_DTYPE, not to_gguf), (_TYPE, to_gguf)):
        if flag.value is not None and not belongs:
            raise ValueError(f"--{flag.name}={flag.value} does not belong to --to={_TO.value}")
    checkpoint = load_checkpoint(_CHECKPOINT.value, dtype=_DTYPE.value, dequantize=_DEQUANTIZE.value)
    tokenizer = _TOKENIZER.value or checkpoint.tokenizer_path
    if to_gguf:
        name = pathlib.Path(_CHECKPOINT.value).stem
        gguf_saving.save_gguf(
            _OUT.value,
            checkpoint.config,
            checkpoint.params,
            type_name=_TYPE.value or "F16",
            name=name,
            tokenizer_path=tokenizer,
        )
    else:
        save_checkpoint(_OUT.value, checkpoint.config, checkpoint.params, tokenizer_path=tokenizer)
    app.say(f"wrote {_OUT.value}")


if __name__ == "__main__":
    app.run(main)
