"""Text that follows many prompts, generated in batches of one shape (models/generate.py does the work).

A prompt that stands several times in a batch is read once, and its keys and values are copied: who asks for many texts
of a kind, or for many samples of an answer, pays for one prompt.

generate = make_text_generator(config, split.merge, split.trainable, split.frozen, tokenizer,
                               sampling=Sampling(temperature=0.9, top_p=0.95, stop_tokens=(2,)), max_new_tokens=30)
generate(["News: ", "Recipe: "], 0)            # two texts; the same for the same prompts and seed
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.tokenizers import Tokenizer, stream_decode
from fmfl_jax.models.batching import RowBatch, encode_prompts, padded, padded_length
from fmfl_jax.models.generate import NO_TOKEN, Sampling, init_cache, jit_generator, prefill
from fmfl_jax.models.llama import Merge


class GenerateTexts(Protocol):
    def __call__(self, prompts: Sequence[str], seed: int, /) -> list[str]:
        """What follows each prompt."""
        ...


def make_text_generator(
    config: LlamaConfig,
    merge: Merge,
    trainable: dict,
    frozen: dict,
    tokenizer: Tokenizer,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    batch_rows: int = 64,
    chunk: int = 16,
) -> GenerateTexts:
    """generate(prompts, seed) -> texts of at most max_new_tokens tokens each, without the stop token that ended them.

    All batches have as many rows, at most batch_rows, and the longest prompt's (padded) length, so that one program
    serves a call; a batch ends when all its rows have, looked at every `chunk` tokens. generate raises ValueError for a
    prompt that leaves no room for max_new_tokens in the model's context, or has no token.
    """
    _, decode_fn = jit_generator(merge, sampling)
    num_tuned = merge(trainable, frozen).num_prompt_slots
    room = config.max_seq_len - num_tuned - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in {config.max_seq_len} tokens")

    @jax.jit
    def read(trainable, frozen, tokens, lengths, rows, key):
        model = merge(trainable, frozen)
        model.prepare_decoding()
        slots = num_tuned + tokens.shape[1] + max_new_tokens
        cache = init_cache(config, len(tokens), slots, one_array=model.has_loop())
        return prefill(model, tokens, lengths, cache, key, sampling, rows=rows)

    def drawn(prompts: list[list[int]], batch: RowBatch, key) -> np.ndarray:
        state = read(trainable, frozen, *_distinct_prompts(prompts, batch), key)
        out = [np.asarray(state.token)[:, None]]
        for _ in range(0, max_new_tokens - 1, chunk):
            if np.asarray(state.done)[: len(batch.rows)].all():
                break
            state, new = decode_fn(trainable, frozen, state, chunk)
            out.append(np.asarray(new))
        return np.concatenate(out, axis=1)[:, :max_new_tokens]

    def generate(prompts, seed):
        ids = encode_prompts(tokenizer, prompts, room=room)
        if not ids:
            return []
        length = min(padded_length(max(map(len, ids))), room)
        order = np.argsort([len(row) for row in ids], kind="stable")
        texts = [""] * len(ids)
        num_batches = -(-len(ids) // batch_rows)
        num_rows = -(-len(ids) // num_batches)
        for start in range(0, len(ids), num_rows):
            batch = RowBatch(order[start : start + num_rows], num_rows, length)
            rows = drawn(ids, batch, jax.random.fold_in(jax.random.key(seed), start))
            for place, row in enumerate(batch.rows):
                kept = [int(i) for i in rows[place] if i != NO_TOKEN and i not in sampling.stop_tokens]
                texts[row] = "".join(stream_decode(tokenizer, kept, ids[row]))
        return texts

    return generate


def _distinct_prompts(prompts: list[list[int]], batch: RowBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch's prompts without repetitions, each to be read once: (tokens int32 [D, L], lengths int32 [D], which of
    them each row goes on from, int32 [num_rows]). D is a power of two: few shapes."""
    distinct: dict[tuple[int, ...], int] = {}
    for row in batch.rows:
        distinct.setdefault(tuple(prompts[row]), len(distinct))
    rows = np.zeros(batch.num_rows, np.int32)
    rows[: len(batch.rows)] = [distinct[tuple(prompts[row])] for row in batch.rows]
    few = 1 << (len(distinct) - 1).bit_length()
    tokens, lengths = padded(list(distinct), RowBatch(np.arange(len(distinct)), few, batch.length))
    return tokens, lengths, rows
