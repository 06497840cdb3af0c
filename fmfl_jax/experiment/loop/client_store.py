"""What thousands of clients keep between rounds, on disk: memory holds the rows of a cohort only.

A client's row is one record of bytes in `rows.bin` (sparse until it is written; plain reads and writes, since a memory
map on a full disk kills the process); `layout.json` says which leaf lies where. Rows change in place, so a stop between
two checkpoints must be undone: before a row is overwritten the first time after checkpoint s, its old bytes are
appended to `undo-s.log`. Rows of checkpoint s = rows now, with the logs of s and of all later steps applied, newest
first.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.experiment.loop.records import write_json

_INIT_CHUNK = 8  # first rows made at a time: they pass through the device
_UNDO_CHUNK = 64  # rows of a log put back at a time
_KEPT_LOGS = 2  # as many as checkpoints are kept


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
        self, directory: pathlib.Path, num_clients: int, init_client: Callable, leaves: list[_Leaf], treedef, step: int
    ):
        self.num_clients = num_clients
        self._directory, self._init_client, self._leaves, self._treedef = directory, init_client, leaves, treedef
        self._row_bytes, self._step = _row_bytes(leaves), step
        self._logged = np.zeros(num_clients, bool)  # whose row of checkpoint `step` is in the log

    @classmethod
    def open(
        cls, directory: str | pathlib.Path, num_clients: int, init_client: Callable[[Any], Any], *, step: int
    ) -> "ClientStore":
        """The rows as they were at checkpoint `step`, whatever a killed process (not a loss of power) left behind.

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
            "leaves": [
                {"name": leaf.name, "shape": list(leaf.shape), "dtype": leaf.dtype.name, "start": leaf.start}
                for leaf in leaves
            ],
        }
        if step == 0:
            for path in (*_logs(directory).values(), directory / "layout.json"):
                path.unlink(missing_ok=True)
            with open(_rows(directory), "wb") as file:
                file.truncate(num_clients * layout["row_bytes"])
            write_json(directory / "layout.json", layout)
        else:
            if not (directory / "layout.json").exists():
                raise ValueError(f"{directory} holds no clients' rows to go on with from step {step}")
            found = json.loads((directory / "layout.json").read_text(encoding="utf-8"))
            if found != layout:
                raise ValueError(f"the rows in {directory} are of {_told(found)}, but {_told(layout)} are asked for")
            _undo(directory, layout["row_bytes"], step)
        _start_log(directory, step)
        return cls(directory, num_clients, init_client, leaves, treedef, step)

    def gather(self, ids) -> Any:
        """The rows of clients int [C]: a pytree of numpy arrays [C, ...]."""
        ids = self._checked(ids)
        raw = _read(self._directory, ids, self._row_bytes)
        columns = [
            raw[:, leaf.start : leaf.start + leaf.size].copy().view(leaf.dtype).reshape(len(ids), *leaf.shape)
            for leaf in self._leaves
        ]
        new = np.flatnonzero(raw[:, 0] == 0)
        for start in range(0, len(new), _INIT_CHUNK):
            places = new[start : start + _INIT_CHUNK]
            chunk = np.resize(ids[places], _INIT_CHUNK).astype(np.int32)  # always the same shape: compiled once
            for column, made in zip(columns, jax.tree.leaves(jax.vmap(self._init_client)(chunk))):
                column[places] = np.asarray(made)[: len(places)]
        return jax.tree.unflatten(self._treedef, columns)

    def scatter(self, ids, rows) -> None:
        """Replaces the rows of clients int [C], each named once, by the pytree of arrays [C, ...]."""
        ids = self._checked(ids)
        raw = np.ones((len(ids), self._row_bytes), np.uint8)
        for leaf, x in zip(self._leaves, self._treedef.flatten_up_to(rows), strict=True):
            x = np.asarray(x)
            if x.shape != (len(ids), *leaf.shape) or x.dtype != leaf.dtype:
                raise ValueError(
                    f"{leaf.name}: expected {leaf.dtype} {(len(ids), *leaf.shape)}, got {x.dtype} {x.shape}"
                )
            flat = np.ascontiguousarray(x).reshape(len(ids), leaf.size // leaf.dtype.itemsize)
            raw[:, leaf.start : leaf.start + leaf.size] = flat.view(np.uint8)
        first = ids[~self._logged[ids]]
        records = np.empty(len(first), _record(self._row_bytes))
        records["id"], records["row"] = first, _read(self._directory, first, self._row_bytes)
        with open(_log(self._directory, self._step), "ab") as log:
            log.write(records.view(np.uint8))  # closed: with the kernel before the first byte of a row changes
        self._logged[first] = True
        _write(self._directory, ids, raw)

    def commit(self, step: int) -> None:
        """The rows as they are now belong to checkpoint `step`, which is on disk. Rows of the one before can still be
        had (by `open`), older ones no more."""
        if step <= self._step:
            raise ValueError(f"commit({step}) after step {self._step}")
        _start_log(self._directory, step)
        self._step = step
        self._logged[:] = False

    def _checked(self, ids) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if np.any((ids < 0) | (ids >= self.num_clients)):
            raise ValueError(f"client {ids.min()} or {ids.max()}: expected 0 ... {self.num_clients - 1}")
        return ids


def _undo(directory: pathlib.Path, row_bytes: int, step: int) -> None:
    """Puts the rows of `step` back. Where it is killed on the way, doing it again does the same.

    Without any log of `step` or later, the process died after the checkpoint was written and before `commit`, and the
    rows are those of `step` already.
    """
    later = {s: path for s, path in _logs(directory).items() if s >= step}
    if later and step not in later:
        raise ValueError(f"the rows in {directory} go back to step {min(later)}, not to {step}")
    for s in sorted(later, reverse=True):
        record = _record(row_bytes)
        count = later[s].stat().st_size // record.itemsize  # what is cut short at the end was never acted on
        if count:
            log = np.memmap(later[s], record, mode="r", shape=(count,))
            for start in range(0, count, _UNDO_CHUNK):
                part = log[start : start + _UNDO_CHUNK]
                _write(directory, part["id"], part["row"])
    for s in sorted(later, reverse=True):  # the newest first: what is left must lead to `step` still
        later[s].unlink()


def _start_log(directory: pathlib.Path, step: int) -> None:
    _log(directory, step).write_bytes(b"")
    for s in sorted(_logs(directory))[:-_KEPT_LOGS]:
        _log(directory, s).unlink()


def _log(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / f"undo-{step}.log"


def _logs(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    return {int(path.stem.removeprefix("undo-")): path for path in directory.glob("undo-*.log")}


def _rows(directory: pathlib.Path) -> pathlib.Path:
    return directory / "rows.bin"


def _read(directory: pathlib.Path, ids, row_bytes: int) -> np.ndarray:
    """uint8 [C, row_bytes]"""
    raw = np.empty((len(ids), row_bytes), np.uint8)
    with open(_rows(directory), "rb") as file:
        for row, client in zip(raw, ids.tolist()):
            file.seek(client * row_bytes)
            file.readinto(row)
    return raw


def _write(directory: pathlib.Path, ids, raw) -> None:
    with open(_rows(directory), "r+b") as file:
        for row, client in zip(raw, ids.tolist()):
            file.seek(client * len(row))
            file.write(row)


def _record(row_bytes: int) -> np.dtype:
    return np.dtype([("id", np.int64), ("row", np.uint8, (row_bytes,))])


def _leaves_of(init_client: Callable):
    """(leaves, treedef) of a row. Byte 0 says that the row was written."""
    shapes, treedef = jax.tree.flatten_with_path(jax.eval_shape(init_client, jax.ShapeDtypeStruct((), jnp.int32)))
    leaves, start = [], 1
    for path, x in shapes:
        size = math.prod(x.shape) * x.dtype.itemsize
        leaves.append(_Leaf(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, x.dtype, start, size))
        start += size
    return leaves, treedef


def _row_bytes(leaves: list[_Leaf]) -> int:
    return leaves[-1].start + leaves[-1].size if leaves else 1


def _told(layout: dict) -> str:
    return f"{layout['num_clients']} clients with {layout['row_bytes']} bytes in {len(layout['leaves'])} arrays"
