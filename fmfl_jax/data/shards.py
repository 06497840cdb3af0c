"""Which rows a client trains on in which step: unequal clients, whole epochs, a smaller last batch.

A round's batches are row numbers, made for a whole cohort at once by a few array operations. They follow from
(seed, round, client) alone, whoever else is in the cohort, so a resumed run needs no saved data position.
"""

from typing import NamedTuple

import numpy as np


class Shards(NamedTuple):
    """The rows of every client: client c holds rows[starts[c] : starts[c + 1]].

    rows: int32 [N], numbers of rows of the data. starts: int64 [num_clients + 1].
    """

    rows: np.ndarray
    starts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """int64 [num_clients]."""
        return np.diff(self.starts)


def shards_of(parts: list[np.ndarray]) -> Shards:
    """From one array of row numbers per client (fmfl_jax/data/partition.py)."""
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Shards(np.concatenate(parts).astype(np.int32), starts)


def max_steps(shards: Shards, *, batch_size: int, epochs: int) -> int:
    """Local steps of the largest client."""
    return epochs * int(-(-shards.sizes.max() // batch_size))


def epoch_batches(
    shards: Shards, client_ids: np.ndarray, *, round: int, seed: int, batch_size: int, epochs: int, num_steps: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(batches, steps of each client int32 [C]).

    batches: {"index": int32 [C, S, B], "mask": bool [C, S, B]} with S = num_steps for all, as `max_steps` gives it;
    each epoch is a new order of the client's rows, its last batch may be smaller. What the mask leaves out has index 0.
    """
    sizes = shards.sizes[client_ids]
    per_epoch = -(-sizes // batch_size)  # steps
    client, epoch = np.divmod(np.arange(len(client_ids) * epochs), epochs)
    lengths = sizes[client]
    owner = np.repeat(np.arange(len(client)), lengths)  # which (client, epoch) each entry belongs to
    within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = shards.starts[client_ids[client[owner]]] + within
    order = np.lexsort((_random_words(seed, round, epoch[owner], place), owner))
    slots = (client * num_steps + epoch * per_epoch[client])[owner] * batch_size + within
    shape = (len(client_ids), num_steps, batch_size)
    index, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    index.reshape(-1)[slots] = shards.rows[place[order]]
    mask.reshape(-1)[slots] = True
    return {"index": index, "mask": mask}, (epochs * per_epoch).astype(np.int32)


def _random_words(seed: int, round: int, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
    """uint64, as many as places: a hash of all four (a generator per client would cost more than a small round)."""
    word = np.uint64(0)
    with np.errstate(over="ignore"):  # wraps around
        for part in (np.uint64(seed), np.uint64(round), epoch.astype(np.uint64), place.astype(np.uint64)):
            word = _mixed((word ^ part) + np.uint64(0x9E3779B97F4A7C15))
    return np.asarray(word)


def _mixed(x):
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
