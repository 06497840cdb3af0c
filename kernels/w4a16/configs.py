"""Which block configuration serves which product: one table, written by hand from `python -m kernels.w4a16.tune`.

Nothing is tuned at run time. Every entry is compiled for sm_80 and sm_90 in tests/kernels/test_compile.py (no spills,
matrix instructions, 16-byte loads of the packed words). docs/results/kernels.md says what was measured on a GPU.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch a kernel.

    Attributes:
      block_m, block_n: rows of x and columns of W per program.
      num_warps, num_stages: Triton's launch options.
      programs: split the summed dimension until about this many programs run (1 keeps it whole).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 1


# (largest M, configuration), smallest M first. The first is the GEMV / split-K family, the others the tensor-core one.
# All use the matrix instructions, M = 1 too: an H200 issues about 3.6 instructions in the time that one weight takes to
# arrive (4.3 TB/s, 132 SMs, 1.75 GHz). Unpacking takes 1.4 of them; products on the ordinary cores would add two. The
# whole loop of the first entry is 410 instructions for 128 weights of a thread, 3.2 a weight (SASS, sm_90).
MATMUL = (
    (16, Config(block_m=16, block_n=64, num_warps=4, num_stages=4, programs=256)),
    (32, Config(block_m=32, block_n=64, num_warps=4, num_stages=4, programs=256)),
    (256, Config(block_m=64, block_n=128, num_warps=8, num_stages=3, programs=128)),
)
SWIGLU = Config(block_m=16, block_n=64, num_warps=4, num_stages=4)
TRANSPOSED = ((16, Config(block_m=16, block_n=64, num_warps=4, num_stages=3, programs=256)),)
DEQUANTIZE = Config(block_m=0, block_n=128, num_warps=4, num_stages=1)

MIN_STEPS = 4
DECODE_ROWS = MATMUL[0][0]  # the largest M for which SwiGLU is fused


def choose(table: tuple, m: int) -> Config | None:
    """The first entry of the table that takes M rows; None where the weight is dequantized first."""
    for largest, config in table:
        if m <= largest:
            return config
    return None


def splits(config: Config, *, tiles: int, steps: int) -> tuple[int, int]:
    """(number of splits, steps per split) of a loop of `steps`, so that about `config.programs` programs run.

    A split keeps `MIN_STEPS`, since its pipeline must fill first; no split is empty.
    """
    wanted = max(1, min(config.programs // tiles, steps // MIN_STEPS))
    per_split = -(-steps // wanted)
    return -(-steps // per_split), per_split
