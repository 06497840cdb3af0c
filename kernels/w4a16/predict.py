"""`python -m kernels.w4a16.predict`: how fast the shipped kernels should be, read from their machine code. No GPU.

For every projection of a model and every M it compiles what would be launched and prints, from SASS, instructions a
weight and waits a loop step, registers, shared memory, programs an SM, bytes under way, and a predicted fraction of the
copy rate; beside it, with --json, what `kernels.w4a16.bench` measured. **A prediction, not a measurement.** The model:

    time = RAMP_US + root of the sum of squares of (memory or L2, the largest of issue, tensor and latency, in flight)
           + LAST_US where the last program of a tile adds up what others wrote

which is the largest where one dominates, and more where they hinder each other:

- memory: the weight's bytes over the copy rate;
- L2: all that programs ask for, over the L2's rate: a tile of columns reads all of x, a tile of rows all of the weight,
  and sums over parts of K are written and read once;
- issue: each of an SM's four schedulers starts one instruction a cycle, at best; the one with the most warps counts;
- tensor: likewise, a matrix instruction a scheduler every so many cycles;
- latency: a program's step takes at least a warp's instructions and WAIT_CYCLES a wait; programs of an SM overlap;
- in flight: by Little's law, bytes under way over LATENCY_US.

The constants are assumptions from published figures (RAMP, LATENCY, LAST and WAIT to about a quarter). The L2's rate is
the low end of what is measured on an H100, 5.5 to 7 TB/s, and for an A100 as much of its nominal rate. mma.sync reaches
63 % of an H100's peak (Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, 2024).
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
from absl import app, flags

from kernels.w4a16 import configs, gpu, layout, sass, shapes

FLAGS = flags.FLAGS
GROUP = 128
RAMP_US = 1.0  # launch, first loads, last stores
LATENCY_US = 0.7  # a load from memory under load
LAST_US = 1.0  # a program's sums visible to all, its count, the last one's reading and adding
WAIT_CYCLES = 60  # a wgmma of 32 rows of K, issue to result; a barrier of a loop step
SCHEDULERS = configs.SCHEDULERS
SHARED_OF_A_PROGRAM = 1024  # bytes that CUDA reserves for each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the model needs of a GPU: copy_gbps as an elementwise pass measures it (bytes read + written).

    multiplies: products of 16-bit numbers a cycle and scheduler, by wgmma; mma_share: what mma.sync reaches of them.
    """

    capability: int
    sms: int
    clock_ghz: float
    copy_gbps: float
    l2_gbps: float
    multiplies: int
    mma_share: float
    shared_bytes: int  # of an SM
    registers: int = 65536
    threads: int = 2048


