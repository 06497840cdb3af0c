"""`python -m kernels.w4a16.bench --json=PATH`: correctness on the GPU first, then every measurement, as Marlin's table.

One run of under ten minutes (--budget_s): what the budget leaves out is listed, and a second run with the same --json
goes on from there (remove the file to measure anew). Without a GPU it says so and ends.
Columns: model, projection, M, N, K, microseconds, TFLOP/s, GB/s of packed bytes, their fraction of the measured copy
bandwidth, and the speed-up over XLA's bf16 dot (and gemlite, where installed) measured in the same run.
"""

import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from kernels.decode import api as decode
from kernels.decode import reference as decode_reference
from kernels.decode.unfinished import finish, finished
from kernels.w4a16 import api, lora, measure, reference, shapes

FLAGS = flags.FLAGS
GROUP = 128
EPS = 1e-5  # of the norms
# (M, K, N, group size): every family, ragged K and N, each kind of group
CORRECTNESS = (
    (1, 4096, 4096, 128),
    (3, 11008, 4096, 128),
    (16, 4096, 12288, 128),
    (8, 2752, 4096, 64),
    (5, 172, 48, 128),
    (2, 4096, 1376, 32),
    (4, 4096, 1024, 256),
    (7, 300, 37, 300),
    (12, 2752, 1376, 64),
    (17, 4096, 4096, 128),
    (32, 4096, 11008, 128),
    (64, 4096, 4096, 128),
    (200, 2752, 4096, 64),
    (256, 5120, 5120, 128),
    (1000, 4096, 4096, 128),
)
# (batch, heads, kv heads, head dim, slots): split keys, one part, grouped queries, a small model
DECODE = ((1, 32, 32, 128, 2048), (64, 32, 32, 128, 300), (3, 32, 8, 128, 1000), (5, 9, 3, 64, 200))


