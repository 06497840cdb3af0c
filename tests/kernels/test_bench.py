"""The measuring scripts: they end with one line where there is no GPU, and run through on a tiny model."""

import functools
import types

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
    monkeypatch.setattr("kernels.w4a16.measure.MAX_SETS", 2)
    rows, left = bench.products("7b", "o", 256, 256, [1, 300], 100.0, float("inf"), implementation="xla")
    assert [row["m"] for row in rows] == [1, 300] and not left
    for row in rows:
        assert row["gbps"] == pytest.approx(shapes.packed_bytes(256, 256) / row["us"] / 1e3)
        assert row["speedup"] == pytest.approx(row["bf16_dot_us"] / row["us"])
    assert bench.products("7b", "o", 256, 256, [1, 300], 100.0, 0.0) == ([], [1, 300])


def test_results_of_another_gpu_are_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    monkeypatch.setattr(bench, "FLAGS", types.SimpleNamespace(json=str(path)))
    h100, h200 = {"device": "H100", "jax": "0.11.2"}, {"device": "H200", "jax": "0.11.2"}
    assert bench.earlier(h100) == h100
    bench.write(h100 | {"table": [1]})
    assert bench.earlier(h100)["table"] == [1] and bench.earlier(h200) == h200
    path.write_text('{"device": "H1')
    assert bench.earlier(h100) == h100


def test_correctness_goes_on_where_it_stopped(monkeypatch):
    """What was right is not checked again, what was wrong is, and what there is no time for is listed."""
    cases = ["right", "wrong", "late"]
    checked = []

    def check(name, error):
        checked.append(name)
        return {"forward": error}

    checks = [(name, functools.partial(check, name, error), 0.5) for name, error in zip(cases, (0.1, 0.9, 0.1))]
    monkeypatch.setattr(bench, "checks", lambda: checks[:2])
    monkeypatch.setattr(bench, "write", lambda results: None)
    results = {"left_out": []}
    assert not bench.correctness(results, float("inf")) and checked == ["right", "wrong"]
    monkeypatch.setattr(bench, "checks", lambda: checks)
    assert not bench.correctness(results, float("inf")) and checked[2:] == ["wrong", "late"]
    assert bench.correctness(results, 0.0) and results["left_out"] == ["wrong"]


def config_of(num_warps, resident, block_m=8):
    return configs.Config(block_m=block_m, block_n=256, num_warps=num_warps, num_stages=3, resident=resident)


def test_splits_cover_the_loop():
    """No split is empty nor of one step, as many programs as asked for at most, and together they take every step."""
    for tiles in (1, 3, 32, 64, 96, 192, 1000):
        for steps in (1, 2, 7, 16, 43, 112):
            for resident in (1, 2, 4):
                number, each = configs.splits(rows=8, tiles=tiles, steps=steps, config=config_of(4, resident))
                assert (number - 1) * each < steps <= number * each
                assert number == 1 or (number * tiles <= resident * configs.SMS and each > 1)
    assert configs.splits(rows=8, tiles=1000, steps=16, config=config_of(4, 4)) == (1, 16)
    # 7B's q|k|v: 48 programs would leave most SMs idle, 384 of 4 warps are 2.9 an SM; o: 128, so that each SM has one.
    assert configs.splits(rows=8, tiles=48, steps=16, config=config_of(4, 3)) == (8, 2)
    assert configs.splits(rows=8, tiles=16, steps=16, config=config_of(4, 3)) == (8, 2)
    # 13B's o: more rows have larger sums for each split
    assert configs.splits(rows=1, tiles=20, steps=20, config=config_of(4, 3)) == (10, 2)
    assert configs.splits(rows=8, tiles=20, steps=20, config=config_of(4, 3)) == (5, 4)


def test_candidates_can_be_launched():
    """Blocks as large as the rows need, and the shipped shapes among them; SwiGLU takes strips in pairs."""
    for m in tune.ROWS:
        found = tune.candidates(m)
        assert found and all(c.block_m >= 8 and c.block_m <= max(16, m) for c in found)
        assert all(c.strips % 2 == 0 and c.block_n % c.strips == 0 for c in found if c.few_rows)
        assert configs.choose(configs.MATMUL, m) in found
