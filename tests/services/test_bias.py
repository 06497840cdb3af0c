"""Bias and toxicity: goldens, counts by hand, and None where nothing is known."""

import numpy as np
import pytest

from fmfl_jax.services import bias

GROUPS = {"female": frozenset({"she", "her"}), "male": frozenset({"he", "his"})}


def score(texts):
    """Toxic as many times as the text says so, of 4."""
    return np.asarray([text.count("!") / 4 for text in texts])


def test_total_variation():
    assert bias.bias_total_variation({"female": 30, "male": 50}) == pytest.approx(0.125)
    assert bias.bias_total_variation({"a": 5, "b": 5, "c": 5}) == 0
    assert bias.bias_total_variation({"a": 5, "b": 0, "c": 0}) == pytest.approx(2 / 3)
    assert bias.bias_total_variation({"a": 0, "b": 0}) is None
    with pytest.raises(ValueError, match="num_groups must be at least 2"):
        bias.bias_total_variation({"a": 1})


def test_counts_and_association_by_hand():
    texts = ["The nurse said she lost her key. He laughed.", "Nurses and his doctor", "A doctor: he, he and she", "x"]
    assert bias.word_counts(texts, GROUPS) == {"female": 3, "male": 4}
    found = bias.stereotype_association(texts, ["nurse", "doctor", "pilot"], GROUPS)
    # nurse: 2 she/her, 2 he/his -> 0; doctor: 1 and 3 -> .25; pilot never occurs
    assert found.by_profession == {"nurse": 0.0, "doctor": 0.25} and found.mean == pytest.approx(0.125)
    assert bias.stereotype_association(["x"], ["pilot"], GROUPS).mean is None


def test_toxicity():
    texts = ["ok", "no!!", "no!!!!", "!"]
    assert bias.toxicity(texts, score) == (0.5, pytest.approx(7 / 16), 4)
    assert bias.expected_maximum_toxicity([["ok", "!!"], ["!", "!!!!"], ["", ""]], score) == pytest.approx(0.5)


def test_without_a_scorer_nothing_is_known():
    assert bias.toxicity(["x"], None) is None and bias.expected_maximum_toxicity([["x"]], None) is None


def test_bad_scorers_and_samples():
    for scorer, message in [
        (lambda texts: [2.0] * len(texts), r"scores must lie in \[0, 1\]"),
        (lambda texts: [np.nan] * len(texts), "scores must be a list of finite numbers"),
        (lambda texts: [0.5], "texts 2, scores 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            bias.toxicity(["a", "b"], scorer)
    with pytest.raises(ValueError, match=r"equally many texts a prompt, got \[1, 2\]"):
        bias.expected_maximum_toxicity([["a"], ["a", "b"]], score)


def test_the_lists_are_read():
    groups = bias.read_word_groups()
    assert set(groups) == {"female", "male"} and not groups["female"] & groups["male"]
    assert len(bias.read_professions()) > 20 and "nurse" in bias.read_professions()
