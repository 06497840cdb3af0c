"""A checkpoint as the parts of a container (transport/weights), in the order in which the model computes."""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fmfl_jax.data.gguf_file import is_gguf, read_gguf
from fmfl_jax.models.formats.safetensors_io import DTYPES, TensorSpec, map_tensor, read_header, write_tensors
from fmfl_jax.transport.weights.container import Source
from fmfl_jax.transport.weights.receive import HEAD_NAME

_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|h)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|token_embd|tok_embeddings|wte)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|output)\.")


class _Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def stages_of(names: Collection[str]) -> dict[str, int]:
    """When each of a model's tensors is needed: 0 for the embedding (a tied one may be stored as the head), 1 + n for
    layer n, one more than the last layer's for what stands behind the layers."""
    layers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
    first = _EMBEDDING if any(map(_EMBEDDING.search, names)) else _HEAD
    behind = 2 + max(layers.values(), default=-1)
    return {name: 1 + layers[name] if name in layers else 0 if first.search(name) else behind for name in names}


def sources(path: str | pathlib.Path) -> list[Source]:
    """All of a folder's files, or one file, as parts: tensors of safetensors and GGUF files each for itself, all other
    bytes (headers, tokenizers, configurations) before the first layer.

    Raises:
      FileNotFoundError, ValueError: nothing there; a damaged file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != HEAD_NAME) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: an empty folder")
    tensors = {file: _tensors(file) for file in files}
    stages = stages_of([t.name for found in tensors.values() for t in found])
    parts = []
    for file, found in tensors.items():
        name = (file.relative_to(path) if path.is_dir() else pathlib.Path(file.name)).as_posix()
        at = 0
        for tensor in found:
            if tensor.offset > at:
                parts.append(_source("", "", (), 0, name, at, tensor.offset - at, file))
            parts.append(_source(*tensor[:3], stages[tensor.name], name, *tensor[3:], file))
            at = tensor.offset + tensor.nbytes
        size = file.stat().st_size
        if size > at or not found:
            parts.append(_source("", "", (), 0, name, at, size - at, file))
    return parts


def cast_safetensors(path: str | pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """`folder` with the checkpoint's files: float32 tensors of safetensors files in bfloat16, all else as links.

    Raises:
      ValueError: no safetensors file there.
    """
    path = pathlib.Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"cast=bfloat16 needs safetensors files, {path} has none")
    for file in files:
        target = folder / (file.relative_to(path) if path.is_dir() else file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".safetensors":
            target.symlink_to(file.resolve())
            continue
        found = sorted(read_header(file).items(), key=lambda item: item[1].offset)
        maps = {name: map_tensor(info) for name, info in found}
        narrow = lambda x: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x
        dtype = lambda x: np.dtype(ml_dtypes.bfloat16 if x.dtype == np.float32 else x.dtype)
        specs = [TensorSpec(name, dtype(x), x.shape) for name, x in maps.items()]
        write_tensors(target, specs, (narrow(x) for x in maps.values()))
    return folder


def _tensors(file: pathlib.Path) -> list[_Tensor]:
    """In the order in which they lie in the file."""
    found = []
    if file.suffix == ".safetensors":
        for name, info in read_header(file).items():
            if info.dtype not in DTYPES:
                raise ValueError(f"{file}: tensor {name} has dtype {info.dtype}: not known")
            nbytes = math.prod(info.shape) * np.dtype(DTYPES[info.dtype]).itemsize
            found.append(_Tensor(name, info.dtype, info.shape, info.offset, nbytes))
    elif is_gguf(file):
        for name, tensor in read_gguf(file).tensors.items():
            found.append(_Tensor(name, tensor.type, tensor.shape, tensor.offset, tensor.nbytes))
    return sorted(found, key=lambda t: t.offset)


def _source(name, dtype, shape, stage, file_name, offset, nbytes, file: pathlib.Path) -> Source:
    return Source(name, dtype, tuple(shape), stage, file_name, offset, nbytes, _reader(file, offset, nbytes))


def _reader(file: pathlib.Path, offset: int, nbytes: int) -> Callable[[], bytes]:
    return functools.partial(_read, file, offset, nbytes)


def _read(file: pathlib.Path, offset: int, nbytes: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(nbytes)
