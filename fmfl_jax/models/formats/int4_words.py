"""4-bit integers packed by eights into int32 words, along the last axis, in any order of the nibbles."""

from collections.abc import Sequence

import numpy as np

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def pack_words(values: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Integers 0..15 uint8 [..., 8 W] -> int32 [..., W]; nibble i (from bit 4 i) holds value order[i] of its eight."""
    eights = values.reshape(*values.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for i, source in enumerate(order):
        words |= eights[..., source].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def unpack_words(words: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The inverse of `pack_words`: int32 [..., W] -> uint8 [..., 8 W]."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((*words.shape, 8), np.uint8)
    for i, target in enumerate(order):
        values[..., target] = (unsigned >> np.uint32(4 * i)) & np.uint32(15)
    return values.reshape(*words.shape[:-1], -1)
