"""The matrix shapes (K, N) of LLaMA's projections, fused (q|k|v, gate|up), whole and cut for tensor parallelism.

Sizes: Touvron et al., 2023 (LLaMA and LLaMA 2, table 2): embedding, hidden width, heads, key/value heads, blocks.
"""

MODELS = {
    "7b": {"embed": 4096, "hidden": 11008, "kv": 4096, "blocks": 32},
    "13b": {"embed": 5120, "hidden": 13824, "kv": 5120, "blocks": 40},
    "70b": {"embed": 8192, "hidden": 28672, "kv": 1024, "blocks": 80},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)  # M of the benchmark's table


def projections(model: str, *, parts: int = 1) -> dict[str, tuple[int, int]]:
    """Name -> (K, N) on each of `parts` devices: q|k|v and gate|up are cut along N, o and down along K.

    Raises:
      ValueError: an unknown model, or widths that `parts` does not divide.
    """
    if model not in MODELS:
        raise ValueError(f"w4a16.shapes: model must be one of {sorted(MODELS)}, got {model!r}")
    size = MODELS[model]
    if any(size[name] % parts for name in ("embed", "hidden", "kv")):
        raise ValueError(f"w4a16.shapes: {parts} parts do not divide the widths {size}")
    embed, hidden, kv = size["embed"], size["hidden"] // parts, size["kv"] // parts
    return {
        "qkv": (embed, embed // parts + 2 * kv),
        "o": (embed // parts, embed),
        "gate_up": (embed, 2 * hidden),
        "down": (hidden, embed),
    }


def packed_bytes(k: int, n: int, group_size: int = 128, scale_bytes: int = 2) -> int:
    """Bytes that one product must read of a packed weight: nibbles, scales and zero points."""
    groups = -(-k // group_size)
    return k * n // 2 + groups * n * scale_bytes + -(-groups // 2) * n
