"""The foundation model as augmenter at the edge (section III-A): rows for a client's minority classes.

A client asks for max_c n_c - n_c rows of each class, at most a cap. The request tells its label histogram: fixed-size
requests tell nothing, and randomized response (Warner 1965; its form for K labels: Kairouz, Oh, Viswanath, JMLR 2016)
hides each row's label at a price in accuracy:

    P[report = label] = e^eps / (e^eps + K - 1),   any other label 1 / (e^eps + K - 1)

The server answers by *retrieve and label*: rows of a public pool that the scorer gives that label, the surest first.
Generated text goes through the filters: enough words, no near duplicates, and the scorer surely agrees with the label
that was asked for. A class that the client does not have is served like any other, and counted.

    >>> wanted = minority_requests(histogram, cap=50)
    >>> served = retrieve(probabilities, wanted)     # of the public pool, calibrated
    >>> new_rows = [pool[i] for i in served.rows]    # labels: served.labels
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.services.checks import at_least, classes, distributions, positive, same_length, share
from fmfl_jax.services.words import words_of

_ID_BITS = 32  # of a public row's number


class Retrieved(NamedTuple):
    """rows: int64 [n] of the pool; labels: int64 [n], the scorer's; sureness: float64 [n], their probability; missing:
    int64 [K], rows that were asked for and that the pool does not have. Class after class, the surest first."""

    rows: np.ndarray
    labels: np.ndarray
    sureness: np.ndarray
    missing: np.ndarray


class RequestCounts(NamedTuple):
    """Of one request: rows asked for, classes asked for, and those of them that the client has no row of."""

    rows: int
    classes: int
    absent_classes: int


def minority_requests(histogram, *, cap: int) -> np.ndarray:
    """int64 [K]: max_c n_c - n_c rows of each class, at most cap. histogram: int [K] >= 0 (estimates are rounded and
    cut at 0 first). A client with no rows asks for none. Raises ValueError for a histogram that is not finite."""
    counts = np.asarray(histogram, np.float64)
    if counts.ndim != 1 or counts.size == 0 or not np.isfinite(counts).all():
        raise ValueError(f"histogram must be one finite number a class, got shape {counts.shape}")
    at_least(0, cap=cap)
    counts = np.maximum(np.rint(counts), 0)
    return np.minimum(counts.max() - counts, cap).astype(np.int64)


def fixed_size_requests(num_classes: int, *, per_class: int) -> np.ndarray:
    """int64 [K]: the same from every client, so that a request tells nothing about it. The client keeps what it needs
    of the answer."""
    at_least(1, num_classes=num_classes)
    at_least(0, per_class=per_class)
    return np.full(num_classes, per_class, np.int64)


def keep_needed(served: Retrieved, wanted) -> np.ndarray:
    """bool [n]: which of the served rows a client takes that needs wanted [K]: the first of each class."""
    wanted = np.asarray(wanted, np.int64)
    place = np.zeros(len(served.labels), np.int64)
    for c in range(len(wanted)):
        members = served.labels == c
        place[members] = np.arange(members.sum())
    return place < wanted[served.labels]


def count_request(wanted, histogram) -> RequestCounts:
    """What a request asks for, beside the rows that the client has: wanted, histogram int [K]."""
    wanted, histogram = np.asarray(wanted), np.asarray(histogram)
    same_length(wanted=wanted, histogram=histogram)
    asked = wanted > 0
    return RequestCounts(int(wanted[asked].sum()), int(asked.sum()), int((asked & (histogram == 0)).sum()))


def randomize_labels(labels, num_classes: int, *, epsilon: float, rng) -> np.ndarray:
    """int64 [n]: each row's label, replaced by another with the probability of the module's formula: epsilon-local DP
    for one row's label. A client with n rows that change together pays n epsilon.

    rng: numpy Generator, or a seed.
    """
    labels = classes("labels", labels, num_classes)
    at_least(2, num_classes=num_classes)
    positive(epsilon=epsilon)
    rng = np.random.default_rng(rng)
    keep = 1 / (1 + (num_classes - 1) * math.exp(-epsilon))
    other = (labels + rng.integers(1, num_classes, size=labels.shape)) % num_classes
    return np.where(rng.random(labels.shape) < keep, labels, other)


def estimate_histogram(reported_counts, *, epsilon: float) -> np.ndarray:
    """float64 [K]: the unbiased estimate of the label histogram from counts [K] of randomized labels; it may be
    negative, and sums to the number of rows."""
    counts = np.asarray(reported_counts, np.float64)
    at_least(2, num_classes=len(counts))
    positive(epsilon=epsilon)
    other = 1 / (math.exp(min(epsilon, 700.0)) + len(counts) - 1)
    keep = 1 - (len(counts) - 1) * other
    return (counts - counts.sum() * other) / (keep - other)


def retrieve(probabilities, wanted, *, exclude=None, min_sureness: float = 0.0) -> Retrieved:
    """Rows of a public pool for each class: those to which the scorer gives this label, the surest first.

    Args:
      probabilities: [N, K], the scorer's calibrated ones of the pool. A row of NaN is never served.
      wanted: int [K].
      exclude: bool [N], rows not to serve (served before); None is none.
      min_sureness: the least probability of the label.

    A row is served once at most: it has one label. Raises ValueError for shapes that do not fit and negative requests.
    """
    p = distributions("probabilities", probabilities)
    wanted = np.asarray(wanted, np.int64)
    if wanted.shape != (p.shape[1],) or wanted.min() < 0:
        raise ValueError(f"wanted must hold {p.shape[1]} counts of at least 0, got {wanted.tolist()}")
    share("min_sureness", min_sureness)
    unknown = np.isnan(p).max(axis=1)
    label = np.argmax(np.where(unknown[:, None], 0.0, p), axis=1)
    sureness = np.where(unknown, -np.inf, p.max(axis=1))
    open_rows = sureness >= min_sureness
    if exclude is not None:
        same_length(probabilities=p, exclude=exclude)
        open_rows &= ~np.asarray(exclude, bool)
    order = np.argsort(-sureness, kind="stable")
    chosen = []
    for c in range(p.shape[1]):
        chosen.append(order[(label[order] == c) & open_rows[order]][: wanted[c]])
    rows = np.concatenate(chosen).astype(np.int64)
    missing = wanted - np.asarray([len(part) for part in chosen])
    return Retrieved(rows, label[rows].astype(np.int64), sureness[rows], missing)


def long_enough(texts: Sequence[str], *, min_words: int = 3) -> np.ndarray:
    """bool [n]: texts with at least min_words words."""
    return np.asarray([len(words_of(text)) >= min_words for text in texts], bool)


def first_of_near_duplicates(texts: Sequence[str], *, min_overlap: float = 0.7, shingle: int = 3) -> np.ndarray:
    """bool [n]: texts that no kept text before them nearly repeats: |A & B| / |A | B| < min_overlap of their sets of
    `shingle` consecutive words (Broder 1997), exact by an index from shingle to texts. A text of fewer words is one
    shingle. Raises ValueError for min_overlap outside (0, 1] and shingle < 1."""
    at_least(1, shingle=shingle)
    share("min_overlap", min_overlap)
    positive(min_overlap=min_overlap)
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    kept = np.zeros(len(texts), bool)
    for number, text in enumerate(texts):
        words = words_of(text)
        own = {tuple(words[i : i + shingle]) for i in range(max(len(words) - shingle + 1, 1))}
        common: dict[int, int] = {}
        for piece in own:
            for other in holders.get(piece, ()):
                common[other] = common.get(other, 0) + 1
        kept[number] = all(n < min_overlap * (len(own) + sizes[other] - n) - 1e-9 for other, n in common.items())
        if kept[number]:
            sizes[number] = len(own)
            for piece in own:
                holders.setdefault(piece, []).append(number)
    return kept


def surely_agrees(probabilities, asked_labels, *, min_sureness: float) -> np.ndarray:
    """bool [n]: generated rows whose asked label is the scorer's best and has at least this probability.

    probabilities: [n, K]; asked_labels: int [n]. A row of NaN does not agree.
    """
    p = distributions("probabilities", probabilities)
    asked = classes("asked_labels", asked_labels, p.shape[1])
    same_length(probabilities=p, asked_labels=asked)
    of_asked = p[np.arange(len(p)), asked]
    return (of_asked >= min_sureness) & (of_asked >= p.max(axis=1))


def request_bits(num_classes: int, *, cap: int) -> int:
    """Bits of a request: a count up to cap for every class."""
    return num_classes * max(int(cap).bit_length(), 1)


def text_bits(texts: Sequence[str]) -> int:
    """Bits of texts sent as UTF-8, a byte between two."""
    return 8 * (sum(len(text.encode("utf-8")) for text in texts) + max(len(texts) - 1, 0))


def id_bits(num_rows: int) -> int:
    """Bits of rows that are sent as numbers of a pool that both sides have."""
    return _ID_BITS * num_rows
