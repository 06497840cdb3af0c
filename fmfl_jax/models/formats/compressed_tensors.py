"""compressed-tensors' `pack-quantized` format of 4-bit weights, as llm-compressor writes it.

For a projection [K, N] with groups of G inputs: `weight_packed` int32 [N, ceil(K/8)], nibbles in order along K;
`weight_scale` [N, K/G]; `weight_zero_point` int32 [ceil(N/8), K/G], packed along N (missing when symmetric);
`weight_shape` int64 [2] = (N, K). Integers are stored plus 8, zero points too: W = (q - z) * s with q, z in 0..15, and
z = 8 when symmetric. (https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized)
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from fmfl_jax.models.formats.int4_words import IN_ORDER, unpack_words

SYMMETRIC_ZERO = 8


class Scheme(NamedTuple):
    """group_size (-1: one group, "channel") and whether there are no zero points."""

    group_size: int
    symmetric: bool


def parse(raw: dict[str, Any], path: pathlib.Path) -> Scheme:
    """The Scheme of a quantization_config. Raises ValueError for what is not plain 4-bit weight-only."""
    where = f"{path}: quantization_config"
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"{where}.config_groups: expected one group, got {groups!r}")
    group = next(iter(groups.values()))
    layout = raw.get("format") or group.get("format")
    if layout != "pack-quantized":
        raise ValueError(f"{where}.format is {layout!r}: not implemented, expected 'pack-quantized'")
    for name in ("input_activations", "output_activations"):
        if group.get(name) is not None:
            raise ValueError(f"{where}: {name} are quantized: not implemented, expected weights only")
    if raw.get("kv_cache_scheme") is not None:
        raise ValueError(f"{where}.kv_cache_scheme is not null: not implemented")
    for name in ("sparsity_config", "transform_config"):
        if raw.get(name) and raw[name] not in ({"format": "dense"}, {"config_groups": {}}):
            raise ValueError(f"{where}.{name} is {raw[name]!r}: not implemented")
    weights = group.get("weights") or {}
    expected = {
        "num_bits": (4,),
        "type": ("int",),
        "dynamic": (False, None),
        "actorder": (None, False, "weight", "static"),
        "strategy": ("group", "channel"),
        "block_structure": (None,),
    }
    for name, values in expected.items():
        if weights.get(name) not in values:
            raise ValueError(
                f"{where}: weights.{name} is {weights.get(name)!r}: not implemented, expected {values[0]!r}"
            )
    group_size = -1 if weights["strategy"] == "channel" else weights.get("group_size")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ValueError(f"{where}: weights.group_size is {group_size!r}: expected a positive integer")
    return Scheme(group_size, bool(weights.get("symmetric", True)))


def shapes(k: int, n: int, scheme: Scheme) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """{suffix: (dtype name or None for any float, shape)} of a projection [k, n]."""
    groups = 1 if scheme.group_size == -1 else -(-k // scheme.group_size)
    found = {
        "weight_packed": ("I32", (n, -(-k // 8))),
        "weight_scale": (None, (n, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = ("I32", (-(-n // 8), groups))
    return found


def decode(tensors: dict[str, np.ndarray], k: int, n: int) -> tuple[np.ndarray, ...]:
    """{suffix: array} of a projection [k, n] -> q uint8 [K, N], scale [G, N], zero_point uint8 [G, N]."""
    if tuple(tensors["weight_shape"]) != (n, k):
        raise ValueError(f"weight_shape is {tensors['weight_shape'].tolist()}, expected {[n, k]}")
    q = unpack_words(tensors["weight_packed"], IN_ORDER)[:, :k].T  # [K, N]
    scale = np.ascontiguousarray(tensors["weight_scale"].T)  # [G, N]
    if "weight_zero_point" in tensors:
        zero = unpack_words(np.ascontiguousarray(tensors["weight_zero_point"].T), IN_ORDER)[:, :n]  # [G, N]
    else:
        zero = np.full(scale.shape, SYMMETRIC_ZERO, np.uint8)
    return q, scale, zero
