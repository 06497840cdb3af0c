"""The Triton kernels for at most 16 rows of x, a decode step's: y = x @ W and the same with SwiGLU. Imports triton.

Decoding is bound by how many instructions a weight takes, so here nothing is done per weight but to mask it. The scheme
of `kernels.py` (y^T = W^T @ x^T, the weight in registers as the left operand) with three differences:

- A masked nibble goes into the matrix instruction as it is: q UNIT, a subnormal number (tensor cores keep subnormal
  inputs: Fasi et al., PeerJ CS 2021; Li et al., FTTN, 2024). The low eight bits of a bf16 count in steps of 2^-133, so
  that a nibble may lie in bits 0-3 or 4-7 and only every second slice needs a shift; x is multiplied by 2^64 or 2^60,
  which brings both to one unit and the sums out of fp32's subnormal range. In fp16 all nibbles are shifted to bits 4-7,
  which count 2^-20, and x stays as it is.
- The zero point is taken off a group's sum, (sum of q x) - z (sum of x): the second factor is one more product, of a
  constant matrix with the x that is in registers anyway.
- A program's columns are strips of 16 a warp, 16 num_warps columns each, and a warp has several of them, so that what
  is done for x is done once for all. A strip's scales are fewer than a program's threads: Triton then loads them where
  they are used, and not through shared memory with a barrier.

x is taken by tiles of 8 rows (mma.sync m16n8k16, on sm_90 too: wgmma waits after every 32 rows of K). A loop step takes
STEP superblocks. Scales and zero points are fetched one group ahead by hand, since Triton pipelines only what feeds a
dot. Sums and scales are fp32.
"""

import triton
import triton.language as tl


def _mask_asm(shift: str, mask: int) -> str:
    """PTX for a pair of weights: $0 = nibbles of $1 as subnormal numbers."""
    return f"{{ .reg .b32 t; {shift or 'mov.b32 t, $1;'} and.b32 $0, t, {mask:#010x}; }}"


def _scale_asm(power: int) -> str:
    """PTX for a pair of bf16: $0 = $1 * power, exact (sm_80 has no product of pairs but as a sum)."""
    return f"{{ .reg .b32 p, z; mov.b32 p, {power:#010x}; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, p, z; }}"


BF16_ASM = tl.constexpr(
    tuple(_mask_asm("shr.b32 t, $1, 8;" if i >= 2 else "", 0x000F000F << 4 * (i % 2)) for i in range(4))
)
FP16_ASM = tl.constexpr(
    tuple(_mask_asm(s, 0x00F000F0) for s in ("shl.b32 t, $1, 4;", "", "shr.b32 t, $1, 4;", "shr.b32 t, $1, 8;"))
)
X_ASM = tl.constexpr((_scale_asm(0x5F805F80), _scale_asm(0x5D805D80)))  # 2^64, 2^60
BF16_UNIT = tl.constexpr(2.0**-69)  # 2^-133 2^64 and 2^-129 2^60
FP16_UNIT = tl.constexpr(2.0**-20)


