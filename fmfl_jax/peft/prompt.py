"""Prompt tuning (Lester et al., EMNLP 2021) and prefix tuning (Li and Liang, ACL 2021).

Prompt tuning puts P trained embeddings before the tokens; prefix tuning gives every layer P trained keys and values
that all tokens see (unrotated, as PEFT's past_key_values; the tokens' positions start at P).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmfl_jax.models.llama import Llama
from fmfl_jax.peft.params import TrainableParam
from fmfl_jax.quant.linear import look_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """num_tokens: length P of the soft prompt."""

    num_tokens: int = 20

    def __post_init__(self):
        _check_length("prompt", self.num_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """num_tokens: number P of trained keys and values per layer."""

    num_tokens: int = 20

    def __post_init__(self):
        _check_length("prefix", self.num_tokens)


class PromptParam(TrainableParam):
    """A soft prompt [P, D], or a prefix's keys or values [P, K, H]."""


class SoftPrompt(nnx.Module):
    """soft_prompt [P, D]."""

    def __init__(self, embeddings):
        self.num_tokens = embeddings.shape[0]
        self.embeddings = PromptParam(embeddings)

    def __call__(self, dtype):
        """[P, D] in dtype."""
        return self.embeddings.get_value().astype(dtype)


class Prefix(nnx.Module):
    """keys and values [P, K, H] of one layer, small and random at the start."""

    def __init__(self, num_tokens: int, num_kv_heads: int, head_dim: int, key):
        shape = (num_tokens, num_kv_heads, head_dim)
        self.num_tokens = num_tokens
        self.keys, self.values = (
            PromptParam(0.02 * jax.random.normal(k, shape, jnp.float32)) for k in jax.random.split(key)
        )

    def __call__(self, dtype):
        """keys and values, [P, K, H] each, in dtype."""
        return self.keys.get_value().astype(dtype), self.values.get_value().astype(dtype)


def add_soft_prompt(model: Llama, config: PromptConfig, embedding, key, start=None) -> None:
    """Starts the prompt from the rows of the token embedding [V, D] of a text, tokens `start` int32 [n >= 1]: the first
    P, or all of them again and again (PEFT's prompt_tuning_init TEXT). None: from P random rows of the vocabulary
    (PEFT's SAMPLE_VOCAB; Lester et al., section 3.2)."""
    if start is None:
        rows = jax.random.randint(key, (config.num_tokens,), 0, model.config.vocab_size, jnp.int32)
    else:
        rows = jnp.asarray(np.resize(start, config.num_tokens), jnp.int32)
    model.soft_prompt = SoftPrompt(look_up(embedding, rows).astype(jnp.float32))


def add_prefix(model: Llama, config: PrefixConfig, key) -> None:
    """Fills the `prefix` slot of every layer."""
    c = model.config
    for i, block in enumerate(model.layers):
        block.self_attn.prefix = Prefix(config.num_tokens, c.num_kv_heads, c.head_dim, jax.random.fold_in(key, i))


def _check_length(what: str, num_tokens: int) -> None:
    if num_tokens < 1:
        raise ValueError(f"{what} num_tokens must be at least 1, got {num_tokens}")
