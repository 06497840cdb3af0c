"""The foundation model as a scorer: log-probabilities of label words after many prompts, batched.

    log p(word | prompt) = sum_j log p(word_j | prompt, word_1 ... word_{j-1})          (all tokens of the word)

    engine = make_engine(config, split.merge, split.trainable, split.frozen, tokenizer)
    engine.score(["Rain all day.\\nTopic:", "He scored.\\nTopic:"], [" weather", " sports"])      # float32 [2, 2]

What makes it fast: the tokens that all prompts begin with (instruction, examples) go through the model once, and their
keys and values stay for the next call; prompts are sorted by length into few shapes; the head sees a prompt's last
token alone; tokens of a word after its first go through beside the prompt, layer by layer, so that no cache of all
layers is held. Blocks are compiled one for all layers and called one after another: a new shape costs the compilation
of a single layer.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.tokenizers import Tokenizer
from fmfl_jax.models.batching import encode_prompts, first_tokens, length_batches, padded, word_tokens
from fmfl_jax.models.llama import Merge, head_logits
from fmfl_jax.models.rope import rope_frequencies, rope_tables
from fmfl_jax.quant.linear import look_up

_LEAST_PREFIX = 16  # tokens in common that are worth a pass of their own
_KEPT_PREFIXES = 4  # their keys and values are kept on the device


class Score(Protocol):
    def __call__(self, texts: Sequence[str], continuations: Sequence[str], /) -> np.ndarray:
        """float32 [N, K]: log p(continuation k | text n)."""
        ...


class NextLogProbs(Protocol):
    def __call__(self, texts: Sequence[str], /) -> np.ndarray:
        """float32 [N, V]: log-probabilities of the token after each text."""
        ...


class Engine(NamedTuple):
    """score(texts, continuations) -> float32 [N, K] and next_log_probs(texts) -> float32 [N, V]. Both raise ValueError
    for a text without tokens or too long for the model, and where the model gives NaN or infinity."""

    score: Score
    next_log_probs: NextLogProbs


def make_engine(
    config: LlamaConfig,
    merge: Merge,
    trainable: dict,
    frozen: dict,
    tokenizer: Tokenizer,
    *,
    whole_words: bool = True,
    batch_tokens: int = 1024,
) -> Engine:
    """The engine of the model merge(trainable, frozen), tuned or not, packed or not.

    whole_words: a continuation's score is that of all its tokens; False: of its first token alone, and continuations
    that begin with the same token are refused. batch_tokens: tokens that go through the model at once; 1,024 are the
    fastest on a CPU, an accelerator takes 16,384 and more.

    The result is that of one text at a time up to rounding. The engine keeps the keys and values of the last few
    beginnings that prompts had in common; it is not meant for several threads at once.
    """
    parts = _take_apart(config, merge(trainable, frozen))
    prefixes: dict[tuple[int, ...], _Before] = {}
    room = config.max_seq_len - parts.num_tuned

    def run(prompts: list[list[int]], words: list[list[int]], finish):
        """finish(log-probabilities [B, V], tail log-probabilities [B, W]) -> [B, ...], for distinct prompts."""
        shared = _shared_prefix(prompts, prefixes)
        before = _before(parts, shared, prefixes)
        rests = [prompt[len(shared) :] for prompt in prompts]
        out: list[Any] = [None] * len(prompts)
        for batch in length_batches([len(rest) for rest in rests], batch_tokens=batch_tokens):
            tokens, lengths = padded(rests, batch)
            rows = np.asarray(finish(*_forward(parts, before, tokens, lengths, words)))
            for place, row in enumerate(batch.rows):
                out[row] = rows[place]
        return out

    def score(texts, continuations):
        words = word_tokens(tokenizer, texts, continuations)
        longest = max(len(word) for word in words)
        if not whole_words:
            words = first_tokens(words, continuations)
        prompts = encode_prompts(tokenizer, texts, room=room - longest + 1)
        first = jnp.asarray([word[0] for word in words], jnp.int32)
        return _over_distinct(prompts, lambda kept: run(kept, words, lambda full, tails: _at_words(full, first, tails)))

    def next_log_probs(texts):
        prompts = encode_prompts(tokenizer, texts, room=room)
        return _over_distinct(prompts, lambda kept: run(kept, [], lambda full, tails: full))

    return Engine(score, next_log_probs)


# ---- tokens


def _over_distinct(prompts: list[list[int]], run) -> np.ndarray:
    """run on the distinct prompts, and its rows for all of them. Raises ValueError where a number is not finite."""
    kept = {tuple(prompt): None for prompt in prompts}
    places = {prompt: place for place, prompt in enumerate(kept)}
    rows = np.stack(run([list(prompt) for prompt in kept]))[[places[tuple(prompt)] for prompt in prompts]]
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(wrong):
        raise ValueError(f"the model gives NaN or infinity for text {wrong[0]} (and {len(wrong) - 1} more)")
    return rows


def _shared_prefix(prompts: list[list[int]], known: dict) -> tuple[int, ...]:
    """The tokens to take as given: those all prompts begin with, or a little less where that is there already."""
    room = min(len(prompt) for prompt in prompts) - 1  # the last token of each goes through with the batch
    low, high = min(prompts), max(prompts)  # what these two have in common, all between them have
    common = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    there = [p for p in known if len(p) <= min(common, room) and tuple(low[: len(p)]) == p]
    best = max(there, key=len, default=())
    # Of a single prompt everything is "in common", with no other to share it.
    new = () if len(prompts) == 1 else tuple(low[: min(common, room)])
    return new if len(new) >= len(best) + _LEAST_PREFIX else best


# ---- the model, layer by layer


class _Before(NamedTuple):
    """What every row sees before its first token: keys and values of all layers, [P, K, H] each; none where P is 0."""

    layers: list[tuple[jax.Array, jax.Array]] | None
    num_tokens: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["graphdef"])
@dataclasses.dataclass(frozen=True)
class _Module:
    """A part of the model as a pytree: jitted functions take it, and are compiled once for all layers."""

    graphdef: nnx.GraphDef
    state: Any

    def merged(self):
        return nnx.merge(self.graphdef, self.state)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A model in pieces that are called one after another. tuned: the keys and values of prefix tuning; soft_prompt:
    [P, D] or None; num_tuned: their slots."""

    config: LlamaConfig
    embedding: jax.Array
    blocks: list[_Module]
    norm: _Module
    head: tuple[Any, bool]
    tuned: _Before
    soft_prompt: jax.Array | None
    num_tuned: int


