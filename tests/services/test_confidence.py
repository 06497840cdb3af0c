"""Calibration, ranking, deferral and conformal sets: goldens, plain loops and coverage."""

import numpy as np
import pytest

from fmfl_jax.services import confidence as c

CONFIDENCE, CORRECT = [0.95, 0.9, 0.85, 0.75, 0.65, 0.55], [1, 1, 0, 1, 0, 1]


def test_goldens():
    assert c.expected_calibration_error(CONFIDENCE, CORRECT, num_bins=5) == pytest.approx(0.258333, abs=5e-7)
    assert c.expected_calibration_error(CONFIDENCE, CORRECT, num_bins=10) == pytest.approx(0.391667, abs=5e-7)
    assert c.brier_score(CONFIDENCE, CORRECT) == pytest.approx(0.237083, abs=5e-7)
    assert c.auroc(CONFIDENCE, CORRECT) == pytest.approx(0.625)
    assert c.area_under_risk_coverage(CONFIDENCE, CORRECT) == pytest.approx(0.219444, abs=5e-7)


def test_ranking_against_plain_loops():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(8, size=60) / 8, rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert c.auroc(scores, positive) == pytest.approx(np.mean(pairs))
    false, true, threshold = c.roc(scores, positive)
    for f, t, at in zip(false, true, threshold):
        assert f == np.mean(scores[~positive] >= at) and t == np.mean(scores[positive] >= at)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(np.mean(pairs))
    assert c.auroc([0.1, 0.2], [1, 1]) is None
    with pytest.raises(ValueError, match="both kinds"):
        c.roc([0.1, 0.2], [1, 1])


def test_ties_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(1)
    confidence, correct = rng.integers(3, size=12) / 3, rng.random(12) < 0.5
    cloud, order = rng.random(12) < 0.8, rng.permutation(12)
    again = c.area_under_risk_coverage(confidence[order], correct[order])
    assert c.area_under_risk_coverage(confidence, correct) == pytest.approx(again)
    shuffled = []  # the mean over random orders of equals, by hand
    for _ in range(3000):
        p = rng.permutation(12)
        p = p[np.argsort(-confidence[p], kind="stable")]
        shuffled.append(np.mean(np.cumsum(~correct[p]) / np.arange(1, 13)))
    assert again == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / np.sqrt(3000))
    np.testing.assert_allclose(
        c.deferral_curve(confidence, correct, cloud)[1],
        c.deferral_curve(confidence[order], correct[order], cloud[order])[1],
    )


def test_deferral_by_hand_and_at_its_ends():
    share, accuracy = c.deferral_curve([0.9, 0.2, 0.6], [1, 0, 0], [1, 1, 0])
    np.testing.assert_allclose(share, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(accuracy, [1 / 3, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_array_equal(c.least_sure([0.9, 0.2, 0.6, 0.6], 0.5), [False, True, True, False])
    assert c.least_sure([0.1, 0.2], 0.0).sum() == 0 and c.least_sure([0.1, 0.2], 1.0).all()


def test_conformal_sets_cover_and_no_more_than_they_must():
    """On average over exchangeable draws coverage lies between 1 - alpha and 1 - alpha + 1 / (n + 1)."""
    rng, covered = np.random.default_rng(2), []
    for _ in range(300):
        logits = rng.normal(size=(140, 5)) * 2
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels = np.where(rng.random(140) < 0.7, p.argmax(axis=1), rng.integers(5, size=140))
        threshold = c.conformal_threshold(p[:99], labels[:99], alpha=0.1)
        covered.append(c.prediction_sets(p[99:], threshold)[np.arange(41), labels[99:]].mean())
    error = np.std(covered) / np.sqrt(300)
    assert 0.9 - 4 * error <= np.mean(covered) <= 0.91 + 4 * error


def test_conformal_edges():
    p, labels = np.asarray([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]]), [0, 0, 0]
    assert c.conformal_threshold(p, labels, alpha=0.25) == pytest.approx(0.6)  # rank ceil(4 * .75) = 3
    assert c.conformal_threshold(p, labels, alpha=0.5) == pytest.approx(0.3)
    assert c.conformal_threshold(p, labels, alpha=0.2) == np.inf
    assert c.prediction_sets(p, np.inf).all()
    unknown = np.asarray([[np.nan, np.nan], [0.9, 0.1]])
    np.testing.assert_array_equal(c.prediction_sets(unknown, 0.5), [[True, True], [True, False]])
    assert c.conformal_threshold(np.vstack([p, unknown[:1]]), [*labels, 0], alpha=0.2) == np.inf


def test_bins_take_their_lower_edge():
    assert c.expected_calibration_error([0.29, 0.295], [1, 0], num_bins=100) == pytest.approx(abs(0.585 - 1) / 2)
    assert c.expected_calibration_error([0.3, 0.25], [1, 0], num_bins=10) == pytest.approx((0.7 + 0.25) / 2)
    assert c.expected_calibration_error([0.0, 1.0], [0, 1], num_bins=4) == 0


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\]"):
        c.brier_score([1.2], [1])
    with pytest.raises(ValueError, match="confidence must be a list of finite numbers"):
        c.area_under_risk_coverage([np.nan], [1])
    with pytest.raises(ValueError, match="labels must lie in 0..1"):
        c.conformal_threshold([[0.5, 0.5]], [2], alpha=0.1)
    with pytest.raises(ValueError, match="sum to 1"):
        c.prediction_sets([[0.5, 0.6]], 0.1)
