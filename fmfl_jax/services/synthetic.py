"""The server's synthetic set (section III-A): labelled text, balanced, versioned and hashed, served without the FM.

It is fetched once and then serves in every outage. The hash is SHA-256 of a canonical form: JSON of classes and rows
in their order, UTF-8, no spaces, and does not cover the version: the same content has the same hash whoever made it.
The file is one JSON object a line; the manifest beside it says version, hash, classes and counts.

    >>> made = balanced(texts, labels, classes=("world", "sports"), per_class=50, version=3)
    >>> save(made, folder)
    >>> assert load(folder) == made       # raises where a byte of a text has changed
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from fmfl_jax.services import checks

ROWS, MANIFEST = "rows.jsonl", "manifest.json"


@dataclasses.dataclass(frozen=True)
class SyntheticSet:
    """classes: names; texts, labels: one entry a row, a label is the number of its class; version: counts up."""

    classes: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    version: int

    def __post_init__(self):
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be distinct names, at least one, got {self.classes}")
        if len(self.texts) != len(self.labels):
            raise ValueError(f"texts ({len(self.texts)}) and labels ({len(self.labels)}) must be as many")
        if self.labels:
            checks.classes("labels", self.labels, len(self.classes))
        checks.at_least(0, version=self.version)


def balanced(
    texts: Sequence[str], labels: Sequence[int], *, classes: Sequence[str], per_class: int, version: int
) -> SyntheticSet:
    """The first per_class texts of every class, class after class in turn, so that any beginning is balanced too.

    Raises ValueError that names the classes with fewer texts.
    """
    checks.same_length(texts=texts, labels=labels)
    labels_found = checks.classes("labels", labels, len(classes))
    checks.at_least(1, per_class=per_class)
    members = [np.flatnonzero(labels_found == c)[:per_class] for c in range(len(classes))]
    short = {name: len(rows) for name, rows in zip(classes, members) if len(rows) < per_class}
    if short:
        raise ValueError(f"per_class is {per_class}, but there are only {short}")
    rows = [int(i) for i in np.stack(members, axis=1).reshape(-1)]
    return SyntheticSet(
        tuple(classes), tuple(texts[i] for i in rows), tuple(int(labels_found[i]) for i in rows), version
    )


def class_counts(synthetic: SyntheticSet) -> np.ndarray:
    """int64 [classes]."""
    return np.bincount(np.asarray(synthetic.labels, np.int64), minlength=len(synthetic.classes))


def content_hash(synthetic: SyntheticSet) -> str:
    """SHA-256 of the canonical content, 64 hexadecimal digits."""
    rows = [[text, label] for text, label in zip(synthetic.texts, synthetic.labels)]
    content = {"classes": list(synthetic.classes), "rows": rows}
    canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def payload_bits(synthetic: SyntheticSet) -> int:
    """What a download costs: the bits of both files."""
    return 8 * (len(_rows(synthetic)) + len(_manifest(synthetic)))


def save(synthetic: SyntheticSet, folder: str | pathlib.Path) -> None:
    """Writes both files into the folder, which is made. The manifest comes last: without it there is no set."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / ROWS).write_bytes(_rows(synthetic))
    (folder / MANIFEST).write_bytes(_manifest(synthetic))


def load(folder: str | pathlib.Path) -> SyntheticSet:
    """The set that `save` wrote. Raises ValueError, which names the file, for a broken file and for content that does
    not have the manifest's hash; FileNotFoundError for none."""
    folder = pathlib.Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        number = {name: place for place, name in enumerate(manifest["classes"])}
        lines = (folder / ROWS).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        texts, labels = tuple(row["text"] for row in rows), tuple(number[row["label"]] for row in rows)
        synthetic = SyntheticSet(tuple(manifest["classes"]), texts, labels, manifest["version"])
        expected = manifest["sha256"]
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no synthetic set: {error}") from error
    found = content_hash(synthetic)
    if found != expected:
        raise ValueError(f"{folder / ROWS} has the hash {found[:12]}, its manifest says {expected[:12]}")
    return synthetic


def _rows(synthetic: SyntheticSet) -> bytes:
    lines = [
        json.dumps({"text": text, "label": synthetic.classes[label]}, ensure_ascii=False) + "\n"
        for text, label in zip(synthetic.texts, synthetic.labels)
    ]
    return "".join(lines).encode("utf-8")


def _manifest(synthetic: SyntheticSet) -> bytes:
    content = {
        "version": synthetic.version,
        "sha256": content_hash(synthetic),
        "classes": list(synthetic.classes),
        "rows": len(synthetic.texts),
        "counts": class_counts(synthetic).tolist(),
    }
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
