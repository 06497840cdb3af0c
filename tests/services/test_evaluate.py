"""Prediction-powered accuracy: goldens, coverage over 1,000 draws, never worse than the labels; the alarm's power."""

import numpy as np
import pytest

from fmfl_jax.services import evaluate
from fmfl_jax.services.confidence import auroc, roc


def draw(rng, n, num_others, accuracy=0.7, differs=0.1):
    """f, f~ on labelled rows and f~ on others: Bernoulli(accuracy) that differ symmetrically."""
    rows = rng.random(n + num_others)
    f = rows < accuracy
    flip = np.where(f, rng.random(rows.size) < differs / 2 / accuracy, rng.random(rows.size) < differs / 2 / 0.3)
    agree = f ^ flip
    return f[:n], agree[:n], agree[n:]


def test_agreement_and_its_inversion():
    assert evaluate.expected_agreement(0.7, 0.85, 4) == pytest.approx(0.61, abs=1e-12)
    assert evaluate.agreement_accuracy(0.61, 0.85, 4) == pytest.approx(0.7, abs=1e-12)
    for accuracy in (0.0, 0.3, 1.0):
        agreement = evaluate.expected_agreement(accuracy, 0.6, 3)
        assert evaluate.agreement_accuracy(agreement, 0.6, 3) == pytest.approx(accuracy)
    with pytest.raises(ValueError, match="fm_accuracy is 0.25, a guess among 4 classes"):
        evaluate.agreement_accuracy(0.5, 0.25, 4)


def test_agreement_of_simulated_models_with_independent_errors():
    rng = np.random.default_rng(0)
    label, answers = rng.integers(4, size=200_000), []
    for accuracy in (0.7, 0.85):
        wrong = (label + rng.integers(1, 4, size=label.size)) % 4
        answers.append(np.where(rng.random(label.size) < accuracy, label, wrong))
    assert (answers[0] == answers[1]).mean() == pytest.approx(0.61, abs=0.005)


def test_variance_golden_and_the_best_weight():
    covariance = 0.65 - 0.49
    assert evaluate.ppi_variance(0.21, 0.21, covariance, 50, 2000, 1.0) == pytest.approx(0.002105, abs=5e-7)
    assert evaluate.ppi_variance(0.21, 0.21, covariance, 50, 2000, 0.0) == pytest.approx(0.0042)
    weight = covariance / ((1 + 50 / 2000) * 0.21)
    grid = [evaluate.ppi_variance(0.21, 0.21, covariance, 50, 2000, w) for w in np.linspace(0, 1, 101)]
    assert evaluate.ppi_variance(0.21, 0.21, covariance, 50, 2000, weight) <= min(grid)


@pytest.mark.parametrize("differs", [0.1, 0.42])  # a good judge, and one that knows nothing
def test_intervals_cover_over_a_thousand_draws_and_the_errors_are_right(differs):
    rng = np.random.default_rng(1)
    found = [evaluate.prediction_powered_accuracy(*draw(rng, 100, 1000, differs=differs)) for _ in range(1000)]
    covered = np.mean([e.low <= 0.7 <= e.high for e in found])
    assert abs(covered - 0.95) <= 0.014
    values = np.asarray([e.value for e in found])
    assert abs(values.mean() - 0.7) < 4 * values.std() / np.sqrt(1000)
    assert values.std() == pytest.approx(np.mean([e.standard_error for e in found]), rel=0.1)
    labels = np.mean([e.effective_labels for e in found])
    if differs == 0.1:
        moments = evaluate.ppi_variance(0.21, 0.21, 0.16, 100, 1000, 0.16 / (1.1 * 0.21))
        assert labels == pytest.approx(0.21 / moments, rel=0.1) and labels > 200
    else:
        assert labels == pytest.approx(100, rel=0.05)  # never worse than the labelled rows


def test_the_weight_by_hand_and_never_worse_with_few_unlabelled_rows():
    f, agree, others = draw(np.random.default_rng(5), 200, 40)
    found = evaluate.prediction_powered_accuracy(f, agree, others)
    weight = np.cov(f, agree)[0, 1] / ((1 + 200 / 40) * np.concatenate([agree, others]).var())
    assert found.weight == pytest.approx(weight)
    variance = np.var(f - weight * agree, ddof=1) / 200 + weight**2 * others.var() / 40
    assert found.standard_error == pytest.approx(np.sqrt(variance))
    values = [evaluate.prediction_powered_accuracy(*draw(np.random.default_rng(i), 200, 40)) for i in range(50)]
    assert np.mean([e.effective_labels for e in values]) > 200


