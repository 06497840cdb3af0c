"""Timing on a GPU for bench.py and tune.py: rotated operands, medians, and the copy bandwidth to compare with."""

import statistics
import time

import jax
import jax.numpy as jnp

from kernels.w4a16 import layout

ROTATED_BYTES = 200e6  # an H200's L2 is 60 MB; the operands of one measurement together exceed it three times
MAX_SETS = 24


def require_gpu(program: str) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]: jax binds the class to a variable
    """The GPU, or the end of the program with one clear line."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"{program}: needs an NVIDIA GPU; jax sees only {device.platform} ({device.device_kind})")
    return device


def random_weight(key, k: int, n: int, group_size: int, dtype=jnp.float16) -> tuple:
    """Random packed arrays of a [k, n] weight: uniform nibbles and zero points, scales about 0.01."""
    shapes = layout.packed_shapes(k, n, group_size)
    keys = jax.random.split(key, 3)
    words = [jax.random.bits(keys[i], shapes[name], jnp.uint32) for i, name in enumerate(("qweight", "zero_point"))]
    qweight, zero_point = (jax.lax.bitcast_convert_type(w, jnp.int32) for w in words)
    scale = jax.random.uniform(keys[2], shapes["scale"], jnp.float32, 0.005, 0.015).astype(dtype)
    return qweight, scale, zero_point


def num_sets(operand_bytes: int) -> int:
    """How many operand sets to rotate so that none is still in the L2."""
    return int(min(MAX_SETS, max(2, -(-ROTATED_BYTES // operand_bytes))))


def time_us(fn, sets, *, repeats: int = 7) -> tuple[float, str]:
    """Median microseconds of one fn(*operands), run once on each of `sets` in one program.

    Returns:
      (microseconds, "cupti" or "loop"): the sum of the kernels' own times where CUPTI is to be had, else the wall time
      of back-to-back programs, launches included.
    """
    run = jax.jit(lambda sets: [fn(*operands) for operands in sets])
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(run, iterations=repeats)(sets)
        if times:
            return statistics.median(times) * 1e3 / len(sets), "cupti"
    except (ImportError, RuntimeError, AttributeError) as error:
        print(f"# no CUPTI timing ({str(error).splitlines()[0][:100]}), wall time instead", flush=True)
    return wall_us(run, sets, repeats=repeats), "loop"


def wall_us(run, sets, *, repeats: int = 7, inner: int = 5) -> float:
    """Median wall-clock microseconds per operand set of a jitted run(sets), launches included."""
    jax.block_until_ready(run(sets))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = run(sets)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times) * 1e6 / len(sets)


def copy_gbps(num_bytes: int = 2**30) -> float:
    """GB/s of an elementwise pass over num_bytes (bytes read + bytes written)."""
    sets = [(jnp.full((num_bytes // 4,), i, jnp.int32),) for i in range(2)]
    us, _ = time_us(lambda x: x + jnp.int32(1), sets)
    return 2 * sets[0][0].nbytes / us / 1e3
