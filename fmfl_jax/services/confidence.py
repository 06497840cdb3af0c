"""How far a model's confidence can be trusted, and what abstaining or asking elsewhere buys (sections II-B, III-D).

ECE: Guo et al., ICML 2017, equal bins. Brier, 1950, of the event "the answer is right". AUROC: Mann-Whitney, ties
count one half. Risk-coverage and AURC: Geifman, El-Yaniv, NeurIPS 2017, answers in falling confidence. Conformal sets:
Sadinle, Lei, Wasserman, JASA 2019, split form:

    set(x) = {y : 1 - p_y(x) <= q},   q = the ceil((n + 1)(1 - alpha))-th smallest 1 - p_y of n held-out rows

covers the label with probability >= 1 - alpha where the rows are exchangeable.

    >>> share_deferred, accuracy = deferral_curve(edge_confidence, edge_correct, cloud_correct)
    >>> sets = prediction_sets(test_probabilities, conformal_threshold(probabilities, labels, alpha=0.1))
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from fmfl_jax.services.checks import classes, distributions, indicators, same_length, share, unit_vector, vector


class Roc(NamedTuple):
    """Rates at "score >= threshold is positive", from (0, 0) at infinity to (1, 1): arrays of one length."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    threshold: np.ndarray


def expected_calibration_error(confidence, correct, *, num_bins: int) -> float:
    """sum_b n_b / n |accuracy_b - mean confidence_b| over num_bins equal bins of [0, 1]; say how many: the value
    depends on it. A bin takes its lower edge, [b / B, (b + 1) / B), the last one 1 too.

    confidence: [n] in [0, 1]; correct: bool [n]. Raises ValueError.
    """
    confidence, correct = _answers(confidence, correct)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    # 0.29 * 100 is 28.999999999999996: an edge belongs to the bin above it.
    bins = np.minimum(np.floor(np.round(confidence * num_bins, 9)).astype(np.int64), num_bins - 1)
    off = np.bincount(bins, confidence - correct, minlength=num_bins)
    return float(np.abs(off).sum() / len(correct))


def brier_score(confidence, correct) -> float:
    """Mean (confidence - correct)^2 of the given answer. confidence: [n] in [0, 1]; correct: bool [n]."""
    confidence, correct = _answers(confidence, correct)
    return float(np.mean(np.square(confidence - correct)))


def auroc(scores, positive) -> float | None:
    """P(a positive scores above a negative), ties one half. None where one of the kinds is missing.

    scores: [n]; positive: bool [n].
    """
    scores, positive = vector("scores", scores), indicators("positive", positive)
    n = same_length(scores=scores, positive=positive)
    num_positive = int(positive.sum())
    if num_positive in (0, n):
        return None
    above = stats.rankdata(scores)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * (n - num_positive)))


def roc(scores, positive) -> Roc:
    """The ROC curve, one point per distinct score. scores: [n]; positive: bool [n].

    Raises ValueError where one of the kinds is missing.
    """
    scores, positive = vector("scores", scores), indicators("positive", positive)
    n = same_length(scores=scores, positive=positive)
    num_positive = int(positive.sum())
    if num_positive in (0, n):
        raise ValueError(f"positive must hold both kinds, got {num_positive} of {n}")
    threshold = np.unique(scores)[::-1]
    above = lambda kind: len(kind) - np.searchsorted(np.sort(kind), threshold, side="left")
    false, true = above(scores[~positive]) / (n - num_positive), above(scores[positive]) / num_positive
    start = np.zeros(1)
    return Roc(np.concatenate([start, false]), np.concatenate([start, true]), np.concatenate([[np.inf], threshold]))


def risk_coverage(confidence, correct) -> tuple[np.ndarray, np.ndarray]:
    """(coverage [n], risk [n]): the share of errors among the k surest answers, k = 1..n.

    Among answers of one confidence the errors are spread evenly: the expectation over their order.
    """
    confidence, correct = vector("confidence", confidence), indicators("correct", correct)
    n = same_length(confidence=confidence, correct=correct)
    errors = _in_order_of(-confidence, (~correct).astype(np.float64))
    k = np.arange(1, n + 1)
    return k / n, np.cumsum(errors) / k


def area_under_risk_coverage(confidence, correct) -> float:
    """AURC: the mean risk of `risk_coverage` over k = 1..n; lower is better."""
    return float(risk_coverage(confidence, correct)[1].mean())


def deferral_curve(confidence, edge_correct, cloud_correct) -> tuple[np.ndarray, np.ndarray]:
    """(share deferred [n + 1], accuracy [n + 1]) where the m least sure of n answers of the edge go to the cloud.

    confidence: [n], the edge's; edge_correct, cloud_correct: bool [n]. Ties as in `risk_coverage`.
    """
    confidence, edge = vector("confidence", confidence), indicators("edge_correct", edge_correct)
    cloud = indicators("cloud_correct", cloud_correct)
    n = same_length(confidence=confidence, edge_correct=edge, cloud_correct=cloud)
    gain = _in_order_of(confidence, cloud.astype(np.float64) - edge)
    return np.arange(n + 1) / n, (edge.sum() + np.concatenate([np.zeros(1), np.cumsum(gain)])) / n


def conformal_threshold(probabilities, labels, *, alpha: float) -> float:
    """q of the module's formula from n held-out rows; infinite where n is too small for alpha: all labels then.

    probabilities: [n, K]; labels: int [n]; alpha in (0, 1). A row of NaN counts as one that no set covers.
    """
    probabilities = distributions("probabilities", probabilities)
    labels = classes("labels", labels, probabilities.shape[1])
    n = same_length(probabilities=probabilities, labels=labels)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    scores = 1 - probabilities[np.arange(n), labels]
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        return math.inf
    return float(np.sort(np.where(np.isnan(scores), np.inf, scores))[rank - 1])


def prediction_sets(probabilities, threshold: float) -> np.ndarray:
    """bool [n, K]: the labels in each row's set. A row of NaN, of which nothing is known, gets all labels."""
    probabilities = distributions("probabilities", probabilities)
    return ~(1 - probabilities > threshold)


def least_sure(confidence, deferred_share: float) -> np.ndarray:
    """bool [n]: the nearest whole number of answers to this share, those of the lowest confidence; the earlier of two
    alike."""
    confidence = vector("confidence", confidence)
    share("deferred_share", deferred_share)
    count = math.floor(deferred_share * len(confidence) + 0.5 + 1e-9)
    chosen = np.zeros(len(confidence), bool)
    chosen[np.argsort(confidence, kind="stable")[:count]] = True
    return chosen


def _answers(confidence, correct) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = unit_vector("confidence", confidence), indicators("correct", correct)
    same_length(confidence=confidence, correct=correct)
    return confidence, correct


def _in_order_of(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` in rising order of keys; those of equal keys are replaced by their mean."""
    order = np.argsort(keys, kind="stable")
    _, group = np.unique(keys[order], return_inverse=True)
    means = np.bincount(group, values[order]) / np.bincount(group)
    return means[group]
