"""A foundation model's LoRA tuned to label texts: the cross-silo teacher (section III-B), on the silo's own machine.

    loss = - mean_n sum_c target[n, c] log softmax_c( log p(word_c | prompt_n) + offset_c )

The targets are a row's label, or another model's probabilities where that one knows better (FedMKT). The offset is what
the scores need to fit the rows' prior: a silo's skewed labels, and the model's own preference of words, would else be
learnt as if they were said by the texts (logit adjustment, Menon et al., ICLR 2021). The tuned scores are without it.
Only the last token's logits of the classes' words are computed, so the head costs nothing.

    >>> tuner = make_tuner(config, params, tokenizer, continuations, LoraTuning())
    >>> factors = tuner.tune(prompts, targets, offset, num_steps=16, seed=0, start=None)
    >>> tuner.engine(factors).score(prompts, continuations)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

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

_TUNED = ("q_proj", "v_proj")
_TUNED_PART = 3  # the last third of the layers: the backward pass, half of a step's cost, ends there


class Tuner(NamedTuple):
    """engine(factors): the tuned model as a scorer."""

    tune: "TuneFactors"
    engine: Callable[[dict], Engine]


class TuneFactors(Protocol):
    def __call__(
        self,
        prompts: Sequence[str],
        targets: np.ndarray,
        offset: np.ndarray,
        /,
        *,
        num_steps: int,
        seed: int,
        start: dict | None,
    ) -> dict:
        """The factors after num_steps on targets float [N, K], from those of `start` on, None for new ones. offset:
        float [K], added to the scores meanwhile."""
        ...


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
    first = config.num_layers - -(-config.num_layers // _TUNED_PART)
    targets = tuple(f"layers.{i}.self_attn.{name}" for i in range(first, config.num_layers) for name in _TUNED)
    lora = LoraConfig(rank=tuning.rank, alpha=2.0 * tuning.rank, targets=targets)
    model = split(config, params, lora, key=jax.random.key(0))
    optimizer = optax.adam(tuning.learning_rate)

    @jax.jit
    def step(factors, opt_state, frozen, tokens, lengths, first, targets, offset):
        """One step on tokens int32 [B, T] with targets float32 [B, K] over the tokens first int32 [K]."""

        def loss(factors):
            llama = model.merge(factors, frozen)
            hidden = llama.hidden(tokens)  # [B, T, D]
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
            logits = head_logits(last, *llama.head())[:, first]  # [B, K]
            log_p = jax.nn.log_softmax(logits.astype(jnp.float32) + offset[None])
            return -jnp.mean(jnp.sum(targets * log_p, axis=-1))

        value, grad = jax.value_and_grad(loss)(factors)
        return *optimizer_step(optimizer, grad, opt_state, factors), value

    def tune(prompts, targets, offset, *, num_steps, seed, start):
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
            given = tokens, lengths, first, goal, np.asarray(offset, np.float32)
            factors, opt_state, value = step(factors, opt_state, model.frozen, *given)
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