def define_flags() -> None:
    """Flags of this program (defined here so that importing the module defines none)."""
    flags.DEFINE_string("json", "", "Where to write the results; empty writes none.")
    flags.DEFINE_float("budget_s", 540.0, "Seconds after which the remaining measurements are left out.")
    flags.DEFINE_multi_string("model", ["7b", "70b", "13b"], "Which models' shapes, most important first.")


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in fp32."""
    difference = actual.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def check_one(m: int, k: int, n: int, group_size: int, dtype) -> dict[str, float]:
    """Relative errors of forward, epilogue, backward and SwiGLU against fp32 on the dequantized weight."""
    static = {"k": k, "n": n, "group_size": group_size}
    keys = jax.random.split(jax.random.key(m + k), 4)
    packed = measure.random_weight(keys[0], k, n, group_size)
    x = jax.random.normal(keys[1], (m, k), dtype)
    dy = jax.random.normal(keys[2], (m, n), dtype)
    w = reference.dequantize(*packed, **static, dtype=jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    y = jnp.dot(x.astype(jnp.float32), w, precision=exact)
    dx = jnp.dot(dy.astype(jnp.float32), w.T, precision=exact)

    def op(x, residual=None):
        return api.matmul(x, *packed, **static, implementation="triton", residual=residual)

    errors = {"forward": relative_error(jax.jit(op)(x), y)}
    errors["residual"] = relative_error(jax.jit(op)(x, dy), y + dy.astype(jnp.float32))
    errors["backward"] = relative_error(jax.jit(lambda dy: jax.vjp(op, x)[1](dy)[0])(dy), dx)
    if n % 2 == 0:
        fused = jax.jit(lambda x: api.matmul_swiglu(x, *packed, **static, implementation="triton"))(x)
        errors["swiglu"] = relative_error(fused, reference.swiglu(y))
    return errors


def check_decode(b: int, heads: int, kv_heads: int, head_dim: int, slots: int, dtype) -> dict[str, float]:
    """Relative errors of the decode step's kernels: attention with the cache's update, residual + norm, SwiGLU."""
    embed, width = heads * head_dim, (heads + 2 * kv_heads) * head_dim
    keys = jax.random.split(jax.random.key(b + slots), 9)
    x, residual = (jax.random.normal(key, (b, embed), dtype) for key in keys[:2])
    cache = [jax.random.normal(key, (b, kv_heads, slots, head_dim), dtype) for key in keys[2:4]]
    angles = jax.random.uniform(keys[4], (b, head_dim // 2), maxval=6.0)
    positions = jax.random.randint(keys[5], (b,), 0, slots)
    tables = jnp.cos(angles), jnp.sin(angles)
    static = {"k": embed, "n": width, "group_size": GROUP}
    packed = measure.random_weight(keys[6], embed, width, GROUP)

    def definition(x, delta, cos, sin, keys, values, positions, *packed):
        qkv = reference.matmul(x, *packed, **static, residual=delta)
        return decode_reference.attend(qkv, cos, sin, keys, values, positions)

    attend = lambda x, *arrays: decode.matmul_attend(definition, finished(x, EPS), *arrays, **static, eps=EPS)[:3]
    delta = jax.random.normal(keys[8], (b, width), dtype) * jnp.asarray(0.1, dtype)  # as LoRA's
    arrays = (x * jnp.asarray(0.1, dtype), delta, *tables, *cache, positions, *packed)  # no softmax of one slot alone
    found, expected = jax.jit(attend)(*arrays), jax.jit(definition)(*arrays)
    errors = {name: relative_error(a, e.astype(jnp.float32)) for name, a, e in zip(("out", "k", "v"), found, expected)}
    weight = jax.random.normal(keys[7], (embed,))
    static = {"k": embed, "n": embed, "group_size": GROUP}
    packed = measure.random_weight(keys[7], embed, embed, GROUP)

    def swiglu(x, *packed):
        return reference.swiglu(reference.matmul(x, *packed, **static))

    def normed(x, residual, weight, *packed):
        h = reference.matmul(x, *packed, **static, residual=residual)
        return h, decode_reference.norm(h, weight, EPS)

    def run(x, residual, weight, *packed):
        counters = decode.swiglu_zeros(b, embed)
        h, norm, zeros = decode.matmul_norm(
            normed, x, residual, weight, None, *packed, eps=EPS, num_zeros=counters, **static
        )
        gated, _ = decode.matmul_swiglu(swiglu, norm, zeros, *packed, eps=EPS, **static)
        return h, finish(norm, EPS), gated

    def expect(x, residual, weight, *packed):
        h, norm = normed(x, residual, weight, *packed)
        return h, norm, swiglu(norm, *packed)

    arrays = (x, residual, weight, *packed)
    found, expected = jax.jit(run)(*arrays), jax.jit(expect)(*arrays)
    for name, a, e in zip(("h", "norm", "swiglu"), found, expected):
        errors[name] = relative_error(a, e.astype(jnp.float32))
    return errors


def checks() -> list[tuple[str, Callable[[], dict[str, float]], float]]:
    """(name, check, largest error allowed) of every case, bf16 first; the limits are a few roundings of the output."""
    found = []
    for dtype, limit in ((jnp.bfloat16, 6e-3), (jnp.float16, 1e-3)):
        name = jnp.dtype(dtype).name
        for m, k, n, group in CORRECTNESS:
            check = functools.partial(check_one, m, k, n, group, dtype)
            found.append((f"M={m} K={k} N={n} group={group} {name}", check, limit))
        for case in DECODE:  # both sides round on the way
            found.append((f"decode step {case} {name}", functools.partial(check_decode, *case, dtype), 2 * limit))
    return found


def correctness(results: dict, deadline: float) -> bool:
    """Adds a row for each case to results["correctness"], but for those that are there and were right; whether all are.

    What there is no time for goes to results["left_out"].
    """
    rows = results["correctness"] = [row for row in results.get("correctness", []) if row["passed"]]
    right = [row["case"] for row in rows]
    for name, check, limit in checks():
        if name in right:
            continue
        if time.monotonic() > deadline:
            results["left_out"].append(name)
            continue
        errors = check()
        rows.append({"case": name, "errors": errors, "passed": all(e < limit for e in errors.values())})
        write(results)
        if not rows[-1]["passed"]:
            print(f"WRONG {name}: {errors}", flush=True)
    return all(row["passed"] for row in rows)


def gemlite_us(m: int, k: int, n: int) -> float | None:
    """gemlite's time for the same product in fp16, or None where it is not installed."""
    if importlib.util.find_spec("gemlite") is None or importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]: optional
    from gemlite.core import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]: optional

    layers = []
    for _ in range(measure.num_sets(shapes.packed_bytes(k, n))):
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        scale = torch.full((n * k // GROUP, 1), 0.01, dtype=torch.float16, device="cuda")
        layer = GemLiteLinear(
            4, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        layer.pack(q, scale, torch.full_like(scale, 8.0), None)
        layers.append(layer)
    x = torch.randn((m, k), dtype=torch.float16, device="cuda")
    for layer in layers:
        layer(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(7):
        start.record()
        for layer in layers:
            layer(x)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(layers))
    return sorted(times)[3]


def products(
    model: str, name: str, k: int, n: int, ms: list, copy_gbps: float, deadline: float, *, implementation="triton"
) -> tuple[list[dict], list]:
    """(rows, M left out) of one projection: our product, XLA's bf16 dot and gemlite at every M of ms."""
    if not ms or time.monotonic() > deadline:
        return [], ms
    static = {"k": k, "n": n, "group_size": GROUP}
    packed_bytes = shapes.packed_bytes(k, n)
    sets = measure.num_sets(packed_bytes)
    keys = jax.random.split(jax.random.key(0), sets)
    packed = [measure.random_weight(key, k, n, GROUP) for key in keys]
    dense_sets = measure.num_sets(2 * k * n)
    dense = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys[:dense_sets]]
    rows = []
    for i, m in enumerate(ms):
        if time.monotonic() > deadline:
            return rows, ms[i:]
        x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        us, how = measure.time_us(
            lambda x, *p: api.matmul(x, *p, **static, implementation=implementation), [(x, *p) for p in packed]
        )
        dot_us, _ = measure.time_us(jnp.dot, [(x, w) for w in dense])
        other = gemlite_us(m, k, n)
        gbps = packed_bytes / us / 1e3
        row = {
            "model": model,
            "projection": name,
            "m": m,
            "n": n,
            "k": k,
            "us": us,
            "timing": how,
            "tflops": 2e-6 * m * n * k / us,
            "gbps": gbps,
            "copy_fraction": gbps / copy_gbps,
            "bf16_dot_us": dot_us,
            "speedup": dot_us / us,
            "gemlite_us": other,
        }
        rows.append(row)
        beside = "" if other is None else f"  gemlite {other:8.1f} us"
        print(
            f"{model:>4} {name:8} {m:5} {n:6} {k:6} {us:9.1f} us {row['tflops']:7.1f} TFLOP/s {gbps:7.0f} GB/s "
            f"{row['copy_fraction']:5.2f} of copy {row['speedup']:5.2f}x bf16{beside}",
            flush=True,
        )
    return rows, []


def extras(copy_gbps: float, *, implementation: str = "triton") -> list[dict]:
    """What the table does not show, on 7B's shapes: SwiGLU fused or not, the backward product, LoRA for 64 clients."""
    rows = []

    def add(name, us, **more):
        rows.append({"name": name, "us": us, **more})
        print(f"{name:48} {us:9.1f} us {more}", flush=True)

    k, n = shapes.projections("7b")["gate_up"]
    static = {"k": k, "n": n, "group_size": GROUP, "implementation": implementation}
    count = measure.num_sets(shapes.packed_bytes(k, n))
    packed = [measure.random_weight(key, k, n, GROUP) for key in jax.random.split(jax.random.key(0), count)]
    for m in (1, 16):
        x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        sets = [(x, *p) for p in packed]
        fused, _ = measure.time_us(lambda x, *p: api.matmul_swiglu(x, *p, **static), sets)
        plain, _ = measure.time_us(lambda x, *p: reference.swiglu(api.matmul(x, *p, **static)), sets)
        fraction = shapes.packed_bytes(k, n) / fused / 1e3 / copy_gbps
        add(f"gate|up with SwiGLU fused, M={m}", fused, m=m, copy_fraction=fraction)
        add(f"gate|up, SwiGLU by XLA, M={m}", plain)
    for m in (1, 16, 64, 4096):
        dy = jax.random.normal(jax.random.key(1), (m, n), jnp.bfloat16)

        def backward(dy, *p):
            return jax.vjp(lambda x: api.matmul(x, *p, **static), jnp.zeros((dy.shape[0], k), dy.dtype))[1](dy)[0]

        us, _ = measure.time_us(backward, [(dy, *p) for p in packed])
        add(f"backward of gate|up, M={m}", us, tflops=2e-6 * m * n * k / us)
    clients, rank = 64, 8
    x = jax.random.normal(jax.random.key(1), (clients, 1, k), jnp.bfloat16)
    a = jax.random.normal(jax.random.key(2), (clients, k, rank), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(3), (clients, rank, n), jnp.bfloat16)
    scale = jnp.ones((clients,), jnp.float32)
    with_lora, _ = measure.time_us(
        lambda x, q, s, z: lora.matmul(x, q, s, z, a, b, scale, **static), [(x, *p) for p in packed]
    )
    without, _ = measure.time_us(lambda x, *p: api.matmul(x, *p, **static), [(x, *p) for p in packed])
    add(f"gate|up of {clients} clients, rank-{rank} LoRA each", with_lora, base_us=without)
    return rows


def write(results: dict) -> None:
    """To --json, as far as it has come: a run that is cut off leaves what it has."""
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump(results, file, indent=1)


def earlier(about: dict) -> dict:
    """What --json holds of an earlier run with the same GPU and jax, else only `about` these."""
    try:
        with open(FLAGS.json, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):  # no such file, or one that was cut off
        return about
    return found if about.items() <= found.items() else about


def main(argv) -> None:
    del argv
    device = measure.require_gpu("kernels.w4a16.bench")
    start = time.monotonic()
    deadline = start + FLAGS.budget_s
    results = earlier({"device": device.device_kind, "jax": jax.__version__, "group_size": GROUP})
    results["left_out"] = []
    good = correctness(results, start + 0.6 * FLAGS.budget_s)
    write(results)
    print(f"correctness: {'all good' if good else 'FAILED'}, {time.monotonic() - start:.0f} s", flush=True)
    if good:
        measure_all(device.device_kind, results, deadline)
        print(f"left out for time: {results['left_out'] or 'nothing'}")
    results["seconds"] = time.monotonic() - start
    write(results)
    sys.exit(0 if good else 1)


def measure_all(device_kind: str, results: dict, deadline: float) -> None:
    """Adds to `results` what is not in them yet."""
    if "copy_gbps" not in results:
        results["copy_gbps"] = measure.copy_gbps()
    print(f"{device_kind}: copy {results['copy_gbps']:.0f} GB/s", flush=True)
    if "extras" not in results:
        results["extras"] = extras(results["copy_gbps"])
    table = results.setdefault("table", [])
    for model in FLAGS.model:
        for name, (k, n) in shapes.projections(model).items():
            done = [row["m"] for row in table if (row["model"], row["projection"]) == (model, name)]
            ms = [m for m in shapes.ROWS if m not in done]
            rows, left = products(model, name, k, n, ms, results["copy_gbps"], deadline)
            table += rows
            results["left_out"] += [f"{model} {name} M={m}" for m in left]
            write(results)


if __name__ == "__main__":
    define_flags()
    app.run(main)
