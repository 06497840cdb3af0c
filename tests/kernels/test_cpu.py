"""The compiled CPU kernels: against the dequantized weight, alike on every instruction set, and what replaces them."""

import functools
import pathlib
import shutil
import stat
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.float32 import product as float32
from kernels.w4a16 import api, halves, layout
from kernels.w4a16.cpu import build, product
from tests import commands

ERROR = {16: 5e-5, 8: 2e-2}  # measured 2e-5 and 6e-3; short sums are worse
ERROR_BACKWARD = {False: 1e-5, True: 4e-4}  # measured 2e-6, and 6e-6 on a matrix unit; 5e-5 to 2e-4 with dy in integers
PAIR_ROWS = 16  # from which on x86-64 multiplies pairs of 16-bit integers
STORED = {jnp.float32: 0, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}  # rounding of x and y themselves


def instruction_sets():
    """What this CPU can run of what its kind has, but for a matrix unit."""
    return [name for name in ("avx512", "avx2", "neon") if product.runs(name)]


def in_pairs(rows, k, group_size):
    """Whether dy becomes integers."""
    whole_slices = group_size % 32 == 0 or group_size >= k
    return product.runs("avx2") and rows >= PAIR_ROWS and whole_slices


needs_kernels = pytest.mark.skipif(not product.available(), reason="no compiler, or no kernels for this CPU")


def problem(rng, k, n, group_size, minimum, scale_dtype=np.float16):
    """(numpy packed arrays, W float64 [k, n])."""
    groups = layout.num_groups(k, group_size)
    q = rng.integers(0, 16, (k, n)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16).astype(scale_dtype)
    zero = rng.integers(0, 16, (groups, n)).astype(np.uint8)
    if minimum:
        zero = rng.normal(-0.4, 0.3, (groups, n)).astype(scale_dtype)
    row = np.arange(k) // group_size
    q64, s64, z64 = q.astype(np.float64), scale[row].astype(np.float64), zero[row].astype(np.float64)
    return layout.pack(q, zero, scale, group_size=group_size), q64 * s64 + z64 if minimum else (q64 - z64) * s64


def error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def random_case(seed):
    rng = np.random.default_rng(seed)
    k, n = int(rng.integers(1, 700)), int(rng.integers(1, 400))
    group_size = int(rng.choice([32, 64, 128, 256, k, rng.integers(1, 200)]))
    rows = int(rng.choice([1, 2, rng.integers(3, 40), rng.integers(510, 530)]))
    dtype = [jnp.float32, jnp.bfloat16, jnp.float16][rng.integers(3)]
    scale_dtype = [np.float16, np.float32, jnp.bfloat16][rng.integers(3)]
    return rng, rows, k, n, group_size, dtype, scale_dtype, bool(rng.integers(2))


@needs_kernels
@pytest.mark.parametrize("seed", range(24))
def test_random_products(seed):
    """Value and gradient on random shapes, groups and types; the same bits from each instruction set of vectors."""
    rng, rows, k, n, group_size, dtype, scale_dtype, minimum = random_case(seed)
    packed, w = problem(rng, k, n, group_size, minimum, scale_dtype)
    packed, static = tuple(map(jnp.asarray, packed)), {"k": k, "n": n, "group_size": group_size}
    # one row is far larger than the others, and one is zero: rows have scales of their own
    sizes = np.where(np.arange(rows) == 1, 100.0, np.where(np.arange(rows) == 2, 0.0, 1.0))[:, None]
    x, dy = (jnp.asarray(sizes * rng.normal(0.3, 1, (rows, width)), dtype) for width in (k, n))
    expected, expected_dx = np.asarray(x, np.float64) @ w, np.asarray(dy, np.float64) @ w.T
    for bits in (16, 8):
        y, vjp = jax.vjp(lambda x: api.matmul(x, *packed, **static, activation_bits=bits), x)
        assert y.dtype == dtype
        (dx,) = vjp(dy)
        by_unit = product.has_matrix_unit() and group_size >= 16 and rows >= 32
        assert error(dx, expected_dx) <= ERROR_BACKWARD[in_pairs(rows, k, group_size) and not by_unit] + STORED[dtype]
        by_vectors = []
        for name in instruction_sets():
            by_vectors.append(product.matmul(x, *packed, **static, activation_bits=bits, instructions=name))
            np.testing.assert_array_equal(np.asarray(by_vectors[-1]), np.asarray(by_vectors[0]))
            again = product.matmul_transposed(dy, *packed, **static, instructions=name)
            most = ERROR_BACKWARD[True] if in_pairs(rows, k, group_size) else 2e-6
            assert error(again, expected_dx) <= most + STORED[dtype]
        for m in range(min(rows, 4)):
            scale = np.sqrt(np.sum(np.asarray(x, np.float64)[m] ** 2 @ w**2))  # as if no terms cancelled
            for one in (y, by_vectors[0]):
                off = np.linalg.norm(np.asarray(one, np.float64)[m] - expected[m])
                assert off <= (ERROR[bits] + STORED[dtype]) * scale


