"""Does the model make it up (sections II-B, III-D)? Ask k times: self-consistency, and entropy over meanings.

Self-consistency: Wang et al., ICLR 2023, here with abstention. Semantic entropy: Kuhn et al., ICLR 2023; Farquhar et
al., Nature 2024: H of the mass of clusters of answers that mean the same. Three readings of the mass are published,
each a function of its own: the sum of the samples' likelihoods (Kuhn's equation), the count of samples (Nature's
discrete form, which needs no likelihoods), and the likelihoods of distinct answers. Where answers are labels, clusters
are labels, exactly; `lexical_clusters` stands in for entailment where they are free text.

All of this measures agreement with oneself: a falsehood told every time passes.

    >>> clusters = lexical_clusters(["Paris", "paris.", "It is Lyon"])
    >>> clusters, entropy_by_counts(clusters)   # [0, 0, 1], 0.6365
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import distributions, same_length, share, vector
from fmfl_jax.services.words import words_of


class Consistency(NamedTuple):
    """answer: the majority's, or None for an abstention; share: of the samples that gave the most frequent answer."""

    answer: Hashable | None
    share: float


def self_consistency(answers: Sequence[Hashable], *, min_share: float) -> Consistency:
    """The most frequent of k sampled answers; an abstention where its share is below min_share or another answer is as
    frequent. A sample that gave none (None) counts among the k and for no answer.

    Raises ValueError for no samples and a min_share outside [0, 1].
    """
    share("min_share", min_share)
    same_length(answers=answers)
    counts: dict[Hashable, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    most = max(counts.values(), default=0)
    best = [answer for answer, count in counts.items() if count == most]
    found = most / len(answers)
    return Consistency(best[0] if len(best) == 1 and found >= min_share else None, found)


def entropy_by_counts(clusters: Sequence[int]) -> float:
    """Discrete semantic entropy, nats: every sample has the same mass (Farquhar et al. 2024).

    clusters: [k], the cluster of each sample, any numbers or labels.
    """
    same_length(clusters=clusters)
    _, counts = np.unique(np.asarray(clusters), return_counts=True)
    return _entropy(counts.astype(np.float64))


def entropy_by_likelihood(clusters: Sequence[int], log_likelihoods) -> float:
    """Semantic entropy, nats: a cluster's mass is the sum of its samples' likelihoods, repeats counted again (Kuhn et
    al. 2023, equation 4 with the masses normalized to 1).

    clusters: [k]; log_likelihoods: [k], of each whole answer or per token: say which, the values differ.
    """
    log_likelihoods = vector("log_likelihoods", log_likelihoods)
    same_length(clusters=clusters, log_likelihoods=log_likelihoods)
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    return _entropy(np.bincount(place, np.exp(log_likelihoods - log_likelihoods.max())))


def entropy_of_distinct(answers: Sequence[Hashable], clusters: Sequence[int], log_likelihoods) -> float:
    """Semantic entropy, nats, with the mass of the distinct answers: a repeated sample is the same event and counts
    once. Args as in `entropy_by_likelihood`; answers: [k], equal where they are the same string."""
    same_length(answers=answers, clusters=clusters, log_likelihoods=log_likelihoods)
    places = {answer: place for place, answer in enumerate(answers)}.values()
    return entropy_by_likelihood([clusters[i] for i in places], [log_likelihoods[i] for i in places])


def label_entropy(probabilities) -> np.ndarray:
    """[n] nats: semantic entropy of a closed set of labels from their probabilities [n, K], exact: no sampling, and no
    two labels mean the same. NaN where the row is NaN."""
    p = distributions("probabilities", probabilities)
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)


def lexical_clusters(texts: Sequence[str], *, min_overlap: float = 0.5) -> list[int]:
    """Clusters [k] of free text, numbered as they appear: a text joins the first cluster whose first text shares at
    least min_overlap of the words of both (Jaccard), else it starts one. Case and punctuation do not count.

    Words stand in for meaning: "not guilty" and "guilty" may meet. Texts without a word are alike.
    """
    share("min_overlap", min_overlap)
    firsts: list[set[str]] = []
    found = []
    for text in texts:
        words = set(words_of(text))
        for number, first in enumerate(firsts):
            both = len(words | first)
            if (not both) or len(words & first) / both >= max(min_overlap, 1e-9):
                found.append(number)
                break
        else:
            found.append(len(firsts))
            firsts.append(words)
    return found


def _entropy(mass: np.ndarray) -> float:
    p = mass[mass > 0] / mass.sum()
    return float(-np.sum(p * np.log(p))) + 0.0
