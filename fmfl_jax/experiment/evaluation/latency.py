"""Latency per token of autoregressive decoding: the paper's second column."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.generate import Sampling, has_loop, init_cache, jit_generator, num_prompt_slots
from fmfl_jax.models.llama import Merge


class Latency(NamedTuple):
    """ms_per_token: median over `repeats` of decoding `tokens` tokens for a batch of one, compilation excluded."""

    ms_per_token: float
    tokens: int
    repeats: int


def decode_latency(
    config: LlamaConfig,
    merge: Merge,
    trainable: dict,
    frozen: dict,
    prompt: np.ndarray,
    *,
    tokens: int = 32,
    repeats: int = 5,
    mesh: Mesh | None = None,
) -> Latency:
    """Times greedy decoding after prompt int32 [T]; a first, untimed run compiles. mesh: see `jit_generator`."""
    prefill_fn, decode_fn = jit_generator(merge, Sampling(), mesh=mesh)
    num_slots = num_prompt_slots(merge, trainable, frozen, mesh) + len(prompt) + 1 + tokens * (repeats + 1)
    state = prefill_fn(
        trainable,
        frozen,
        prompt[None],
        np.asarray([len(prompt)], np.int32),
        init_cache(config, 1, num_slots, mesh=mesh, one_array=has_loop(merge, trainable, frozen, mesh)),
        jax.random.key(0),
    )
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(decode_fn(trainable, frozen, state, tokens))
        seconds.append(time.perf_counter() - begin)
    return Latency(1e3 * float(np.median(seconds[1:])) / tokens, tokens, repeats)