@needs_kernels
def test_a_row_does_not_depend_on_the_others_nor_on_threads():
    """Bit by bit: one row alone, in a small batch and in one of several chunks; run again and again."""
    rng = np.random.default_rng(0)
    packed, _ = problem(rng, 300, 700, 64, minimum=False)
    packed, static = tuple(map(jnp.asarray, packed)), {"k": 300, "n": 700, "group_size": 64}
    x, dy = (jnp.asarray(rng.normal(size=(1050, width)), jnp.float32) for width in (300, 700))
    cases = [(instruction_sets()[0], (1, 5, 64, 1050))]
    if product.has_matrix_unit():
        cases.append(("amx", (64, 79, 1050)))  # fewer rows go to the vectors
    for name, numbers in cases:
        static["instructions"] = name
        y, dx = product.matmul(x, *packed, **static), product.matmul_transposed(dy, *packed, **static)
        for rows in numbers:
            for _ in range(5):
                np.testing.assert_array_equal(product.matmul(x[:rows], *packed, **static), y[:rows])
            if in_pairs(rows, 300, 64) or not product.runs("avx2"):  # dx is that of many rows
                np.testing.assert_array_equal(product.matmul_transposed(dy[:rows], *packed, **static), dx[:rows])


@needs_kernels
@pytest.mark.parametrize(
    "rows, k, n, group_size", [(1, 64, 20, 32), (33, 576, 301, 32), (530, 160, 48, 160), (40, 48, 70, 16)]
)
def test_eight_bits_in_two_halves(rows, k, n, group_size):
    """Value, gradient and vmap against q * scale: at once where this CPU can, else (few rows, small groups) not."""
    rng = np.random.default_rng(5)
    q = rng.integers(-128, 128, (k, n))
    scale = rng.uniform(0.01, 0.1, (k // group_size, n)).astype(np.float16)
    nibbles = np.concatenate([(q + 128) >> 4, (q + 128) & 15]).astype(np.uint8)
    zero = np.concatenate([np.full(scale.shape, 8, np.uint8), np.zeros(scale.shape, np.uint8)])
    scales = np.concatenate([16 * scale, scale])
    packed = tuple(map(jnp.asarray, layout.pack(nibbles, zero, scales, group_size=group_size)))
    w = q * np.repeat(scale.astype(np.float64), group_size, axis=0)
    x, dy = (rng.normal(0.3, 1, (2, rows, width)).astype(np.float32) for width in (k, n))
    multiply = lambda x: halves.matmul(x, *packed, k=k, n=n, group_size=group_size)
    y, vjp = jax.vjp(jax.vmap(multiply), x)
    assert error(y, x.astype(np.float64) @ w) < ERROR[16]
    assert error(vjp(dy)[0], dy.astype(np.float64) @ w.T) < ERROR_BACKWARD[True]
    at_once = product.multiplies_bytes() and 2 * rows >= halves.MIN_ROWS and group_size % 32 == 0
    assert ("bits = 8" in jax.jit(jax.vmap(multiply)).lower(x).as_text()) == at_once


@needs_kernels
def test_bad_numbers_in_one_of_many_rows():
    """Its y and dx are no numbers, the others' are as without it."""
    rng = np.random.default_rng(6)
    packed, _ = problem(rng, 200, 48, 32, minimum=True)
    packed, static = tuple(map(jnp.asarray, packed)), {"k": 200, "n": 48, "group_size": 32}
    for run, width in ((product.matmul, 200), (product.matmul_transposed, 48)):
        x = jnp.asarray(rng.normal(size=(40, width)), jnp.float32)
        good, bad = run(x, *packed, **static), run(x.at[7, 30].set(jnp.nan).at[9, 3].set(jnp.inf), *packed, **static)
        assert not np.isfinite(bad[jnp.array([7, 9])]).any()
        others = np.delete(np.arange(40), [7, 9])
        np.testing.assert_array_equal(bad[others], good[others])


@pytest.mark.skipif(not product.has_matrix_unit(), reason="this CPU has no matrix unit (AMX)")
@pytest.mark.parametrize("seed", range(8))
def test_float_products_on_a_matrix_unit(seed):
    """Value, gradients and vmap of x @ W and x @ W^T on random shapes: one tile and less, several, and depths beyond
    those that are split together."""
    rng = np.random.default_rng(seed)
    m, k, n = int(rng.integers(1, 600)), int(rng.integers(1, 700)), int(rng.integers(1, 700))
    if seed == 0:
        m, k = 33, 9000
    w = rng.normal(0.1, 1, (k, n)).astype(np.float32)
    x, dy = (rng.normal(0.3, 1, (2, m, width)).astype(np.float32) for width in (k, n))
    w64, x64, dy64 = w.astype(np.float64), x.astype(np.float64), dy.astype(np.float64)
    for turned in (False, True):
        multiply = functools.partial(float32.matmul, turned=turned)
        weight = w.T.copy() if turned else w
        y, vjp = jax.vjp(jax.vmap(multiply, (0, None)), x, weight)
        dx, dw = vjp(dy)
        assert error(y, x64 @ w64) < 2e-5 and error(dx, dy64 @ w64.T) < 2e-5
        expected = sum(a.T @ b for a, b in zip(x64, dy64, strict=True))
        assert error(dw.T if turned else dw, expected) < 2e-6
        bad = np.asarray(multiply(np.where(np.arange(m)[:, None] == m // 2, np.nan, x[0]), weight))
        assert np.isnan(bad[m // 2]).all() and np.isfinite(np.delete(bad, m // 2, 0)).all()


def test_who_takes_float_products():
    """Large float32 products, on a CPU with a matrix unit, unless more precision was asked for."""
    here = product.has_matrix_unit()
    x, w = jnp.zeros((128, 512), jnp.float32), jnp.zeros((512, 512), jnp.float32)
    assert float32.serves(x, w) == here
    for refused in ((x[:8], w), (x, w[:, :8]), (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), (x, w[None])):
        assert not float32.serves(*refused)
    with jax.default_matmul_precision("highest"):
        assert not float32.serves(x, w)


@needs_kernels
@pytest.mark.parametrize("minimum", [False, True])
def test_a_loop_over_layers_copies_no_weight(minimum):
    """x of two clients through three layers of the same shape, one call for all."""
    rng = np.random.default_rng(3)
    static = {"k": 640, "n": 640, "group_size": 128}
    problems = [problem(rng, 640, 640, 128, minimum) for _ in range(3)]
    weights = [tuple(map(jnp.asarray, packed)) for packed, _ in problems]
    x = rng.normal(size=(2, 5, 640)).astype(np.float32)

    @jax.jit
    def run(x, weights):
        layer = lambda i, x: api.matmul_layer(x, i, weights, **static)
        return jax.vmap(lambda x: jax.lax.fori_loop(0, 3, layer, x))(x)

    compiled = run.lower(x, weights).compile()
    assert compiled.as_text().count('custom_call_target="w4a16') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < weights[0][0].nbytes
    y = x.astype(np.float64)
    for _, w in problems:
        y = y @ w
    assert error(run(x, weights), y) < 3 * ERROR[16]


@needs_kernels
@pytest.mark.parametrize("h, slots", [(64, 37), (20, 8), (128, 1)])
def test_attention_of_one_token_in_a_layer(h, slots):
    """Against softmax in float64, over each number of slots seen, scores up to the hundreds; also by vmap."""
    rng = np.random.default_rng(4)
    b, layers, k, n = slots + 1, 2, 2, 6
    positions = np.arange(b, dtype=np.int32)  # the last row's lies beyond the slots: all are seen
    q = (rng.normal(size=(b, n, h)) * np.logspace(-2, 1.5, b)[:, None, None]).astype(np.float32)
    keys, values = rng.normal(size=(2, b, layers, k, slots, h)).astype(np.float32)
    for layer in range(layers):
        scores = np.einsum("bkgh,bksh->bkgs", q.reshape(b, k, -1, h).astype(np.float64), keys[:, layer]) / np.sqrt(h)
        scores[np.arange(slots) > positions[:, None, None, None] + np.zeros_like(scores)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bkgs,bksh->bkgh", weights, values[:, layer]).reshape(b, n, h)
        arrays = positions, keys, values
        for name in instruction_sets():
            out = product.attend(jnp.asarray(q), jnp.int32(layer), *map(jnp.asarray, arrays), instructions=name)
            np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
        one_row = lambda q, p, keys, values: api.attend_layer(
            q[None], jnp.int32(layer), p[None], keys[None], values[None]
        )[0]
        np.testing.assert_allclose(jax.jit(jax.vmap(one_row))(q, *arrays), expected, rtol=2e-5, atol=2e-5)


@needs_kernels
def test_vmap_gradient_and_bad_numbers():
    rng = np.random.default_rng(0)
    packed, w = problem(rng, 200, 48, 128, minimum=True)
    packed, static = tuple(map(jnp.asarray, packed)), {"k": 200, "n": 48, "group_size": 128}
    x = jnp.asarray(rng.normal(size=(3, 2, 200)), jnp.float32)

    def loss(x):
        return jnp.sum(api.matmul(x, *packed, **static) ** 2)

    step = jax.jit(jax.vmap(jax.value_and_grad(loss)))
    assert step.lower(x).as_text().count("@w4a16_forward") == 1  # all clients in one product
    value, gradient = step(x)
    y = np.asarray(x, np.float64) @ w
    assert error(value, (y**2).sum((1, 2))) < 1e-4 and error(gradient, 2 * y @ w.T) < 1e-4
    bad = x.at[0, 1, 150].set(jnp.nan).at[1, 0, 3].set(jnp.inf).at[2, 0].multiply(1e-37)
    y = np.asarray(api.matmul(bad, *packed, **static))
    assert np.isnan(y[0, 1]).all() and not np.isfinite(y[1, 0]).any()
    assert np.isfinite(y[[0, 1, 2, 2], [0, 1, 0, 1]]).all()


@needs_kernels
def test_memory_that_does_not_fit_is_refused():
    """The custom call checks its arrays itself: a wrong shape is an error, not a read beyond the end."""
    packed, _ = problem(np.random.default_rng(0), 200, 48, 128, minimum=False)
    with pytest.raises(Exception, match="not the packed form"):
        product.matmul(jnp.ones((1, 200)), *map(jnp.asarray, packed), k=200, n=48, group_size=32).block_until_ready()
    with pytest.raises(ValueError, match="activation_bits must be one of"):
        api.matmul(jnp.ones((1, 200)), *packed, k=200, n=48, group_size=128, activation_bits=4)


def multiply(cache, **environment):
    """Starts another process that multiplies, with this cache."""
    return commands.start("tests.kernels.one_product", XDG_CACHE_HOME=str(cache), **environment)


def said(process):
    done = process.wait()
    assert done.status == 0, done.err
    return done.out.split("\n")[:-1] if done.out.strip() else []


def fake_compiler(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_falls_back_aloud_once(tmp_path):
    """Switched off, no compiler, one that fails, a cache that cannot be made, a library that does not load."""
    (tmp_path / "file").write_text("")
    broken = fake_compiler(
        tmp_path / "broken", 'case "$1" in --version) echo 1;; *) echo "x.cc:1: error: boom" >&2; exit 1; esac'
    )
    empty = fake_compiler(
        tmp_path / "empty", 'case "$1" in --version) echo 2;; *) for last; do :; done; : > "$last";; esac'
    )
    none = {"CXX": str(tmp_path / "missing")}
    cases = {
        "FMFL_CPU_KERNEL=0": multiply(tmp_path, FMFL_CPU_KERNEL="0"),
        "no C++ compiler": multiply(tmp_path, **none),
        "error: boom": multiply(tmp_path, CXX=broken),
        "cache cannot be written": multiply(tmp_path / "file"),
        "does not load": multiply(tmp_path, CXX=empty),
    }
    for expected, process in cases.items():
        lines = said(process)
        assert len(lines) == 1 and lines[0].startswith("w4a16: int4 products on this CPU") and expected in lines[0]


@needs_kernels
def test_two_processes_build_at_once_and_a_third_reads(tmp_path):
    """The compiler is slow and hands out what this process has built."""
    body = f'case "$1" in --version) echo 3;; *) sleep 1; for last; do :; done; cp {build.library()} "$last";; esac'
    cxx = {"CXX": fake_compiler(tmp_path / "slow", body)}
    both = [multiply(tmp_path, **cxx), multiply(tmp_path, **cxx)]
    for process in both:
        assert said(process) == []
    files = list((tmp_path / "fmfl_jax" / "w4a16").iterdir())
    assert [f.suffix for f in files] == [".so"]  # nothing half made is left
    files[0].parent.chmod(0o555)
    assert said(multiply(tmp_path, **cxx)) == []  # a cache that can only be read serves
    files[0].parent.chmod(0o755)


def test_another_cpu_compiler_or_source_gets_another_library(monkeypatch, tmp_path):
    cxx = fake_compiler(tmp_path / "cxx", "echo 1")
    keys = [build.key(cxx)]
    monkeypatch.setattr(build, "cpu_flags", lambda: "sse2 avx2")
    keys.append(build.key(cxx))
    keys.append(build.key(fake_compiler(tmp_path / "cxx", "echo 2")))
    copy = shutil.copytree(build.SOURCES, tmp_path / "sources")
    with (copy / "forward.h").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "SOURCES", copy)
    keys.append(build.key(cxx))
    assert len(set(keys)) == 4


CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")


@needs_kernels
@pytest.mark.skipif(not (CROSS and QEMU), reason="needs g++-aarch64-linux-gnu and qemu-user-static")
def test_neon_under_emulation(tmp_path):
    harness = tmp_path / "harness"
    flags = [*build.FLAGS, *build.UNITS["aarch64"]["neon.cc"], f"-I{build.SOURCES}", "-static"]
    sources = [str(build.SOURCES / "neon.cc"), str(pathlib.Path(__file__).parent / "cpu_harness.cc")]
    subprocess.run([CROSS, *flags, *sources, "-o", str(harness)], check=True)
    for seed in range(6):
        rng, rows, k, n, group_size, _, _, minimum = random_case(seed)
        packed, w = problem(rng, k, n, group_size, minimum)
        x, dy = (rng.normal(0.3, 1, (rows, width)).astype(np.float32) for width in (k, n))
        for planes in (1, 2):
            header = np.array([rows, k, n, group_size, *layout.padded_shape(k, n), planes, minimum], np.int64)
            (tmp_path / "in").write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in (header, *packed, x, dy)))
            subprocess.run([QEMU, str(harness), str(tmp_path / "in"), str(tmp_path / "out")], check=True)
            out = np.frombuffer((tmp_path / "out").read_bytes(), np.float32)
            y, dx = out[: rows * n].reshape(rows, n), out[rows * n :].reshape(rows, k)
            # the same integers as this CPU's kernels
            static = {"k": k, "n": n, "group_size": group_size, "activation_bits": 8 * planes}
            assert error(y, np.asarray(product.matmul(jnp.asarray(x), *map(jnp.asarray, packed), **static))) < 1e-6
            assert error(dx, dy.astype(np.float64) @ w.T) < 2e-6
