"""Scores kept on disk, so that a second run does not ask again.

An answer is found by (model, prompt, words), where the prompt is the template with the text in it: a changed template,
text, word or checkpoint asks anew.

    with ScoreCache("scores.sqlite") as cache:
        score = cached(engine.score, cache, model=checkpoint_hash(["model.gguf"]) + " float32")
        score(prompts, words)                          # the second time from the file

SQLite (of the standard library) makes each write whole or not there at all, and lets several processes share a file.
"""

import hashlib
import os
import pathlib
import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np

from fmfl_jax.services.types import ScoreFn

_FORMAT = 0x464D5331  # stands in the file's header: scores of ours, version 1
_WAIT_S = 60.0  # for another process that writes
_CHUNK = 256  # prompts asked for between two writes: a stop loses no more
_WHOLE_BYTES = 2**28  # files up to this size are hashed whole
_BLOCK, _NUM_BLOCKS = 2**16, 1024  # of larger ones: the first 16 MiB and this many blocks over the rest
_HEAD = 2**24


class ScoreCache:
    """The file at `path`, made where there is none. hits and misses count prompts since it was opened.

    Raises ValueError where the file is damaged or is something else, in one line that names it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.hits = self.misses = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        except sqlite3.OperationalError as e:
            raise ValueError(f"{self.path}: the cache of scores cannot be used ({e})") from e
        try:
            self._run("BEGIN IMMEDIATE")
            (version,) = self._run("PRAGMA user_version")[0]
            tables = self._run("SELECT name FROM sqlite_master")
            if version != _FORMAT and (version or tables):
                raise ValueError(f"{self.path} is a database, but not of scores: name another file")
            self._run("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, log_probs BLOB NOT NULL) WITHOUT ROWID")
            self._run(f"PRAGMA user_version = {_FORMAT}")
            self._run("COMMIT")
        except BaseException:
            self._database.close()
            raise

    def get(self, keys: Sequence[bytes], num_words: int) -> list[np.ndarray | None]:
        """float32 [num_words] for each key, None where it is not there. Raises ValueError for a damaged record."""
        found = []
        for key in keys:
            rows = self._run("SELECT log_probs FROM scores WHERE key = ?", (key,))
            found.append(self._decoded(rows[0][0], num_words) if rows else None)
        return found

    def put(self, keys: Sequence[bytes], log_probs: np.ndarray) -> None:
        """Writes rows of float [N, K], all or none. What another process wrote meanwhile stays."""
        rows = np.ascontiguousarray(log_probs, "<f4")
        self._run("BEGIN IMMEDIATE")
        try:
            for key, row in zip(keys, rows, strict=True):
                record = row.tobytes()
                self._run("INSERT OR IGNORE INTO scores VALUES (?, ?)", (key, record + _check(record)))
            self._run("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> "ScoreCache":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self, sql: str, values: tuple = ()) -> list:
        try:
            return self._database.execute(sql, values).fetchall()
        except sqlite3.OperationalError as e:
            raise ValueError(f"{self.path}: the cache of scores cannot be used ({e})") from e
        except sqlite3.DatabaseError as e:
            raise ValueError(f"{self.path}: a damaged cache of scores, or no such file; delete it ({e})") from e

    def _decoded(self, record: bytes, num_words: int) -> np.ndarray:
        values, check = record[:-4], record[-4:]
        if len(values) != 4 * num_words or check != _check(values):
            raise ValueError(f"{self.path}: a damaged record in the cache of scores; delete the file")
        return np.frombuffer(values, "<f4")


def cached(score: ScoreFn, cache: ScoreCache, *, model: str) -> ScoreFn:
    """`score` that asks only for what the cache lacks. model: all that the answers depend on beside prompt and words:
    the checkpoint's hash, the dtype, whole words or first tokens."""

    def scored(texts: Sequence[str], words: Sequence[str]) -> np.ndarray:
        keys = [score_key(model, text, words) for text in texts]
        found = dict(zip(keys, cache.get(keys, len(words))))
        texts_of = dict(zip(keys, texts))
        missing = [key for key, row in found.items() if row is None]
        for start in range(0, len(missing), _CHUNK):
            asked = missing[start : start + _CHUNK]
            rows = np.asarray(score([texts_of[key] for key in asked], words), np.float32)
            if rows.shape != (len(asked), len(words)) or not np.isfinite(rows).all():
                raise ValueError(f"the scorer gave shape {rows.shape} or numbers that are not finite")
            cache.put(asked, rows)
            found.update(zip(asked, rows))
        asked_for = set(missing)
        cache.misses += sum(key in asked_for for key in keys)
        cache.hits += sum(key not in asked_for for key in keys)
        return np.stack([row for key in keys if (row := found[key]) is not None])

    return scored


def score_key(model: str, prompt: str, words: Sequence[str]) -> bytes:
    """SHA-256 of the three, each part with its length before it."""
    digest = hashlib.sha256()
    for part in (model, prompt, *words):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def checkpoint_hash(paths: Iterable[str | os.PathLike]) -> str:
    """Hex SHA-256 of files, and of all files directly in folders, by name: their names, sizes and contents.

    Files up to 256 MiB are read whole. Of larger ones the first 16 MiB (a header of safetensors or GGUF is in it) and
    1,024 blocks of 64 KiB, evenly over the rest, are read: a fine-tuned, requantized or cut file differs in them; one
    whose few other bytes alone were changed does not.
    """
    digest = hashlib.sha256()
    for path in map(pathlib.Path, paths):
        files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode("utf-8", "surrogatepass"))
            with file.open("rb") as opened:
                if size <= _WHOLE_BYTES:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
                    continue
                digest.update(opened.read(_HEAD))
                for block in range(_NUM_BLOCKS):
                    opened.seek(_HEAD + (size - _HEAD - _BLOCK) * block // (_NUM_BLOCKS - 1))
                    digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


def _check(record: bytes) -> bytes:
    return hashlib.sha256(record).digest()[:4]