@triton.jit
def _nibbles(words, I: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 words -> q of slice I, in the unit that `_scaled` completes, exact in DTYPE."""
    if INTERPRET:  # the interpreter has no inline PTX
        return ((words >> (4 * I)) & 15).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(BF16_ASM[I], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(FP16_ASM[I], "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _scaled(x, I: tl.constexpr, INTERPRET: tl.constexpr):
    """x of slice I times the power of two that its nibbles need."""
    if INTERPRET or x.dtype != tl.bfloat16:
        return x
    else:
        return tl.inline_asm_elementwise(X_ASM[I % 2], "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _ones(I: tl.constexpr, STRIP: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """[STRIP, 32] of what `_nibbles` makes of q = 1 in slice I."""
    if INTERPRET:
        return tl.full((STRIP, 32), 1.0, DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.full((STRIP, 32), 1 if I % 2 == 0 else 16, tl.int16).to(DTYPE, bitcast=True)
    else:
        return tl.full((STRIP, 32), 16, tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _slices(x):
    """x [128, M] -> its four slices [32, M]."""
    x = tl.permute(tl.reshape(x, (2, 2, 32, x.shape[1])), (2, 3, 0, 1))
    even, odd = tl.split(x)
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def _group_of(block, slice_, blocks_per_group, GROUP_SLICES: tl.constexpr):
    """The group of a superblock's slice."""
    if GROUP_SLICES == 0:
        return block // blocks_per_group
    else:
        return block * (4 // GROUP_SLICES) + slice_ // GROUP_SLICES


@triton.jit
def _of_group(ptr, row, stride, offs_n, far, STRIPS: tl.constexpr, EVEN_TILES: tl.constexpr):
    """A row of scales or of zero points as a tuple of [STRIP]; `far` and the strips as in `_product`."""
    row_ptr = ptr + row * stride
    values = ()
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]
        offs = offs_n + ((q % (STRIPS // 2)) * offs_n.shape[0] + (q // (STRIPS // 2)) * far)
        if not EVEN_TILES:  # what lies beyond the last column is not stored: any scale will do
            offs = tl.minimum(offs, stride - 1)
        values = values + (tl.load(row_ptr + offs),)
    return values


@triton.jit
def _nibble_as_float(byte, high):
    """The low (high = 0) or high nibble of uint8 as fp32, by the bits of 2^23 + nibble: converting is a slow unit's."""
    bits = (byte.to(tl.int32) & (15 << (high * 4))) | 0x4B000000
    unit = tl.where(high == 0, 1.0, 0.0625)
    return bits.to(tl.float32, bitcast=True) * unit - 8388608.0 * unit


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    m,
    k,
    stride,
    last_group,
    blocks_per_group,
    step_begin,
    step_end,
    offs_n,
    offs_m,
    far,
    BLOCK_M: tl.constexpr,
    STRIPS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_TILES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """W^T @ x^T over the steps step_begin .. step_end - 1 as a tuple of fp32 [STRIP, 8], tiles of x fastest.

    offs_n [STRIP] are the columns of strip 0, offs_m [8] the rows of tile 0. The strips' first half lies side by side,
    the other begins `far` columns on.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STRIP: tl.constexpr = offs_n.shape[0]
    HALF: tl.constexpr = STRIPS // 2
    TILES: tl.constexpr = BLOCK_M // 8
    IN_PAIRS: tl.constexpr = GROUP_SLICES > 0 and STEP * 4 // max(GROUP_SLICES, 1) % 2 == 0  # groups of a step
    w_ptr = w_ptr.to(tl.pointer_type(tl.int16))
    z_ptr = z_ptr.to(tl.pointer_type(tl.uint8))
    rows = tl.arange(0, 128)
    words_ptr = w_ptr + (step_begin * (STEP * 32) + tl.arange(0, 32))[None, :] * stride + offs_n[:, None]
    x_ptrs = ()
    for t in tl.static_range(TILES):  # rows beyond the last read the last one: what they give is not stored
        row = tl.minimum(offs_m + t * 8, m - 1)
        x_ptrs = x_ptrs + (x_ptr + row[None, :] * k + (step_begin * (STEP * 128) + rows)[:, None],)
    accs = ()
    for _ in tl.static_range(STRIPS * TILES):  # pyright: ignore[reportGeneralTypeIssues]
        accs = accs + (tl.zeros((STRIP, 8), dtype=tl.float32),)
    group = _group_of(step_begin * STEP, 0, blocks_per_group, GROUP_SLICES)
    next_scales = _of_group(s_ptr, group, stride, offs_n, far, STRIPS, EVEN_TILES)
    next_zeros = _of_group(z_ptr, group >> 1, stride, offs_n, far, STRIPS, EVEN_TILES)
    for step in range(step_begin, step_end):
        for j in tl.static_range(STEP):
            block = step * STEP + j
            words = ()
            parts = ()
            for q in tl.static_range(STRIPS):
                offset = (q % HALF) * STRIP + (q // HALF) * far
                words_ptrs = words_ptr + (j * 32 * stride + offset)
                if EVEN_TILES and EVEN_K:
                    words = words + (tl.load(words_ptrs),)
                else:  # K is padded to whole superblocks, not to steps
                    mask_w = (offs_n + offset < stride)[:, None] & (block * 128 < k)
                    words = words + (tl.load(words_ptrs, mask=mask_w, other=0),)
                for _ in tl.static_range(TILES):
                    parts = parts + (tl.zeros((STRIP, 8), dtype=tl.float32),)
            tiles = ()
            sums = ()
            for t in tl.static_range(TILES):
                if EVEN_K:
                    x = tl.load(x_ptrs[t] + j * 128)
                else:
                    x = tl.load(x_ptrs[t] + j * 128, mask=(block * 128 + rows < k)[:, None], other=0.0)
                tiles = tiles + (_slices(x),)
                sums = sums + (tl.zeros((STRIP, 8), dtype=tl.float32),)
            for i in tl.static_range(4):
                if i == 0 or (GROUP_SLICES > 0 and i % GROUP_SLICES == 0):
                    scales, zeros = next_scales, next_zeros
                    group = _group_of(block, i, blocks_per_group, GROUP_SLICES)
                    following = block + 1 if GROUP_SLICES == 0 else block
                    ahead = _group_of(following, i + GROUP_SLICES, blocks_per_group, GROUP_SLICES)
                    ahead = tl.minimum(ahead, last_group)
                    next_scales = _of_group(s_ptr, ahead, stride, offs_n, far, STRIPS, EVEN_TILES)
                    if not (IN_PAIRS and (j * 4 + i) // GROUP_SLICES % 2 == 0):  # else they are in the same bytes
                        next_zeros = _of_group(z_ptr, ahead >> 1, stride, offs_n, far, STRIPS, EVEN_TILES)
                of_slice = ()
                new_sums = ()
                for t in tl.static_range(TILES):
                    x = _scaled(tiles[t][i], i, INTERPRET)
                    of_slice = of_slice + (x,)
                    new_sums = new_sums + (tl.dot(_ones(i, STRIP, DTYPE, INTERPRET), x, sums[t]),)
                sums = new_sums
                new_parts = ()
                for q in tl.static_range(STRIPS):
                    w = _nibbles(words[q], i, DTYPE, INTERPRET)
                    for t in tl.static_range(TILES):
                        new_parts = new_parts + (tl.dot(w, of_slice[t], parts[q * TILES + t]),)
                parts = new_parts
                if i == 3 or (GROUP_SLICES > 0 and (i + 1) % GROUP_SLICES == 0):  # the group ends
                    new_accs = ()
                    new_parts = ()
                    new_sums = ()
                    for q in tl.static_range(STRIPS):
                        zero = _nibble_as_float(zeros[q], group & 1)[:, None]
                        scale = scales[q].to(tl.float32)[:, None]
                        for t in tl.static_range(TILES):
                            part = parts[q * TILES + t] - sums[t] * zero
                            new_accs = new_accs + (accs[q * TILES + t] + part * scale,)
                            new_parts = new_parts + (tl.zeros((STRIP, 8), dtype=tl.float32),)
                    for _ in tl.static_range(TILES):
                        new_sums = new_sums + (tl.zeros((STRIP, 8), dtype=tl.float32),)
                    accs, parts, sums = new_accs, new_parts, new_sums
        words_ptr += STEP * 32 * stride
        moved = ()
        for t in tl.static_range(TILES):
            moved = moved + (x_ptrs[t] + STEP * 128,)
        x_ptrs = moved
    return accs


@triton.jit
def _in_units(acc, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """A sum of `_product` without the unit in which its integers count."""
    if INTERPRET:
        return acc
    elif DTYPE == tl.bfloat16:
        return acc * (1.0 / BF16_UNIT)
    else:
        return acc * (1.0 / FP16_UNIT)


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
    accs = _product(
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
        BLOCK_N // 2,
        BLOCK_M,
        STRIPS,
        STEP,
        GROUP_SLICES,
        EVEN_K,
        EVEN_TILES,
        INTERPRET,
    )
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        columns = offs_n + q * STRIP
        for t in tl.static_range(BLOCK_M // 8):  # pyright: ignore[reportGeneralTypeIssues]
            acc = _in_units(accs[q * (BLOCK_M // 8) + t], DTYPE, INTERPRET)
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
    m,
    k_units,
    n_units,
    groups,
    blocks_per_group,
    steps,
    y_ptr,
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

    Half of program i's strips are columns of the first half, the others the same columns of the second: one loop that
    reads x once. What lies beyond a half is computed from the wrong columns or from none, and not stored. zeros and
    squares: as in `matmul_kernel`.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STRIP: tl.constexpr = BLOCK_N // STRIPS
    TILES: tl.constexpr = BLOCK_M // 8
    half = (n_units // 2) * 16
    if ZEROS > 0 and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(zeros_ptr + tl.arange(0, ZEROS), tl.zeros((ZEROS,), dtype=tl.int32))
    offs_n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, STRIP)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, 8)
    accs = _product(
        x_ptr,
        w_ptr,
        s_ptr,
        z_ptr,
        m,
        k_units * K_UNIT,
        n_units * 16,
        groups - 1,
        blocks_per_group,
        0,
        steps,
        offs_n,
        offs_m,
        half,
        BLOCK_M,
        STRIPS,
        STEP,
        GROUP_SLICES,
        EVEN_K,
        EVEN_TILES,
        INTERPRET,
    )
    for q in tl.static_range(STRIPS // 2):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        columns = offs_n + q * STRIP
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            gate = _in_units(accs[q * TILES + t], DTYPE, INTERPRET)
            up = _in_units(accs[(q + STRIPS // 2) * TILES + t], DTYPE, INTERPRET)
            tile = offs_m + t * 8
            if SQUARES > 0:
                norm = _norm_of_rows(squares_ptr, tile, m, k_units * K_UNIT, SQUARES, EPS)
                gate *= norm
                up *= norm
            y = gate / (1.0 + tl.exp(-gate)) * up
            mask = (columns < half)[:, None] & (tile < m)[None, :]
            tl.store(y_ptr + tile[None, :] * half + columns[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)
