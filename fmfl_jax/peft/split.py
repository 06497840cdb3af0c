"""The one boundary between the Flax model and the rest: a model becomes (merge, trainable, frozen).

`trainable` and `frozen` are flat dictionaries of arrays. Only `trainable` is differentiated, mapped over clients, given
optimizer state, aggregated, counted in bits and checkpointed.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.llama import Merge, abstract_llama
from fmfl_jax.models.params import from_dict, to_dict
from fmfl_jax.peft.adapter import AdapterConfig, add_adapters
from fmfl_jax.peft.lora import LoraConfig, add_lora
from fmfl_jax.peft.params import TrainableParam
from fmfl_jax.peft.prompt import PrefixConfig, PromptConfig, add_prefix, add_soft_prompt
from fmfl_jax.quant.int4 import Int4Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Full fine-tuning: every parameter is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPeftConfig:
    """The base model as it is: nothing is trained."""


PeftConfig = LoraConfig | AdapterConfig | PromptConfig | PrefixConfig | FullConfig | NoPeftConfig


def num_virtual_tokens(peft: PeftConfig) -> int:
    """Positions that a soft prompt or a prefix takes before the first token."""
    return peft.num_tokens if isinstance(peft, PromptConfig | PrefixConfig) else 0


def check_context(config: LlamaConfig, peft: PeftConfig, seq_len: int) -> None:
    """Raises ValueError where windows of seq_len tokens, with the virtual ones before them, exceed the context."""
    virtual = num_virtual_tokens(peft)
    if seq_len + virtual > config.max_seq_len:
        beside = f" with the {virtual} virtual tokens of {type(peft).__name__}" if virtual else ""
        raise ValueError(f"seq_len={seq_len}{beside} exceeds the model's context of {config.max_seq_len}")


@dataclasses.dataclass(frozen=True)
class Split:
    """merge(trainable, frozen) is the Llama to call; it is free of side effects and may stand in any jax transform.

    trainable, frozen: {name: array} (frozen may hold Int4Weight).
    """

    merge: Merge
    trainable: dict
    frozen: dict


def split(config: LlamaConfig, params: dict, peft: PeftConfig, *, key, prompt_start=None) -> Split:
    """Adds what `peft` says to the base model of `params` and splits it. Trainable parameters are float32.

    prompt_start: a text's tokens int32 [n] that a soft prompt starts from (`add_soft_prompt`).

    Raises ValueError when `peft` asks for full fine-tuning of packed weights, or names a target that is not there.
    """
    model = abstract_llama(config)
    match peft:
        case LoraConfig():
            add_lora(model, peft, key)
        case AdapterConfig():
            add_adapters(model, peft, key)
        case PromptConfig():
            add_soft_prompt(model, peft, params["embed_tokens.weight"], key, prompt_start)
        case PrefixConfig():
            add_prefix(model, peft, key)
    trained = nnx.Param if isinstance(peft, FullConfig) else TrainableParam
    graphdef, trainable_state, frozen_state = nnx.split(model, trained, ...)
    if isinstance(peft, FullConfig):
        packed = [name for name, value in params.items() if isinstance(value, Int4Weight)]
        if packed:
            raise ValueError(f"full fine-tuning needs unpacked weights, but {packed[0]} is int4")
        trainable = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
        frozen = {}
    else:
        trainable, frozen = to_dict(trainable_state), dict(params)

    def merge(trainable, frozen):
        return nnx.merge(graphdef, from_dict(trainable_state, trainable), from_dict(frozen_state, frozen))

    return Split(merge, trainable, frozen)
