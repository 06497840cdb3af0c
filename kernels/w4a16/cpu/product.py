"""x @ W and dy @ W^T for 4-bit W on a CPU: the XLA custom calls of the library that `build` makes.

Forward, x is rounded to integers, by default of 16 bits with one scale per row and 128 rows of K; every other operation
is exact or in fp32. Relative error of a product about 2e-5 (6e-3 with 8 bits). Backward, everything is in fp32, but for
many rows on x86-64 (pairs.h), where dy times the scales is rounded to 16 bits: relative error 5e-5 to 2e-4.

On a CPU with a matrix unit (AMX) products of many rows with 16 bits go there, both ways: x and the unpacked W as two
bfloat16 each, relative error about 6e-6 (amx.cc). So a row's last bits may depend on whether there are many rows.
"""

import functools
import math
import os
import warnings

import jax
import jax.numpy as jnp

from kernels.w4a16 import reference
from kernels.w4a16.cpu import build

SWITCH = "FMFL_CPU_KERNEL"
_library = functools.cache(build.load)  # finding it asks the compiler for its version


@functools.cache
def available() -> bool:
    """Whether the kernels can be used here; builds and registers them when first asked. If not, says so in one line."""
    if os.environ.get(SWITCH) == "0":
        reason = f"{SWITCH}=0"
    else:
        try:
            loaded = _library()
        except build.BuildError as error:
            reason = str(error)
        else:
            for name in build.TARGETS:
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
            return True
    message = f"w4a16: int4 products on this CPU run by the slower XLA reference: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return False


@functools.cache
def has_matrix_unit() -> bool:
    """Whether products of many rows go to this CPU's matrix unit (AMX). Where the CPU has none nothing is built."""
    return "amx_bf16" in build.cpu_flags().split() and available() and runs("amx")


@functools.cache
def multiplies_bytes() -> bool:
    """Whether products of many rows with 8-bit W are best computed as such (x86-64: pairs.h), not as two 4-bit ones."""
    return available() and runs("avx2") and not has_matrix_unit()


def runs(instructions: str) -> bool:
    """Whether this CPU has what the kernels of this name need: avx512, avx2, neon, or amx, which serves many rows."""
    return bool(_library().w4a16_runs_here(instructions.encode()))


def _call(target: str, x, width: int, weight, **attributes) -> jax.Array:
    """[..., rows] -> [..., width] in fp32."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    out = jax.ShapeDtypeStruct((rows.shape[0], width), jnp.float32)
    return jax.ffi.ffi_call(target, out)(rows, *weight, **attributes).reshape(*x.shape[:-1], width)


def _known_floats(array):
    """As it is where the kernels read its type, else in fp32."""
    known = (jnp.int32, jnp.float32, jnp.float16, jnp.bfloat16)
    return array if array.dtype in known else array.astype(jnp.float32)


def matmul(
    x,
    qweight,
    scale,
    zero_point,
    *,
    k: int,
    n: int,
    group_size: int,
    bits: int = 4,
    activation_bits: int = 16,
    bias=None,
    residual=None,
    instructions: str = "best",
) -> jax.Array:
    """As `reference.matmul`; bits is 4, or 8 for W in halves (`kernels.w4a16.halves`), activation_bits 16 or 8,
    instructions one of best, amx, avx512, avx2 and neon."""
    weight = (qweight, _known_floats(scale), _known_floats(zero_point))
    static = {"k": k, "n": n, "group_size": group_size, "bits": bits, "activation_bits": activation_bits}
    y = _call("w4a16_forward", x, n, weight, **static, instructions=instructions)
    return reference.epilogue(y, bias, residual, x.dtype)


def matmul_layer(x, layer, weights, *, k: int, n: int, group_size: int, activation_bits: int = 16) -> jax.Array:
    """`matmul` with the weight of one layer, an int32 scalar; weights holds (qweight, scale, zero_point) of each.

    No layer's weight is copied, as a loop over layers would copy what it takes out of a stack of them.
    """
    weights = [(qweight, _known_floats(scale), _known_floats(zero_point)) for qweight, scale, zero_point in weights]
    arrays = [array for of_layers in zip(*weights) for array in of_layers]
    static = {"k": k, "n": n, "group_size": group_size, "activation_bits": activation_bits, "instructions": "best"}
    return _call("w4a16_forward_layer", x, n, (layer, *arrays), **static).astype(x.dtype)


def attend(q, layer, positions, keys, values, *, instructions: str = "best") -> jax.Array:
    """Softmax attention of one token a row in one layer of a cache, as it lies: attend.h.

    q fp32 [B, N, H], N a multiple of K; layer int32 []; positions int32 [B], the last slots to be seen; keys and values
    fp32 [B, L, K, S, H] -> fp32 [B, N, H].
    """
    b, n, h = q.shape
    out = jax.ShapeDtypeStruct((b, keys.shape[2], n // keys.shape[2], h), jnp.float32)
    arrays = (q / math.sqrt(h)).reshape(out.shape), layer, positions, keys, values
    return jax.ffi.ffi_call("w4a16_attend", out)(*arrays, instructions=instructions).reshape(b, n, h)


def matmul_transposed(
    dy, qweight, scale, zero_point, *, k: int, n: int, group_size: int, bits: int = 4, instructions: str = "best"
) -> jax.Array:
    """As `reference.matmul_transposed`; bits and instructions as for `matmul`."""
    weight = (qweight, _known_floats(scale), _known_floats(zero_point))
    static = {"k": k, "n": n, "group_size": group_size, "bits": bits}
    return _call("w4a16_backward", dy, k, weight, **static, instructions=instructions).astype(dy.dtype)
