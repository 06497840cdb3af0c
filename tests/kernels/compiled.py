"""Compiles for a GPU that is not there what `gpu.py` would launch, and reads the machine code back.

`launches` runs a function of gpu.py on abstract arrays with `launch.call` replaced by a recorder, so that what is
compiled is the real launch: kernel, constants, argument types, and jax_triton 0.3.1's specialization (array pointers
are 16-byte aligned, an integer equal to 1 becomes a constant, no other integer is known to be divisible by anything).
"""

import dataclasses
import os
import re
import subprocess
import tempfile

import jax
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.w4a16 import launch

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary:
    """Compiled code: registers per thread, bytes of stack (spills), shared memory, Triton GPU IR, SASS."""

    registers: int
    stack: int
    shared: int
    ttgir: str
    sass: str


def launches(monkeypatch, fn, *arrays) -> list[tuple]:
    """The (kernel, argument types, constants, num_warps, num_stages) that fn(*arrays) launches."""
    recorded = []

    def record(kernel, *args, out_shape, grid, num_warps, num_stages, compute_capability=None, **constants):
        kinds = [a if isinstance(a, int) else "*" + TYPES[a.dtype.name] for a in args]
        kinds.append("*" + TYPES[out_shape.dtype.name])
        recorded.append((kernel, tuple(kinds), constants, num_warps, num_stages))
        return jax.numpy.zeros(out_shape.shape, out_shape.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "call", record)
        jax.eval_shape(fn, *arrays)
    return recorded


def build(launched: tuple, capability: int) -> Binary:
    """Compiles one recorded launch for sm_<capability>."""
    kernel, kinds, constants, num_warps, num_stages = launched
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = kinds[i] if i < len(kinds) else constants[name]
        if isinstance(kind, str):
            signature[name], attributes[(i,)] = kind, [["tt.divisibility", 16]]
        elif i < len(kinds) and kind != 1:
            signature[name] = "i32"
        else:
            signature[name], constexprs[(i,)] = "constexpr", kind
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Binary(
        registers=registers, stack=stack, shared=compiled.metadata.shared, ttgir=compiled.asm["ttgir"], sass=sass
    )


def _tool(name, *args) -> str:
    done = subprocess.run([os.path.join(TOOLS, name), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def check(binary: Binary, capability: int, *, pipelined: bool, wgmma: bool, in_registers: bool) -> None:
    """Asserts what a shipped matrix kernel must show.

    Args:
      pipelined: the packed words travel by asynchronous 16-byte copies (else by 16-byte loads).
      wgmma: Hopper's instruction is expected on sm_90.
      in_registers: the unpacking happens in the matrix operand's own layout, with no trip through shared memory.
    """
    assert binary.stack == 0, f"spills {binary.stack} bytes of stack ({binary.registers} registers)"
    limit = 227 if capability == 90 else 163
    assert binary.shared <= limit * 1024, f"needs {binary.shared} bytes of shared memory"
    instruction = "HGMMA" if wgmma and capability == 90 else "HMMA"
    assert instruction in binary.sass, f"no {instruction}"
    if pipelined:
        copies = [line for line in binary.ttgir.splitlines() if "async_copy_global_to_local" in line and "xi16" in line]
        assert copies, "the packed words are not copied asynchronously"
        assert all("contiguity = 8" in line for line in copies), "copies of packed words under 16 bytes"
        assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128", binary.sass), "no 16-byte asynchronous copy"
    unpacked = [line for line in binary.ttgir.splitlines() if "elementwise_inline_asm" in line]
    assert unpacked, "no packed unpacking"
    if in_registers:
        assert all("#ttg.dot_op" in line for line in unpacked), "unpacked outside the operand's layout"
