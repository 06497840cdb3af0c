"""llama2.c's `.bin` checkpoints (https://github.com/karpathy/llama2.c): the legacy format and version 1, float32.

Legacy: 7 int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocab_size says that
the head is not tied), then the tensors of all layers by kind, then two tables of rotary frequencies that nobody reads.
Version 1: "ak42", version, the 7 integers, one byte (tied), padding to 256 bytes, the tensors in another order.

Its rotary embedding turns neighbouring pairs (2 i, 2 i + 1); ours the pairs (i, i + H/2). The rows of wq and wk are put
in our order, which leaves every product of a query and a key as it was. rope_theta is 10000 and eps 1e-5 (run.c).
"""

import functools
import math
import pathlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fmfl_jax.config import LlamaConfig
from fmfl_jax.models.formats.huggingface import aligned_copy, aligned_empty, to_device, transpose_into

_MAGIC = 0x616B3432
_VERSION_1_HEADER = 256
_INTS = struct.Struct("<7i")


class _Header(NamedTuple):
    config: LlamaConfig
    start: int
    version: int


class _Stack(NamedTuple):
    """Tensors of one kind, `shape` each, one after another from byte `offset`."""

    offset: int
    shape: tuple[int, ...]


def open_llama2c(path: pathlib.Path, dtype: str | None) -> tuple[LlamaConfig, dict[str, Callable[[], jax.Array]]]:
    """The config and {parameter name: a function that reads it}; dtype of the matrices, None for float32.

    Raises ValueError for another version, a header that is not one, or a file of the wrong length.
    """
    config, start, version = _read_header(path)
    stacks, end = _stacks(config, start, version)
    if version == 0:
        end += 4 * config.max_seq_len * config.head_dim  # cos and sin, H/2 each per position
        if not config.tie_embeddings:
            stacks["wcls"] = _Stack(end, (config.vocab_size, config.embed_dim))
            end += 4 * config.vocab_size * config.embed_dim
    size = path.stat().st_size
    if size != end:
        raise ValueError(f"{path}: {'truncated' if size < end else 'damaged'}: {size} bytes, its header asks for {end}")

    def mapped(kind, layer=0):
        offset, shape = stacks[kind]
        return np.memmap(path, np.dtype("<f4"), "r", offset + 4 * layer * math.prod(shape), shape)

    return config, _readers(config, mapped, "float32" if dtype is None else dtype)


def _read_header(path: pathlib.Path) -> _Header:
    with path.open("rb") as file:
        data = file.read(_VERSION_1_HEADER)
    if len(data) < _INTS.size:
        raise ValueError(f"{path}: truncated: {len(data)} bytes, expected a llama2.c header of {_INTS.size}")
    magic, version = struct.unpack_from("<Ii", data)
    if magic == _MAGIC:
        if version != 1:
            raise ValueError(
                f"{path}: llama2.c version {version}: not implemented, expected the legacy format or "
                f"version 1 (float32)"
            )
        if len(data) < _VERSION_1_HEADER:
            raise ValueError(f"{path}: truncated: {len(data)} bytes, expected a header of {_VERSION_1_HEADER}")
        ints, start, tied = _INTS.unpack_from(data, 8), _VERSION_1_HEADER, data[8 + _INTS.size] != 0
    else:
        ints, start, version = _INTS.unpack_from(data), _INTS.size, 0
        tied = ints[5] > 0
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = ints
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len) < 1 or dim % heads:
        raise ValueError(f"{path}: not a llama2.c checkpoint: its header reads {list(ints)}")
    try:
        config = LlamaConfig(
            vocab_size=abs(vocab),
            embed_dim=dim,
            hidden_dim=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim // heads,
            rope_theta=10000.0,
            norm_eps=1e-5,
            max_seq_len=seq_len,
            tie_embeddings=tied,
        )
    except ValueError as e:
        raise ValueError(f"{path}: not a llama2.c checkpoint: {e}") from e
    return _Header(config, start, version)


def _stacks(c: LlamaConfig, start: int, version: int) -> tuple[dict[str, _Stack], int]:
    """Where each kind of tensor begins, and the byte after the last. Weights are [out, in]."""
    d, f, q, kv = c.embed_dim, c.hidden_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "tok_embeddings": (c.vocab_size, d),
        "attention_norm": (d,),
        "wq": (q, d),
        "wk": (kv, d),
        "wv": (kv, d),
        "wo": (d, q),
        "ffn_norm": (d,),
        "w1": (f, d),
        "w2": (d, f),
        "w3": (f, d),
        "norm": (d,),
    }
    order = list(shapes)
    if version == 1:
        order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
        if not c.tie_embeddings:
            shapes["wcls"] = (c.vocab_size, d)
            order.append("wcls")
    stacks = {}
    for kind in order:
        stacks[kind] = _Stack(start, shapes[kind])
        once = kind in ("tok_embeddings", "norm", "wcls")
        start += 4 * math.prod(shapes[kind]) * (1 if once else c.num_layers)
    return stacks, start


def _readers(c: LlamaConfig, mapped, dtype: str) -> dict[str, Callable[[], jax.Array]]:
    def copied(kind, layer, stored):
        return to_device(aligned_copy(mapped(kind, layer), stored))

    def fused(layer, *kinds):
        sources = [
            half_rotation(mapped(kind, layer), c.head_dim) if kind in ("wq", "wk") else mapped(kind, layer)
            for kind in kinds
        ]
        out = aligned_empty((sources[0].shape[1], sum(x.shape[0] for x in sources)), np.dtype(dtype))
        start = 0
        for source in sources:
            transpose_into(out[:, start : start + source.shape[0]], source)
            start += source.shape[0]
        return to_device(out)

    found = {
        "embed_tokens.weight": functools.partial(copied, "tok_embeddings", 0, dtype),
        "norm.weight": functools.partial(copied, "norm", 0, "float32"),
    }
    for i in range(c.num_layers):
        found |= {
            f"layers.{i}.input_layernorm.weight": functools.partial(copied, "attention_norm", i, "float32"),
            f"layers.{i}.self_attn.qkv_proj.weight": functools.partial(fused, i, "wq", "wk", "wv"),
            f"layers.{i}.self_attn.o_proj.weight": functools.partial(fused, i, "wo"),
            f"layers.{i}.post_attention_layernorm.weight": functools.partial(copied, "ffn_norm", i, "float32"),
            f"layers.{i}.mlp.gate_up_proj.weight": functools.partial(fused, i, "w1", "w3"),
            f"layers.{i}.mlp.down_proj.weight": functools.partial(fused, i, "w2"),
        }
    if not c.tie_embeddings:
        found["lm_head.weight"] = functools.partial(fused, 0, "wcls")
    return found


def half_rotation(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads * H, D] of every head from the order of neighbouring pairs to that of the two halves."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])  # [heads, H/2, 2, D]
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def pair_rotation(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `half_rotation`."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])  # [heads, 2, H/2, D]
    return halves.transpose(0, 2, 1, 3).reshape(weight.shape)
