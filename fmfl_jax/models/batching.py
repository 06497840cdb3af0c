"""Prompts as token ids, cut into batches of few shapes, so that a handful of programs is compiled.

prompts = encode_prompts(tokenizer, ["A goal.", "Rain."], room=256)
for rows in length_batches([len(p) for p in prompts], batch_tokens=2048):
    tokens, lengths = padded(prompts, rows)          # int32 [B, T], int32 [B]
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.data.tokenizers import Tokenizer

_LEAST_LENGTH = 16  # shorter prompts are padded to it
_LEAST_COUNTED = 64  # a row costs its logits too, so short rows count as this many tokens


class RowBatch(NamedTuple):
    """rows: places of the texts, at most num_rows of them; the batch is [num_rows, length] with padding."""

    rows: np.ndarray
    num_rows: int
    length: int


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], *, room: int) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's opening.

    Raises ValueError for a text without any token, and one of more than `room` tokens: nothing is cut here
    (services/prompts.py cuts a text where it may be cut).
    """
    prompts = []
    for number, text in enumerate(texts):
        ids = [*tokenizer.opening, *tokenizer.encode(text).tolist()]
        if not ids:
            raise ValueError(f"text {number} is empty and {tokenizer.name} puts no token at a text's beginning")
        if len(ids) > room:
            raise ValueError(f"text {number} has {len(ids)} tokens, the model's context has room for {room}")
        prompts.append(ids)
    return prompts


def padded_length(length: int) -> int:
    """The next of 16, 24, 32, 40, 48, 56, 64, 80, ...: in steps of a quarter of the power of two below."""
    size = _LEAST_LENGTH
    while size < length:
        step = max(8, 2 ** (size.bit_length() - 1) // 4)
        size += step
    return size


def length_batches(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[RowBatch]:
    """Batches of at most batch_tokens tokens (but at least one row), the longest texts first.

    Sorted by length, so that rows beside each other are padded little; the number of rows is a power of two.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]))
        most = _power_of_two(max(1, batch_tokens // max(length, _LEAST_COUNTED)))
        rows = order[start : start + most]
        yield RowBatch(rows, _power_of_two(2 * len(rows) - 1), length)
        start += len(rows)


def padded(prompts: Sequence[Sequence[int]], batch: RowBatch) -> tuple[np.ndarray, np.ndarray]:
    """tokens int32 [B, T], padded on the right with 0, and lengths int32 [B]; rows beyond the texts have one token."""
    tokens = np.zeros((batch.num_rows, batch.length), np.int32)
    lengths = np.ones(batch.num_rows, np.int32)
    for place, row in enumerate(batch.rows):
        tokens[place, : len(prompts[row])] = prompts[row]
        lengths[place] = len(prompts[row])
    return tokens, lengths


def _power_of_two(number: int) -> int:
    """The largest power of two that is no larger."""
    return 1 << (number.bit_length() - 1)
