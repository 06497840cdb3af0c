"""Saves a model as a Hugging Face checkpoint folder; packed weights in AutoAWQ's format.

One tensor passes through the host at a time, and the folder appears whole or not at all.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data import gguf_tokenizer
from fmfl_jax.data.gguf_file import is_gguf, read_gguf
from fmfl_jax.models.formats import awq_gemm
from fmfl_jax.models.formats.config_json import config_json, read_json
from fmfl_jax.models.formats.huggingface import INDEX_FILE, SINGLE_FILE, Parts, published_parts, transpose_into
from fmfl_jax.models.formats.safetensors_io import TensorSpec, write_tensors
from fmfl_jax.models.formats.staging import staged_directory, write_text
from fmfl_jax.models.params import param_specs
from fmfl_jax.quant.int4 import Int4Weight

_TOKENIZER_NAMES = {".json": "tokenizer.json", ".model": "tokenizer.model", ".bin": "tokenizer.bin"}
_BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of the config.json beside the tokenizer
_OWNED = ("config.json", "model*.safetensors", INDEX_FILE, *_TOKENIZER_NAMES.values(), *_BESIDE_TOKENIZER)
_STORED = ("float32", "float16", "bfloat16")


class _Entry(NamedTuple):
    """One of our parameters and the tensors that it becomes."""

    name: str
    parts: Parts | None  # None: a tensor that is written as it is
    specs: list[TensorSpec]


def save_checkpoint(
    path: str | os.PathLike,
    config: LlamaConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_path: str | os.PathLike | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, model.safetensors (or shards of up to `shard_bytes` with an index) and the tokenizer's files.

    Arrays keep their dtype and are read back bit for bit; so are the integers and float16 scales of Int4Weights, which
    make it a checkpoint in AutoAWQ's format. (A 3-bit model is stored in 4-bit words like any other.) A folder that
    holds an earlier checkpoint is replaced.

    Args:
      path: the folder.
      params: {name: array or Int4Weight} as `fmfl_jax.models.params.param_specs` names them.
      tokenizer_path: a tokenizer file, or a GGUF file with a tokenizer; what stands beside the first is copied too, and
        of a config.json there the ids of the tokens that begin and end a text.

    Raises:
      ValueError: params that are not the model's, or packed weights in a shape that AutoAWQ's format cannot hold (the
        group size must divide the input dimension, 8 the output dimension).
      FileExistsError: the folder holds other files.
      OSError: the disk is full; nothing is left at `path`.
    """
    check_params(config, params)
    group_size = None
    packed = {name: value for name, value in params.items() if isinstance(value, Int4Weight)}
    if packed:
        group_size = awq_gemm.common_group_size(packed)
    entries = _plan(config, params, group_size)
    quantization = (
        None
        if group_size is None
        else awq_gemm.quantization_json(
            group_size,
            [
                part
                for entry in entries
                if entry.parts is not None and entry.name not in packed
                for part, _ in entry.parts
            ],
            head="lm_head.weight" in packed,
        )
    )
    dtype = "float16" if packed else jnp.dtype(params["embed_tokens.weight"].dtype).name
    raw = config_json(config, dtype=dtype, quantization=quantization)
    if tokenizer_path is not None:
        raw |= _special_ids(pathlib.Path(tokenizer_path))
    with staged_directory(path, owned=_OWNED) as folder:
        _write_shards(folder, entries, params, shard_bytes)
        if tokenizer_path is not None:
            _copy_tokenizer(pathlib.Path(tokenizer_path), folder)
        write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def check_params(config: LlamaConfig, params: Mapping[str, Any]) -> None:
    """Raises ValueError unless params are those of the model, in shape and dtype."""
    specs = param_specs(config)
    if set(specs) != set(params):
        wrong = sorted(set(specs) ^ set(params))[0]
        raise ValueError(f"cannot save: parameter {wrong} is {'missing' if wrong in specs else 'not of this model'}")
    for name, spec in specs.items():
        if tuple(params[name].shape) != spec.shape:
            raise ValueError(f"cannot save: {name} has shape {tuple(params[name].shape)}, expected {spec.shape}")
        if not isinstance(params[name], Int4Weight) and jnp.dtype(params[name].dtype).name not in _STORED:
            raise ValueError(f"cannot save: {name} has dtype {params[name].dtype}, expected {', '.join(_STORED)}")


