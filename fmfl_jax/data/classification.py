"""Data for small models: two tasks made from a seed, and labelled text (AG News) as hashed n-grams."""

import functools
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fmfl_jax.data.partition import dirichlet_partition
from fmfl_jax.data.shards import Shards, shards_of

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")


class Rows(NamedTuple):
    """x: array [N, ...]. y: int32 [N], class numbers."""

    x: np.ndarray
    y: np.ndarray


class Task(NamedTuple):
    """train: rows of all clients. shards: who holds which of them. test: rows that no client holds."""

    train: Rows
    shards: Shards
    test: Rows


class LabelledText(NamedTuple):
    """texts: list of str. labels: int32 [N], place in the list of label names."""

    texts: list[str]
    labels: np.ndarray


def linear_task(
    num_clients: int, *, num_features: int = 784, num_classes: int = 10, num_test: int = 0, seed: int = 0
) -> Task:
    """Clients of log-normal size (10 to 300 rows, mean about 56) that learn one noisy linear teacher.

        x = u b, u uniform on [0, 1), b Bernoulli(.2);   y = argmax_k(x T + e)_k, T and e standard normal

    With the defaults and 1,000 clients these are the numbers of the peer that launch/benchmark_cross_device.py runs
    against. The test rows are drawn last, so that their number changes nothing else.
    """
    rng = np.random.default_rng(seed)
    sizes = np.clip(np.round(rng.lognormal(3.8, 0.75, num_clients)), 10, 300).astype(int)
    teacher = rng.normal(size=(num_features, num_classes)).astype(np.float32)
    ends = np.cumsum(sizes)
    train = Rows(np.empty((ends[-1], num_features), np.float32), np.empty(ends[-1], np.int32))
    test = Rows(np.empty((num_test, num_features), np.float32), np.empty(num_test, np.int32))

    def fill(rows: Rows, start: int, end: int):
        x = rng.random((end - start, num_features), dtype=np.float32)
        x *= rng.random((end - start, num_features)) < 0.2
        rows.x[start:end] = x
        rows.y[start:end] = (x @ teacher + rng.normal(size=(end - start, num_classes))).argmax(1)

    for start, end in zip(ends - sizes, ends):
        fill(train, start, end)
    fill(test, 0, num_test)
    return Task(train, Shards(np.arange(ends[-1], dtype=np.int32), np.concatenate([[0], ends])), test)


