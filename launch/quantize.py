"""Quantizes a checkpoint to 4 bits, by AWQ, by GPTQ or by rounding to nearest, and writes it in AutoAWQ's format.

  python -m launch.quantize --checkpoint=DIR --calib_text=FILE --out=DIR [--bits=4 --method=awq --recipe=clip --head=fp]

The source is read and quantized one block at a time: held are the quantized model, one block and the calibration
activations. Prints one JSON line. TinyStories-656K with --seq_len=128 took 30 s on 2 busy cores.
"""

import dataclasses
import json
import pathlib
import time

import numpy as np
from absl import flags

from fmfl_jax import streams
from fmfl_jax.data.batches import token_windows
from fmfl_jax.data.corpora import load_documents
from fmfl_jax.data.tokenizers import model_tokenizer
from fmfl_jax.models.formats import awq_gemm
from fmfl_jax.models.formats.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from fmfl_jax.models.params import num_bytes
from fmfl_jax.models.quantize import check_group_size, quantize, quantize_head, with_group_size
from fmfl_jax.peft.split import NoPeftConfig, check_context
from fmfl_jax.progress import Progress
from fmfl_jax.quant.awq import METHODS, RECIPES, QuantConfig
from launch import app

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A Hugging Face folder or a llama2.c .bin, unquantized.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The folder to write.", required=True)
_CALIB_TEXT = flags.DEFINE_string("calib_text", None, "The calibration text: a file, or a folder of text files.")
_DEQUANTIZE = flags.DEFINE_bool("dequantize", False, "Quantize a checkpoint's 4-bit weights again.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer file, where the checkpoint has none; 'bytes' for bytes.")
_METHOD = flags.DEFINE_enum("method", "awq", METHODS, "AWQ, GPTQ, or rounding to nearest (needs no text).")
_RECIPE = flags.DEFINE_enum(
    "recipe", "clip", RECIPES, "AWQ's searches: as published, or with ours of the clip (docs/results/awq.md)."
)
_BITS = flags.DEFINE_integer("bits", 4, "Bits of a weight: 4, or 3 (kept in 4-bit words all the same).")
_HEAD = flags.DEFINE_enum(
    "head",
    "fp",
    ["fp", "int4"],
    "The head: as it is, or rounded to nearest to --bits too (a tied one gets a copy and is tied no more). "
    "Packed, it is read by this project, by vLLM's Marlin kernels (not tried), not by transformers or AutoAWQ.",
)
_GROUP_SIZE = flags.DEFINE_integer(
    "group_size",
    None,
    "Weights of the input dimension that share a scale; -1 for all; default: 128, or the largest power of two below "
    "that divides the model's dimensions.",
)
_SEQ_LEN = flags.DEFINE_integer(
    "seq_len", None, "Tokens of a calibration window; default: the context, at most 512.", lower_bound=1
)
_NUM_WINDOWS = flags.DEFINE_integer(
    "num_windows", 128, "Calibration windows, drawn from the text at random.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides which windows are drawn.", lower_bound=0)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the calibration activations.")


def main():
    asked = QuantConfig(method=_METHOD.value, bits=_BITS.value, group_size=_GROUP_SIZE.value, recipe=_RECIPE.value)
    checkpoint = open_checkpoint(_CHECKPOINT.value, dequantize=_DEQUANTIZE.value)
    config = dataclasses.replace(checkpoint.config, dtype=_DTYPE.value)
    quant = with_group_size(asked, config, app.say)
    check_group_size(config, quant.known_group_size)
    if _HEAD.value == "int4":  # refused now where the format cannot hold it, not after the blocks
        awq_gemm.specs("lm_head", config.embed_dim, config.vocab_size, quant.known_group_size)
    tokenizer_path = _TOKENIZER.value or checkpoint.tokenizer_path
    windows = _calibration_windows(checkpoint, tokenizer_path) if quant.needs_text else None
    start = time.perf_counter()
    progress = Progress(config.num_layers, label=quant.method, unit="block", seconds_between_lines=0)
    params = quantize(config, checkpoint.params, windows, quant, on_block=lambda done: progress.advance())
    progress.close()
    if _HEAD.value == "int4":
        config, params = quantize_head(config, params, bits=quant.bits, group_size=quant.known_group_size)
    seconds = time.perf_counter() - start
    named = None if tokenizer_path == "bytes" else tokenizer_path
    save_checkpoint(_OUT.value, config, params, tokenizer_path=named)
    app.say(
        json.dumps(
            {
                "out": _OUT.value,
                "method": quant.method,
                "recipe": quant.recipe if quant.method == "awq" else None,
                "bits": quant.bits,
                "group_size": quant.group_size,
                "head": _HEAD.value,
                "calibration_tokens": 0 if windows is None else int(windows.size),
                "weight_bytes": num_bytes(params),
                "file_bytes": sum(f.stat().st_size for f in pathlib.Path(_OUT.value).glob("*.safetensors")),
                "seconds": round(seconds, 2),
            }
        )
    )


def _calibration_windows(checkpoint: Checkpoint, tokenizer_path) -> np.ndarray:
    """int32 [num_windows, seq_len], or all windows of a shorter text."""
    if _CALIB_TEXT.value is None:
        raise ValueError(f"--method={_METHOD.value} needs --calib_text=FILE (--method=rtn needs none)")
    seq_len = _SEQ_LEN.value or min(checkpoint.config.max_seq_len, 512)
    check_context(checkpoint.config, NoPeftConfig(), seq_len)
    tokenizer = model_tokenizer(tokenizer_path, vocab_size=checkpoint.config.vocab_size, model_name=_CHECKPOINT.value)
    windows = token_windows(tokenizer, load_documents(_CALIB_TEXT.value), seq_len, add_bos=True, add_eos=True).windows
    order = streams.host_rng(streams.CALIBRATION, _SEED.value).permutation(len(windows))[: _NUM_WINDOWS.value]
    return windows[order, :-1]


if __name__ == "__main__":
    app.run(main)
