"""Fairness and counterfactuals: goldens, a plain loop, and rates that do not exist."""

import numpy as np
import pytest

from fmfl_jax.services import align
from fmfl_jax.services.counterfactual import read_pairs, read_rows, swap_all, swap_gender, swap_words


def test_golden():
    labels, predictions = [1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1, 0, 0]
    found = align.fairness(labels, predictions, "aaaabbbb", positive=1)
    assert (found.accuracy_gap, found.parity_gap) == (0.5, 0)
    assert (found.true_positive_gap, found.false_positive_gap) == (0.5, 0.5)
    assert found.worst_accuracy == 0.5 and found.groups["b"].accuracy == 1


def test_against_a_plain_loop_with_three_labels():
    rng = np.random.default_rng(0)
    labels, predictions, groups = (rng.integers(3, size=200) for _ in range(3))
    found = align.fairness(labels, predictions, groups.tolist(), positive=2)
    rates = {}
    for group in range(3):
        rows = [i for i in range(200) if groups[i] == group]
        hits = [predictions[i] == 2 for i in rows if labels[i] == 2]
        false = [predictions[i] == 2 for i in rows if labels[i] != 2]
        rates[group] = (np.mean([labels[i] == predictions[i] for i in rows]), np.mean(hits), np.mean(false))
        assert found.groups[group][1] == pytest.approx(rates[group][0]) and found.groups[group].num_rows == len(rows)
    for place, gap in enumerate((found.accuracy_gap, found.true_positive_gap, found.false_positive_gap)):
        values = [r[place] for r in rates.values()]
        assert gap == pytest.approx(max(values) - min(values))


def test_a_rate_that_no_row_shows_is_none_and_no_gap_of_zero():
    found = align.fairness([1, 0, 0], [1, 0, 0], ["a", "a", "b"], positive=1)
    assert found.groups["b"].true_positive_rate is None and found.true_positive_gap is None
    assert found.false_positive_gap == 0
    assert align.fairness([1], [1], ["a"], positive=1).accuracy_gap is None
    with pytest.raises(ValueError, match="predictions 1"):
        align.fairness([1, 0], [1], ["a", "a"], positive=1)


def test_robust_accuracy_by_hand():
    found = align.counterfactual([0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1])
    assert found == (0.75, 0.5, pytest.approx(2 / 3), 3)
    assert align.counterfactual([0], [0], [0], [0]).flip_rate is None


def test_swapped_texts():
    for text, expected in [
        ("She saw him and his mother.", "He saw her and her father."),
        ("HER book was hers, not HIS.", "HIS book was his, not HERS."),
        ("I told her that she won.", "I told him that he won."),
        ("Give her the key to her car", "Give him the key to his car"),
        ("The theory of history", "The theory of history"),  # he and his inside of words
        ("Mr Smith, his boys", "Mrs Smith, her girls"),
    ]:
        assert swap_gender(text) == expected
        if "hers" not in text:
            assert swap_gender(expected) == text
    names = read_pairs("name_swaps")
    assert swap_words("Emily met EMILY and Greg.", names) == "Lakisha met LAKISHA and Jamal."
    texts = ["Emily came", "nobody came"]
    assert swap_all(texts, lambda text: swap_words(text, names)) == (["Lakisha came", "nobody came"], [True, False])


def test_word_lists_are_pairs_and_swapping_twice_is_nothing():
    for name in ("gender_swaps", "name_swaps"):
        pairs = read_pairs(name)
        assert len(pairs) == 2 * len(read_rows(name)) > 20
        text = " ".join(pairs)
        assert swap_words(swap_words(text, pairs), pairs) == text != swap_words(text, pairs)


def test_a_bad_word_list_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr("fmfl_jax.services.counterfactual.FOLDER", tmp_path)
    (tmp_path / "x.tsv").write_text("# he\nhe\tshe\nhim\n")
    with pytest.raises(ValueError, match=r"x.tsv, line 3: expected two words and a tab, got 'him'"):
        read_pairs("x")
    (tmp_path / "x.tsv").write_text("he\tshe\nhe\tthey\n")
    with pytest.raises(ValueError, match="'he' has two partners"):
        read_pairs("x")
