"""What thousands of clients keep between rounds, on disk: memory holds the rows of a cohort only.

SQLite (of the standard library) holds each client's row as one record of bytes, once for every checkpoint that changed
it: a stop between two checkpoints loses what is newer than the one that is restored, and nothing else. A client that
was never written has no record. Against an undo log of our own it was between 2 times as fast and 1.5 times as slow
(docs/results/cross_device.md).
"""

import contextlib
import json
import math
import pathlib
import sqlite3
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.fed.core.types import Tree

_INIT_CHUNK = 8  # first rows made at a time: they pass through the device
_PENDING = 2**62  # the step of what no checkpoint holds yet
_TABLES = """
    CREATE TABLE layout (text TEXT);
    CREATE TABLE commits (step INTEGER PRIMARY KEY);
    CREATE TABLE rows (client INTEGER, step INTEGER, bytes BLOB);
    CREATE UNIQUE INDEX rows_by_client ON rows (client, step);
"""
# Of a client's rows the newest that the checkpoint before this one knew stays, and all newer ones.
_FORGET = """
    DELETE FROM rows WHERE client IN (SELECT client FROM rows WHERE step = :step)
    AND step < (SELECT MAX(older.step) FROM rows older WHERE older.client = rows.client AND older.step <= :before)
"""


InitClient = Callable[[jax.Array], Tree]
"""client id, int32 scalar -> the client's row before it is first written, a pytree of arrays."""


