"""Every shipped configuration compiles for sm_80 and sm_90: no spills, matrix instructions, 16-byte packed loads."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels.w4a16 import configs, few_rows, gpu, kernels, layout, sass
from tests.kernels import compiled

pytestmark = pytest.mark.usefixtures("kept_listings")

CAPABILITIES = (80, 90)
K, N = 4096, 12288  # LLaMA-7B's fused q/k/v


def arguments(m, k, n, group_size, dtype=jnp.bfloat16, width=None):
    """Abstract (x or dy [m, width], qweight, scale, zero_point) of a [k, n] weight."""
    shapes = layout.packed_shapes(k, n, group_size)
    return (
        jax.ShapeDtypeStruct((m, width or k), dtype),
        jax.ShapeDtypeStruct(shapes["qweight"], jnp.int32),
        jax.ShapeDtypeStruct(shapes["scale"], jnp.float16),
        jax.ShapeDtypeStruct(shapes["zero_point"], jnp.int32),
    )


def launch_of(fn, m, k, n, group_size, *, config=None, dtype=jnp.bfloat16, epilogue=False):
    """The one launch of a function of gpu.py at these shapes."""
    static = {"k": k, "n": n, "group_size": group_size}
    if fn is gpu.matmul:
        bias, residual = jax.ShapeDtypeStruct((n,), dtype), jax.ShapeDtypeStruct((m, n), dtype)

        def run(x, bias, residual, *packed):
            return fn(x, bias if epilogue else None, residual if epilogue else None, *packed, **static, config=config)

        x, *packed = arguments(m, k, n, group_size, dtype)
        found = sass.launches(run, x, bias, residual, *packed)
    elif fn is gpu.dequantize:
        run = functools.partial(fn, **static, dtype=dtype)
        found = sass.launches(run, *arguments(m, k, n, group_size)[1:])
    else:
        width = n if fn is gpu.matmul_transposed else k
        found = sass.launches(functools.partial(fn, **static), *arguments(m, k, n, group_size, dtype, width))
    (only,) = found
    return only


def run_ptx(text, dtype, first, second=0):
    """Executes the few PTX instructions that the kernels use on pairs: `$1` = first, `$2` = second -> `$0`, its bits.

    fma takes and gives subnormal numbers, as PTX's does for bf16x2 and f16x2 without .ftz.
    """
    registers = {"$1": np.uint32(first), "$2": np.uint32(second)}

    def pair(bits):
        return np.array([bits], np.uint32).view(dtype).astype(np.float32)

    for instruction in filter(None, (part.strip() for part in text.strip("{} ").split(";"))):
        name, operands = instruction.split(maxsplit=1)
        if name == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        if name == "shr.b32":
            registers[target] = values[0] >> values[1]
        elif name == "shl.b32":
            registers[target] = np.uint32(int(values[0]) << int(values[1]) & 0xFFFFFFFF)
        elif name == "mov.b32":
            registers[target] = values[0]
        elif name == "and.b32":
            registers[target] = values[0] & values[1]
        elif name.startswith("fma.rn."):
            exact = pair(values[0]) * pair(values[1]) + pair(values[2])
            registers[target] = exact.astype(dtype).view(np.uint32)[0]
        else:
            raise AssertionError(f"unexpected PTX instruction {instruction!r}")
    return np.array([registers["$0"]], np.uint32).view(dtype).astype(np.float64)


def words_of(i, q, rng):
    """Two words whose nibbles i are q and 15 - q; the other nibbles hold anything."""
    low, high = rng.integers(0, 16, (2, 4))
    low[i], high[i] = q, 15 - q
    return sum(int(low[j]) << 4 * j | int(high[j]) << (16 + 4 * j) for j in range(4))


@pytest.mark.parametrize(
    "asm, zero_asm, unit, dtype",
    [
        (kernels.BF16_ASM, kernels.BF16_ZERO_ASM, kernels.BF16_UNIT, ml_dtypes.bfloat16),
        (kernels.FP16_ASM, kernels.FP16_ZERO_ASM, kernels.FP16_UNIT, np.float16),
    ],
)
def test_unpacking_ptx_is_exact(asm, zero_asm, unit, dtype):
    """The interpreter has no inline PTX, so its text is executed here: (q - z) UNIT for every pair of nibbles, in each
    slice."""
    rng = np.random.default_rng(0)
    for q, zero in np.ndindex(16, 16):
        negative = run_ptx(zero_asm.value[0], dtype, zero << 16 | zero).astype(dtype).view(np.uint32)[0]
        for i in range(4):
            found = run_ptx(asm.value[i], dtype, words_of(i, q, rng), negative)
            np.testing.assert_array_equal(found / unit.value, [q - zero, 15 - q - zero])


def test_masked_nibbles_count_in_one_unit_with_x():
    """few_rows.py: nibble times scaled x is q x UNIT, exactly, in each slice; what stands for q = 1 is that too."""
    rng = np.random.default_rng(0)
    for q in range(16):
        x = rng.standard_normal(2).astype(ml_dtypes.bfloat16)
        for i in range(4):
            word = words_of(i, q, rng)
            scaled = run_ptx(few_rows.X_ASM.value[i % 2], ml_dtypes.bfloat16, x.view(np.uint32)[0])
            nibbles = run_ptx(few_rows.BF16_ASM.value[i], ml_dtypes.bfloat16, word)
            expected = np.array([q, 15 - q]) * x.astype(float)
            np.testing.assert_array_equal(nibbles * scaled / few_rows.BF16_UNIT.value, expected)
            nibbles = run_ptx(few_rows.FP16_ASM.value[i], np.float16, word)
            np.testing.assert_array_equal(nibbles / few_rows.FP16_UNIT.value, [q, 15 - q])
    ones = np.array([1, 16, 1, 16], np.uint16).view(ml_dtypes.bfloat16).astype(float)
    np.testing.assert_array_equal(ones * np.array([2.0**64, 2.0**60] * 2), few_rows.BF16_UNIT.value)
    assert float(np.array(16, np.uint16).view(np.float16)) == few_rows.FP16_UNIT.value


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [largest for largest, _ in configs.MATMUL])
def test_matmul_configurations(rows, capability):
    launched = launch_of(gpu.matmul, rows, K, 600 * 128, 128, epilogue=True)
    assert launched.constants["HAS_RESIDUAL"] and launched.grid[2] == 1
    binary = sass.build(launched, capability)
    stack = 64 if rows == 256 and capability == 80 else 0  # 19 of the 1,410 instructions of the loop
    compiled.check(binary, capability, pipelined=True, wgmma=rows > 16, in_registers=True, stack=stack)


@pytest.mark.parametrize(
    "rows, k, n, group_size, dtype",
    [
        (1, 4096, 4096, 128, jnp.bfloat16),  # M = 1 becomes a constant; K splits, fp32 partial sums
        (16, 11008, 4096, 128, jnp.float16),
        (8, 2752, 4096, 64, jnp.bfloat16),  # down_proj over four devices, ragged K
        (4, 4096, 1376, 32, jnp.bfloat16),  # gate_proj over eight
        (1, 200, 16, 128, jnp.float16),  # so small that nearly every run-time argument is 1 and becomes a constant
    ],
)
def test_decode_shapes(rows, k, n, group_size, dtype):
    launched = launch_of(gpu.matmul, rows, k, n, group_size, dtype=dtype)
    binary = sass.build(launched, 90)
    compiled.check(binary, 90, pipelined=True, wgmma=rows > 16, in_registers=True)


def test_group_sizes_without_constant_shifts():
    """Few rows take the zero point off the sums, so that a run-time shift costs them nothing."""
    for rows, group_size in ((16, 256), (32, 4096)):
        binary = sass.build(launch_of(gpu.matmul, rows, 4096, N, group_size), 90)
        compiled.check(binary, 90, pipelined=True, wgmma=rows > 16, in_registers=rows <= 16)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [largest for largest, _ in configs.SWIGLU])
def test_swiglu_configurations(rows, capability):
    binary = sass.build(launch_of(gpu.matmul_swiglu, rows, K, 22016, 128), capability)
    compiled.check(binary, capability, pipelined=True, wgmma=rows > 16, in_registers=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [largest for largest, _ in configs.TRANSPOSED])
def test_transposed_configurations(rows, capability):
    binary = sass.build(launch_of(gpu.matmul_transposed, rows, K, N, 128), capability)
    compiled.check(binary, capability, pipelined=True, wgmma=False, in_registers=False)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantize_configuration(capability):
    binary = sass.build(launch_of(gpu.dequantize, 1, K, N, 128), capability)
    assert binary.stack == 0
    assert re.search(r"LDG\.E\S*\.128", binary.sass) and re.search(r"STG\.E\S*\.128", binary.sass)


@pytest.mark.parametrize(
    "config, message",
    [
        (configs.Config(block_m=128, block_n=128, num_warps=4, num_stages=3), "spills|shared memory"),
        (configs.Config(block_m=32, block_n=32, num_warps=2, num_stages=3), "no HGMMA|spills"),
        (configs.Config(block_m=32, block_n=64, num_warps=4, num_stages=1), "not copied asynchronously"),
    ],
)
def test_a_bad_configuration_fails(config, message):
    launched = launch_of(gpu.matmul, 32, K, N, 128, config=config)
    with pytest.raises(AssertionError, match=message):
        compiled.check(sass.build(launched, 90), 90, pipelined=True, wgmma=True, in_registers=True)
