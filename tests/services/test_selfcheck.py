"""SelfCheckGPT's n-gram score: the golden, the smoothing, and sentences that the samples contradict."""

import numpy as np
import pytest

from fmfl_jax.services.selfcheck import ngram_scores

SENTENCE = "he was born in london"
SAMPLES = ["he was born in paris", "he was born in london", "he was raised in paris"]


def test_golden_without_smoothing():
    found = ngram_scores([SENTENCE], SAMPLES, smoothing=0.0)
    assert found.mean[0] == pytest.approx(1.805604, abs=5e-7) and found.largest[0] == pytest.approx(2.302585, abs=5e-7)


def test_smoothed_probabilities_sum_to_one_with_the_unseen_word():
    """Unigrams: every word seen and one that never was, in turn as a sentence that is not counted."""
    words = ["he", "was", "born", "raised", "in", "paris", "london", "mars"]
    for smoothing in (0.1, 1.0):
        p = np.exp(-ngram_scores(words, SAMPLES, smoothing=smoothing, count_sentence=False).mean)
        assert p.sum() == pytest.approx(1.0) and np.all(p > 0)
    pairs = [f"born in {w}" for w in words]  # bigrams: of the last word, given "in"
    shared = ngram_scores(["born in"], SAMPLES, order=2, count_sentence=False).mean[0] * 2
    p = np.exp(shared - 3 * ngram_scores(pairs, SAMPLES, order=2, count_sentence=False).mean)
    assert p.sum() == pytest.approx(1.0)


def test_unseen_tokens_cost_something_finite():
    found = ngram_scores(["zebra quantum"], SAMPLES, order=3, count_sentence=False)
    assert np.isfinite(found.mean).all() and found.mean[0] > ngram_scores([SENTENCE], SAMPLES, order=3).mean[0]
    with pytest.raises(ValueError, match="smoothing is 0.0"):
        ngram_scores([SENTENCE], SAMPLES, smoothing=0.0, count_sentence=False)


def test_what_the_samples_contradict_ranks_above_what_they_repeat():
    sentences = ["he was born in paris", "he studied law on mars"]
    for order in (1, 2):
        scores = ngram_scores(sentences, SAMPLES, order=order)
        assert scores.mean[1] > scores.mean[0] and scores.largest[1] > scores.largest[0]
    assert np.isnan(ngram_scores(["..."], SAMPLES).mean[0])
    with pytest.raises(ValueError, match="samples is empty"):
        ngram_scores(sentences, [])
