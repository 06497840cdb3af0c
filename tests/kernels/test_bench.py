"""The measuring scripts: they end with one line where there is no GPU, and run through on a tiny model."""

import pytest

from kernels.w4a16 import bench, configs, shapes, tune
from tests.commands import run


@pytest.mark.parametrize("program", ["bench", "tune"])
def test_refuses_without_a_gpu(program):
    done = run(f"kernels.w4a16.{program}")
    assert done.status == 1
    assert f"kernels.w4a16.{program}: needs an NVIDIA GPU; jax sees only cpu" in done.err.strip().splitlines()[-1]


def test_table_on_a_tiny_model(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "7b", {"embed": 256, "hidden": 256, "kv": 256, "blocks": 1})
    monkeypatch.setattr(shapes, "ROWS", (1, 300))
    monkeypatch.setattr("kernels.w4a16.measure.MAX_SETS", 2)
    rows, left = bench.products("7b", "o", 256, 256, 100.0, float("inf"), implementation="xla")
    assert [row["m"] for row in rows] == [1, 300] and not left
    for row in rows:
        assert row["gbps"] == pytest.approx(shapes.packed_bytes(256, 256) / row["us"] / 1e3)
        assert row["speedup"] == pytest.approx(row["bf16_dot_us"] / row["us"])
    assert bench.products("7b", "o", 256, 256, 100.0, 0.0, implementation="xla") == ([], [1, 300])


def test_splits_cover_the_loop():
    """No split is empty, all programs are resident at once, and together they take every step."""
    for tiles in (1, 3, 32, 64, 96, 192, 1000):
        for steps in (1, 2, 7, 16, 43, 112):
            for resident in (1, 2, 4):
                number, each = configs.splits(tiles=tiles, steps=steps, resident=resident)
                assert (number - 1) * each < steps <= number * each
                assert number == 1 or number * tiles <= resident * configs.SMS
    assert configs.splits(tiles=1000, steps=16, resident=4) == (1, 16)
    assert configs.splits(tiles=96, steps=16, resident=4) == (4, 4)  # 7B's q|k|v: 384 programs, three on an SM


def test_candidates_hold_the_shipped_block_sizes():
    for m in tune.ROWS:
        assert all(c.block_m >= 8 and c.block_m <= max(16, m) for c in tune.candidates(m))
