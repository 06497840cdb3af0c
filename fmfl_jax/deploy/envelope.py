"""What server and nodes send each other: a head of plain values and named blobs of bytes.

Updates and broadcasts are messages of fmfl_jax/transport (size and checksum checked), whatever carries the envelope:
Flower's records (flower.py) between machines, a Unix socket (channel.py) on one.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Envelope(NamedTuple):
    """head: what JSON can hold, and NaN. blobs: {name: bytes}."""

    head: dict[str, Any]
    blobs: dict[str, bytes] = {}


def num_bytes(envelope: Envelope) -> int:
    """Of an envelope without what carries it."""
    return len(json.dumps(envelope.head)) + sum(map(len, envelope.blobs.values()))


def fingerprint(tree: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of the arrays of a tree: paths, dtypes, shapes and bytes, and nothing else, so two machines
    that hold the same base find the same."""
    import jax  # not for the process that only passes envelopes on

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), array.dtype.name, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
