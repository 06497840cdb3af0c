"""Opens, loads and saves checkpoints of every format: a Hugging Face folder (fp or 4-bit), or a llama2.c file."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.formats import huggingface, llama2c
from fmfl_jax.models.formats.config_json import end_tokens, parse_config, read_json
from fmfl_jax.models.formats.saving import save_checkpoint

__all__ = ["Checkpoint", "LazyParams", "load_checkpoint", "open_checkpoint", "save_checkpoint"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
_DTYPES = (None, "float32", "float16", "bfloat16")


class LazyParams(Mapping):
    """{parameter name: array or Int4Weight}, each read from the file whenever it is asked for."""

    def __init__(self, readers: dict[str, Callable[[], Any]]):
        self._readers = readers

    def __getitem__(self, name: str):
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """config: the model's (its compute dtype is the default; formats do not say); params: {name: array or Int4Weight};
    tokenizer_path: the tokenizer's file, or None where the checkpoint carries none; stop_tokens: the ids that its
    config.json and generation_config.json end a text with, all of them, sorted (the tokenizer's own may be another)."""

    config: LlamaConfig
    params: Mapping[str, Any]
    tokenizer_path: pathlib.Path | None
    stop_tokens: tuple[int, ...] = ()


def open_checkpoint(path: str | os.PathLike, *, dtype: str | None = None) -> Checkpoint:
    """A checkpoint whose tensors are checked now, by the files' headers, and read one by one when asked for.

    Args:
      path: a folder with config.json and safetensors, or a llama2.c .bin file.
      dtype: "float32", "float16" or "bfloat16" for the matrices; None keeps the file's. Norms are float32 always.
        Packed weights keep their integers and their scales.

    Raises:
      FileNotFoundError: no such file or folder, or one of its files is missing.
      ValueError: truncated or damaged files; a tensor missing, not expected, or of the wrong shape or dtype; a field of
        config.json that changes the mathematics and is not implemented.
    """
    path = pathlib.Path(path)
    dtype = None if dtype is None else str(dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(map(str, _DTYPES))}")
    if path.is_dir():
        file = path / "config.json"
        raw = read_json(file)
        config = parse_config(raw, file)
        config, readers = huggingface.open_folder(config, path, raw.get("quantization_config"), dtype)
        stop_tokens = end_tokens(raw, file)
        if (file := path / "generation_config.json").is_file():
            stop_tokens |= end_tokens(read_json(file), file)
        tokenizer_path = _tokenizer(path, config.vocab_size)
        return Checkpoint(config, LazyParams(readers), tokenizer_path, tuple(sorted(stop_tokens)))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint: expected a folder with config.json or a llama2.c file")
    config, readers = llama2c.open_llama2c(path, dtype)
    return Checkpoint(config, LazyParams(readers), _tokenizer(path.parent, config.vocab_size))


def load_checkpoint(path: str | os.PathLike, *, dtype: str | None = None) -> Checkpoint:
    """As `open_checkpoint`, with all parameters read. Memory: the parameters and one (fused) tensor more."""
    opened = open_checkpoint(path, dtype=dtype)
    return dataclasses.replace(opened, params=dict(opened.params))


def _tokenizer(folder: pathlib.Path, vocab_size: int) -> pathlib.Path | None:
    """The folder's tokenizer file; tok512.bin is llama2.c's name for one of 512 entries."""
    for name in (*_TOKENIZERS, f"tok{vocab_size}.bin"):
        if (folder / name).is_file():
            return folder / name
    return None
