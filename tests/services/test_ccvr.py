"""CCVR: the golden, merging against all features in one place, virtual features, and the refitted layer."""

import numpy as np
import pytest

from fmfl_jax.services import ccvr


def split(features, labels, num_classes, num_clients, rng):
    client = rng.integers(num_clients, size=len(labels))
    return [ccvr.class_statistics(features[client == k], labels[client == k], num_classes) for k in range(num_clients)]


def test_golden():
    clients = [
        ccvr.ClassStatistics(np.asarray([4]), np.asarray([[0.0, 1.0]]), np.eye(2)[None]),
        ccvr.ClassStatistics(np.asarray([6]), np.asarray([[2.0, 0.0]]), np.asarray([[[2.0, 0.5], [0.5, 1.0]]])),
    ]
    merged = ccvr.merge_statistics(clients)
    np.testing.assert_allclose(merged.means[0], [1.2, 0.4])
    expected = [[2.511111, -0.255556], [-0.255556, 1.155556]]
    np.testing.assert_allclose(merged.covariances[0], expected, atol=5e-7)


def test_merged_statistics_are_those_of_all_features():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 4], [30, 7, 2, 1])  # class 3 is nobody's, 4 one row's
    features = rng.normal(size=(40, 3)) + labels[:, None]
    merged = ccvr.merge_statistics(split(features, labels, 5, 6, rng))
    np.testing.assert_array_equal(merged.counts, [30, 7, 2, 0, 1])
    for c in (0, 1, 2):
        np.testing.assert_allclose(merged.means[c], features[labels == c].mean(axis=0))
        np.testing.assert_allclose(merged.covariances[c], np.cov(features[labels == c].T), atol=1e-12)
    assert not merged.covariances[3:].any()


def test_what_a_client_lacks_is_not_looked_at_and_what_it_has_must_be_finite():
    empty = ccvr.ClassStatistics(np.asarray([0, 1]), np.full((2, 2), np.nan), np.full((2, 2, 2), np.nan))
    empty.means[1] = 3.0
    full = ccvr.class_statistics([[0.0, 1.0], [2.0, 1.0]], [0, 0], 2)
    merged = ccvr.merge_statistics([empty, full])
    np.testing.assert_allclose(merged.means, [[1, 1], [3, 3]])
    empty.means[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"clients \[0\] send statistics that are not finite"):
        ccvr.merge_statistics([empty, full])
    with pytest.raises(ValueError, match="features must be finite"):
        ccvr.class_statistics([[np.nan]], [0], 1)


def test_payload_bits_by_hand():
    statistics = ccvr.class_statistics(np.zeros((3, 4)), [0, 0, 2], 3)
    assert ccvr.payload_bits(statistics) == 3 + (32 + 32 * (4 + 10)) + (32 + 32 * 4)


def test_drawn_features_have_the_statistics():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(3, 3))
    statistics = ccvr.ClassStatistics(
        np.asarray([9, 0, 5]), rng.normal(size=(3, 3)), np.stack([root @ root.T, np.eye(3), np.zeros((3, 3))])
    )
    features, labels = ccvr.draw_features(statistics, [40_000, 10, 5], rng=rng)
    np.testing.assert_array_equal(np.bincount(labels, minlength=3), [40_000, 0, 5])
    np.testing.assert_allclose(np.cov(features[labels == 0].T), root @ root.T, atol=0.15)
    np.testing.assert_allclose(features[labels == 0].mean(axis=0), statistics.means[0], atol=0.05)
    np.testing.assert_allclose(features[labels == 2], np.tile(statistics.means[2], (5, 1)))
    assert len(ccvr.draw_features(statistics, 0, rng=0)[0]) == 0


def test_a_biased_last_layer_is_repaired():
    """Gaussian classes spread over skewed clients; a layer refitted on draws is as good as one on all features."""
    rng = np.random.default_rng(2)
    centres = 2 * rng.normal(size=(3, 4))
    draw = lambda n: (lambda y: (centres[y] + rng.normal(size=(n, 4)), y))(rng.integers(3, size=n))
    (features, labels), (test, answers) = draw(600), draw(2000)
    merged = ccvr.merge_statistics(split(features, labels, 3, 5, rng))
    accuracies = []
    for given in ((features, labels), ccvr.draw_features(merged, 200, rng=rng)):
        weight, bias = ccvr.refit_last_layer(*given, 3, decay=1e-3)
        accuracies.append(np.mean((test @ weight + bias).argmax(axis=1) == answers))
    assert accuracies[0] > 0.9 and accuracies[1] > accuracies[0] - 0.02


def test_the_refit_is_at_its_optimum():
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(50, 2)), rng.integers(3, size=50)
    weight, bias = ccvr.refit_last_layer(features, labels, 3, decay=0.1)

    def loss(w, b):
        logits = features @ w + b
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -logp[np.arange(50), labels].mean() + 0.05 * np.square(w).sum()

    best = loss(weight, bias)
    for _ in range(20):
        step, shift = 1e-3 * rng.normal(size=weight.shape), 1e-3 * rng.normal(size=3)
        assert loss(weight + step, bias + shift) >= best - 1e-12
    with pytest.raises(ValueError, match="decay must be above 0"):
        ccvr.refit_last_layer(features, labels, 3, decay=0.0)
