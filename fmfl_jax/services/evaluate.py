"""The foundation model as evaluator of small models (section III-C of the paper): agreement, accuracy, over-fitting.

The FM judges by agreement with the student on text without labels. Agreement alone is biased; prediction-powered
inference (Angelopoulos et al., Science 2023) corrects it with n labelled rows, and PPI++ (Angelopoulos, Duchi, Zrnic
2023) weighs it so that it never costs:

    accuracy = lambda mean_N f~ + mean_n (f - lambda f~),   variance = var(f - lambda f~) / n + lambda^2 var(f~) / N

f is "the student is right", f~ "the student agrees with the FM". lambda = cov(f, f~) / ((1 + n / N) var(f~)) is the
least variance. An FM that taught the student favours it: the correction rests on the labelled rows alone.

    >>> estimate = prediction_powered_accuracy(correct, agrees_labelled, agrees_unlabelled)
    >>> estimate.low, estimate.value, estimate.high, estimate.effective_labels
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from fmfl_jax.services.checks import at_least, indicators, same_length, share


class Estimate(NamedTuple):
    """An accuracy with its confidence interval, which is cut to [0, 1].

    value: unbiased, and so at times a little beyond [0, 1]. weight: lambda, how much of the agreement counts.
    effective_labels: how many labelled rows alone would give the same standard error.
    """

    value: float
    standard_error: float
    low: float
    high: float
    weight: float
    effective_labels: float


class Overfitting(NamedTuple):
    """gap, reference_gap: agreement on the training text minus on fresh text, of the student and of the good model.
    excess: their difference. p_value: one-sided, of an excess as large where the two models are alike."""

    gap: float
    reference_gap: float
    excess: float
    p_value: float


def expected_agreement(student_accuracy, fm_accuracy: float, num_classes: int):
    """A = a s + (1 - a)(1 - s) / (K - 1): agreement of two models whose errors are independent and uniform over the
    wrong classes. Broadcasts over student_accuracy. Raises ValueError for accuracies outside [0, 1] and K < 2."""
    _check_judge(fm_accuracy, num_classes)
    by_chance = (1 - fm_accuracy) / (num_classes - 1)
    return by_chance + np.asarray(student_accuracy, np.float64) * (fm_accuracy - by_chance)


def agreement_accuracy(agreement, fm_accuracy: float, num_classes: int):
    """The student's accuracy that `expected_agreement` turns into this agreement, cut to [0, 1]. **Biased** where the
    errors of the two go together, as they do for a student that the FM taught: see `prediction_powered_accuracy`.

    Raises ValueError where the FM is no better than a guess: its agreement then says nothing.
    """
    _check_judge(fm_accuracy, num_classes)
    by_chance = (1 - fm_accuracy) / (num_classes - 1)
    if math.isclose(fm_accuracy, by_chance, abs_tol=1e-9):
        raise ValueError(f"fm_accuracy is {fm_accuracy}, a guess among {num_classes} classes: agreement says nothing")
    return np.clip((np.asarray(agreement, np.float64) - by_chance) / (fm_accuracy - by_chance), 0.0, 1.0)


def labelled_accuracy(correct, *, confidence: float = 0.95) -> Estimate:
    """The accuracy by labelled rows alone: `prediction_powered_accuracy` with an FM that says nothing.

    correct: bool [n].
    """
    correct = indicators("correct", correct)
    nothing = np.zeros(1, bool)
    return prediction_powered_accuracy(correct, np.zeros_like(correct), nothing, confidence=confidence, weight=0.0)


def prediction_powered_accuracy(
    correct, agrees_labelled, agrees_unlabelled, *, confidence: float = 0.95, weight: float | None = None
) -> Estimate:
    """PPI++: the student's accuracy from n labelled rows and the FM's agreement on N others.

    Args:
      correct, agrees_labelled: bool [n], on the same labelled rows.
      agrees_unlabelled: bool [N], on rows from the same source.
      weight: lambda; None is the one of the least variance, in [0, 1]. 1 is plain PPI, 0 the labelled rows alone.

    The quantile is Student's with n - 1 degrees of freedom. The variance of the labelled rows is not taken below that
    of one deviating row in n: n rows that are all right do not prove an accuracy of 1.

    Raises ValueError for fewer than 2 labelled rows, unequal lengths and values other than 0 and 1.
    """
    f, agree = indicators("correct", correct), indicators("agrees_labelled", agrees_labelled)
    others = indicators("agrees_unlabelled", agrees_unlabelled)
    n, num_others = same_length(correct=f, agrees_labelled=agree), same_length(agrees_unlabelled=others)
    at_least(2, labelled_rows=n)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if weight is None:
        weight = _best_weight(f, agree, others)
    share("weight", weight)
    rest = f - weight * agree  # what the labelled rows correct
    value = float(weight * others.mean() + rest.mean())
    least = (1 - 1 / n) / n
    variance = max(float(rest.var(ddof=1)), least) / n + weight**2 * float(others.var()) / num_others
    error = math.sqrt(variance)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    low, high = (min(max(end, 0.0), 1.0) for end in (value - reach, value + reach))
    effective = max(float(f.var(ddof=1)), least) / variance
    return Estimate(value, error, low, high, weight, effective)


def ppi_variance(
    var_correct: float, var_agrees: float, covariance: float, num_labelled: int, num_unlabelled: int, weight: float
) -> float:
    """Variance of the estimate from the moments of f and f~: for planning how many labels an FM is worth."""
    rest = var_correct - 2 * weight * covariance + weight**2 * var_agrees
    return rest / num_labelled + weight**2 * var_agrees / num_unlabelled


def overfitting(
    train_agrees, fresh_agrees, reference_train_agrees, reference_fresh_agrees, *, num_permutations: int = 2000, rng
) -> Overfitting:
    """The over-fitting alarm: does the student agree with the FM more on its training text than on fresh text, by more
    than a good model does?

    Args:
      train_agrees, fresh_agrees: bool [a], [b], the student's agreement with the FM on its training text and on fresh
        or synthetic text.
      reference_train_agrees, reference_fresh_agrees: bool [c], [d], the same of a model known good.
      rng: numpy Generator, or a seed.

    The permutation test deals the rows of each kind of text anew to the two models. The statistic is the excess in
    standard errors (studentized as in Chung, Romano 2013), so that models of unequal accuracy are no alarm. The alarm
    is a small p_value; `confidence.roc` over many students says which threshold costs what.
    """
    cells = [
        indicators(name, values)
        for name, values in (
            ("train_agrees", train_agrees),
            ("fresh_agrees", fresh_agrees),
            ("reference_train_agrees", reference_train_agrees),
            ("reference_fresh_agrees", reference_fresh_agrees),
        )
    ]
    for name, cell in zip(("train_agrees", "fresh_agrees", "reference_train_agrees", "reference_fresh_agrees"), cells):
        same_length(**{name: cell})
    at_least(1, num_permutations=num_permutations)
    rng = np.random.default_rng(rng)
    sizes = np.asarray([len(cell) for cell in cells], np.float64)
    hits = np.asarray([cell.sum() for cell in cells], np.float64)

    def deal(student: int, reference: int) -> np.ndarray:
        """The student's agreements when the rows of one kind of text are dealt at random."""
        agreeing = int(hits[student] + hits[reference])
        rows = int(sizes[student] + sizes[reference])
        return rng.hypergeometric(agreeing, rows - agreeing, int(sizes[student]), size=num_permutations)

    train, fresh = deal(0, 2), deal(1, 3)
    dealt = np.stack([train, fresh, hits[0] + hits[2] - train, hits[1] + hits[3] - fresh], axis=1)
    observed = _studentized(hits[None], sizes)[0]
    as_large = int((_studentized(dealt, sizes) >= observed - 1e-12).sum())
    means = hits / sizes
    gap, reference_gap = float(means[0] - means[1]), float(means[2] - means[3])
    return Overfitting(gap, reference_gap, gap - reference_gap, (1 + as_large) / (1 + num_permutations))


def _studentized(hits: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[B]: the excess in its standard errors, from hits [B, 4] out of sizes [4]. Half a row is added to either side in
    the standard error, so that a model that always agrees has one."""
    means, smoothed = hits / sizes, (hits + 0.5) / (sizes + 1)
    excess = (means[:, 0] - means[:, 1]) - (means[:, 2] - means[:, 3])
    return excess / np.sqrt((smoothed * (1 - smoothed) / sizes).sum(axis=1))


def _best_weight(f: np.ndarray, agree: np.ndarray, others: np.ndarray) -> float:
    """lambda of the least variance, in [0, 1]; 0 where the agreement never changes."""
    variance = float(np.concatenate([agree, others]).var())
    if variance == 0:
        return 0.0
    covariance = float(np.cov(f.astype(np.float64), agree.astype(np.float64))[0, 1])
    return min(max(covariance / ((1 + len(f) / len(others)) * variance), 0.0), 1.0)


def _check_judge(fm_accuracy: float, num_classes: int) -> None:
    share("fm_accuracy", fm_accuracy)
    at_least(2, num_classes=num_classes)