class _Leaf(NamedTuple):
    """Where a leaf's [*shape] of `dtype` lies in a row: bytes start ... start + size."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    size: int


class ClientStore:
    """Rows of a pytree, one per client; see `open`. For one process at a time."""

    def __init__(
        self, database: sqlite3.Connection, num_clients: int, init_client: InitClient, leaves: list[_Leaf], treedef
    ):
        self.num_clients = num_clients
        self._database, self._init_client, self._leaves, self._treedef = database, init_client, leaves, treedef
        self._row_bytes = _row_bytes(leaves)

    @classmethod
    def open(
        cls, directory: str | pathlib.Path, num_clients: int, init_client: InitClient, *, step: int
    ) -> "ClientStore":
        """The rows as they were at checkpoint `step`, whatever a killed process left behind.

        init_client(client_id int32 scalar) -> pytree of arrays: a client's row before it is first scattered; vmapped,
        and called again whenever such a row is asked for. step: of the checkpoint that was restored; 0 for none: every
        row is as init_client makes it.

        Raises ValueError where the rows on disk are of another shape, or do not reach back to `step`.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        leaves, treedef = _leaves_of(init_client)
        layout = {
            "num_clients": num_clients,
            "row_bytes": _row_bytes(leaves),
            "leaves": [[leaf.name, list(leaf.shape), leaf.dtype.name, leaf.start] for leaf in leaves],
        }
        path = directory / "rows.sqlite"
        if step == 0:
            for old in directory.glob("rows.sqlite*"):
                old.unlink()
        elif not path.exists():
            raise ValueError(f"{directory} holds no clients' rows to go on with from step {step}")
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        if step == 0:
            database.executescript(_TABLES)
            database.execute("INSERT INTO layout VALUES (?)", (json.dumps(layout),))
            database.execute("INSERT INTO commits VALUES (0)")
        else:
            _check(database, directory, layout, step)
        database.execute("BEGIN")
        for table in ("rows", "commits"):
            database.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
        return cls(database, num_clients, init_client, leaves, treedef)

    @staticmethod
    def steps(directory: str | pathlib.Path) -> list[int]:
        """The checkpoints that `open` can go back to, oldest first: at most two; [] where there is no store."""
        path = pathlib.Path(directory) / "rows.sqlite"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(path)) as database:
            return [step for (step,) in database.execute("SELECT step FROM commits ORDER BY step")]

    def gather(self, ids: Sequence[int] | np.ndarray) -> Tree:
        """The rows of clients int [C]: a pytree of numpy arrays [C, ...]."""
        ids = self._checked(ids)
        raw, new = np.zeros((len(ids), self._row_bytes), np.uint8), []
        for place, client in enumerate(ids.tolist()):
            found = self._database.execute(
                "SELECT bytes FROM rows WHERE client = ? ORDER BY step DESC LIMIT 1", (client,)
            ).fetchone()
            if found is None:
                new.append(place)
            else:
                raw[place] = np.frombuffer(found[0], np.uint8)
        columns = [
            raw[:, leaf.start : leaf.start + leaf.size].copy().view(leaf.dtype).reshape(len(ids), *leaf.shape)
            for leaf in self._leaves
        ]
        for start in range(0, len(new), _INIT_CHUNK):
            places = np.asarray(new[start : start + _INIT_CHUNK])
            chunk = np.resize(ids[places], _INIT_CHUNK).astype(np.int32)  # always the same shape: compiled once
            for column, made in zip(columns, jax.tree.leaves(jax.vmap(self._init_client)(jnp.asarray(chunk)))):
                column[places] = np.asarray(made)[: len(places)]
        return jax.tree.unflatten(self._treedef, columns)

    def scatter(self, ids: Sequence[int] | np.ndarray, rows: Tree) -> None:
        """Replaces the rows of clients int [C], each named once, by the pytree of arrays [C, ...]."""
        ids = self._checked(ids)
        raw = np.empty((len(ids), self._row_bytes), np.uint8)
        for leaf, x in zip(self._leaves, self._treedef.flatten_up_to(rows), strict=True):
            x = np.asarray(x)
            if x.shape != (len(ids), *leaf.shape) or x.dtype != leaf.dtype:
                raise ValueError(
                    f"{leaf.name}: expected {leaf.dtype} {(len(ids), *leaf.shape)}, got {x.dtype} {x.shape}"
                )
            flat = np.ascontiguousarray(x).reshape(len(ids), leaf.size // leaf.dtype.itemsize)
            raw[:, leaf.start : leaf.start + leaf.size] = flat.view(np.uint8)
        self._database.executemany(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)",
            ((client, _PENDING, row.tobytes()) for client, row in zip(ids.tolist(), raw)),
        )

    def commit(self, step: int) -> None:
        """The rows as they are now belong to checkpoint `step`, which is about to be written: where it never is, the
        one before it can still be had (by `open`), older ones no more."""
        (before,) = self._database.execute("SELECT MAX(step) FROM commits").fetchone()
        if step <= before:
            raise ValueError(f"commit({step}) after step {before}")
        steps = {"step": step, "before": before}
        self._database.execute(
            "UPDATE rows SET step = :step WHERE step = :pending", {"step": step, "pending": _PENDING}
        )
        self._database.execute(_FORGET, steps)
        self._database.execute("DELETE FROM commits WHERE step < :before", {"before": before})
        self._database.execute("INSERT INTO commits VALUES (:step)", {"step": step})
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def close(self) -> None:
        """Lets go of the file; what was not committed is lost."""
        self._database.close()

    def _checked(self, ids) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if np.any((ids < 0) | (ids >= self.num_clients)):
            raise ValueError(f"client {ids.min()} or {ids.max()}: expected 0 ... {self.num_clients - 1}")
        return ids


def _check(database: sqlite3.Connection, directory: pathlib.Path, layout: dict, step: int) -> None:
    """Raises ValueError where the file holds other rows, or none of `step`."""
    found = json.loads(database.execute("SELECT text FROM layout").fetchone()[0])
    if found != layout:
        raise ValueError(f"the rows in {directory} are of {_described(found)}, but {_described(layout)} are asked for")
    steps = [step for (step,) in database.execute("SELECT step FROM commits ORDER BY step")]
    if step not in steps:
        raise ValueError(f"the rows in {directory} go back to step {steps[0]}, not to {step}")


def _leaves_of(init_client: InitClient):
    """(leaves, treedef) of a row."""
    shapes, treedef = jax.tree.flatten_with_path(jax.eval_shape(init_client, jax.ShapeDtypeStruct((), jnp.int32)))
    leaves, start = [], 0
    for path, x in shapes:
        size = math.prod(x.shape) * x.dtype.itemsize
        leaves.append(_Leaf(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, x.dtype, start, size))
        start += size
    return leaves, treedef


def _row_bytes(leaves: list[_Leaf]) -> int:
    return leaves[-1].start + leaves[-1].size if leaves else 0


def _described(layout: dict) -> str:
    return f"{layout['num_clients']} clients with {layout['row_bytes']} bytes in {len(layout['leaves'])} arrays"
