"""Text generation: prefill, then a decode loop that stays on the device, with a KV cache whose memory is reused."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fmfl_jax.config import LlamaConfig
from fmfl_jax.finite import finite_fields
from fmfl_jax.memory import return_freed_memory
from fmfl_jax.models.kv_cache import KVCache
from fmfl_jax.models.llama import Llama, Merge
from fmfl_jax.models.tensor_parallel import CUT_FROZEN
from fmfl_jax.parallel import MODEL_AXIS

_BLOCK = 256  # tokens, in drawing
NO_TOKEN = -1  # what a finished row's places are filled with
_ALL, _BY_HEADS = PartitionSpec(), PartitionSpec(None, MODEL_AXIS)  # of [B, K, S, H]


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k and top_p (Holtzman et al., ICLR 2020) narrow the
    choice before the draw; None keeps all. A row ends after one of stop_tokens, which is still returned. Ids from
    vocab_size on, which a padded embedding has and its tokenizer lacks, are never drawn; None: all may be."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")


class DecodeState(NamedTuple):
    """token int32 [B]: the last token drawn, not yet in the cache. position int32 [B]: its slot. done bool [B]."""

    cache: KVCache
    token: jax.Array
    position: jax.Array
    done: jax.Array
    key: jax.Array


_STATE = DecodeState(KVCache(_BY_HEADS, _BY_HEADS), _ALL, _ALL, _ALL, _ALL)  # pyright: ignore[reportArgumentType]


def init_cache(
    config: LlamaConfig, batch_size: int, num_slots: int, *, mesh: Mesh | None = None, one_array: bool = False
) -> KVCache:
    """An empty cache for batch_size rows of num_slots positions, in the compute dtype. mesh: that of a model which is
    cut: the kv heads are those of all devices, repeated ones counted. one_array: of a model that `has_loop`."""
    num_kv_heads = config.num_kv_heads if mesh is None else max(config.num_kv_heads, mesh.shape[MODEL_AXIS])
    shape = (batch_size, num_kv_heads, num_slots, config.head_dim)
    if one_array:
        shape = (batch_size, config.num_layers, *shape[1:])
        return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    zeros = tuple(jnp.zeros(shape, config.dtype) for _ in range(2 * config.num_layers))
    return KVCache(zeros[: config.num_layers], zeros[config.num_layers :])


def sample(logits, key, sampling: Sampling):
    """logits float32 [B, V] -> int32 [B]."""
    logits = logits[:, : sampling.vocab_size]
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]  # [B, 1]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None:
        logits = jnp.where(in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return draw(logits, jax.random.uniform(key, logits.shape[:1]))


def draw(logits, uniforms):
    """int32 [B] from softmax(logits), float32 [B, V], where the cumulative probabilities pass uniforms [B] in [0, 1).

    One number a row: Gumbel noise for every token of the vocabulary is a tenth of a decoding step on a CPU at batch 1,
    and a third in batches. Two levels, blocks of tokens and tokens in one, keep the sums short.
    """
    short = -logits.shape[1] % _BLOCK
    logits = jnp.pad(logits, ((0, 0), (0, short)), constant_values=-jnp.inf)
    mass = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)).reshape(len(logits), -1, _BLOCK)  # [B, V/256, 256]
    of_blocks = jnp.cumsum(jnp.sum(mass, axis=2), axis=1)  # [B, V/256]
    left = uniforms * of_blocks[:, -1]
    block = _first_above(of_blocks, left)
    before = jnp.pad(of_blocks, ((0, 0), (1, 0)))
    left = left - jnp.take_along_axis(before, block[:, None], axis=1)[:, 0]
    inside = jnp.cumsum(jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0], axis=1)  # [B, 256]
    return block * _BLOCK + _first_above(inside, left)


def _first_above(cumulative, values):
    """int32 [B]: the first place in a row of cumulative [B, N], rising, that is above the row's value, of values [B].
    Rounding may put a value at the row's end, where the last rise is meant."""
    values = jnp.minimum(values, jnp.nextafter(cumulative[:, -1], jnp.zeros_like(values)))
    return jnp.sum((cumulative <= values[:, None]).astype(jnp.int32), axis=1, dtype=jnp.int32)


