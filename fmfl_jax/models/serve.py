"""One batch for many clients, each with its own tuned parameters: the frozen base is read once for all.

Every row of the batch is a client. vmap over the tuned parameters folds the rows' tokens into one product with each
base matrix (quant/linear.py folds packed ones), with the small products of the clients' own factors beside it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.generate import NO_TOKEN, Sampling, decode, has_loop, init_cache, jit_generator, prefill
from fmfl_jax.models.llama import Merge


def make_server(
    config: LlamaConfig, merge: Merge, *, max_prompt_tokens: int, max_new_tokens: int, sampling: Sampling
) -> Callable[[dict, dict, list[list[int]], jax.Array], jax.Array]:
    """serve(trainables, frozen, prompts, key) -> int32 [C, max_new_tokens], NO_TOKEN after a row's end.

    trainables: pytree of [C, ...], one client's tuned parameters per row, all of the same shapes. prompts: C lists of
    token ids. Compiled once for each C. Greedy rows are those that each client's model alone would give, up to ties of
    rounding.

    serve raises ValueError for an empty prompt and one longer than max_prompt_tokens, and where prompt and new tokens,
    with those of a tuned prompt or prefix, do not fit the model.
    """

    @jax.jit
    def run(trainables, frozen, tokens, lengths, keys):
        def one(trainable, tokens, length, key):
            model = merge(trainable, frozen)
            slots = model.num_prompt_slots + max_prompt_tokens + max_new_tokens
            if slots > config.max_seq_len:
                raise ValueError(
                    f"{max_prompt_tokens} prompt tokens + {max_new_tokens} new ones + {model.num_prompt_slots} tuned "
                    f"ones exceed the model's max_seq_len {config.max_seq_len}"
                )
            model.prepare_decoding()
            cache = init_cache(config, 1, slots, one_array=model.has_loop())
            state = prefill(model, tokens[None], length[None], cache, key, sampling)
            _, drawn = decode(model, state, max_new_tokens - 1, sampling)
            return jnp.concatenate([state.token, drawn[0]])

        return jax.vmap(one)(trainables, tokens, lengths, keys)

    def serve(trainables, frozen, prompts: list[list[int]], key):
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        if lengths.min() < 1 or lengths.max() > max_prompt_tokens:
            raise ValueError(
                f"prompts must have 1 to {max_prompt_tokens} tokens, got {lengths.min()} to {lengths.max()}"
            )
        tokens = np.zeros((len(prompts), max_prompt_tokens), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        return run(trainables, frozen, tokens, lengths, jax.random.split(key, len(prompts)))

    return serve


def answer_one_by_one(
    config: LlamaConfig,
    merge: Merge,
    frozen: dict,
    trainables: Sequence[dict],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    sampling: Sampling,
    *,
    chunk: int = 16,
) -> list[list[int]]:
    """Each prompt's tokens by its own tuned parameters, one prompt after the other: what a batch is compared with. Two
    programs are compiled for all of them."""
    prefill_fn, decode_fn = jit_generator(merge, sampling)
    num_tuned = merge(trainables[0], frozen).num_prompt_slots
    num_slots = num_tuned + max(len(prompt) + most for prompt, most in zip(prompts, max_new_tokens))
    one_array = has_loop(merge, trainables[0], frozen)
    answers = []
    for trainable, prompt, most in zip(trainables, prompts, max_new_tokens, strict=True):
        tokens = np.zeros((1, max(map(len, prompts))), np.int32)
        tokens[0, : len(prompt)] = prompt
        lengths, cache = np.asarray([len(prompt)], np.int32), init_cache(config, 1, num_slots, one_array=one_array)
        state = prefill_fn(trainable, frozen, tokens, lengths, cache, jax.random.key(0))
        drawn = [int(state.token[0])]
        while len(drawn) < most and not state.done[0]:
            state, more = decode_fn(trainable, frozen, state, chunk)
            drawn += kept_tokens(more[0])
        answers.append(drawn[:most])
    return answers


def kept_tokens(row) -> list[int]:
    """A row's tokens without what follows its end."""
    return [int(token) for token in row if token != NO_TOKEN]
