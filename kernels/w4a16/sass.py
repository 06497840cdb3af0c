"""Machine code for a GPU that is not there: what `gpu.py` would launch, compiled by Triton and read back.

`launches` runs a function of gpu.py on abstract arrays with `launch.call` replaced by a recorder, so that what is
compiled is the real launch: kernel, grid, constants, argument types, and jax_triton 0.3.1's specialization (array
pointers are 16-byte aligned, an integer equal to 1 becomes a constant, no other integer is known to be divisible by
anything). The disassembler is the one in Triton's wheel. Imports triton.
"""

import collections
import dataclasses
import os
import re
import subprocess
import tempfile
from unittest import mock

import jax
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.w4a16 import launch

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
MATRIX = ("HGMMA", "HMMA")  # matrix instructions of sm_90 and sm_80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch: kernel, types of its arguments (or an integer's value), grid, constants, warps and stages."""

    kernel: triton.JITFunction
    arguments: tuple
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    constants: dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary:
    """Compiled code: registers per thread, bytes of stack (spills), bytes of shared memory, Triton GPU IR, SASS."""

    registers: int
    stack: int
    shared: int
    ttgir: str
    sass: str


def launches(fn, *arrays) -> list[Launch]:
    """What fn(*arrays) launches; the arrays may be abstract."""
    recorded = []

    def record(
        kernel, *args, out_shape, grid, num_warps, num_stages, compute_capability=None, aliases=None, **constants
    ):
        outs = jax.tree.leaves(out_shape)
        kinds = [a if isinstance(a, int) else "*" + TYPES[a.dtype.name] for a in args]
        kinds += ["*" + TYPES[out.dtype.name] for out in outs]
        recorded.append(
            Launch(
                kernel=kernel,
                arguments=tuple(kinds),
                grid=grid,
                num_warps=num_warps,
                num_stages=num_stages,
                constants=constants,
            )
        )
        return jax.tree.map(lambda out: jax.numpy.zeros(out.shape, out.dtype), out_shape)

    with mock.patch.object(launch, "call", record):
        jax.eval_shape(lambda *arrays: fn(*arrays), *arrays)  # a new function: what jax has traced it does not call
    return recorded


def build(launched: Launch, capability: int) -> Binary:
    """Compiles one recorded launch for sm_<capability>."""
    kernel, kinds = launched.kernel, launched.arguments
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = kinds[i] if i < len(kinds) else launched.constants[name]
        if isinstance(kind, str):
            signature[name], attributes[(i,)] = kind, [["tt.divisibility", 16]]
        elif i < len(kinds) and kind != 1:
            signature[name] = "i32"
        else:
            signature[name], constexprs[(i,)] = "constexpr", kind
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": launched.num_warps, "num_stages": launched.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    return Binary(
        registers=registers, stack=stack, shared=compiled.metadata.shared, ttgir=compiled.asm["ttgir"], sass=sass
    )


def _tool(name, *args) -> str:
    done = subprocess.run([os.path.join(TOOLS, name), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction, the predicate in the text, of a `cuobjdump -sass` listing."""
    return [(int(a, 16), text.strip()) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]


def opcode(text: str) -> str:
    """LDGSTS of "@!P0 LDGSTS.E.BYPASS.128 [R1], ..."."""
    words = text.split()
    return words[1 if words[0].startswith("@") else 0].split(".")[0]


def main_loop(sass: str) -> list[str]:
    """The instructions of the loop with the most matrix instructions (of the shortest such loop, padding left out).

    A loop is what lies between a branch backward and where it goes. Raises ValueError where no loop has one.
    """
    code = instructions(sass)
    best: list[str] = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target is None or int(target[1], 16) >= address:
            continue
        body = [t for a, t in code if int(target[1], 16) <= a <= address and opcode(t) != "NOP"]
        rank = lambda body: (sum(opcode(t) in MATRIX for t in body), -len(body))
        if rank(body)[0] and (not best or rank(body) > rank(best)):
            best = body
    if not best:
        raise ValueError("no loop with matrix instructions")
    return best


def histogram(body: list[str]) -> collections.Counter:
    """How often each opcode is in these instructions."""
    return collections.Counter(map(opcode, body))


def products(body: list[str]) -> tuple[int, int]:
    """Multiplications of 16-bit numbers of a warp in these instructions: (by mma.sync, by wgmma).

    HMMA.16816 is a warp's 16 x 8 x 16; of HGMMA.64xNx16 a warp does 16 x N x 16.
    """
    by_mma = sum(16 * 8 * 16 for text in body if opcode(text) == "HMMA")
    widths = re.findall(r"HGMMA\.64x(\d+)x16", "\n".join(body))
    return by_mma, sum(16 * 16 * int(n) for n in widths)
