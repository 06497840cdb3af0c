"""Augmentation: requests, their privacy, retrieval in order of sureness, filters against all pairs, bits by hand."""

import numpy as np
import pytest

from fmfl_jax.services import augment as a

POOL = np.asarray([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [np.nan, 0.5], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])


def test_requests_fill_up_to_the_largest_class():
    np.testing.assert_array_equal(a.minority_requests([30, 0, 12, 29], cap=20), [0, 20, 18, 1])
    np.testing.assert_array_equal(a.minority_requests([30, 0, 12], cap=0), [0, 0, 0])
    np.testing.assert_array_equal(a.minority_requests([0, 0], cap=5), [0, 0])
    np.testing.assert_array_equal(a.minority_requests([4.4, -3.0], cap=9), [0, 4])
    with pytest.raises(ValueError, match="histogram must be one finite number a class"):
        a.minority_requests([1, np.nan], cap=3)


def test_a_fixed_request_tells_nothing_and_the_client_keeps_what_it_needs():
    served = a.retrieve(POOL, a.fixed_size_requests(2, per_class=2))
    np.testing.assert_array_equal(served.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(a.keep_needed(served, [0, 1]), [False, False, True, False])
    np.testing.assert_array_equal(a.keep_needed(served, [9, 2]), [True] * 4)


def test_a_class_that_the_client_lacks_is_served_and_counted():
    wanted = a.minority_requests([3, 0], cap=10)
    assert a.count_request(wanted, [3, 0]) == (3, 1, 1)
    served = a.retrieve(POOL, wanted)
    np.testing.assert_array_equal(served.labels, [1, 1])
    np.testing.assert_array_equal(served.missing, [0, 1])


def test_retrieval_is_by_label_and_sureness():
    served = a.retrieve(POOL, [9, 1])
    np.testing.assert_array_equal(served.rows, [0, 4, 1, 5, 2])  # row 3 is unknown, of 2 and 6 the earlier
    np.testing.assert_allclose(served.sureness, [0.9, 0.7, 0.6, 0.5, 0.8])
    again = a.retrieve(POOL, [9, 9], exclude=np.isin(np.arange(7), served.rows), min_sureness=0.7)
    np.testing.assert_array_equal(again.rows, [6])
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), size=200)
    wanted = np.asarray([10, 0, 100, 7])
    served = a.retrieve(p, wanted)
    for c in range(4):
        mine = served.rows[served.labels == c]
        assert len(mine) == wanted[c] - served.missing[c] and len(set(served.rows)) == len(served.rows)
        expected = [i for i in np.argsort(-p.max(axis=1)) if p[i].argmax() == c][: wanted[c]]
        np.testing.assert_array_equal(mine, expected)
    with pytest.raises(ValueError, match="wanted must hold 4 counts"):
        a.retrieve(p, [1, 2])


def test_randomized_response_is_unbiased_and_as_private_as_it_says():
    truth, epsilon = np.asarray([300, 20, 80]), 1.0
    labels, rng = np.repeat([0, 1, 2], truth), np.random.default_rng(1)
    counts = [np.bincount(a.randomize_labels(labels, 3, epsilon=epsilon, rng=rng), minlength=3) for _ in range(500)]
    estimates = np.asarray([a.estimate_histogram(c, epsilon=epsilon) for c in counts])
    np.testing.assert_allclose(estimates.sum(axis=1), 400)
    error = estimates.std(axis=0) / np.sqrt(500)
    assert np.all(np.abs(estimates.mean(axis=0) - truth) < 4 * error)
    # the likelihood ratio of any report between two labels is e^epsilon at most, and that is attained
    reports = a.randomize_labels(np.repeat([0, 1], 200_000), 3, epsilon=epsilon, rng=rng).reshape(2, -1)
    rates = np.asarray([np.bincount(row, minlength=3) for row in reports]) / 200_000
    assert rates[0, 0] / rates[1, 0] == pytest.approx(np.e, rel=0.03)
    assert rates[0, 2] / rates[1, 2] == pytest.approx(1, rel=0.03)
    np.testing.assert_array_equal(a.randomize_labels(labels, 3, epsilon=800.0, rng=rng), labels)
    np.testing.assert_allclose(a.estimate_histogram(truth, epsilon=800.0), truth)


def test_near_duplicates_against_all_pairs():
    rng = np.random.default_rng(2)
    texts = []
    for _ in range(40):
        words = [f"w{i}" for i in rng.integers(60, size=12)]
        texts += [" ".join(words), " ".join(words[:-1] + ["new"]).upper(), " ".join(words[: rng.integers(1, 12)])]
    for shingle, overlap in ((1, 0.5), (3, 0.7), (3, 1.0)):
        found = a.first_of_near_duplicates(texts, min_overlap=overlap, shingle=shingle)
        kept = []
        for i, text in enumerate(texts):
            words = text.lower().split()
            mine = {tuple(words[j : j + shingle]) for j in range(max(len(words) - shingle + 1, 1))}
            near = any(len(mine & other) / len(mine | other) >= overlap for other in kept)
            assert found[i] == (not near)
            kept += [] if near else [mine]
    chain = ["a b c d", "b c d e", "c d e f"]  # the third nearly repeats the second, which is gone
    assert list(a.first_of_near_duplicates(chain, min_overlap=0.6, shingle=1)) == [True, False, True]
    assert list(a.first_of_near_duplicates(["a", "", "A!", "..."])) == [True, True, False, False]


def test_the_other_filters():
    np.testing.assert_array_equal(a.long_enough(["one two", "One, two: three.", ""]), [False, True, False])
    agrees = a.surely_agrees(POOL, [0, 1, 1, 1, 0, 1, 0], min_sureness=0.75)
    np.testing.assert_array_equal(agrees, [True, False, True, False, False, False, False])


def test_bits_by_hand():
    assert a.request_bits(4, cap=50) == 24 and a.request_bits(4, cap=0) == 4
    assert a.text_bits(["é", "ab"]) == 8 * 5 and a.text_bits([]) == 0
    assert a.id_bits(10) == 320
