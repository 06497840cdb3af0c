"""What a shipped matrix kernel's machine code must show."""

import re

from kernels.w4a16.sass import Binary


def check(binary: Binary, capability: int, *, pipelined: bool, wgmma: bool, in_registers: bool, stack: int = 0) -> None:
    """Asserts what a shipped matrix kernel must show.

    Args:
      pipelined: the packed words travel by asynchronous 16-byte copies (else by 16-byte loads).
      wgmma: Hopper's instruction is expected on sm_90; else mma.sync.
      in_registers: the unpacking happens in the matrix operand's own layout, with no trip through shared memory.
      stack: bytes a thread that may be spilled.
    """
    assert binary.stack <= stack, f"spills {binary.stack} bytes of stack ({binary.registers} registers)"
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
