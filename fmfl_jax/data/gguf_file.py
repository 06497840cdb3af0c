"""The container of GGUF files (https://github.com/ggml-org/ggml, docs/gguf.md): metadata and where tensors lie.

A file is the magic "GGUF", a version, the counts of tensors and of metadata, the metadata (typed keys and values), the
tensors' names, dimensions (innermost first), types and offsets, and the data. The names of types and the sizes of
their blocks are the `gguf` package's. Its reader is not used: it makes numpy arrays of every string of a vocabulary
(17 s for 49,152 tokens on a busy core, where this takes 0.2) and answers a damaged file with whatever error arises.
"""

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Value types of metadata by number: what struct calls them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """Where one tensor lies: its type's name ("Q4_1"), shape (outermost first), first byte and number of bytes."""

    path: pathlib.Path
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def rows(self) -> np.ndarray:
        """uint8 [rows, bytes of a row], a read-only map of the file: blocks of a type run along the last dimension."""
        rows = math.prod(self.shape[:-1])
        return np.memmap(self.path, np.uint8, "r", self.offset, (rows, self.nbytes // rows))


class GgufFile(NamedTuple):
    """path; metadata: {key: number, bool, str or list}; tensors: {name: GgufTensor}."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads values one after another; raises _Truncated past the end."""

    def __init__(self, data, size: int):
        self.data, self.size, self.at = data, size, 0

    def take(self, num_bytes: int) -> int:
        """Steps over num_bytes; returns where they begin."""
        if num_bytes > self.size - self.at:
            raise _Truncated
        self.at += num_bytes
        return self.at - num_bytes

    def scalar(self, code: str):
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind}: not known")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            start = self.take(count * struct.calcsize(f"<{_SCALARS[item]}"))
            return list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self.data, start))
        if count > self.size - self.at:  # every string and array takes bytes: a damaged count ends here
            raise _Truncated
        return [self.value(item) for _ in range(count)]


class _Truncated(Exception):
    pass


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a file begins with GGUF's magic."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: pathlib.Path) -> GgufFile:
    """The metadata and the tensors' places; no tensor is read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another magic or version, a truncated or damaged file, a tensor of an unknown type, of a shape that
        its type cannot have, or beyond the file's end.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, size)
            cursor.take(len(MAGIC))
            try:
                return _read(path, cursor)
            except _Truncated:
                raise ValueError(f"{path}: truncated: {size} bytes, and its header goes on") from None
            except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
                raise ValueError(str(e) if str(path) in str(e) else f"{path}: damaged GGUF header ({e})") from e


def _read(path: pathlib.Path, cursor: _Cursor) -> GgufFile:
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ValueError(f"{path}: GGUF version {version}: not implemented, expected 2 or 3 in little-endian order")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = []
    for _ in range(num_tensors):
        name = cursor.string()
        num_dims = cursor.scalar("I")
        dims = struct.unpack_from(f"<{num_dims}Q", cursor.data, cursor.take(8 * num_dims))
        entries.append((name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {alignment!r}: expected a positive integer")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, type_number, offset in entries:
        if name in tensors:
            raise ValueError(f"{path}: damaged: tensor {name} is there twice")
        tensors[name] = _place(path, cursor.size, name, shape, type_number, start + offset)
    return GgufFile(path, metadata, tensors)


def _place(path: pathlib.Path, size: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
    """The GgufTensor, checked against the file's size."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{path}: tensor {name} has quantization type {number}: not known") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"{path}: damaged: tensor {name} {kind.name} has shape {list(shape)}")
    nbytes = math.prod(shape) // block * block_bytes
    if offset + nbytes > size:
        raise ValueError(f"{path}: truncated: {size} bytes, but tensor {name} ends at byte {offset + nbytes}")
    return GgufTensor(path, kind.name, shape, offset, nbytes)
