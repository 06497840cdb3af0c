"""What clients keep, over several hosts: each process keeps the rows of its own clients on its own disk.

Client c belongs to process c modulo the number of processes, whichever device trains it in a round. A round's rows are
exchanged when they are asked for; what comes back is on all hosts already, and each writes its own. All processes call
the same methods with the same arguments, and commit before the one checkpoint that all of them write.
"""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmfl_jax.experiment.loop.client_store import ClientStore, InitClient
from fmfl_jax.fed.core.types import Tree


class ShardedStore:
    """A ClientStore's methods over all processes; see there."""

    def __init__(self, own: ClientStore, process: int, num_processes: int):
        self.num_clients, self._own, self._process, self._num_processes = own.num_clients, own, process, num_processes

    @classmethod
    def open(
        cls, directory: str | pathlib.Path, num_clients: int, init_client: InitClient, *, step: int
    ) -> "ShardedStore":
        """The rows as they were at checkpoint `step`, those of this process in a folder of its own.

        Raises ValueError as ClientStore.open does, so also where a run goes on with another number of processes.
        """
        process, num_processes = jax.process_index(), jax.process_count()
        folder = pathlib.Path(directory) / f"{process}-of-{num_processes}"
        return cls(ClientStore.open(folder, num_clients, init_client, step=step), process, num_processes)

    def gather(self, ids: Sequence[int] | np.ndarray) -> Tree:
        """The rows of clients int [C] on every process: a pytree of numpy arrays [C, ...]."""
        ids = np.asarray(ids, np.int64)
        own = self._owned(ids)
        rows = jax.tree.map(lambda x: _at(x, own), self._own.gather(ids[own]))
        if not len(ids):
            return rows
        of_all = multihost_utils.process_allgather(jax.tree.map(_as_bytes, rows))  # [processes, C, bytes]
        owners, places = ids % self._num_processes, np.arange(len(ids))
        return jax.tree.map(lambda x, row: _from_bytes(np.asarray(x)[owners, places], row), of_all, rows)

    def scatter(self, ids: Sequence[int] | np.ndarray, rows: Tree) -> None:
        """Replaces the rows of clients int [C], each named once, by the pytree of arrays [C, ...], the same on every
        process."""
        ids = np.asarray(ids, np.int64)
        own = self._owned(ids)
        self._own.scatter(ids[own], jax.tree.map(lambda x: np.asarray(x)[own], rows))

    def commit(self, step: int) -> None:
        """Returns when every process has committed its rows."""
        self._own.commit(step)
        multihost_utils.sync_global_devices(f"clients' rows of step {step}")

    def close(self) -> None:
        self._own.close()

    def _owned(self, ids: np.ndarray) -> np.ndarray:
        return ids % self._num_processes == self._process


def _at(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """[owned, ...] -> [C, ...] with zeros where others own."""
    whole = np.zeros((len(own), *rows.shape[1:]), rows.dtype)
    whole[own] = rows
    return whole


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    """[C, ...] of any dtype -> uint8 [C, bytes]: what is exchanged is not rounded on the way."""
    return np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)


def _from_bytes(raw: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(like.dtype).reshape(like.shape)
