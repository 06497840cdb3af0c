"""AutoAWQ's "GEMM" format of 4-bit weights (https://github.com/casper-hansen/AutoAWQ, WQLinear_GEMM).

For a projection [K, N] with groups of G rows: `qweight` int32 [K, N/8], `qzeros` int32 [K/G, N/8], `scales` float16
[K/G, N]; nibble i of a word holds column ORDER[i] of its eight; W = (q - z) * s.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fmfl_jax.models.formats.int4_words import pack_words, unpack_words
from fmfl_jax.models.formats.safetensors_io import TensorSpec
from fmfl_jax.quant.int4 import Int4Weight
from kernels.w4a16 import layout

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
_BLOCK_ROWS = 4 * layout.SUPERBLOCK


def parse(raw: dict[str, Any], path: pathlib.Path) -> int:
    """The group size of a quantization_config. Raises ValueError for what is not 4-bit GEMM with zero points."""
    expected = {"bits": 4, "zero_point": True, "version": "gemm"}
    for name, value in expected.items():
        got = raw.get(name, value)
        if (got.lower() if isinstance(got, str) else got) != value:
            raise ValueError(f"{path}: quantization_config.{name} is {got!r}: not implemented, expected {value!r}")
    group_size = raw.get("group_size")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 1 and group_size != -1):
        raise ValueError(f"{path}: quantization_config.group_size is {group_size!r}: expected a positive integer or -1")
    return group_size


def quantization_json(group_size: int, unquantized: list[str], *, head: bool = False) -> dict[str, Any]:
    """The quantization_config that `parse` reads; `unquantized`: full names of projections kept as they are.

    head: whether lm_head is packed too. AutoAWQ has no word for that: the field `lm_head` is the one that vLLM reads
    with its Marlin kernels. transformers leaves the head unquantized whatever stands here.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": unquantized or None,
    } | ({"lm_head": True} if head else {})


def specs(name: str, k: int, n: int, group_size: int) -> list[TensorSpec]:
    """The three tensors of the projection `name` [k, n]; group_size -1 is one group.

    Raises ValueError for a shape that the format cannot hold.
    """
    group_size = k if group_size == -1 else group_size
    if k % group_size or n % 8:
        raise ValueError(
            f"{name} [{k}, {n}]: AutoAWQ's format needs an input dimension that the group size "
            f"{group_size} divides and an output dimension that 8 divides: leave it unquantized"
        )
    groups = k // group_size
    return [
        TensorSpec(f"{name}.qweight", np.dtype(np.int32), (k, n // 8)),
        TensorSpec(f"{name}.qzeros", np.dtype(np.int32), (groups, n // 8)),
        TensorSpec(f"{name}.scales", np.dtype(np.float16), (groups, n)),
    ]


def encode(weight: Int4Weight, columns: Sequence[slice]) -> Iterator[np.ndarray]:
    """qweight, qzeros, scales of each of the projections that stand side by side in `weight` (numpy leaves, [K, N]).

    By blocks of rows, so that the unpacked matrix is never there as a whole. Raises ValueError when a scale is no
    float16 number.
    """
    k, n = weight.shape
    scale = np.asarray(weight.scale)[:, :n]
    half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale.astype(np.float32)):
        raise ValueError("AutoAWQ's format holds float16 scales, and these would be rounded")
    words = [np.empty((k, (c.stop - c.start) // 8), np.int32) for c in columns]
    for start in range(0, k, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, k)
        # Four rows of K share a row of the packed array, and nothing in it looks across 128 rows.
        q = np.asarray(layout.unpack_rows(weight.qweight[start // 4 : (start + _BLOCK_ROWS) // 4]))[: stop - start]
        for qweight, c in zip(words, columns):
            qweight[start:stop] = pack_words(q[:, c], ORDER)
    zero_point = np.asarray(layout.unpack_zero_point(weight.zero_point, groups=half.shape[0], n=n))
    for qweight, c in zip(words, columns):
        yield from (qweight, pack_words(zero_point[:, c], ORDER), half[:, c])


def decode(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """The integers and scales of one projection: q uint8 [K, N], scale float16 [G, N], zero_point uint8 [G, N]."""
    return unpack_words(qweight, ORDER), np.array(scales), unpack_words(qzeros, ORDER)


def common_group_size(weights: dict[str, Int4Weight]) -> int:
    """The one group size of the file: that of all weights, or -1 where each is one group.

    Raises ValueError for weights whose group sizes differ.
    """
    sizes = {weight.group_size for weight in weights.values()}
    if len(sizes) == 1 and all(weight.shape[0] % weight.group_size == 0 for weight in weights.values()):
        return sizes.pop()
    if all(weight.group_size >= weight.shape[0] for weight in weights.values()):
        return -1
    if len(sizes) == 1:
        return sizes.pop()
    raise ValueError(f"AutoAWQ's format holds one group size, but these weights have {sorted(sizes)}")
