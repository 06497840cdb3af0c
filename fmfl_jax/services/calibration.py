"""Class probabilities from a foundation model's scores: raw, contextual, batch, and a temperature.

Scores are log-probabilities l [N, K] of the classes' words. The model prefers some words whatever the text says; the
methods divide by an estimate of that preference:

    raw          p = softmax(l)
    contextual   p ~ softmax(l) / mean_m softmax(l_m),   l_m of texts without content
                 (Zhao et al., Calibrate Before Use, ICML 2021, section 5; their W = diag(p_cf)^-1, b = 0)
    batch        p ~ softmax(l) / mean_n softmax(l_n),   l_n of the unlabelled batch itself
                 (Zhou et al., Batch Calibration, ICLR 2024, eq. 3, with strength 1)
    temperature  p ~ p^(1/T), T minimizes the negative log-likelihood of labelled rows (Guo et al., ICML 2017)

The first three move the classes' prior and so the accuracy; a temperature moves only the confidence.

    l = [[-1.0, -3.0], [-1.5, -2.0]]                    # the second word is never preferred ...
    batch(l).argmax(axis=1)                             # [0, 1]: ... but in the second text it is less unlikely

All of it is numpy in float64 and takes and gives log-probabilities [N, K], each row normalized.
"""

import numpy as np

NULL_TEXTS = ("N/A", "", "[MASK]")  # Zhao et al.'s texts without content
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-3, 1e3


def raw(log_probs) -> np.ndarray:
    """Scores [N, K], any offset in a row -> normalized log-probabilities. Raises ValueError for NaN or infinity: it
    must not reach a student."""
    scores = np.asarray(log_probs, np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores are [N, K], got shape {scores.shape}")
    wrong = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} of the scores holds NaN or infinity")
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def contextual(log_probs, null_log_probs) -> np.ndarray:
    """Scores [N, K] by those of texts without content [M, K] (`NULL_TEXTS` in the same template)."""
    return raw(raw(log_probs) - log_prior(null_log_probs))


def batch(log_probs) -> np.ndarray:
    """Scores [N, K] by their own mean. It takes the classes to be about equally frequent in the batch."""
    return raw(raw(log_probs) - log_prior(log_probs))


def log_prior(log_probs) -> np.ndarray:
    """The log of the mean class probabilities, [1, K], to subtract from later scores."""
    rows = raw(log_probs)
    top = rows.max(axis=0, keepdims=True)
    return top + np.log(np.exp(rows - top).mean(axis=0, keepdims=True))


def with_temperature(log_probs, temperature: float) -> np.ndarray:
    """Log-probabilities [N, K] raised to 1 / temperature and normalized."""
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    return raw(raw(log_probs) / temperature)


def fit_temperature(log_probs, labels) -> float:
    """The temperature that minimizes `nll` of with_temperature(log_probs, T), between 0.001 and 1000.

    The loss is convex in 1/T; its slope mean_n (E_p[l_n] - l_n,label) is brought to 0 by bisection. Rows that are all
    right have no minimum: the returned temperature is one at which nothing is left to gain.
    """
    rows, labels = raw(log_probs), _labels(log_probs, labels)
    truth = rows[np.arange(len(rows)), labels]

    def slope(inverse: float) -> float:
        return float(np.mean((np.exp(raw(rows * inverse)) * rows).sum(axis=1) - truth))

    low, high = np.log(1 / _MAX_TEMPERATURE), np.log(1 / _MIN_TEMPERATURE)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(float(np.exp(middle))) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def nll(log_probs, labels) -> float:
    """Mean negative log-likelihood of the labels int [N], in nats."""
    return float(-np.mean(raw(log_probs)[np.arange(len(log_probs)), _labels(log_probs, labels)]))


def accuracy(log_probs, labels) -> float:
    """The share of rows whose first best class is the label."""
    return float(np.mean(raw(log_probs).argmax(axis=1) == _labels(log_probs, labels)))


def _labels(log_probs, labels) -> np.ndarray:
    labels = np.asarray(labels)
    n, k = np.shape(log_probs)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels must be {n} class numbers from 0 to {k - 1}")
    return labels
