"""Is the service equally good for everybody (section III-D)? Gaps between groups, and robustness to swapped words.

Metrics of HELM (Liang et al., TMLR 2023) and of Hardt et al., NeurIPS 2016: accuracy gap and worst group, demographic
parity (the rate of predicted positives), gaps of true and false positive rates. A gap is the largest minus the least
over the groups in which the rate exists; None where fewer than two groups have it: a gap of 0 would be a claim.

    >>> fairness(labels, predictions, groups, positive=1).accuracy_gap
    >>> counterfactual(labels, predict(texts), predict(swapped), changed).robust_accuracy
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import indicators, same_length


class GroupRates(NamedTuple):
    """Of one group: its number of rows, and rates; None where no row can show it."""

    num_rows: int
    accuracy: float
    positive_rate: float
    true_positive_rate: float | None
    false_positive_rate: float | None


class Fairness(NamedTuple):
    """Gaps over the groups, and the rates they are made of. worst_accuracy: of the group that is served worst."""

    accuracy_gap: float | None
    worst_accuracy: float
    parity_gap: float | None
    true_positive_gap: float | None
    false_positive_gap: float | None
    groups: dict[Hashable, GroupRates]


class Counterfactual(NamedTuple):
    """accuracy: on the texts as they are; robust_accuracy: right before and after the swap (the worst case of the two,
    over all rows); flip_rate: predictions that change among the texts that the swap changes, None where there is none;
    num_changed: of those texts."""

    accuracy: float
    robust_accuracy: float
    flip_rate: float | None
    num_changed: int


def fairness(labels: Sequence, predictions: Sequence, groups: Sequence[Hashable], *, positive) -> Fairness:
    """Rates of every group and their gaps.

    labels, predictions, groups: [n]. positive: the label whose rates are compared (with more than two labels, one
    against the rest). Raises ValueError for unequal lengths and no rows.
    """
    same_length(labels=labels, predictions=predictions, groups=groups)
    actual, said = np.asarray(labels), np.asarray(predictions)
    names = list(dict.fromkeys(groups))
    number = {name: place for place, name in enumerate(names)}
    member = np.asarray([number[group] for group in groups])
    found = {name: _rates(actual[member == i], said[member == i], positive) for name, i in number.items()}
    rates = list(found.values())
    return Fairness(
        accuracy_gap=_gap([r.accuracy for r in rates]),
        worst_accuracy=min(r.accuracy for r in rates),
        parity_gap=_gap([r.positive_rate for r in rates]),
        true_positive_gap=_gap([r.true_positive_rate for r in rates]),
        false_positive_gap=_gap([r.false_positive_rate for r in rates]),
        groups=found,
    )


def counterfactual(labels: Sequence, predictions: Sequence, swapped_predictions: Sequence, changed) -> Counterfactual:
    """Robustness of predictions to a swap that must not matter (`counterfactual.py` swaps words).

    labels, predictions, swapped_predictions: [n]. changed: bool [n], whether the swap changed the text at all.
    """
    changed = indicators("changed", changed)
    n = same_length(labels=labels, predictions=predictions, swapped_predictions=swapped_predictions, changed=changed)
    label, before, after = np.asarray(labels), np.asarray(predictions), np.asarray(swapped_predictions)
    right = np.equal(label, before)
    num_changed = int(changed.sum())
    flips = float(np.mean(np.not_equal(before, after)[changed])) if num_changed else None
    return Counterfactual(float(right.mean()), float(np.sum(right & np.equal(label, after)) / n), flips, num_changed)


def _rates(labels: np.ndarray, predictions: np.ndarray, positive) -> GroupRates:
    actual, said = labels == positive, predictions == positive
    rate = lambda rows: float(said[rows].mean()) if rows.any() else None
    return GroupRates(
        len(labels), float((labels == predictions).mean()), float(said.mean()), rate(actual), rate(~actual)
    )


def _gap(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return max(known) - min(known) if len(known) > 1 else None
