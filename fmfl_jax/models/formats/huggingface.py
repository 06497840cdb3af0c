"""A Hugging Face checkpoint folder: config.json with model.safetensors, or shards and their index; fp or 4-bit.

Everything is checked when the folder is opened, from the files' headers alone: that all tensors are there, and none
that this model has no place for (a bias), in the right shapes and dtypes. Data is read tensor by tensor when asked.
"""

import dataclasses
import functools
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.formats import awq_gemm, compressed_tensors
from fmfl_jax.models.formats.config_json import read_json
from fmfl_jax.models.formats.safetensors_io import DTYPES, TensorInfo, map_tensor, read_header
from fmfl_jax.models.params import Projection, param_specs, projections
from fmfl_jax.models.rope import rope_frequencies
from fmfl_jax.quant.int4 import Int4Weight

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
_COMPARED = 1 << 22  # numbers of two tensors that are compared at a time
_TILE = 256  # a tile of float32 rows and columns stays in the cache while it is transposed

Tensors = dict[str, TensorInfo]
Parts = list[tuple[str, Projection]]


def published_parts(config: LlamaConfig) -> dict[str, Parts]:
    """{"layers.0.self_attn.qkv_proj": [("model.layers.0.self_attn.q_proj", Projection), ...]}: ours, and its parts."""
    found: dict[str, Parts] = {}
    for name, projection in projections(config).items():
        found.setdefault(projection.matrix, []).append((f"model.{name}", projection))
    if not config.tie_embeddings:
        found["lm_head"] = [("lm_head", Projection("lm_head", 0, config.embed_dim, config.vocab_size))]
    return found


def open_tensors(folder: pathlib.Path) -> Tensors:
    """{name: TensorInfo} of all the files of a folder; tensors of a shard that the index does not list are among them.

    Raises:
      FileNotFoundError: no safetensors there, or a shard that the index names is missing.
      ValueError: a truncated or damaged file, a shard without a tensor that the index says it has, or one tensor in two
        shards.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if single.is_file() or not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
        return read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected an object weight_map")
    headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(f"{folder / shard}: has no tensor {name}, which {INDEX_FILE} places there")
    found: Tensors = {}
    for shard, header in headers.items():
        for name, info in header.items():
            if name in found:
                raise ValueError(f"{folder / shard}: tensor {name} is in {found[name].path.name} too")
            found[name] = info
    return found


def open_folder(
    config: LlamaConfig, folder: pathlib.Path, quantization: dict[str, Any] | None, dtype: str | None
) -> tuple[LlamaConfig, dict[str, Callable[[], Any]]]:
    """The config and {parameter name: a function that reads it}. dtype: what matrices are converted to; None keeps the
    file's.

    A head in the file that differs from the embedding is used, with a warning, also where the config says that the two
    are tied; the config that is returned says what the model is. The two are read and compared where both are there.

    Raises ValueError for a tensor that is missing, not expected, or of another shape or dtype than expected, and for a
    quantization that is not implemented.
    """
    tensors = open_tensors(folder)
    if config.tie_embeddings and _has_own_head(tensors):
        warnings.warn(
            f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs: the head is used",
            stacklevel=2,
        )
        config = dataclasses.replace(config, tie_embeddings=False)
    used: set[str] = set()
    parts_reader = _quantization(quantization, folder / "config.json")
    matrices = published_parts(config)
    found: dict[str, Callable[[], Any]] = {}
    for name, spec in param_specs(config).items():
        matrix = name.removesuffix(".weight")
        if matrix not in matrices:
            published = f"model.{name}"
            if name == "embed_tokens.weight" and config.tie_embeddings and published not in tensors:
                published = "lm_head.weight"  # a tied pair may be stored under either name
            info = _expect(tensors, used, folder, published, _FLOATS, spec.shape)
            found[name] = functools.partial(_read_plain, info, "float32" if len(spec.shape) == 1 else dtype)
            continue
        parts = matrices[matrix]
        packed = [parts_reader is not None and f"{part}.weight" not in tensors for part, _ in parts]
        if any(packed) and not all(packed):
            names = {True: [], False: []}
            for (part, _), is_packed in zip(parts, packed):
                names[is_packed].append(part)
            raise ValueError(
                f"{folder}: {names[True][0]} is quantized and {names[False][0]} is not, but {matrix} is "
                f"one matrix here: expected all or none of its parts"
            )
        expect = functools.partial(_expect, tensors, used, folder)
        found[name] = parts_reader(parts, expect) if all(packed) else _matrix_reader(parts, expect, dtype)
    _check_leftovers(set(tensors) - used, tensors, config)
    return config, found


def _quantization(raw: dict[str, Any] | None, path: pathlib.Path) -> Callable | None:
    """A function (parts, expect) -> reader for the 4-bit format that quantization_config names; None without one."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: quantization_config is {raw!r}: expected an object")
    method = raw.get("quant_method")
    if method == "awq":
        return functools.partial(_awq_reader, awq_gemm.parse(raw, path), path)
    if method == "compressed-tensors":
        return functools.partial(_compressed_tensors_reader, compressed_tensors.parse(raw, path))
    raise ValueError(
        f"{path}: quantization_config.quant_method is {method!r}: not implemented, expected 'awq' or "
        f"'compressed-tensors'"
    )


