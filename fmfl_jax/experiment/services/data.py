"""The texts of a run: the clients' rows, a public pool without labels, validation and test rows.

A client's labels are a mixture drawn from Dirichlet(alpha) (Hsu, Qi, Brown 2019), all clients have as many rows. Where
a class has no text left, the client takes others. No text is in two parts of a seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax import streams
from fmfl_jax.data.classification import LabelledText, Rows, Task, hashed_ngrams
from fmfl_jax.data.shards import shards_of
from fmfl_jax.experiment.services.config import DataConfig

TUNING_SEED = 1_000_000  # beyond the seeds of a run


class Corpus(NamedTuple):
    """Labelled texts of the training file and of the test file, and the names of the classes."""

    train: LabelledText
    test: LabelledText
    classes: tuple[str, ...]


class SeedData(NamedTuple):
    """task: clients' and test rows as hashed n-grams. texts: those of each client, in the order of its rows.
    histograms: int64 [C, K] of their labels. pool: texts; pool_rows: the same with their true labels, which only
    evaluations may see. validation: for tuning. pool_numbers: of the training file."""

    task: Task
    texts: list[LabelledText]
    histograms: np.ndarray
    pool: list[str]
    pool_rows: Rows
    pool_numbers: np.ndarray
    validation: Rows


def test_texts(corpus: Corpus, config: DataConfig, seed: int) -> LabelledText:
    """The test rows, the same for all seeds of a run. Raises ValueError where the file has too few."""
    if len(corpus.test.texts) < config.num_test:
        raise ValueError(f"num_test={config.num_test}, but the test texts are only {len(corpus.test.texts)}")
    order = streams.host_rng(streams.SERVICE_TEXTS, seed, 0).permutation(len(corpus.test.texts))[: config.num_test]
    return taken(corpus.test, order)


def public_labelled(corpus: Corpus, config: DataConfig, seed: int) -> LabelledText:
    """The few public texts with labels, of a seed that no result uses: for template, temperature and decays."""
    order = _order(corpus, TUNING_SEED + seed)
    return taken(corpus.train, order[: config.num_labelled])


def _order(corpus: Corpus, seed: int) -> np.ndarray:
    return streams.host_rng(streams.SERVICE_TEXTS, seed, 1).permutation(len(corpus.train.texts))


def seed_data(corpus: Corpus, config: DataConfig, test: Rows, seed: int) -> SeedData:
    """One seed's draw. Raises ValueError where the training file has too few texts."""
    num_texts = len(corpus.train.texts)
    if num_texts < config.num_train:
        raise ValueError(
            f"the training texts are {num_texts}, but clients, pool and validation rows need "
            f"{config.num_train}: lower num_clients, rows_per_client, num_pool or num_validation"
        )
    order = _order(corpus, seed)
    ends = np.cumsum([config.num_pool, config.num_validation])
    pool, validation, rest = np.split(order, ends)
    parts = mixture_parts(
        corpus.train.labels,
        rest,
        config.num_clients,
        config.rows_per_client,
        alpha=config.alpha,
        rng=streams.host_rng(streams.SERVICE_CLIENTS, seed),
    )
    train = np.concatenate(parts)
    rows = lambda numbers: hashed_rows(taken(corpus.train, numbers), config)
    num_classes = len(corpus.classes)
    histograms = np.stack([np.bincount(corpus.train.labels[part], minlength=num_classes) for part in parts])
    places = np.split(np.arange(len(train)), np.cumsum([len(part) for part in parts])[:-1])
    return SeedData(
        Task(rows(train), shards_of(places), test),
        [taken(corpus.train, part) for part in parts],
        histograms,
        taken(corpus.train, pool).texts,
        rows(pool),
        pool,
        rows(validation),
    )


