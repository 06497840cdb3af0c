"""SelfCheckGPT's n-gram score (Manakul et al., EMNLP 2023): is a sentence likely under what the model says otherwise?

    score = mean or max over tokens of -log p(w | n - 1 words before),   p = (c(h w) + s) / (c(h) + s (V + 1))

counted on the sampled passages and, once, on the sentence itself. V: distinct words seen; the one more is "any other
word", so that no token costs infinity while s > 0. The scores have no upper bound and depend on the samples: they rank
sentences of one passage and no more. The history before a word
for n > 1 is an own choice; the program that the authors publish counts single words.

    >>> ngram_scores(["he was born in london"], ["he was born in paris"]).mean
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, same_length
from fmfl_jax.services.words import words_of


class NgramScores(NamedTuple):
    """[sentences] nats each: the mean and the largest over the sentence's tokens; NaN for one without a word."""

    mean: np.ndarray
    largest: np.ndarray


def ngram_scores(
    sentences: Sequence[str],
    samples: Sequence[str],
    *,
    order: int = 1,
    smoothing: float = 1.0,
    count_sentence: bool = True,
) -> NgramScores:
    """Scores of the sentences of one passage against samples of the same question.

    order: n. smoothing: s. count_sentence: each sentence is added to its own counts once, as published.

    Raises ValueError for no samples, order < 1, a negative smoothing, and smoothing 0 where the sentence is not
    counted: an unseen word would cost infinity.
    """
    same_length(samples=samples)
    at_least(1, order=order)
    at_least(0, smoothing=smoothing)
    if not math.isfinite(smoothing) or (smoothing == 0 and not count_sentence):
        raise ValueError(f"smoothing is {smoothing}: expected a finite number, above 0 where count_sentence is False")
    base = Counter(gram for text in samples for gram in _grams(words_of(text), order))
    scores = [_surprisals(words_of(text), base, order, smoothing, count_sentence) for text in sentences]
    return NgramScores(
        np.asarray([s.mean() if s.size else np.nan for s in scores]),
        np.asarray([s.max() if s.size else np.nan for s in scores]),
    )


def _surprisals(words: list[str], base: Counter, order: int, smoothing: float, count_sentence: bool) -> np.ndarray:
    """[tokens]: -log p of every word."""
    grams = _grams(words, order)
    counts = base + Counter(grams) if count_sentence else base
    histories: Counter = Counter()
    for gram, count in counts.items():
        histories[gram[:-1]] += count
    outcomes = len({gram[-1] for gram in counts}) + 1
    return np.asarray(
        [-math.log((counts[gram] + smoothing) / (histories[gram[:-1]] + smoothing * outcomes)) + 0.0 for gram in grams]
    )


def _grams(words: list[str], order: int) -> list[tuple[str, ...]]:
    """One n-gram per word; the first words have the start of the text before them."""
    padded = [""] * (order - 1) + words
    return [tuple(padded[i : i + order]) for i in range(len(words))]
