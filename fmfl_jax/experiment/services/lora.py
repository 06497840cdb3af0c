"""A foundation model's LoRA tuned to label texts: the cross-silo teacher (section III-B), on the silo's own machine.

    loss = - mean_n sum_c target[n, c] log softmax over the classes' words of log p(word_c | prompt_n)

The targets are a row's label, or another model's probabilities where that one knows better (FedMKT). Only the last
token's logits of the classes' words are computed, so the head costs nothing.

    >>> tuner = make_tuner(config, params, tokenizer, continuations, LoraTuning())
    >>> factors = tuner.tune(prompts, targets, seed=0)
    >>> tuner.engine(factors).score(prompts, continuations)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmfl_jax import streams
from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.tokenizers import Tokenizer
from fmfl_jax.experiment.services.config import LoraTuning
from fmfl_jax.models.batching import encode_prompts, first_tokens, word_tokens
from fmfl_jax.models.llama import head_logits
from fmfl_jax.models.scoring import Engine, make_engine
from fmfl_jax.optimize import optimizer_step
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import split


class Tuner(NamedTuple):
    """tune(prompts, targets float [N, K], num_steps, seed, start) -> factors, from those of `start` on, None for new
    ones. engine(factors): the tuned model as a scorer."""

    tune: Callable[[Sequence[str], np.ndarray, int, int, dict | None], dict]
    engine: Callable[[dict], Engine]


def make_tuner(
    config: LlamaConfig,
    params: dict,
    tokenizer: Tokenizer,
    continuations: Sequence[str],
    tuning: LoraTuning,
    *,
    batch_tokens: int = 1024,
) -> Tuner:
    """The tuner of the model with these frozen params. continuations: one word a class, told apart by their first
    tokens (raises ValueError else). Prompts of more than tuning.max_tokens tokens are refused."""
    model = split(config, params, LoraConfig(rank=tuning.rank, alpha=2.0 * tuning.rank), key=jax.random.key(0))
    optimizer = optax.adam(tuning.learning_rate)

    @jax.jit
    def step(factors, opt_state, frozen, tokens, lengths, first, targets):
        """One step on tokens int32 [B, T] with targets float32 [B, K] over the tokens first int32 [K]."""

        def loss(factors):
            llama = model.merge(factors, frozen)
            hidden = llama.hidden(tokens)  # [B, T, D]
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
            logits = head_logits(last, *llama.head())[:, first]  # [B, K]
            return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1))

        value, grad = jax.value_and_grad(loss)(factors)
        return *optimizer_step(optimizer, grad, opt_state, factors), value

    def tune(prompts, targets, num_steps, seed, start):
        first = jnp.asarray([w[0] for w in first_tokens(word_tokens(tokenizer, prompts, continuations), continuations)])
        ids = encode_prompts(tokenizer, prompts, room=tuning.max_tokens)
        factors = model.trainable if start is None else start
        opt_state = optimizer.init(factors)
        for rows in _batches(len(ids), tuning.batch_size, num_steps, seed):
            tokens = np.zeros((len(rows), tuning.max_tokens), np.int32)
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])] = ids[row]
            lengths = np.asarray([len(ids[row]) for row in rows], np.int32)
            goal = np.asarray(targets, np.float32)[rows]
            factors, opt_state, value = step(factors, opt_state, model.frozen, tokens, lengths, first, goal)
            if not np.isfinite(value):
                raise ValueError(f"lora_lr={tuning.learning_rate}: the tuning of the FM diverged")
        return factors

    def engine(factors):
        return make_engine(config, model.merge, factors, model.frozen, tokenizer, batch_tokens=batch_tokens)

    return Tuner(tune, engine)


def _batches(num_rows: int, batch_size: int, num_steps: int, seed: int):
    """num_steps arrays [batch_size] of row numbers: shuffled epochs, one after another."""
    rng = streams.host_rng(streams.SERVICE_SILOS, seed)
    epochs = -(-num_steps * batch_size // num_rows)
    order = np.concatenate([rng.permutation(num_rows) for _ in range(epochs)])
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)
