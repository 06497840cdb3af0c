"""A teacher that saw private data answers with noise (section III-B): PATE's Gaussian noisy arg-max, and its cost.

    answer = arg max_c (votes_c + N(0, sigma^2))          (GNMax: Papernot et al., ICLR 2018)

One teacher that votes otherwise changes two counts by 1: an L2 sensitivity of sqrt(2), so one answer is Gaussian noise
of multiplier sigma / sqrt(2), Renyi DP of alpha / sigma^2 at every order alpha. This bound does not look at the votes:
it may be published. The unit is all data of one teacher.

    >>> labels = noisy_argmax(vote_counts(teacher_labels, num_classes), sigma=40.0, rng=rng)
    >>> gnmax_privacy(len(labels), sigma=40.0, delta=1e-5).epsilon_pld
"""

import math

import numpy as np

from fmfl_jax.fed.privacy.accounting import PrivacySpent, SampledGaussian, privacy_spent
from fmfl_jax.services.checks import at_least, classes, positive


def vote_counts(teacher_labels, num_classes: int) -> np.ndarray:
    """int64 [n, K]: how many teachers vote for each class, from labels int [teachers, n]. -1 is no vote."""
    labels = np.asarray(teacher_labels)
    if labels.ndim != 2:
        raise ValueError(f"teacher_labels must be [teachers, examples], got shape {labels.shape}")
    flat = classes("teacher_labels + 1", labels.reshape(-1) + 1, num_classes + 1).reshape(labels.shape)
    return np.stack([(flat == c + 1).sum(axis=0) for c in range(num_classes)], axis=1)


def noisy_argmax(votes, *, sigma: float, rng) -> np.ndarray:
    """int64 [n]: the class with the most votes after noise of standard deviation sigma on every count.

    votes: [n, K], finite; rng: numpy Generator, or a seed. The noise hides one vote only while the generator is secret.
    """
    votes = np.asarray(votes, np.float64)
    at_least(0, sigma=sigma)
    if votes.ndim != 2 or not np.isfinite(votes).all():
        raise ValueError(f"votes must be finite counts [examples, classes], got shape {votes.shape}")
    return np.argmax(votes + sigma * np.random.default_rng(rng).standard_normal(votes.shape), axis=1)


def gnmax_privacy(num_answers: int, *, sigma: float, delta: float) -> PrivacySpent:
    """What num_answers answers cost a teacher's data, by RDP and by the tighter PLD. Raises ValueError for sigma <= 0.

    No vote at all differs from a vote in one count: it costs less and is within the bound.
    """
    positive(sigma=sigma)
    return privacy_spent([(SampledGaussian(1.0, sigma / math.sqrt(2)), num_answers)], delta)
