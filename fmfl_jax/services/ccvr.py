"""Classifier calibration with virtual representations (section III-A): CCVR, Luo et al., NeurIPS 2021.

Clients send, per class, how many features they have, their mean and covariance (n - 1). The server merges them,

    mean = sum_k n_k mean_k / n
    cov  = (sum_k (n_k - 1) cov_k + sum_k n_k (mean_k - mean)(mean_k - mean)^T) / (n - 1),

draws Gaussian features and fits the last layer anew. Without the second term the classes come out too narrow. With
synthetic text in place of Gaussians nothing has to be sent: fit `refit_last_layer` on its features.

    >>> merged = merge_statistics([class_statistics(features_k, labels_k, num_classes) for ...])
    >>> weight, bias = refit_last_layer(*draw_features(merged, per_class, rng=rng), num_classes, decay=1e-3)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize
from scipy.special import log_softmax

from fmfl_jax.services.checks import at_least, classes, same_length


class ClassStatistics(NamedTuple):
    """counts: int [K]; means: [K, D]; covariances: [K, D, D] with n - 1, zero where n < 2. Of a class with count 0 the
    other numbers say nothing."""

    counts: np.ndarray
    means: np.ndarray
    covariances: np.ndarray


def class_statistics(features, labels, num_classes: int) -> ClassStatistics:
    """What one client sends, from features [n, D] and labels int [n], in float64. Raises ValueError for features that
    are not finite."""
    features, labels = np.asarray(features, np.float64), classes("labels", labels, num_classes)
    if features.ndim != 2 or len(features) != len(labels) or not np.isfinite(features).all():
        raise ValueError(f"features must be finite [{len(labels)}, D], got shape {features.shape}")
    width = features.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    means, covariances = np.zeros((num_classes, width)), np.zeros((num_classes, width, width))
    for c in np.flatnonzero(counts):
        rows = features[labels == c]
        means[c] = rows.mean(axis=0)
        if len(rows) > 1:
            apart = rows - means[c]
            covariances[c] = apart.T @ apart / (len(rows) - 1)
    return ClassStatistics(counts, means, covariances)


def merge_statistics(clients: Sequence[ClassStatistics]) -> ClassStatistics:
    """The statistics of all features together, exactly: those of one client that held them all.

    Raises ValueError for no clients and where a client that has a class sends numbers that are not finite.
    """
    same_length(clients=clients)
    counts = np.stack([np.asarray(s.counts, np.int64) for s in clients])  # [C, K]
    means = np.stack([np.asarray(s.means, np.float64) for s in clients])  # [C, K, D]
    covariances = np.stack([np.asarray(s.covariances, np.float64) for s in clients])
    held, several = (counts > 0)[..., None], (counts > 1)[..., None, None]
    means, covariances = np.where(held, means, 0.0), np.where(several, covariances, 0.0)
    bad = ~(np.isfinite(means).all(axis=(1, 2)) & np.isfinite(covariances).all(axis=(1, 2, 3)))
    if bad.any():
        raise ValueError(f"clients {np.flatnonzero(bad).tolist()} send statistics that are not finite")
    total = counts.sum(axis=0)
    mean = np.einsum("ck,ckd->kd", counts, means) / np.maximum(total, 1)[:, None]
    apart = np.where(held, means - mean, 0.0)
    within = np.einsum("ck,ckde->kde", np.maximum(counts - 1, 0), covariances)
    between = np.einsum("ck,ckd,cke->kde", counts, apart, apart)
    return ClassStatistics(total, mean, (within + between) / np.maximum(total - 1, 1)[:, None, None])


def payload_bits(statistics: ClassStatistics, *, value_bits: int = 32) -> int:
    """What a client sends: per class that it has a count (32 bits), D numbers and the D (D + 1) / 2 of the covariance
    (none for a single row); one bit for every class says whether it follows."""
    width = statistics.means.shape[1]
    sizes = [(32 + value_bits * (width + (width * (width + 1) // 2) * (n > 1))) for n in statistics.counts if n > 0]
    return len(statistics.counts) + int(sum(sizes))


def draw_features(statistics: ClassStatistics, per_class, *, rng) -> tuple[np.ndarray, np.ndarray]:
    """(features float64 [n, D], labels int64 [n]): per_class[c] draws from each class's Gaussian.

    per_class: int [K] or one number for all; a class of which nothing is known gives none. rng: numpy Generator, or a
    seed.
    """
    rng = np.random.default_rng(rng)
    num_classes, width = statistics.means.shape
    wanted = np.broadcast_to(np.asarray(per_class, np.int64), num_classes)
    at_least(0, per_class=int(wanted.min()))
    features, labels = [np.zeros((0, width))], []
    for c in range(num_classes):
        if statistics.counts[c] > 0 and wanted[c] > 0:
            values, vectors = np.linalg.eigh(statistics.covariances[c])
            root = vectors * np.sqrt(np.maximum(values, 0.0))  # rounding may leave small negative eigenvalues
            features.append(statistics.means[c] + rng.standard_normal((wanted[c], width)) @ root.T)
            labels += [c] * int(wanted[c])
    return np.concatenate(features), np.asarray(labels, np.int64)


def refit_last_layer(features, labels, num_classes: int, *, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """(weight [D, K], bias [K]) float64 of a softmax regression: mean cross-entropy + decay / 2 ||weight||^2, by L-BFGS
    from zero. Raises ValueError for no rows and decay <= 0 (separable classes would have no optimum)."""
    features, labels = np.asarray(features, np.float64), classes("labels", labels, num_classes)
    n, width = same_length(features=features, labels=labels), features.shape[1]
    if not decay > 0:
        raise ValueError(f"decay must be above 0, got {decay}")
    inputs, target = np.hstack([features, np.ones((n, 1))]), np.eye(num_classes)[labels]

    def loss(flat):
        matrix = flat.reshape(width + 1, num_classes)
        logp = log_softmax(inputs @ matrix, axis=1)
        gradient = inputs.T @ (np.exp(logp) - target) / n
        gradient[:-1] += decay * matrix[:-1]
        return -np.sum(target * logp) / n + decay / 2 * np.sum(np.square(matrix[:-1])), gradient.reshape(-1)

    start = np.zeros((width + 1) * num_classes)
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-7}).x
    matrix = found.reshape(width + 1, num_classes)
    return matrix[:-1], matrix[-1]