_H200 = Gpu(
    capability=90,
    sms=132,
    clock_ghz=1.75,
    copy_gbps=4300,
    l2_gbps=5500,
    multiplies=512,
    mma_share=0.63,
    shared_bytes=233472,
)
_A100 = Gpu(
    capability=80,
    sms=108,
    clock_ghz=1.41,
    copy_gbps=1700,
    l2_gbps=4400,
    multiplies=256,
    mma_share=1.0,
    shared_bytes=167936,
)
GPUS = {"h200": _H200, "h100": dataclasses.replace(_H200, copy_gbps=3000), "a100": _A100}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A compiled matrix kernel. per_weight: instructions (of one thread) a weight; waits: a step of the loop; products:
    a warp's in a step, by mma.sync and by wgmma."""

    registers: int
    stack: int
    shared: int
    loop: int
    per_weight: float
    waits: int
    products: tuple[int, int]
    threads: int
    step_bytes: int  # of packed words, one program
    stages: int

    def resident(self, gpu: Gpu) -> int:
        """Programs that an SM holds at once."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(
            gpu.registers // registers,
            gpu.shared_bytes // (self.shared + SHARED_OF_A_PROGRAM),
            gpu.threads // self.threads,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """us and the fraction of the copy rate; busy: mean programs of an SM over the most; limit: the largest term."""

    us: float
    fraction: float
    programs: int
    resident: int
    waves: int
    busy: float
    in_flight: int
    limit: str


def launch_of(m: int, k: int, n: int, *, swiglu: bool, config=None) -> sass.Launch:
    """What gpu.py launches for bf16 x [M, K] and a [K, N] weight in groups of 128."""
    packed = layout.packed_shapes(k, n, GROUP)
    dtypes = {"qweight": jnp.int32, "scale": jnp.float16, "zero_point": jnp.int32}
    arrays = [jax.ShapeDtypeStruct(packed[name], dtype) for name, dtype in dtypes.items()]
    static = {"k": k, "n": n, "group_size": GROUP, "config": config}

    def run(x, *weight):
        if swiglu:
            return gpu.matmul_swiglu(x, *weight, **static)
        return gpu.matmul(x, None, None, *weight, **static)

    (only,) = sass.launches(run, jax.ShapeDtypeStruct((m, k), jnp.bfloat16), *arrays)
    return only


def read(launched: sass.Launch, capability: int) -> Kernel:
    """Compiles a launch of a matrix kernel for sm_<capability> and counts."""
    binary = sass.build(launched, capability)
    body = sass.main_loop(binary.sass)
    threads = 32 * launched.num_warps
    weights = launched.constants["BLOCK_N"] * step_rows(launched)  # of one step
    waits = sum("DEPBAR" in t and not t.startswith("LDGDEPBAR") or t.startswith("BAR.SYNC") for t in body)
    return Kernel(
        registers=binary.registers,
        stack=binary.stack,
        shared=binary.shared,
        loop=len(body),
        per_weight=len(body) * threads / weights,
        waits=waits,
        products=sass.products(body),
        threads=threads,
        step_bytes=weights // 2,
        stages=launched.num_stages,
    )


def step_rows(launched: sass.Launch) -> int:
    """Rows of K that a step of the loop takes."""
    return launched.constants.get("STEP", 2) * layout.SUPERBLOCK


def predict(launched: sass.Launch, kernel: Kernel, m: int, k: int, n: int, gpu_: Gpu) -> Prediction:
    """The model of the module docstring for one launch of x [M, K] by a [K, N] weight."""
    columns, rows, splits = launched.grid
    programs = math.prod(launched.grid)
    resident = min(kernel.resident(gpu_), -(-programs // gpu_.sms))
    busiest = -(-programs // gpu_.sms)
    waves = -(-busiest // kernel.resident(gpu_))
    steps = -(-k // step_rows(launched)) / splits
    warps = kernel.threads // 32
    on_one = math.ceil(busiest * warps / SCHEDULERS)  # warps that the busiest scheduler sees
    packed = shapes.packed_bytes(k, n, GROUP)
    sums = 2 * 4 * splits * m * n if splits > 1 else 0
    in_flight = resident * kernel.step_bytes * min(kernel.stages - 1, math.ceil(steps))
    cycles_us = 1e-3 / gpu_.clock_ghz
    own_cycles = math.ceil(warps / SCHEDULERS) * kernel.loop + kernel.waits * WAIT_CYCLES
    limits = {
        "memory": packed / gpu_.copy_gbps / 1e3,
        "L2": (packed * rows + 2 * m * k * columns + sums) / gpu_.l2_gbps / 1e3,
        "issue": on_one * steps * kernel.loop * cycles_us,
        "tensor": on_one * steps * tensor_cycles(kernel, gpu_) * cycles_us,
        "latency": waves * steps * own_cycles * cycles_us,
        "in flight": LATENCY_US * packed * rows / (in_flight * min(programs, gpu_.sms)),
    }
    limit = max(limits, key=lambda name: limits[name])
    hindering = (("memory", "L2"), ("issue", "tensor", "latency"), ("in flight",))
    us = RAMP_US + math.hypot(*(max(limits[name] for name in names) for names in hindering))
    if splits > 1 and "counts_ptr" in launched.kernel.arg_names:
        us += LAST_US
    return Prediction(
        us=us,
        fraction=packed / gpu_.copy_gbps / 1e3 / us,
        programs=programs,
        resident=kernel.resident(gpu_),
        waves=waves,
        busy=programs / gpu_.sms / busiest,
        in_flight=in_flight,
        limit=limit,
    )


def tensor_cycles(kernel: Kernel, gpu_: Gpu) -> float:
    """Cycles that a warp's matrix instructions of one step keep a scheduler's tensor core."""
    by_mma, by_wgmma = kernel.products
    return (by_mma / gpu_.mma_share + by_wgmma) / gpu_.multiplies


def is_swiglu(name: str, m: int) -> bool:
    """Whether a decode step takes this projection's SwiGLU kernel."""
    return name == "gate_up" and m <= configs.DECODE_ROWS


