"""What server and nodes send each other: a head of plain values and named blobs of bytes.

Updates and broadcasts are messages of fmfl_jax/transport (size and checksum checked), whatever carries the envelope:
Flower's records (flower.py) between machines, a Unix socket (channel.py) on one.
"""

import json
from typing import Any, NamedTuple


class Envelope(NamedTuple):
    """head: what JSON can hold, and NaN. blobs: {name: bytes}."""

    head: dict[str, Any]
    blobs: dict[str, bytes] = {}


def num_bytes(envelope: Envelope) -> int:
    """Of an envelope without what carries it."""
    return len(json.dumps(envelope.head)) + sum(map(len, envelope.blobs.values()))