def _take_apart(config: LlamaConfig, model) -> _Parts:
    num_tuned = model.num_prompt_slots
    dtype = jnp.dtype(config.dtype)
    soft_prompt = None if model.soft_prompt is None else model.soft_prompt(dtype)
    tuned = _Before(None, 0)
    if model.layers[0].self_attn.prefix is not None:
        layers = [block.self_attn.prefix(dtype) for block in model.layers]
        tuned = _Before(layers, layers[0][0].shape[0])
    model.prepare_decoding()  # also what tells one layer's dropout from another's goes: layers are one program
    for block in model.layers:
        block.self_attn.prefix = None  # what is seen before is given in each call
    blocks = [_Module(*nnx.split(block)) for block in model.layers]
    embedding = model.embed_tokens.weight.get_value()
    return _Parts(
        config, embedding, blocks, _Module(*nnx.split(model.norm)), model.head(), tuned, soft_prompt, num_tuned
    )


def _before(parts: _Parts, shared: tuple[int, ...], known: dict) -> _Before:
    """Keys and values of what was tuned and of the shared tokens; the newest few are kept in `known`."""
    if shared in known:
        known[shared] = known.pop(shared)  # the newest is last
        return known[shared]
    h = _embed(parts.embedding, jnp.asarray([shared], jnp.int32), parts.config.dtype)
    if parts.soft_prompt is not None:
        h = jnp.concatenate([parts.soft_prompt[None], h], axis=1)
    before = parts.tuned
    if h.shape[1]:
        layers = []
        for i, block in enumerate(parts.blocks):
            given = None if parts.tuned.layers is None else parts.tuned.layers[i]
            h, (key, value) = _block(block, parts.config, h, given)
            own = key[0], value[0]
            layers.append(own if given is None else tuple(jnp.concatenate(pair) for pair in zip(given, own)))
        before = _Before(layers, layers[0][0].shape[0])
    known[shared] = before
    while len(known) > _KEPT_PREFIXES:
        del known[next(iter(known))]
    return before


def _forward(parts: _Parts, before: _Before, tokens, lengths, words: list[list[int]]):
    """Log-probabilities float32 [B, V] of the token after each row, and [B, W] of the words' further tokens, 0 for
    words of one token."""
    config = parts.config
    long = [w for w, word in enumerate(words) if len(word) > 1]
    h = _embed(parts.embedding, tokens, config.dtype)
    tail, positions, targets, real = None, None, None, None
    if long:  # rows of word 0, of word 1, ...
        steps = max(len(words[w]) for w in long) - 1
        inputs, targets, real = _tails([words[w] for w in long], steps)
        tail = _embed(parts.embedding, np.repeat(inputs, len(tokens), axis=0), config.dtype)  # [W B, L, D]
        positions = before.num_tokens + np.tile(lengths, len(long))[:, None] + np.arange(steps, dtype=np.int32)[None]
    for i, block in enumerate(parts.blocks):
        given = None if before.layers is None else before.layers[i]
        h, kv = _block(block, config, h, given)
        if tail is not None:
            tail = _tail_block(block, config, tail, positions, kv, given)
    end = parts.norm, *parts.head
    full = _last_log_probs(*end, h, lengths)
    if tail is None:
        return full, jnp.zeros((len(tokens), len(words)), jnp.float32)
    places = jnp.asarray(long, jnp.int32)
    return full, _tail_log_probs(*end, tail, targets, real, places, num_words=len(words))


