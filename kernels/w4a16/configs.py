"""Which block configuration serves which product: one table, written by hand from `python -m kernels.w4a16.predict`.

Nothing is tuned at run time. Every entry is compiled for sm_80 and sm_90 in tests/kernels/test_compile.py (no spills,
matrix instructions, 16-byte loads of the packed words) and held to the predictor's bounds in test_predict.py.
`python -m kernels.w4a16.tune` times the alternatives on a GPU; docs/results/kernels.md says what was measured on one.
"""

import dataclasses

SMS = 132  # of an H100 and an H200; only how a product is cut depends on it, not what it gives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch a kernel.

    Attributes:
      block_m, block_n: rows of x and columns of W per program (of SwiGLU, gate and up together).
      num_warps, num_stages: Triton's launch options.
      resident: programs an SM holds at once, as far as K is split for them (1 keeps it whole).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int = 1

    @property
    def few_rows(self) -> bool:
        """Whether the kernel is one of few_rows.py."""
        return self.block_m <= 16

    @property
    def step_rows(self) -> int:
        """Rows of K that a step of the loop takes: 256, where the registers allow it."""
        return 256 if not self.few_rows or self.strips * self.block_m <= 32 else 128

    @property
    def hiding(self) -> float:
        """Warps that a scheduler works off while one alone goes through its own latencies (wgmma: 15 waits a step)."""
        return 1.3 if self.few_rows else 3.0

    @property
    def strips(self) -> int:
        """Strips of columns of a kernel of few_rows.py, 16 a warp each."""
        return self.block_n // (16 * self.num_warps)


# (largest M, configuration), smallest M first. All use the matrix instructions, M = 1 too.
MATMUL = (
    (8, Config(block_m=8, block_n=256, num_warps=4, num_stages=3, resident=3)),
    (16, Config(block_m=16, block_n=256, num_warps=4, num_stages=4, resident=2)),
    (32, Config(block_m=32, block_n=256, num_warps=8, num_stages=4, resident=2)),
    (256, Config(block_m=64, block_n=256, num_warps=8, num_stages=3)),
)
SWIGLU = (
    (8, Config(block_m=8, block_n=256, num_warps=4, num_stages=3, resident=3)),
    (16, Config(block_m=16, block_n=256, num_warps=4, num_stages=4, resident=2)),
)
TRANSPOSED = ((16, Config(block_m=16, block_n=64, num_warps=4, num_stages=3, resident=2)),)
DEQUANTIZE = Config(block_m=0, block_n=128, num_warps=4, num_stages=1)

DECODE_ROWS = SWIGLU[-1][0]  # the largest M for which SwiGLU is fused
MAX_ROWS = MATMUL[-1][0]  # the largest M with a kernel of its own
MAX_SPLITS = 16
SPLIT_COST = 0.5  # of a program, in steps: what comes before and after the loop; sums of parts of K come to it
SCHEDULERS = 4  # of an SM


def choose(table: tuple, m: int) -> Config | None:
    """The first entry of the table that takes M rows; None where the weight is dequantized first."""
    for largest, config in table:
        if m <= largest:
            return config
    return None


def swiglu_tiles(m: int, n: int) -> int:
    """Into how many tiles SwiGLU's kernel of M rows cuts N columns, each with a counter; 0 above its rows."""
    config = choose(SWIGLU, m)
    return 0 if config is None else -(-n // config.block_n)


def zeros_written(count: int) -> int:
    """How many zeros a launch writes that is asked for `count`: a power of two (tl.arange's), and one for none."""
    return 1 << max(0, count - 1).bit_length()


def splits(*, rows: int, tiles: int, steps: int, config: Config) -> tuple[int, int]:
    """(number of splits, steps per split) of a loop of `steps` for each of `tiles`, the product being of so many rows.

    The cut whose busiest SM is done first, all programs resident at once; of equal ones the fewest splits. No split is
    empty.
    """
    best = (float("inf"), 1, steps)
    # Bytes of a column's fp32 sums, written and read, over those of its weights; twice, as then nothing else goes on.
    sums = 2 * (2 * 4 * min(rows, config.block_m)) / (config.step_rows / 2)
    for wanted in range(1, min(max(1, steps // 2), MAX_SPLITS) + 1):  # one step alone has nothing to fetch ahead of
        per_split = -(-steps // wanted)
        number = -(-steps // per_split)
        if number > 1 and tiles * number > config.resident * SMS:
            break
        busiest = -(-tiles * number // SMS)  # programs on one SM
        warps = -(-busiest * config.num_warps // SCHEDULERS)  # on one scheduler
        cost = SPLIT_COST + (sums if number > 1 else 0)  # in steps
        best = min(best, (max(warps, config.hiding) * per_split + cost * warps, number, per_split))
    return best[1:]
