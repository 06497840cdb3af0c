"""The flags that name a model and how it is used, for the commands that use one: --checkpoint, --peft_dir, ..."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import flags

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.tokenizers import Tokenizer, model_tokenizer, with_bos
from fmfl_jax.memory import return_large_arrays
from fmfl_jax.models.formats.checkpoint import open_checkpoint
from fmfl_jax.models.quantize import head_group_size, quantize_head
from fmfl_jax.peft.export import load_peft
from fmfl_jax.peft.split import NoPeftConfig, PeftConfig, Split, split
from fmfl_jax.quant.int4 import with_activation_bits

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A Hugging Face folder (fp, AutoAWQ or compressed-tensors), a GGUF or a llama2.c file, or smollm2-135m.",
    required=True,
)
_PEFT_DIR = flags.DEFINE_string("peft_dir", None, "Tuned parameters: a folder with adapter_config.json.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer file, where the checkpoint has none; 'bytes' for bytes.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16", "float16"],
    "Compute dtype; auto: bfloat16 on a GPU or TPU, float32 on a CPU.",
)
_DEQUANTIZE = flags.DEFINE_bool("dequantize", False, "Unpack the checkpoint's 4-bit weights to --dtype.")
_HEAD = flags.DEFINE_enum(
    "head", "fp", ["fp", "int8", "int4"], "The head: as it is, or rounded to 8 or 4 bits (a tied one gets a copy)."
)
_ACTIVATION_BITS = flags.DEFINE_enum(
    "activation_bits", "16", ["16", "8"], "Bits that a CPU rounds the inputs of 4-bit products to; nothing elsewhere."
)
_BOS = flags.DEFINE_enum(
    "bos", "auto", ["auto", "always", "never"], "The token that begins a text; auto: as the checkpoint has it."
)


class LoadedModel(NamedTuple):
    """A model ready to be called: split.merge(split.trainable, split.frozen). peft: how it was tuned; stop_tokens: the
    ids that end a text, the tokenizer's and the checkpoint's."""

    config: LlamaConfig
    split: Split
    tokenizer: Tokenizer
    peft: PeftConfig
    stop_tokens: tuple[int, ...]


def default_dtype() -> str:
    """float32 on a CPU, where half precision is computed in float32 anyway; elsewhere bfloat16, which the 4-bit kernels
    need."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(check: Callable[[LlamaConfig, PeftConfig], None] | None = None) -> LoadedModel:
    """The model, tuned parameters and tokenizer that the flags name. check(config, peft) may refuse them before the
    weights are read."""
    return_large_arrays()
    dtype = default_dtype() if _DTYPE.value == "auto" else _DTYPE.value
    checkpoint = open_checkpoint(
        _CHECKPOINT.value, dtype=dtype, dequantize=_DEQUANTIZE.value, int8_head=_HEAD.value == "int8"
    )
    config = dataclasses.replace(checkpoint.config, dtype=dtype)
    tokenizer = model_tokenizer(
        _TOKENIZER.value or checkpoint.tokenizer_path, vocab_size=config.vocab_size, model_name=_CHECKPOINT.value
    )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{tokenizer.name} has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    tokenizer = with_bos(tokenizer, _BOS.value)
    peft, tuned = NoPeftConfig(), {}
    if _PEFT_DIR.value is not None:
        peft, tuned = load_peft(_PEFT_DIR.value, config)
    if check is not None:
        check(config, peft)
    params = checkpoint.params
    if _HEAD.value != "fp":
        bits = int(_HEAD.value.removeprefix("int"))
        config, params = quantize_head(config, params, bits=bits, group_size=head_group_size(config))
    params = with_activation_bits(dict(params), int(_ACTIVATION_BITS.value))
    model = split(config, params, peft, key=jax.random.key(0))
    own_end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    stop_tokens = tuple(sorted({*own_end, *checkpoint.stop_tokens}))
    return LoadedModel(config, dataclasses.replace(model, trainable=tuned), tokenizer, peft, stop_tokens)


def split_with(config: LlamaConfig, params: dict, peft) -> Split:
    """The base model with empty places for what `peft` tunes."""
    return split(config, params, peft, key=jax.random.key(0))
