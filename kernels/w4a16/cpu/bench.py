"""`python -m kernels.w4a16.cpu.bench --json=PATH`: the CPU kernels against XLA's fp32 dot of the same shape, in turn.

Every round runs each function once, so that other work on the machine slows all of them alike; a row gives medians of
CPU time (the steadier where the machine is shared), the least wall time, and the error against fp32.
"""

import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from kernels.w4a16 import measure, reference, shapes
from kernels.w4a16.cpu import product

FLAGS = flags.FLAGS
SHAPES = ((576, 1536, 32), (1536, 576, 32), (2048, 8192, 128), (4096, 11008, 128))  # K, N, group: SmolLM2, 1B, 7B
ROWS = (1, 4, 16, 64, 512)
MIN_MULTIPLICATIONS = 2e8  # of a timing, so that the clock's grain does not matter


def define_flags() -> None:
    """Flags of this program (defined here so that importing the module defines none)."""
    flags.DEFINE_string("json", "", "Where to write the results; empty writes none.")
    flags.DEFINE_multi_string("instructions", ["best"], "Instruction sets: best, amx, avx512, avx2 or neon.")
    flags.DEFINE_integer("rounds", 7, "How often each function is timed.", lower_bound=1)
    flags.DEFINE_multi_string("shape", [f"{k}x{n}x{group}" for k, n, group in SHAPES], "KxNxGROUP.")
    flags.DEFINE_multi_integer("rows", list(ROWS), "M.")


def functions(packed, static, instructions) -> dict:
    """Name -> (jitted function of (x, packed), whether it takes dy [M, N])."""
    run = {}
    for name in instructions:
        for bits in (16, 8):

            def forward(x, packed, name=name, bits=bits):
                return product.matmul(x, *packed, **static, activation_bits=bits, instructions=name)

            run[f"{name} int{bits}"] = (jax.jit(forward), False)

        def backward(dy, packed, name=name):
            return product.matmul_transposed(dy, *packed, **static, instructions=name)

        run[f"{name} backward"] = (jax.jit(backward), True)
    run["reference"] = (jax.jit(lambda x, packed: reference.matmul(x, *packed, **static)), False)
    return run


def measure_shape(k: int, n: int, group_size: int, m: int, instructions, rounds: int) -> list[dict]:
    """One row of results per function; `ratio` is its CPU time over that of the fp32 dot it replaces."""
    static = {"k": k, "n": n, "group_size": group_size}
    packed = measure.random_weight(jax.random.key(0), k, n, group_size)
    w = reference.dequantize(*packed, **static, dtype=jnp.float32)
    x, dy = (jax.random.normal(jax.random.key(1), (m, width)) for width in (k, n))
    dots = {False: jax.jit(jnp.dot), True: jax.jit(lambda dy, w: jnp.dot(dy, w.T))}
    run = {
        name: (fn, (dy if back else x, packed), back)
        for name, (fn, back) in functions(packed, static, instructions).items()
    }
    run |= {"fp32 dot": (dots[False], (x, w), False), "fp32 dot backward": (dots[True], (dy, w), True)}
    exact = {back: fn(dy if back else x, w) for back, fn in dots.items()}
    errors = {
        name: float(jnp.linalg.norm(fn(*args) - exact[back]) / jnp.linalg.norm(exact[back]))
        for name, (fn, args, back) in run.items()
    }
    repeats = max(1, int(MIN_MULTIPLICATIONS / (m * k * n)))
    cpu, wall = {name: [] for name in run}, {name: [] for name in run}
    for _ in range(rounds):
        for name, (fn, args, _) in run.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                out = fn(*args)
            jax.block_until_ready(out)
            wall[name].append((time.perf_counter() - start) / repeats * 1e3)
            cpu[name].append((time.process_time() - start_cpu) / repeats * 1e3)
    rows = []
    for name, (_, _, back) in run.items():
        dot = "fp32 dot backward" if back else "fp32 dot"
        ms = statistics.median(cpu[name])
        row = {"k": k, "n": n, "group_size": group_size, "m": m, "function": name, "cpu_ms": ms}
        row |= {"wall_ms": min(wall[name]), "ratio": ms / statistics.median(cpu[dot]), "error": errors[name]}
        row["packed_gb_per_cpu_s"] = shapes.packed_bytes(k, n, group_size) / ms / 1e6
        rows.append(row)
    return rows


def main(argv) -> None:
    del argv
    if not product.available():
        raise SystemExit("kernels.w4a16.cpu.bench: the CPU kernels cannot be used here")
    results = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
    results["rows"] = []
    for shape in FLAGS.shape:
        for m in FLAGS.rows:
            k, n, group_size = map(int, shape.split("x"))
            rows = measure_shape(k, n, group_size, m, FLAGS.instructions, FLAGS.rounds)
            results["rows"] += rows
            for row in rows:
                print(
                    f"{shape:15} M={m:<4} {row['function']:18} wall {row['wall_ms']:8.3f} ms  "
                    f"cpu {row['cpu_ms']:8.3f} ms  {row['ratio']:5.2f} of the dot  error {row['error']:.1e}",
                    flush=True,
                )
            if FLAGS.json:
                with open(FLAGS.json, "w") as file:
                    json.dump(results, file, indent=1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