def _plan(config: LlamaConfig, params: Mapping[str, Any], group_size: int | None) -> list[_Entry]:
    matrices = published_parts(config)
    entries = []
    for name in param_specs(config):
        value, parts = params[name], matrices.get(name.removesuffix(".weight"))
        if isinstance(value, Int4Weight):
            if parts is None:
                raise ValueError(f"cannot save: {name} is packed, which no published format provides for")
            if value.has_minima:
                raise ValueError(f"cannot save: {name} has minima, which AutoAWQ's format cannot hold: dequantize it")
            assert group_size is not None  # that of the packed weights
            specs = [spec for part, p in parts for spec in awq_gemm.specs(part, p.in_dim, p.out_dim, group_size)]
        elif parts is None:
            specs = [TensorSpec(f"model.{name}", np.dtype(value.dtype), tuple(value.shape))]
        else:
            specs = [TensorSpec(f"{part}.weight", np.dtype(value.dtype), (p.out_dim, p.in_dim)) for part, p in parts]
        entries.append(_Entry(name, parts, specs))
    return entries


def _write_shards(folder: pathlib.Path, entries: list[_Entry], params: Mapping[str, Any], shard_bytes: int) -> None:
    shards, filled = [[]], 0
    for entry in entries:
        size = sum(spec.nbytes for spec in entry.specs)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        specs = [spec for entry in shard for spec in entry.specs]
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, specs, _tensors(shard, params))
        weight_map |= {spec.name: file for spec in specs}
        total += sum(spec.nbytes for spec in specs)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _tensors(entries: list[_Entry], params: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The tensors of the entries' specs, in order."""
    for name, parts, specs in entries:
        value = params[name]
        if isinstance(value, Int4Weight):
            assert parts is not None  # _plan refuses it
            try:
                yield from awq_gemm.encode(jax.tree.map(_to_host, value), [p.columns for _, p in parts])
            except ValueError as e:
                raise ValueError(f"cannot save: {name}: {e}") from e
        elif parts is None:
            yield _to_host(value)
        else:
            value = _to_host(value)
            for (_, p), spec in zip(parts, specs):
                part = np.empty(spec.shape, spec.dtype)
                transpose_into(part, value[:, p.columns])
                yield part


def _to_host(x) -> np.ndarray:
    """x as numpy. An array that lies elsewhere is copied on its device first: jax would keep the host copy of the
    original for as long as the original lives, and in the end all of them."""
    if isinstance(x, jax.Array) and any(device.platform != "cpu" for device in x.devices()):
        x = jnp.array(x, copy=True)
    return np.asarray(x)


def _copy_tokenizer(path: pathlib.Path, folder: pathlib.Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    if is_gguf(path):
        metadata = read_gguf(path).metadata
        for name, content in (
            ("tokenizer.json", gguf_tokenizer.tokenizer_json(metadata)),
            ("tokenizer_config.json", gguf_tokenizer.tokenizer_config(metadata)),
        ):
            write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return
    if path.suffix not in _TOKENIZER_NAMES:
        raise ValueError(f"{path}: expected a tokenizer file that ends in {', '.join(_TOKENIZER_NAMES)}")
    shutil.copyfile(path, folder / _TOKENIZER_NAMES[path.suffix])
    for name in _BESIDE_TOKENIZER:
        if path.with_name(name).is_file():
            shutil.copyfile(path.with_name(name), folder / name)


def _special_ids(path: pathlib.Path) -> dict[str, Any]:
    """Of the config.json beside a tokenizer's file, or of the metadata of a GGUF file."""
    if path.is_file() and is_gguf(path):
        return gguf_tokenizer.special_ids(read_gguf(path).metadata)
    path = path.with_name("config.json")
    if not path.is_file():
        return {}
    raw = read_json(path)
    return {name: raw[name] for name in _SPECIAL_IDS if name in raw}
