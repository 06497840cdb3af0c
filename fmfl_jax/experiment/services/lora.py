"""A foundation model's LoRA tuned to label texts: the cross-silo teacher (section III-B), on the silo's own machine.

    loss = - mean_n sum_c target[n, c] log softmax_c( log p(word_c | prompt_n) + offset_c )

The targets are a row's label, or another model's probabilities where that one knows better (FedMKT). The offset is what
the scores need to fit the rows' prior: a silo's skewed labels, and the model's own preference of words, would else be
learnt as if they were said by the texts (logit adjustment, Menon et al., ICLR 2021). The tuned scores are without it.

Only the last third of the layers is tuned. What lies below is the same for every silo, step and text that comes again,
and so a text goes through it once; above it only the last token's logits of the classes' words are computed.

    >>> tuner = make_tuner(config, params, tokenizer, continuations, LoraTuning())
    >>> factors = tuner.tune(prompts, targets, offset, num_steps=16, seed=0, start=None)
    >>> tuner.score(factors, prompts)
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
from fmfl_jax.models.batching import RowBatch, encode_prompts, first_tokens, padded, word_tokens
from fmfl_jax.models.llama import head_logits
from fmfl_jax.optimize import optimizer_step
from fmfl_jax.peft.lora import LoraConfig
from fmfl_jax.peft.split import Split, split

_TUNED = ("q_proj", "v_proj")
_TUNED_PART = 3  # one of so many parts of the layers, the last, is tuned


class Tuner(NamedTuple):
    """score(factors, prompts) -> float32 [N, K], logits of the continuations' first tokens by the tuned model."""

    tune: "TuneFactors"
    score: Callable[[dict, Sequence[str]], np.ndarray]


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
        float [K], added to the scores meanwhile. Raises ValueError where the loss is not finite."""
        ...


def make_tuner(
    config: LlamaConfig, params: dict, tokenizer: Tokenizer, continuations: Sequence[str], tuning: LoraTuning
) -> Tuner:
    """The tuner of the model with these frozen params. continuations: one word a class, told apart by their first
    tokens (raises ValueError else). Prompts of more than tuning.max_tokens tokens are refused."""
    first_tuned = config.num_layers - -(-config.num_layers // _TUNED_PART)
    names = [f"layers.{i}.self_attn.{name}" for i in range(first_tuned, config.num_layers) for name in _TUNED]
    lora = LoraConfig(rank=tuning.rank, alpha=2.0 * tuning.rank, targets=tuple(names))
    model = split(config, params, lora, key=jax.random.key(0))
    optimizer = optax.adam(tuning.learning_rate)
    below = _below(model, first_tuned, tuning)

    @jax.jit
    def class_logits(factors, frozen, h, lengths, words):
        """h [B, T, D] from below, lengths int32 [B], words int32 [K] -> float32 [B, K]."""
        llama = model.merge(factors, frozen)
        h = llama.norm(llama.through(h, first_tuned, config.num_layers))
        last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
        return head_logits(last, *llama.head())[:, words].astype(jnp.float32)

    @jax.jit
    def step(factors, opt_state, frozen, rows, targets, offset):
        """One step on rows, the arguments of class_logits from h on, with targets float32 [B, K]."""

        def loss(factors):
            log_p = jax.nn.log_softmax(class_logits(factors, frozen, *rows) + offset[None])
            return -jnp.mean(jnp.sum(targets * log_p, axis=-1))

        value, grad = jax.value_and_grad(loss)(factors)
        return *optimizer_step(optimizer, grad, opt_state, factors), value

    def read(prompts):
        """h float32 [N, T, D], lengths int32 [N], words int32 [K]."""
        words = first_tokens(word_tokens(tokenizer, prompts, continuations), continuations)
        ids = encode_prompts(tokenizer, prompts, room=tuning.max_tokens)
        return *below(ids), np.asarray([word[0] for word in words], np.int32)

    def tune(prompts, targets, offset, *, num_steps, seed, start):
        h, lengths, words = read(prompts)
        factors = model.trainable if start is None else start
        opt_state, added = optimizer.init(factors), np.asarray(offset, np.float32)
        for chosen in _batches(len(h), tuning.batch_size, num_steps, seed):
            rows, goal = (h[chosen], lengths[chosen], words), np.asarray(targets, np.float32)[chosen]
            factors, opt_state, value = step(factors, opt_state, model.frozen, rows, goal, added)
            if not np.isfinite(value):
                raise ValueError(f"lora_lr={tuning.learning_rate}: the tuning of the FM diverged")
        return factors

    def score(factors, prompts):
        (h, lengths, words), out = read(prompts), []
        for start in range(0, len(h), tuning.batch_size):
            chosen = np.minimum(np.arange(start, start + tuning.batch_size), len(h) - 1)  # one shape for all batches
            out.append(np.asarray(class_logits(factors, model.frozen, h[chosen], lengths[chosen], words)))
        return np.concatenate(out)[: len(h)]

    return Tuner(tune, score)


def _below(model: Split, first_tuned: int, tuning: LoraTuning):
    """token ids -> (h float32 [N, T, D] after the layers that are not tuned, lengths int32 [N]). What it said to a text
    is kept, max_tokens x embed_dim numbers each."""
    known: dict[tuple[int, ...], np.ndarray] = {}

    @jax.jit
    def through_below(frozen, tokens):
        llama = model.merge(model.trainable, frozen)
        return llama.through(llama.embedded(tokens), 0, first_tuned)

    def below(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        texts = [tuple(row) for row in ids]
        new = [row for row in dict.fromkeys(texts) if row not in known]
        for start in range(0, len(new), tuning.batch_size):
            some = new[start : start + tuning.batch_size]
            batch = RowBatch(np.arange(len(some)), tuning.batch_size, tuning.max_tokens)
            known.update(zip(some, np.asarray(through_below(model.frozen, padded(some, batch)[0]))))
        return np.stack([known[row] for row in texts]), np.asarray([len(row) for row in texts], np.int32)

    return below


def _batches(num_rows: int, batch_size: int, num_steps: int, seed: int):
    """num_steps arrays [batch_size] of row numbers: shuffled epochs, one after another."""
    rng = streams.host_rng(streams.SERVICE_SILOS, seed)
    epochs = -(-num_steps * batch_size // num_rows)
    order = np.concatenate([rng.permutation(num_rows) for _ in range(epochs)])
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)