def image_task(
    num_clients: int,
    *,
    num_rows: int,
    alpha: float,
    image_size: int = 28,
    num_classes: int = 10,
    num_test: int = 0,
    seed: int = 0,
) -> Task:
    """Grey images x float32 [N, size, size, 1]: a smooth pattern per class, shifted by up to 3 pixels and in noise;
    dealt by Dirichlet(alpha) over the classes."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(num_classes, image_size // 4, image_size // 4))
    patterns = np.kron(coarse, np.ones((4, 4)))  # blocks of 4 x 4 pixels

    def draw(count: int) -> Rows:
        y = rng.integers(num_classes, size=count).astype(np.int32)
        shift = rng.integers(-3, 4, size=(2, count))
        pixels = (np.arange(image_size)[None] - shift[..., None]) % image_size  # [2, N, size]
        x = patterns[y[:, None, None], pixels[0][:, :, None], pixels[1][:, None, :]]
        return Rows((x + rng.normal(size=x.shape)).astype(np.float32)[..., None], y)

    train = draw(num_rows)
    parts = dirichlet_partition(train.y, num_clients, alpha=alpha, rng=seed)
    return Task(train, shards_of(parts), draw(num_test))


def text_task(
    train: LabelledText,
    test: LabelledText,
    num_clients: int,
    *,
    alpha: float,
    num_buckets: int,
    max_ngrams: int,
    seed: int,
) -> Task:
    """Texts as hashed n-grams, dealt by Dirichlet(alpha) over the labels; every client has at least one.

    Raises ValueError where there are more clients than texts.
    """
    parts = dirichlet_partition(train.labels, num_clients, alpha=alpha, rng=seed)
    rows = [
        Rows(hashed_ngrams(part.texts, num_buckets=num_buckets, max_ngrams=max_ngrams), part.labels)
        for part in (train, test)
    ]
    return Task(rows[0], shards_of(parts), rows[1])


def read_labelled_text(
    path: str | pathlib.Path,
    label_names: Sequence[str] = AG_NEWS_LABELS,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
) -> LabelledText:
    """Labelled texts of a UTF-8 file.

    A .jsonl file has an object a line, with the fields text_column and label_column ("text" and "label" where they are
    not named). Any other file has lines text<TAB>label; with both columns named, its first line names the columns and
    the others are read by them. A label is one of label_names or, as a whole number in JSON, its place among them.

    Raises ValueError, with file and line, for a line that is not of this form, one without text, or with another label;
    and where the file has no line, or not such a column.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e})") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: no lines")
    if (text_column is None) != (label_column is None) and path.suffix != ".jsonl":
        raise ValueError(f"{path}: name both columns, text_column={text_column} label_column={label_column}")
    first, split_line = 1, _split_pair
    if path.suffix == ".jsonl":
        split_line = functools.partial(_split_object, fields=(text_column or "text", label_column or "label"))
    elif text_column is not None and label_column is not None:
        first, split_line = 2, _by_header(path, lines.pop(0), (text_column, label_column))
        if not lines:
            raise ValueError(f"{path}: no lines after the names of the columns")
    numbers = {name: number for number, name in enumerate(label_names)}
    texts, labels = [], []
    for number, line in enumerate(lines, first):
        try:
            text, label = split_line(line)
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}, got {line[:60]!r}") from None
        if type(label) is int and 0 <= label < len(numbers):
            labels.append(label)
        elif label in numbers:
            labels.append(numbers[label])
        else:
            shown = label[:60] if isinstance(label, str) else label
            raise ValueError(f"{path}, line {number}: label {shown!r} is none of {', '.join(label_names)}")
        texts.append(text)
    return LabelledText(texts, np.asarray(labels, np.int32))


def _split_pair(line: str) -> tuple[str, str | int]:
    text, *rest = line.split("\t")
    if len(rest) != 1 or not text.strip():
        raise ValueError("expected text<TAB>label")
    return text, rest[0]


def _by_header(path: pathlib.Path, header: str, columns: tuple[str, str]) -> Callable[[str], tuple[str, str | int]]:
    names = header.rstrip("\r").split("\t")
    for column in columns:
        if names.count(column) != 1:
            raise ValueError(f"{path}: the first line names no column {column!r} (or two), but {', '.join(names)[:80]}")
    places = [names.index(column) for column in columns]

    def split_line(line: str) -> tuple[str, str | int]:
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(names) or not cells[places[0]].strip():
            raise ValueError(f"expected {len(names)} cells with a text among them")
        return cells[places[0]], cells[places[1]]

    return split_line


def _split_object(line: str, *, fields: tuple[str, str]) -> tuple[str, str | int]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    text, label = (record.get(field) for field in fields) if isinstance(record, dict) else (None, None)
    if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int) or isinstance(label, bool):
        raise ValueError(f"expected a JSON object with a text {fields[0]!r} and a label {fields[1]!r}")
    return text, label


def hashed_ngrams(texts: list[str], *, num_buckets: int, max_ngrams: int) -> np.ndarray:
    """int32 [N, max_ngrams]: buckets 1 ... num_buckets - 1 of the words and word pairs, 0 for no more.

    Words are runs of letters and digits in lower case; all words come before the pairs, and what exceeds max_ngrams is
    left out. The hash is CRC-32: the same on every machine.
    """
    if num_buckets < 2:
        raise ValueError(f"num_buckets is {num_buckets}: expected at least 2")
    ids = np.zeros((len(texts), max_ngrams), np.int32)
    for row, text in zip(ids, texts):
        words = re.findall(r"[^\W_]+", text.lower())
        grams = (words + [f"{a} {b}" for a, b in zip(words, words[1:])])[:max_ngrams]
        row[: len(grams)] = [1 + zlib.crc32(gram.encode("utf-8")) % (num_buckets - 1) for gram in grams]
    return ids
