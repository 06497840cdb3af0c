"""The Triton kernel of a decode step that ends a half layer: h = residual + x @ W, and what RMSNorm(h) needs.

RMSNorm(h) weight = (h weight) / sqrt(mean(h^2) + eps): the first factor and the squares' sums over tiles of columns are
written here, the division is done by the product that takes it (`few_rows.py`), on its own sums. So the norm is no
launch of its own, and no program needs a whole row. K is split over programs: the last one of a tile adds the splits
up, in one order whoever is last. Imports triton.
"""

import triton
import triton.language as tl

from kernels.w4a16.few_rows import in_units, product


@triton.jit
def residual_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    residual_ptr,
    weight_ptr,
    counts_in_ptr,
    first_zero,
    m,
    k_units,
    n_units,
    groups,
    blocks_per_group,
    steps,
    steps_per_split,
    splits,
    parts_ptr,
    h_ptr,
    g_ptr,
    squares_ptr,
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
    INTERPRET: tl.constexpr,
):
    """Program (i, 0, s): tile i of N, a multiple of 16, part s of K; M at most BLOCK_M.

    residual [M, N], weight [N], parts fp32 [splits, M, N]; h and g = h weight [M, N] in residual's dtype, h rounded
    before it is multiplied; squares fp32 [M, tiles]; counts int32, those of the tiles from first_zero on and zero
    before (counts_in is the same memory). zeros: as in `few_rows_kernels.matmul_kernel`.
    """
    DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    STRIP: tl.constexpr = BLOCK_N // STRIPS
    TILES: tl.constexpr = BLOCK_M // 8
    n = n_units * 16
    tile = tl.program_id(0)
    split = tl.program_id(2)
    if ZEROS > 0 and tile + split == 0:
        tl.store(zeros_ptr + tl.arange(0, ZEROS), tl.zeros((ZEROS,), dtype=tl.int32))
    offs_n = tile * BLOCK_N + tl.arange(0, STRIP)
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
        STRIP,
        STEP,
        GROUP_SLICES,
        EVEN_K,
        EVEN_TILES,
        INTERPRET,
    )
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            columns, rows = (offs_n + q * STRIP)[:, None], (offs_m + t * 8)[None, :]
            acc = in_units(accs[q * TILES + t], x_ptr.dtype.element_ty, INTERPRET)
            tl.store(parts_ptr + (split * m + rows) * n + columns, acc, mask=(columns < n) & (rows < m))
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(counts_ptr + first_zero + tile, 1, sem="acq_rel", scope="gpu") == splits - 1:
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            rows = (offs_m + t * 8)[None, :]
            squares = tl.zeros((8,), dtype=tl.float32)
            for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]
                columns = (offs_n + q * STRIP)[:, None]
                mask = (columns < n) & (rows < m)
                at = rows * n + columns
                total = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
                for s in range(splits):  # written by other programs: from where all see the same, the L2 cache
                    total += tl.load(parts_ptr + s * m * n + at, mask=mask, other=0.0, cache_modifier=".cg")
                h = total.to(DTYPE)
                tl.store(h_ptr + at, h, mask=mask)
                h = h.to(tl.float32)
                squares += tl.sum(h * h, axis=0)
                weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
                tl.store(g_ptr + at, (h * weight).to(DTYPE), mask=mask)
            row = offs_m + t * 8
            tl.store(squares_ptr + row * tl.num_programs(0) + tile, squares, mask=row < m)