def _expect(tensors: Tensors, used: set[str], folder: pathlib.Path, name: str, dtypes, shape) -> TensorInfo:
    """The TensorInfo of `name`, checked, and marked as used."""
    if name not in tensors:
        raise ValueError(f"{folder}: tensor {name} is missing: expected {' or '.join(dtypes)} {list(shape)}")
    info = tensors[name]
    if info.shape != tuple(shape):
        raise ValueError(f"{info.path}: tensor {name} has shape {list(info.shape)}: expected {list(shape)}")
    if info.dtype not in dtypes:
        raise ValueError(f"{info.path}: tensor {name} has dtype {info.dtype}: expected {' or '.join(dtypes)}")
    used.add(name)
    return info


def _has_own_head(tensors: Tensors) -> bool:
    """Whether the files of a model whose config says "tied" hold a head that is not the embedding."""
    if not any(name.startswith("lm_head.") for name in tensors) or "model.embed_tokens.weight" not in tensors:
        return False
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    if head is None or head.shape != embedding.shape or not {head.dtype, embedding.dtype} <= set(_FLOATS):
        return True  # packed, or wrong: what the head's own checks say
    left, right = (map_tensor(info).reshape(-1) for info in (head, embedding))
    same = lambda a, b: np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
    return not all(same(left[i : i + _COMPARED], right[i : i + _COMPARED]) for i in range(0, left.shape[0], _COMPARED))


def _check_leftovers(names: set[str], tensors: Tensors, config: LlamaConfig) -> None:
    """Refuses tensors that nothing reads, but for a tied head stored twice and the rotary tables of old files; of a
    table that is not the config's it is said that it is not used."""
    tables = sorted(name for name in names if name.endswith("rotary_emb.inv_freq"))
    for name in sorted(names - set(tables)):
        if not (name == "lm_head.weight" and config.tie_embeddings):
            raise ValueError(f"{tensors[name].path}: tensor {name} is not expected: this model has no place for it")
    for name in tables:
        if not _is_rotary_table(tensors[name], config):
            warnings.warn(
                f"{tensors[name].path}: {name} is not the table of config.json's rope_theta: not used", stacklevel=3
            )
            return  # all layers have the same


