"""Saves a model as a GGUF file, by the `gguf` package's writer; one tensor passes through the host at a time."""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.data.gguf_export import tokenizer_metadata
from fmfl_jax.data.gguf_tokenizer import UNUSED
from fmfl_jax.models.formats.gguf_model import BLOCK, ROPE_FACTORS, Part, gguf_parts, rope_factors
from fmfl_jax.models.formats.llama2c import pair_rotation
from fmfl_jax.models.formats.saving import check_params
from fmfl_jax.quant.int4 import Int4Weight

TYPES = ("F16", "Q8_0", "Q4_1")


class _Entry(NamedTuple):
    """A tensor of the file: its place in our parameters, and the type it is written in."""

    parameter: str
    part: Part
    type: str


def save_gguf(
    path: str | os.PathLike,
    config: LlamaConfig,
    params: Mapping[str, Any],
    *,
    type_name: str,
    name: str,
    tokenizer_path: str | os.PathLike | None = None,
) -> None:
    """Writes a GGUF file, which appears whole or not at all.

    Norms are float32. With Q4_1, embedding and head are Q8_0 (llama.cpp too keeps them finer than the blocks), and
    packed weights in groups of a multiple of 32 are written as they are: integers and scales exactly, a minimum, or
    -z s of an integer zero point, rounded to float16. Where 32 does not divide the input dimension it is F16.

    Args:
      params: {name: array or Int4Weight} as `fmfl_jax.models.params.param_specs` names them.
      type_name: "F16", "Q8_0" or "Q4_1", of the matrices.
      name: what the file calls the model.
      tokenizer_path: a tokenizer's file, None for a model without one.

    Raises:
      ValueError: params that are not the model's, another type, or a tokenizer that GGUF has no form for.
      OSError: writing failed; nothing is left at `path`.
    """
    import gguf

    if type_name not in TYPES:
        raise ValueError(f"type {type_name!r}: expected one of {', '.join(TYPES)}")
    check_params(config, params)
    metadata = _metadata(config, type_name, name, tokenizer_path)
    path = pathlib.Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(staging, "llama")
        for key, value in metadata.items():
            _add(writer, key, value)
        _write_tensors(writer, config, params, type_name)
        writer.close()
        staging.rename(path)
    except OSError as e:
        raise OSError(e.errno, f"{path}: could not be saved ({e.strerror or e}); nothing was left there") from e
    finally:
        staging.unlink(missing_ok=True)


def _write_tensors(writer, config: LlamaConfig, params: Mapping[str, Any], type_name: str) -> None:
    """The header, and the tensors one by one."""
    import gguf

    parts = [(parameter, part) for parameter, several in gguf_parts(config).items() for part in several]
    entries = [_Entry(parameter, part, _type_of(part, type_name)) for parameter, part in parts]
    for _, part, kind in entries:
        qtype = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        row_bytes = part.shape[-1] // block * size
        nbytes = math.prod(part.shape[:-1]) * row_bytes
        if kind.startswith("Q"):
            writer.add_tensor_info(part.name, (*part.shape[:-1], row_bytes), np.dtype(np.uint8), nbytes, qtype)
        else:
            dtype = np.dtype(np.float32 if kind == "F32" else np.float16)
            writer.add_tensor_info(part.name, part.shape, dtype, nbytes)
    factors = None
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        factors = rope_factors(config.head_dim, config.rope_theta, config.rope_scaling)
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parameter, several in itertools.groupby(entries, key=lambda entry: entry.parameter):
        for stored in _encode(params[parameter], list(several), config.head_dim):
            writer.write_tensor_data(stored)
    if factors is not None:
        writer.write_tensor_data(factors)


def _metadata(config: LlamaConfig, type_name: str, name: str, tokenizer_path) -> dict[str, Any]:
    """All keys of the file but the architecture, which the writer puts first."""
    import gguf

    file_types = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_1": "MOSTLY_Q4_1"}
    metadata = {
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[file_types[type_name]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.embed_dim,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        metadata["llama.rope.scaling.type"] = "linear"
        metadata["llama.rope.scaling.factor"] = float(config.rope_scaling.factor)
    if tokenizer_path is None:
        return metadata | {"tokenizer.ggml.model": "none"}
    found = tokenizer_metadata(pathlib.Path(tokenizer_path))
    tokens = found["tokenizer.ggml.tokens"]
    missing = range(len(tokens), config.vocab_size)  # llama.cpp wants a token for every row of the embedding
    found["tokenizer.ggml.tokens"] = [*tokens, *(f"[PAD{i}]" for i in missing)]
    fill = {"token_type": UNUSED, "scores": -1e9}
    for key, value in fill.items():
        if f"tokenizer.ggml.{key}" in found:
            found[f"tokenizer.ggml.{key}"] = [*found[f"tokenizer.ggml.{key}"], *(value for _ in missing)]
    return metadata | found


def _add(writer, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        if value:  # the writer takes no empty array
            writer.add_array(key, value)
    else:
        add[type(value)](key, value)


def _type_of(part: Part, type_name: str) -> str:
    if len(part.shape) == 1:
        return "F32"
    if part.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if type_name == "Q4_1" and not part.name.startswith("blk.") else type_name


def _encode(value, entries: list[_Entry], head_dim: int) -> Iterator[np.ndarray]:
    """The parts of one of our parameters as they are stored: [out, in], uint8 [out, bytes] where it is quantized. The
    parameter is decoded once for all of them."""
    import gguf

    kind = entries[0].type  # of all: they have the same input dimension
    if isinstance(value, Int4Weight):
        if kind == "Q4_1" and value.group_size % BLOCK == 0:
            unpacked = jax.tree.map(np.asarray, value).unpack()
            for entry in entries:
                yield _encode_int4(value, unpacked, entry.part, head_dim)
            return
        value = value.dequantize()
    value = np.asarray(value)
    for _, part, _ in entries:
        columns = slice(None) if part.columns is None else part.columns
        matrix = value[..., columns].astype(np.float32)
        matrix = matrix if part.columns is None else matrix.T
        matrix = pair_rotation(matrix, head_dim) if part.rotary else matrix
        yield gguf.quants.quantize(np.ascontiguousarray(matrix), gguf.GGMLQuantizationType[kind])


def _encode_int4(weight: Int4Weight, unpacked, part: Part, head_dim: int) -> np.ndarray:
    """Blocks of float16 scale, float16 minimum and 16 bytes, the first 16 inputs in the low nibbles. unpacked:
    weight.unpack(), as numpy arrays."""
    q, scale, zero_point = unpacked
    scale = scale[:, part.columns].astype(np.float32)
    zero = zero_point[:, part.columns].astype(np.float32)
    minimum = zero if weight.has_minima else -zero * scale
    k = weight.shape[0]
    per_block = weight.group_size // BLOCK
    floats = np.stack([np.repeat(x.T, per_block, axis=1)[:, : k // BLOCK] for x in (scale, minimum)], axis=-1)
    values = q[:, part.columns].T.reshape(-1, k // BLOCK, 2, BLOCK // 2)  # [out, K / 32, low and high, 16]
    nibbles = values[:, :, 0] | (values[:, :, 1] << np.uint8(4))
    blocks = np.concatenate([floats.astype(np.float16).view(np.uint8), nibbles], axis=-1)  # [out, K / 32, 20]
    rows = np.ascontiguousarray(blocks).reshape(len(blocks), -1)
    return pair_rotation(rows, head_dim) if part.rotary else rows
