"""The Triton kernels for at most 16 rows of x, a decode step's: y = x @ W, and the same with SwiGLU. Imports triton.

Their loop and its scheme: `few_rows.py`. A kernel of `kernels/decode` that writes h, the residual stream, has the same.
"""

import triton
import triton.language as tl

from kernels.w4a16.few_rows import in_units, product


@triton.jit
def _norm_of_rows(squares_ptr, offs_m, m, k, COUNT: tl.constexpr, EPS: tl.constexpr):
    """[1, 8]: 1 / sqrt(mean of a row's squares + EPS), of squares fp32 [M, COUNT], sums over parts of the row of K."""
    part = tl.arange(0, triton.next_power_of_2(COUNT))
    mask = (offs_m < m)[:, None] & (part < COUNT)[None, :]
    squares = tl.load(squares_ptr + offs_m[:, None] * COUNT + part[None, :], mask=mask, other=0.0)
    return (1.0 / tl.sqrt(tl.sum(squares, axis=1) / k + EPS))[None, :]


@triton.jit
def matmul_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    bias_ptr,
    residual_ptr,
    squares_ptr,
    m,
    k_units,
    n,
    n_units,
    groups,
    blocks_per_group,
    steps,
    steps_per_split,
    y_ptr,
    zeros_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIPS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    K_UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ZEROS: tl.constexpr,
    SQUARES: tl.constexpr,
    EPS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y [splits, M, N] as of `kernels.matmul_kernel`: program (i, j, s) takes tile i of N, j of M, part s of K.

    ZEROS (0 or a power of two): so many zeros go to zeros [ZEROS], int32, for a kernel that follows to count in.
    SQUARES (0: none): x lacks the division of an RMSNorm, by the mean of squares fp32 [M, SQUARES]; y gets it.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STRIP: tl.constexpr = BLOCK_N // STRIPS
    stride = n_units * 16
    if EVEN_N:
        n = stride
    split = tl.program_id(2)
    if ZEROS > 0 and tl.program_id(0) + tl.program_id(1) + split == 0:
        tl.store(zeros_ptr + tl.arange(0, ZEROS), tl.zeros((ZEROS,), dtype=tl.int32))
    step_begin = split * steps_per_split
    step_end = tl.minimum(step_begin + steps_per_split, steps)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, STRIP)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, 8)
    accs = product(
        x_ptr,
        w_ptr,
        s_ptr,
        z_ptr,
        m,
        k_units * K_UNIT,
        stride,
        groups - 1,
        blocks_per_group,
        step_begin,
        step_end,
        offs_n,
        offs_m,
        BLOCK_M,
        STRIPS,
        STRIP,
        STEP,
        GROUP_SLICES,
        EVEN_K,
        EVEN_TILES,
        INTERPRET,
    )
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        columns = offs_n + q * STRIP
        for t in tl.static_range(BLOCK_M // 8):  # pyright: ignore[reportGeneralTypeIssues]
            acc = in_units(accs[q * (BLOCK_M // 8) + t], DTYPE, INTERPRET)
            tile = offs_m + t * 8
            if SQUARES > 0:
                acc *= _norm_of_rows(squares_ptr, tile, m, k_units * K_UNIT, SQUARES, EPS)
            if HAS_BIAS:
                acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
            out = tile[None, :] * n + columns[:, None]
            mask = (columns < n)[:, None] & (tile < m)[None, :]
            if HAS_RESIDUAL:
                acc += tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + split * m * n + out, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    squares_ptr,
    counts_in_ptr,
    m,
    k_units,
    n_units,
    groups,
    blocks_per_group,
    steps,
    steps_per_split,
    splits,
    y_ptr,
    parts_ptr,
    counts_ptr,
    zeros_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIPS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    K_UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_TILES: tl.constexpr,
    ZEROS: tl.constexpr,
    SQUARES: tl.constexpr,
    EPS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y [M, N/2] = silu(x @ W[:, :N/2]) * (x @ W[:, N/2:]), N / 2 a multiple of 16 (so N has no padding).

    Program (i, 0, s): tile i of N, part s of K; M at most BLOCK_M. Half of a strip are columns of the first half, the
    others the same columns of the second: one loop that reads x once. What lies beyond a half is computed from the
    wrong columns or from none, and not stored. The sums over parts of K go to parts fp32 [splits, M, N]; the
    last program of a tile adds them, in one order whoever is last. counts int32, one a tile and zero before (counts_in
    is the same memory). zeros and squares: as in `matmul_kernel`.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STRIP: tl.constexpr = BLOCK_N // STRIPS
    APART: tl.constexpr = STRIP // 2
    TILES: tl.constexpr = BLOCK_M // 8
    n = n_units * 16
    half = (n_units // 2) * 16
    tile = tl.program_id(0)
    split = tl.program_id(2)
    if ZEROS > 0 and tile + split == 0:
        tl.store(zeros_ptr + tl.arange(0, ZEROS), tl.zeros((ZEROS,), dtype=tl.int32))
    of_strip = tl.arange(0, STRIP)
    first = tile * (BLOCK_N // 2)
    offs_n = first + of_strip % APART + of_strip // APART * half
    offs_m = tl.arange(0, 8)
    step_begin = split * steps_per_split
    accs = product(
        x_ptr,
        w_ptr,
        s_ptr,
        z_ptr,
        m,
        k_units * K_UNIT,
        n,
        groups - 1,
        blocks_per_group,
        step_begin,
        tl.minimum(step_begin + steps_per_split, steps),
        offs_n,
        offs_m,
        BLOCK_M,
        STRIPS,
        APART,
        STEP,
        GROUP_SLICES,
        EVEN_K,
        EVEN_TILES,
        INTERPRET,
    )
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            rows = (offs_m + t * 8)[None, :]
            at = (split * m + rows) * n + (offs_n + q * APART)[:, None]
            in_half = (first + of_strip % APART + q * APART < half)[:, None]
            acc = in_units(accs[q * TILES + t], DTYPE, INTERPRET)
            tl.store(parts_ptr + at, acc, mask=in_half & (rows < m))
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1:
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            rows = (offs_m + t * 8)[None, :]
            for q in tl.static_range(STRIPS // 2):  # pyright: ignore[reportGeneralTypeIssues]
                columns = (first + of_strip + q * STRIP)[:, None]
                mask = (columns < half) & (rows < m)
                gate, up = tl.zeros((STRIP, 8), dtype=tl.float32), tl.zeros((STRIP, 8), dtype=tl.float32)
                for s in range(splits):  # written by other programs: from where all see the same, the L2 cache
                    part = parts_ptr + (s * m + rows) * n + columns
                    gate += tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
                    up += tl.load(part + half, mask=mask, other=0.0, cache_modifier=".cg")
                if SQUARES > 0:
                    norm = _norm_of_rows(squares_ptr, offs_m + t * 8, m, k_units * K_UNIT, SQUARES, EPS)
                    gate *= norm
                    up *= norm
                y = gate / (1.0 + tl.exp(-gate)) * up
                tl.store(y_ptr + rows * half + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