def mixture_parts(
    labels: np.ndarray, rows: np.ndarray, num_clients: int, rows_per_client: int, *, alpha: float, rng
) -> list[np.ndarray]:
    """int64 [rows_per_client] for each client: numbers among `rows` (in random order) of labels int [N], each once."""
    num_classes = int(labels.max()) + 1
    left = [list(rows[labels[rows] == c]) for c in range(num_classes)]
    parts = []
    for _ in range(num_clients):
        wanted = rng.multinomial(rows_per_client, rng.dirichlet(np.full(num_classes, alpha)))
        own = [left[c].pop() for c in range(num_classes) for _ in range(min(wanted[c], len(left[c])))]
        while len(own) < rows_per_client:  # a class has run out
            own.append(max(left, key=len).pop())
        parts.append(np.asarray(own, np.int64))
    return parts


def hashed_rows(texts: LabelledText, config: DataConfig) -> Rows:
    """Texts as the student sees them."""
    return Rows(hashed(texts.texts, config), texts.labels)


def hashed(texts: Sequence[str], config: DataConfig) -> np.ndarray:
    """int32 [N, max_ngrams]."""
    return hashed_ngrams(list(texts), num_buckets=config.num_buckets, max_ngrams=config.max_ngrams)


def taken(texts: LabelledText, numbers: np.ndarray) -> LabelledText:
    """These of the texts."""
    return LabelledText([texts.texts[i] for i in numbers], texts.labels[numbers])


def with_rows_for_clients(task: Task, rows: list[Rows]) -> Task:
    """The task with further rows for each client, copied: a client that flips labels flips only its own."""
    x = np.concatenate([task.train.x, *(more.x for more in rows)])
    y = np.concatenate([task.train.y, *(more.y.astype(np.int32) for more in rows)])
    own = np.split(task.shards.rows, task.shards.starts[1:-1])
    ends = len(task.train.y) + np.cumsum([0, *(len(more.y) for more in rows)])
    parts = [np.concatenate([held, np.arange(a, b)]) for held, a, b in zip(own, ends, ends[1:])]
    return Task(Rows(x, y), shards_of(parts), task.test)


def with_public_rows(task: Task, x: np.ndarray) -> tuple[Task, int]:
    """The task with rows x [P, L] behind the clients' that none of them trains on, and the place of the first: a
    penalty of local training finds them there."""
    train = Rows(np.concatenate([task.train.x, x]), np.concatenate([task.train.y, np.zeros(len(x), np.int32)]))
    return task._replace(train=train), len(task.train.y)


def controls(log_probs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The answers [N, K] with their rows shuffled, and uniform answers."""
    order = streams.host_rng(streams.SERVICE_CONTROLS, seed, 0).permutation(len(log_probs))
    return {"shuffled": log_probs[order], "uniform": np.full_like(log_probs, -np.log(log_probs.shape[1]))}


def with_taught_rows_for_clients(
    task: Task, rows: list[tuple[np.ndarray, np.ndarray]], num_classes: int, *, teacher_weight: float
) -> Task:
    """As `with_rows_for_clients`, with a teacher's probabilities [m, K] as targets of a client's m further rows:

        loss of a client = (1 - teacher_weight) mean over its own rows + teacher_weight mean over the teacher's

    train.y is float32 [N, K], every row's targets times its weight: cross-entropy is linear in them.
    """
    hard = with_rows_for_clients(task, [Rows(x, np.zeros(len(x), np.int32)) for x, _ in rows])
    targets = np.concatenate([np.eye(num_classes)[task.train.y], *(p for _, p in rows)])
    own_rows = np.split(task.shards.rows, task.shards.starts[1:-1])
    all_rows = np.split(hard.shards.rows, hard.shards.starts[1:-1])
    for own, both in zip(own_rows, all_rows):
        taught = both[len(own) :]
        targets[own] *= (1 - teacher_weight) * len(both) / len(own)
        targets[taught] *= teacher_weight * len(both) / len(taught)
    return hard._replace(train=Rows(hard.train.x, targets.astype(np.float32)))
