"""Prompts as token ids, cut into batches of few shapes, so that a handful of programs is compiled.

prompts = encode_prompts(tokenizer, ["A goal.", "Rain."], room=256)
for rows in length_batches([len(p) for p in prompts], batch_tokens=2048):
    tokens, lengths = padded(prompts, rows)          # int32 [B, T], int32 [B]
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.data.tokenizers import Tokenizer

_ENDING = 16  # characters at a prompt's end beside which a word is tokenized
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


def word_tokens(tokenizer: Tokenizer, texts: Sequence[str], words: Sequence[str]) -> list[list[int]]:
    """The tokens that each word adds to a text's end.

    Raises ValueError where a word melts into the text's last token, or has other tokens after one text than after
    another, and where there are no texts or no words.
    """
    if not texts or not words:
        raise ValueError(f"{len(texts)} texts and {len(words)} continuations: at least one of each is needed")
    found: list[list[int]] | None = None
    for ending in sorted({text[-_ENDING:] for text in texts}):
        ids = tokenizer.encode(ending).tolist()
        added = []
        for word in words:
            both = tokenizer.encode(ending + word).tolist()
            if both[: len(ids)] != ids or len(both) == len(ids):
                raise ValueError(
                    f"{word!r} after {ending!r} is no token of its own: begin it with a space, or the like"
                )
            added.append(both[len(ids) :])
        if found is not None and added != found:
            raise ValueError(f"the continuations have other tokens after {ending!r} than after other texts")
        found = added
    assert found is not None
    return found


def first_tokens(words: list[list[int]], continuations: Sequence[str]) -> list[list[int]]:
    """The words' first tokens alone. Raises ValueError where two words share theirs."""
    first = [word[:1] for word in words]
    for k, word in enumerate(first):
        if word in first[:k]:
            same = continuations[first.index(word)]
            raise ValueError(f"{same!r} and {continuations[k]!r} begin with the same token: score whole words")
    return first


def padded_length(length: int) -> int:
    """The next of 16, 24, 32, 40, 48, 56, 64, 80, ...: in steps of a quarter of the power of two below."""
    size = _LEAST_LENGTH
    while size < length:
        step = max(8, 2 ** (size.bit_length() - 1) // 4)
        size += step
    return size


def length_batches(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[RowBatch]:
    """Batches of at most batch_tokens tokens (but at least one row), the longest texts first.

    Sorted by length, so that rows beside each other are padded little; a batch that is at least a quarter full ends
    before a text that would be padded by more than a third. The number of rows is a power of two, so that shapes are
    few; at most a quarter of the rows are padding.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]))
        most = max(1, batch_tokens // max(length, _LEAST_COUNTED))
        near = sum(bool(4 * lengths[row] >= 3 * length) for row in order[start : start + most])
        count = min(max(near, most // 4, 1), most, len(order) - start)
        num_rows = _power_of_two(count)
        if 2 * num_rows <= most and 2 * count >= 3 * num_rows and count > num_rows:
            num_rows *= 2
        rows = order[start : start + min(num_rows, count)]
        yield RowBatch(rows, num_rows, length)
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