def _is_rotary_table(info: TensorInfo, c: LlamaConfig) -> bool:
    """Whether a table holds the config's frequencies, with or without the scaling (old files keep it apart)."""
    if info.dtype not in _FLOATS or info.shape != (c.head_dim // 2,):
        return False
    table = map_tensor(info).astype(np.float32)
    plain, scaled = (np.asarray(rope_frequencies(c.head_dim, c.rope_theta, s)) for s in (None, c.rope_scaling))
    return any(np.allclose(table, x, rtol=1e-2, atol=0) for x in (plain, scaled))  # may be stored in bfloat16


def _read_plain(info: TensorInfo, dtype: str | None) -> jax.Array:
    # Always a copy: an array that aliased the map would change, or fault, with the file.
    return to_device(aligned_copy(map_tensor(info), DTYPES[info.dtype] if dtype is None else dtype))


def _matrix_reader(parts: Parts, expect, dtype: str | None) -> Callable[[], jax.Array]:
    infos = [expect(f"{name}.weight", _FLOATS, (p.out_dim, p.in_dim)) for name, p in parts]
    for (name, _), info in zip(parts, infos):
        if dtype is None and info.dtype != infos[0].dtype:
            raise ValueError(
                f"{info.path}: {name} is {info.dtype} and {parts[0][0]} {infos[0].dtype}, but they are "
                f"one matrix here: name a dtype for both"
            )
    return functools.partial(_read_matrix, parts, infos, dtype)


def _read_matrix(parts: Parts, infos: list[TensorInfo], dtype: str | None) -> jax.Array:
    """The parts, [out, in] in the file, transposed side by side: [D, sum of out]."""
    stored = np.dtype(DTYPES[infos[0].dtype] if dtype is None else dtype)
    fused = aligned_empty((parts[0][1].in_dim, sum(p.out_dim for _, p in parts)), stored)
    for (_, p), info in zip(parts, infos):
        transpose_into(fused[:, p.columns], map_tensor(info))
    return to_device(fused)


def transpose_into(out: np.ndarray, source: np.ndarray) -> None:
    """out [K, N] = source [N, K] transposed, in out's dtype, by tiles: twice as fast as in one piece (float32, 7B)."""
    for i in range(0, out.shape[0], _TILE):
        for j in range(0, out.shape[1], _TILE):
            out[i : i + _TILE, j : j + _TILE] = source[j : j + _TILE, i : i + _TILE].T


def _awq_reader(group_size: int, path: pathlib.Path, parts: Parts, expect) -> Callable[[], Int4Weight]:
    try:
        specs = [awq_gemm.specs(name, p.in_dim, p.out_dim, group_size) for name, p in parts]
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    infos = [
        [expect(spec.name, ("I32",) if spec.dtype == np.int32 else ("F16",), spec.shape) for spec in part]
        for part in specs
    ]

    def decode_part(i):
        return awq_gemm.decode(*map(map_tensor, infos[i]))

    return functools.partial(_read_int4, parts, decode_part, group_size)


def _compressed_tensors_reader(scheme: compressed_tensors.Scheme, parts: Parts, expect) -> Callable[[], Int4Weight]:
    infos = [
        {
            suffix: expect(f"{name}.{suffix}", _FLOATS if dtype is None else (dtype,), shape)
            for suffix, (dtype, shape) in compressed_tensors.shapes(p.in_dim, p.out_dim, scheme).items()
        }
        for name, p in parts
    ]
    scales = [part["weight_scale"] for part in infos]
    for (name, _), scale in zip(parts, scales):
        if scale.dtype != scales[0].dtype:
            raise ValueError(
                f"{scale.path}: the scale of {name} is {scale.dtype} and of {parts[0][0]} {scales[0].dtype}, but they "
                "are one matrix here: expected one dtype"
            )

    def decode_part(i):
        name, p = parts[i]
        try:
            return compressed_tensors.decode(
                {suffix: map_tensor(info) for suffix, info in infos[i].items()}, p.in_dim, p.out_dim
            )
        except ValueError as e:
            raise ValueError(f"{infos[i]['weight_shape'].path}: {name}: {e}") from e

    return functools.partial(_read_int4, parts, decode_part, scheme.group_size)


def _read_int4(parts: Parts, decode_part, group_size: int) -> Int4Weight:
    """The parts side by side as one Int4Weight [D, sum of out]."""
    n = sum(p.out_dim for _, p in parts)
    for i, (_, p) in enumerate(parts):
        part = decode_part(i)
        if i == 0:
            joined = [np.empty((x.shape[0], n), x.dtype) for x in part]
        for whole, x in zip(joined, part):
            whole[:, p.columns] = x
    return jax.tree.map(to_device, Int4Weight.pack(*joined, group_size=group_size))


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """np.empty at an address that jax's CPU backend takes over without a copy (64 bytes)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(source: np.ndarray, dtype) -> np.ndarray:
    """`source` in `dtype`, in memory of its own."""
    out = aligned_empty(source.shape, dtype)
    out[...] = source
    return out


def to_device(x: np.ndarray) -> jax.Array:
    """x on the default device, which may take over its memory: x must not be written again."""
    # Wait for the transfer, so that no more than one tensor's host buffer is alive.
    return jax.block_until_ready(jax.device_put(x))