def in_nucleus(logits, top_p: float):
    """logits float32 [B, V] -> bool [B, V]: tokens than which all likelier ones together hold less than top_p.

    The mass above a threshold falls as the threshold rises, so the least one is found by bisection. It runs over the
    bits of the floats in [0, 1], whose order is theirs as integers, and so is exact: a sort of the vocabulary in every
    step cost a CPU six times what all else of the sampling does.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]  # [B, 1]

    def halve(_, ends):
        too_low, enough = ends  # int32 [B] each
        middle = too_low + (enough - too_low) // 2
        above = jnp.sum(jnp.where(probs > as_float(middle), probs, jnp.float32(0)), axis=-1)
        fits = above < top_p
        return jnp.where(fits, too_low, middle), jnp.where(fits, middle, enough)

    one = int(np.float32(1).view(np.int32))
    ends = jnp.zeros(logits.shape[0], jnp.int32), jnp.full(logits.shape[0], one, jnp.int32)
    _, least = jax.lax.fori_loop(0, one.bit_length(), halve, ends)
    return probs >= as_float(least)


def prefill(model: Llama, tokens, lengths, cache: KVCache, key, sampling: Sampling, *, rows=None) -> DecodeState:
    """Reads the prompts and draws the first new token.

    tokens int32 [B, T], padded on the right; lengths int32 [B], 1..T. What padding writes to the cache lies beyond
    every later query until it is overwritten, so it is never seen. rows int32 [N]: the state is of so many texts, the
    prompt of each being row rows[n] of tokens, which is read once; None: one text a row.
    """
    cache, first = model.start_cache(cache)
    slots = first + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden, cache = model.hidden_cached(tokens, jnp.broadcast_to(slots[None], tokens.shape), cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
    if rows is not None:
        cache, last, lengths = jax.tree.map(lambda x: x[rows], (cache, last, lengths))
    key, sample_key = jax.random.split(key)
    token = sample(model.logits(last), sample_key, sampling)
    return DecodeState(cache, token, first + lengths, _stops(token, sampling), key)


def decode(model: Llama, state: DecodeState, num_steps: int, sampling: Sampling):
    """Draws num_steps more tokens per row in one loop on the device.

    The number of steps is fixed, also when all rows are done before: a GPU's runtime reads the condition of any other
    loop back to the host after every step. Whoever wants to end early calls with few steps (`generate` does).

    Returns the state and int32 [B, num_steps], NO_TOKEN after a row's end.
    """

    def step(state, _):
        hidden, cache = model.hidden_cached(state.token[:, None], state.position[:, None], state.cache)
        key, sample_key = jax.random.split(state.key)
        token = sample(model.logits(hidden[:, 0]), sample_key, sampling)
        drawn = jnp.where(state.done, NO_TOKEN, token)
        done = state.done | _stops(token, sampling)
        return DecodeState(cache, token, state.position + 1, done, key), drawn

    state, drawn = jax.lax.scan(step, state, length=num_steps)
    return state, drawn.T  # [B, num_steps]


def jit_generator(merge: Merge, sampling: Sampling, *, mesh: Mesh | None = None):
    """(prefill_fn, decode_fn) compiled, for a model that merge(trainable, frozen) gives; see peft/split.py.

    prefill_fn(trainable, frozen, tokens, lengths, cache, key) -> state and
    decode_fn(trainable, frozen, state, num_steps) -> (state, tokens); both take the memory of the cache given to them.
    mesh: the model is cut over its axis "model" (peft/tensor_parallel.py), its cache by heads.
    """

    def start(trainable, frozen, tokens, lengths, cache, key):
        model = merge(trainable, frozen)
        model.prepare_decoding()
        return prefill(model, tokens, lengths, cache, key, sampling)

    def go_on(trainable, frozen, state, num_steps):
        model = merge(trainable, frozen)
        model.prepare_decoding()
        return decode(model, state, num_steps, sampling)

    @functools.partial(jax.jit, donate_argnames="cache")
    def prefill_fn(trainable, frozen, tokens, lengths, cache, key):
        run = start
        if mesh is not None:
            in_specs = (_ALL, CUT_FROZEN, _ALL, _ALL, _BY_HEADS, _ALL)
            run = jax.shard_map(start, mesh=mesh, in_specs=in_specs, out_specs=_STATE, check_vma=False)
        return run(trainable, frozen, tokens, lengths, cache, key)

    @functools.partial(jax.jit, static_argnames="num_steps", donate_argnames="state")
    def decode_fn(trainable, frozen, state, num_steps):
        run = functools.partial(go_on, num_steps=num_steps)
        if mesh is not None:
            specs = {"in_specs": (_ALL, CUT_FROZEN, _STATE), "out_specs": (_STATE, _ALL)}
            run = jax.shard_map(run, mesh=mesh, check_vma=False, **specs)
        return run(trainable, frozen, state)

    return prefill_fn, decode_fn


def generate(
    config: LlamaConfig,
    merge: Merge,
    trainable: dict,
    frozen: dict,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key,
    chunk: int = 16,
    mesh: Mesh | None = None,
):
    """Yields int arrays [B, n] of new tokens, up to `chunk` at a time, NO_TOKEN after a row's end. mesh: see
    `jit_generator`.

    Raises ValueError when a prompt is empty, or when prompt and new tokens, with those of a tuned prompt or prefix,
    exceed the model's max_seq_len.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < 1:
        raise ValueError("a prompt must hold at least one token")
    num_tuned = num_prompt_slots(merge, trainable, frozen, mesh)
    num_slots = num_tuned + max(lengths) + max_new_tokens
    if num_slots > config.max_seq_len:
        raise ValueError(
            f"{max(lengths)} prompt tokens + {max_new_tokens} new ones + {num_tuned} tuned ones "
            f"exceed the model's max_seq_len {config.max_seq_len}"
        )
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    prefill_fn, decode_fn = jit_generator(merge, sampling, mesh=mesh)
    one_array = has_loop(merge, trainable, frozen, mesh)
    new_cache = functools.partial(init_cache, config, len(prompts), num_slots, mesh=mesh, one_array=one_array)
    prompt = trainable, frozen, tokens, np.asarray(lengths, np.int32)
    read = prefill_fn.lower(*prompt, jax.eval_shape(new_cache), key).compile()
    return_freed_memory()  # of compiling, before there is a cache
    state = read(*prompt, new_cache(), key)
    del prefill_fn, read  # with the program: there is one prompt
    yield np.asarray(state.token)[:, None]
    left = max_new_tokens - 1
    while left > 0 and not np.all(state.done):
        # Always whole chunks, so that one loop is compiled; the last may draw more than is asked for, into no slot.
        state, drawn = decode_fn(trainable, frozen, state, chunk)
        if left == max_new_tokens - 1:
            return_freed_memory()
        yield np.asarray(drawn)[:, :left]
        left -= chunk


def num_prompt_slots(merge: Merge, trainable: dict, frozen: dict, mesh: Mesh | None) -> int:
    """Of the merged model, which exists only on the devices where it is cut: told by a shape."""
    slots = lambda trainable, frozen: jnp.zeros(merge(trainable, frozen).num_prompt_slots)
    if mesh is not None:
        slots = jax.shard_map(slots, mesh=mesh, in_specs=(_ALL, CUT_FROZEN), out_specs=_ALL, check_vma=False)
    return jax.eval_shape(slots, trainable, frozen).shape[0]


def has_loop(merge: Merge, trainable: dict, frozen: dict, mesh: Mesh | None = None) -> bool:
    """Whether the merged model decodes by a loop over its layers, for which the cache is one array. No array is
    computed."""

    def ask(trainable, frozen):
        model = merge(trainable, frozen)
        model.prepare_decoding()
        return jnp.zeros(int(model.has_loop()))

    return mesh is None and jax.eval_shape(ask, trainable, frozen).shape[0] > 0


def _stops(token, sampling: Sampling):
    """bool [B]: token is one of the stop tokens."""
    done = jnp.zeros(token.shape, bool)
    for stop in sampling.stop_tokens:
        done |= token == stop
    return done