def read_results(path: str) -> dict:
    """A JSON file of `kernels.w4a16.bench`."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"kernels.w4a16.predict: --json={path}: {error}") from None


def measured_fractions(results: dict) -> dict[tuple[str, str, int], float]:
    """(model, projection, M) -> measured fraction of the copy rate; a decode step's gate_up with SwiGLU."""
    rows = [row for row in results.get("table", []) if not is_swiglu(row["projection"], row["m"])]
    found = {(row["model"], row["projection"], row["m"]): row["copy_fraction"] for row in rows}
    fused = [row for row in results.get("extras", []) if "copy_fraction" in row]
    return found | {("7b", "gate_up", row["m"]): row["copy_fraction"] for row in fused}


def card(results: dict) -> tuple[str, Gpu]:
    """The GPU that gave these results, with the copy rate that it measured; an H200 for none."""
    if "device" not in results:
        return "h200", GPUS["h200"]
    name = results["device"]
    for key, gpu_ in GPUS.items():
        if key in name.lower():
            return name, dataclasses.replace(gpu_, copy_gbps=results.get("copy_gbps", gpu_.copy_gbps))
    raise SystemExit(f"kernels.w4a16.predict: --json is of a {name!r}: --gpu must say whose rates to take")


def define_flags() -> None:
    """Flags of this program (defined here so that importing the module defines none)."""
    flags.DEFINE_enum("gpu", None, sorted(GPUS), "Which GPU's rates; default: of what --json is from, else an H200's.")
    flags.DEFINE_multi_enum("model", ["7b", "13b", "70b"], sorted(shapes.MODELS), "Which models' shapes.")
    flags.DEFINE_multi_integer("rows", [1, 8, 16, 32, 64], "Which M, at most 256.", lower_bound=1, upper_bound=256)
    flags.DEFINE_string("json", "", "A GPU's results (kernels.w4a16.bench --json) to print beside.")


def main(argv) -> None:
    del argv
    results = read_results(FLAGS.json) if FLAGS.json else {}
    name, device = (FLAGS.gpu, GPUS[FLAGS.gpu]) if FLAGS.gpu else card(results)
    measured = measured_fractions(results)
    print(f"Predicted from SASS, not measured: {name}, sm_{device.capability}, copy {device.copy_gbps:.0f} GB/s")
    print(
        "model projection    M      N      K  instr/weight waits  regs shared  an SM programs waves busy "
        " KB under way       us of copy limit     measured"
    )
    kernels = {}
    for model in FLAGS.model:
        for projection, (k, n) in shapes.projections(model).items():
            for m in FLAGS.rows:
                launched = launch_of(m, k, n, swiglu=is_swiglu(projection, m))
                code = (launched.kernel, launched.num_warps, launched.num_stages, tuple(launched.constants.items()))
                code = (code, launched.arguments[-2:], m == 1, launched.arguments.count(1))
                if code not in kernels:
                    kernels[code] = read(launched, device.capability)
                kernel = kernels[code]
                p = predict(launched, kernel, m, k, n, device)
                beside = measured.get((model, projection, m))
                print(
                    f"{model:>5} {projection:10} {m:4} {n:6} {k:6} {kernel.per_weight:13.2f} {kernel.waits:5} "
                    f"{kernel.registers:5} {kernel.shared:6} {p.resident:6} {p.programs:8} {p.waves:5} {p.busy:4.2f} "
                    f"{p.in_flight / 1024:13.0f} {p.us:9.1f} {p.fraction:7.2f} {p.limit:9} "
                    f"{'' if beside is None else format(beside, '8.2f')}",
                    flush=True,
                )


if __name__ == "__main__":
    define_flags()
    app.run(main)
