"""Self-consistency and semantic entropy: goldens of three readings, and what consistency cannot see."""

import numpy as np
import pytest

from fmfl_jax.services import hallucination as h
from fmfl_jax.services.confidence import auroc

LOGP = np.log([0.4, 0.4, 0.4, 0.1, 0.3])
CLUSTERS = [0, 0, 0, 0, 1]


def test_the_three_published_readings():
    assert h.entropy_by_likelihood(CLUSTERS, LOGP) == pytest.approx(0.482578, abs=5e-7)
    assert h.entropy_by_counts(CLUSTERS) == pytest.approx(0.500402, abs=5e-7)
    answers = ["rome", "rome", "rome", "roma", "milan"]
    assert h.entropy_of_distinct(answers, CLUSTERS, LOGP) == pytest.approx(0.661563, abs=5e-7)


def test_entropy_ends_and_invariances():
    rng = np.random.default_rng(0)
    for _ in range(20):
        clusters, logp = rng.integers(4, size=9), rng.normal(size=9)
        order = rng.permutation(9)
        value = h.entropy_by_likelihood(clusters, logp)
        assert 0 <= value <= np.log(4) + 1e-12
        assert value == pytest.approx(h.entropy_by_likelihood(7 - clusters[order], logp[order] - 900))
    assert h.entropy_by_counts([3, 3, 3]) == 0 and h.entropy_by_counts([0, 1, 2]) == pytest.approx(np.log(3))
    assert h.entropy_by_counts(["a", "b"]) == pytest.approx(np.log(2))


def test_closed_labels_are_exact():
    p = np.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [np.nan, 0.5, 0.5]])
    found = h.label_entropy(p)
    assert found[0] == pytest.approx(np.log(2)) and found[1] == 0 and np.isnan(found[2])
    rng = np.random.default_rng(1)  # the sampled entropy goes to the exact one
    samples = rng.choice(3, p=[0.6, 0.3, 0.1], size=20_000)
    assert h.entropy_by_counts(samples) == pytest.approx(h.label_entropy([[0.6, 0.3, 0.1]])[0], abs=0.02)


def test_lexical_clusters():
    texts = ["Paris", "paris.", "It is Lyon", "it is LYON, it is", "", "!"]
    assert h.lexical_clusters(texts) == [0, 0, 1, 1, 2, 2]
    assert h.lexical_clusters(["born in Rome", "born in Paris"], min_overlap=0.5) == [0, 0]
    assert h.lexical_clusters(["born in Rome", "born in Paris"], min_overlap=0.6) == [0, 1]
    assert h.lexical_clusters(["a", "b"], min_overlap=0.0) == [0, 1]  # nothing in common is never the same


def test_majority_and_abstention():
    assert h.self_consistency([1, 2, 1, 1], min_share=0.7) == (1, 0.75)
    assert h.self_consistency([1, 2, 1, 3], min_share=0.7) == (None, 0.5)
    assert h.self_consistency([1, 2], min_share=0.1) == (None, 0.5)  # a tie
    assert h.self_consistency([None, None, "x"], min_share=0.5) == (None, pytest.approx(1 / 3))
    assert h.self_consistency([None], min_share=0.0) == (None, 0.0)
    with pytest.raises(ValueError, match="answers is empty"):
        h.self_consistency([], min_share=0.5)
    with pytest.raises(ValueError, match="min_share must be"):
        h.self_consistency([1], min_share=2)


def test_consistency_finds_guesses_and_misses_a_planted_consistent_falsehood():
    """Questions that are known (right 9 times in 10), guessed, and believed wrongly (wrong 9 times in 10)."""
    rng, k = np.random.default_rng(2), 10
    entropy, wrong, kind = [], [], []
    for question in range(300):
        what = ("known", "guessed", "believed")[question % 3]
        usual = {"known": 0, "guessed": None, "believed": 1}[what]
        answers = [int(rng.integers(4)) if usual is None or rng.random() < 0.1 else usual for _ in range(k)]
        found = h.self_consistency(answers, min_share=0.6)
        entropy.append(h.entropy_by_counts(answers))
        wrong.append(found.answer not in (0, None))
        kind.append((what, found.answer is None))
    entropy, wrong, names = np.asarray(entropy), np.asarray(wrong), np.asarray([name for name, _ in kind])
    abstained = np.asarray([gone for _, gone in kind])
    assert abstained[names == "guessed"].mean() > 0.9 and abstained[names == "known"].mean() < 0.1
    caught = names != "believed"
    assert auroc(entropy[caught], names[caught] == "guessed") > 0.95
    # the miss: what is believed passes unseen, and looks like what is known
    assert wrong[names == "believed"].mean() > 0.9 and abstained[names == "believed"].mean() < 0.1
    missed = auroc(entropy[names != "guessed"], names[names != "guessed"] == "believed")
    assert abs(missed - 0.5) < 0.15
