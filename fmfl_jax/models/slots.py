"""Rows of a batch that different requests take in turn, for continuous batching: what is compiled has fixed shapes, so
requests come and go without compiling anything again.

A slot is a row of the cache of keys and values with the tuned parameters of the client whose request has it. A prompt
is read a chunk at a time into its slot; a step draws a token for all slots over one pass of the frozen base (`serve.py`
says how). What a slot's last owner left in the cache lies beyond every position of the next one until it is
overwritten, so it is never seen.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.generate import Sampling, has_loop, init_cache, sample
from fmfl_jax.models.kv_cache import KVCache
from fmfl_jax.models.llama import Merge


class Slots(NamedTuple):
    """What each slot has of the cache, and the tuned parameters of its client: pytrees of [B, ...]."""

    cache: KVCache
    trainables: dict


class SlotEngine:
    """Greedy decoding in num_slots slots of slot_tokens tokens each (prompt, answer and tuned prompt together).

    join(slots, slot, trainable), read(slots, slot, tokens, position) and step(slots, tokens, positions) return when
    they are done; each takes over the memory of the slots it is given. Three programs are compiled, at their first use.
    """

    def __init__(
        self,
        config: LlamaConfig,
        merge: Merge,
        frozen: dict,
        trainable: dict,
        *,
        num_slots: int,
        slot_tokens: int,
        chunk_tokens: int,
        sampling: Sampling,
    ):
        """trainable: tuned parameters of any one client, for their shapes. Raises ValueError where slots exceed the
        model's context, and for sampling that is not greedy."""
        if sampling.temperature != 0:
            raise ValueError("slots decode greedily: temperature must be 0")
        if slot_tokens > config.max_seq_len:
            raise ValueError(f"slots of {slot_tokens} tokens exceed the model's max_seq_len {config.max_seq_len}")
        self.num_slots, self.slot_tokens, self.chunk_tokens = num_slots, slot_tokens, chunk_tokens
        self._config, self._frozen, self._trainable = config, frozen, trainable
        self._one_array = has_loop(merge, trainable, frozen)
        first = merge(trainable, frozen).num_prompt_slots

        @functools.partial(jax.jit, donate_argnums=0)
        def join(slots: Slots, frozen, slot, trainable):
            trainables = jax.tree.map(lambda all, one: all.at[slot].set(one), slots.trainables, trainable)
            row, _ = merge(trainable, frozen).start_cache(_row(slots.cache, slot))
            return Slots(_with_row(slots.cache, slot, row), trainables)

        @functools.partial(jax.jit, donate_argnums=0)
        def read(slots: Slots, frozen, slot, tokens, position):
            model = merge(jax.tree.map(lambda x: x[slot], slots.trainables), frozen)
            model.prepare_decoding()
            positions = first + position + jnp.arange(chunk_tokens, dtype=jnp.int32)
            _, row = model.hidden_cached(tokens[None], positions[None], _row(slots.cache, slot))
            return Slots(_with_row(slots.cache, slot, row), slots.trainables)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(slots: Slots, frozen, tokens, positions):
            def one(trainable, cache, token, position):
                model = merge(trainable, frozen)
                model.prepare_decoding()
                cache = jax.tree.map(lambda x: x[None], cache)
                hidden, cache = model.hidden_cached(token[None, None], position[None, None], cache)
                drawn = sample(model.logits(hidden[:, 0]), None, sampling)[0]
                return jax.tree.map(lambda x: x[0], cache), drawn

            # An idle slot writes nothing: its position lies beyond the last.
            positions = jnp.where(positions < 0, slot_tokens, first + positions)
            cache, drawn = jax.vmap(one)(slots.trainables, slots.cache, tokens, positions)
            return Slots(cache, slots.trainables), drawn

        self._join, self._read, self._step = join, read, step

    def start(self) -> Slots:
        """Empty slots."""
        trainables = jax.tree.map(lambda x: jnp.zeros((self.num_slots, *x.shape), x.dtype), self._trainable)
        cache = init_cache(self._config, self.num_slots, self.slot_tokens, one_array=self._one_array)
        return Slots(cache, trainables)

    def join(self, slots: Slots, slot: int, trainable: dict) -> Slots:
        """Gives the slot to a client with these tuned parameters (none: nothing to do)."""
        if not trainable:
            return slots
        return jax.block_until_ready(self._join(slots, self._frozen, np.int32(slot), trainable))

    def read(self, slots: Slots, slot: int, tokens: Sequence[int], position: int) -> Slots:
        """Reads at most chunk_tokens tokens of a prompt into the slot, the first of them at `position`."""
        padded = np.zeros(self.chunk_tokens, np.int32)
        padded[: len(tokens)] = tokens
        return jax.block_until_ready(self._read(slots, self._frozen, np.int32(slot), padded, np.int32(position)))

    def step(self, slots: Slots, tokens: np.ndarray, positions: np.ndarray) -> tuple[Slots, np.ndarray]:
        """tokens int32 [B] at positions int32 [B] (below 0: an idle slot) -> the likeliest next tokens, int32 [B]."""
        slots, drawn = self._step(slots, self._frozen, tokens, positions)
        return slots, np.asarray(drawn)

    def programs(self) -> int:
        """Programs compiled so far, of all three functions."""
        compiled = (self._join, self._read, self._step)
        return sum(function._cache_size() for function in compiled)  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True)
class RequestEngine:
    """A SlotEngine whose slots are given to requests: number i has the tuned parameters adapters[i]."""

    engine: SlotEngine
    adapters: list[dict]

    def join(self, state: Slots, slot: int, request: int) -> Slots:
        """`SlotEngine.join` with the request's parameters."""
        return self.engine.join(state, slot, self.adapters[request])

    def read(self, state: Slots, slot: int, tokens: Sequence[int], position: int) -> Slots:
        """`SlotEngine.read`."""
        return self.engine.read(state, slot, tokens, position)

    def step(self, state: Slots, tokens: np.ndarray, positions: np.ndarray) -> tuple[Slots, np.ndarray]:
        """`SlotEngine.step`."""
        return self.engine.step(state, tokens, positions)


def _row(cache: KVCache, slot) -> KVCache:
    """The slot's part, a cache of one row."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), cache)


def _with_row(cache: KVCache, slot, row: KVCache) -> KVCache:
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, slot, 0), cache, row)
