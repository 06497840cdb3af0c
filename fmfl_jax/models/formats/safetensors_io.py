"""The safetensors file format, read and written one tensor at a time.

A file is a little-endian uint64 header length, a JSON header {name: {dtype, shape, data_offsets}} and the tensors'
bytes without gaps (https://github.com/huggingface/safetensors, "Format"). The library maps a whole file and
writes from a dictionary of all tensors; a 7B model must pass through with one tensor in memory, so each tensor gets
a map of its own, and writing takes an iterator.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


class TensorInfo(NamedTuple):
    """Where one tensor lies: its file, format's dtype name ("BF16"), shape and first byte."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
    """{name: TensorInfo} of a file. Raises FileNotFoundError, or ValueError for a truncated or damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(f"{path}: truncated or not safetensors: {size} bytes, and a header of {length} expected")
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {
            name: (str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: damaged safetensors header ({e})") from e
    start = _LENGTH_BYTES + length
    found = {}
    for name, (dtype, shape, begin, end) in tensors.items():
        if begin < 0 or min(shape, default=0) < 0:
            raise ValueError(f"{path}: damaged: tensor {name} has shape {list(shape)} at byte {begin}")
        if start + end > size:
            raise ValueError(f"{path}: truncated: {size} bytes, but tensor {name} ends at byte {start + end}")
        if dtype in DTYPES and end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise ValueError(f"{path}: damaged: tensor {name} {dtype} {list(shape)} has {end - begin} bytes")
        found[name] = TensorInfo(path, dtype, shape, start + begin)
    return found


def map_tensor(info: TensorInfo) -> np.ndarray:
    """The tensor as a read-only map of the file; the map is closed when the array is dropped."""
    return np.memmap(info.path, DTYPES[info.dtype], "r", info.offset, info.shape)


def write_tensors(path: pathlib.Path, specs: Sequence[TensorSpec], tensors: Iterable[np.ndarray]) -> None:
    """Writes the file; `tensors` yields the arrays of `specs`, in their order, each asked for when its turn comes.

    Raises ValueError when an array is not what its spec says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"{path}: tensor {spec.name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"announced as {spec.dtype} {list(spec.shape)}"
                )
            # As bytes: bfloat16 has no buffer of its own.
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