def test_a_biased_judge_does_not_bias_the_estimate():
    """The FM agrees far more often than the student is right, as with a student of its own."""
    rng, values = np.random.default_rng(2), []
    for _ in range(400):
        f = rng.random(1100) < 0.6
        agree = f | (rng.random(1100) < 0.7)
        values.append(evaluate.prediction_powered_accuracy(f[:100], agree[:100], agree[100:]).value)
    assert np.mean(values) == pytest.approx(0.6, abs=4 * np.std(values) / 20)


def test_the_labelled_rows_alone_and_weights():
    correct = np.asarray([1, 1, 0, 1, 0, 1, 1, 1, 0, 1])
    alone = evaluate.labelled_accuracy(correct)
    assert alone.value == pytest.approx(0.7) and alone.weight == 0
    assert alone.standard_error == pytest.approx(correct.std(ddof=1) / np.sqrt(10))
    assert alone.effective_labels == pytest.approx(10)
    agree = np.ones(10, bool)
    plain = evaluate.prediction_powered_accuracy(correct, agree, np.asarray([1, 0]), weight=1.0)
    assert plain.value == pytest.approx(0.5 + (0.7 - 1.0))
    assert evaluate.prediction_powered_accuracy(correct, agree, np.ones(5, bool)).weight == 0  # it never changes


def test_all_right_is_no_proof():
    sure = evaluate.labelled_accuracy(np.ones(50, bool))
    assert sure.value == 1 and sure.high == 1 and 0.9 < sure.low < 0.99


def test_bad_input_is_one_line():
    for correct, agree, others, message in [
        ([1, 0], [1], [1], "correct 2, agrees_labelled 1"),
        ([1, 0], [1, np.nan], [1], "agrees_labelled must be a list of 0 and 1"),
        ([1], [1], [1], "labelled_rows must be at least 2"),
        ([1, 0], [1, 0], [], "agrees_unlabelled is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.prediction_powered_accuracy(correct, agree, others)


def alarm(rng, student, reference, rows):
    """Agreement rates (train, fresh) of a student and of a good model on `rows` texts of each kind."""
    cells = [rng.random(rows) < rate for rate in (*student, *reference)]
    return evaluate.overfitting(*cells, num_permutations=400, rng=rng)


def test_the_alarm_catches_an_overfit_student_and_clears_a_good_one():
    rng = np.random.default_rng(3)
    overfit = [alarm(rng, (0.8, 0.5), (0.76, 0.74), 200).p_value for _ in range(100)]
    good = [alarm(rng, (0.71, 0.69), (0.76, 0.74), 200).p_value for _ in range(400)]
    assert np.mean(np.asarray(overfit) < 0.05) > 0.95
    assert np.mean(np.asarray(good) < 0.05) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 400)
    scores, labels = -np.asarray(overfit + good), [1] * 100 + [0] * 400
    false, true, _ = roc(scores, labels)
    assert auroc(scores, labels) > 0.98 and true[false <= 0.05].max() > 0.95


def test_the_alarm_is_valid_for_models_of_unequal_accuracy_and_sizes():
    """Equal gaps at .9 and at .5 agreement, cells of unequal sizes: under the null p is below .1 in a tenth of runs. In
    plain differences instead of standard errors it would be in 18 %."""
    rng, low = np.random.default_rng(4), 0
    for _ in range(500):
        cells = [rng.random(n) < rate for n, rate in ((400, 0.95), (400, 0.9), (60, 0.55), (60, 0.5))]
        low += evaluate.overfitting(*cells, num_permutations=300, rng=rng).p_value <= 0.1
    assert abs(low / 500 - 0.1) < 4 * np.sqrt(0.09 / 500)


def test_the_alarms_gaps_by_hand():
    found = evaluate.overfitting([1, 1, 1, 0], [1, 0], [1, 0], [1, 0, 0, 0], num_permutations=99, rng=0)
    assert (found.gap, found.reference_gap, found.excess) == pytest.approx((0.25, 0.25, 0.0))
    assert found == evaluate.overfitting([1, 1, 1, 0], [1, 0], [1, 0], [1, 0, 0, 0], num_permutations=99, rng=0)
    with pytest.raises(ValueError, match="fresh_agrees is empty"):
        evaluate.overfitting([1], [], [1], [1], rng=0)