def _tails(words: list[list[int]], steps: int):
    """inputs and targets int32 [W, L], padded with 0, and which of them are real, bool [W, L]."""
    inputs, targets = np.zeros((2, len(words), steps), np.int32)
    for row, word in enumerate(words):
        inputs[row, : len(word) - 1], targets[row, : len(word) - 1] = word[:-1], word[1:]
    return inputs, targets, np.asarray([[j < len(word) - 1 for j in range(steps)] for word in words])


@functools.partial(jax.jit, static_argnames="dtype")
def _embed(embedding, tokens, dtype):
    return look_up(embedding, tokens).astype(dtype)


class _Given:
    """Keys and values [P, K, H] in a layer's slot for prefixes."""

    def __init__(self, keys, values):
        self.keys, self.values, self.num_tokens = keys, values, keys.shape[0]

    def __call__(self, dtype):
        return self.keys.astype(dtype), self.values.astype(dtype)


@functools.partial(jax.jit, static_argnames="config")
def _block(module: _Module, config: LlamaConfig, h, given):
    """One layer on h [B, T, D], padded on the right: causal, so that no token sees padding. given: None or keys and
    values [P, K, H] that all see. Returns h and the rows' own keys and values [B, T, K, H]."""
    block = module.merged()
    start = 0
    if given is not None:
        block.self_attn.prefix = _Given(*given)
        start = given[0].shape[0]
    positions = jnp.arange(start, start + h.shape[1], dtype=jnp.int32)
    return block(h, _rope(config, positions[None]), None, None, None)


@functools.partial(jax.jit, static_argnames="config")
def _tail_block(module: _Module, config: LlamaConfig, h, positions, kv, given):
    """One layer on the words' tokens h [W B, L, D] at slots positions [W B, L], after the rows' keys and values kv
    [B, T, K, H]. What padding left in the slots is overwritten before it is seen, as in decoding."""
    block = module.merged()
    rows, length, num_words = kv[0].shape[0], h.shape[1], h.shape[0] // kv[0].shape[0]

    def cache(own, before):
        own = own.transpose(0, 2, 1, 3)  # [B, K, T, H]
        if before is not None:
            before = before.transpose(1, 0, 2)[None]
            own = jnp.concatenate([jnp.broadcast_to(before, (rows, *before.shape[1:])), own], axis=2)
        own = jnp.pad(own, ((0, 0), (0, 0), (0, length), (0, 0)))
        return jnp.tile(own, (num_words, 1, 1, 1))

    keys, values = (cache(own, None if given is None else given[i]) for i, own in enumerate(kv))
    return block(h, _rope(config, positions), positions, (keys, values), None)[0]


def _rope(config: LlamaConfig, positions):
    return rope_tables(positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))


@jax.jit
def _at_words(full, first, tails):
    return full[:, first] + tails


@functools.partial(jax.jit, static_argnames="tied")
def _last_log_probs(norm: _Module, weight, tied: bool, h, lengths):
    """h [B, T, D], lengths int32 [B] -> float32 [B, V] of the token after each row."""
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
    return _log_probs(norm, weight, tied, last)


@functools.partial(jax.jit, static_argnames=("tied", "num_words"))
def _tail_log_probs(norm: _Module, weight, tied: bool, h, targets, real, places, *, num_words: int):
    """h [W B, L, D], targets int32 and real bool [W, L] -> float32 [B, num_words], the words at their places."""
    steps = h.shape[1]
    h = h.reshape(len(targets), -1, steps, h.shape[2])  # [W, B, L, D]

    def one(word):
        hidden, targets, real = word
        rows = _log_probs(norm, weight, tied, hidden)  # [B, L, V]
        rows = jnp.take_along_axis(rows, targets[None, :, None], axis=2)[..., 0]
        return jnp.where(real[None], rows, 0.0).sum(axis=1)

    sums = jax.lax.map(one, (h, targets, real))  # one word at a time: of all, the logits could be large
    return jnp.zeros((h.shape[1], num_words), jnp.float32).at[:, places].set(sums.T)


def _log_probs(norm: _Module, weight, tied: bool, hidden):
    """hidden [..., D] -> float32 [..., V]."""
    return jax.nn.log_softmax(head_logits(norm.merged()(hidden), weight, tied), axis=-1)
