"""An update as bytes on a wire: a header of 20 bytes, then the payload.

    4  "FMU1"
    4  whom it is for: CRC-32 of the codec's name and numbers and of the update's leaves (paths, shapes, dtypes)
    8  length of the payload, bytes
    4  CRC-32 of the header's other 16 bytes and the payload

All numbers are little-endian. The checksum finds accidents, not an attacker: whoever sends over an open network signs,
or uses TLS. Nothing is allocated by what a message claims: the codec knows how long its messages may be.
"""

import struct
import zlib
from typing import Any

import jax
import jax.numpy as jnp

_MAGIC = b"FMU1"
_HEADER = struct.Struct("<4sIQ")
HEADER_BYTES = _HEADER.size + 4


def frame(payload: bytes, address: int) -> bytes:
    """The message: header, checksum, payload. address: of `address_of`."""
    head = _HEADER.pack(_MAGIC, address, len(payload))
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def unframe(message: bytes, address: int, max_bytes: int) -> memoryview:
    """The payload of a message, at most `max_bytes` long.

    Raises:
      ValueError: if it is truncated, too long, damaged, or for another codec or another tree.
    """
    if len(message) < HEADER_BYTES:
        raise ValueError(f"message of {len(message)} bytes is shorter than its header of {HEADER_BYTES}")
    if len(message) > HEADER_BYTES + max_bytes:
        raise ValueError(f"message of {len(message)} bytes, expected at most {HEADER_BYTES + max_bytes}")
    magic, sent_to, length = _HEADER.unpack_from(message)
    if magic != _MAGIC:
        raise ValueError("message does not begin with FMU1: it is no update")
    if len(message) != HEADER_BYTES + length:
        raise ValueError(f"message has {len(message) - HEADER_BYTES} bytes of payload, its header announces {length}")
    payload = memoryview(message)[HEADER_BYTES:]
    (checksum,) = struct.unpack_from("<I", message, _HEADER.size)
    if zlib.crc32(payload, zlib.crc32(message[: _HEADER.size])) != checksum:
        raise ValueError("message is damaged: its checksum does not fit")
    if sent_to != address:
        raise ValueError("message was encoded by another codec, or for an update of other names, shapes or dtypes")
    return payload


def address_of(codec_name: str, template: Any) -> int:
    """Of a codec with its numbers, and of the leaves of an update: their paths, shapes and dtypes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(template)
    described = [(jax.tree_util.keystr(path), tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for path, leaf in leaves]
    return zlib.crc32(repr((codec_name, described)).encode())
