"""The loop of the Triton kernels for at most 16 rows of x (`few_rows_kernels.py`). Imports triton.

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
def _of_group(ptr, row, stride, offs_n, STRIPS: tl.constexpr, APART: tl.constexpr, EVEN_TILES: tl.constexpr):
    """A row of scales or of zero points as a tuple of [STRIP]; the strips as in `product`."""
    row_ptr = ptr + row * stride
    values = ()
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]
        if EVEN_TILES:  # the distance last: it becomes a constant of the load
            values = values + (tl.load(row_ptr + offs_n + q * APART),)
        else:  # what lies beyond the last column is not stored: any scale will do
            values = values + (tl.load(row_ptr + tl.minimum(offs_n + q * APART, stride - 1)),)
    return values


@triton.jit
def _nibble_as_float(byte, high):
    """The low (high = 0) or high nibble of uint8 as fp32, by the bits of 2^23 + nibble: converting is a slow unit's."""
    bits = (byte.to(tl.int32) & (15 << (high * 4))) | 0x4B000000
    unit = tl.where(high == 0, 1.0, 0.0625)
    return bits.to(tl.float32, bitcast=True) * unit - 8388608.0 * unit


@triton.jit
def _zeros(COUNT: tl.constexpr, STRIP: tl.constexpr):
    """COUNT sums of [STRIP, 8]."""
    sums = ()
    for _ in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        sums = sums + (tl.zeros((STRIP, 8), dtype=tl.float32),)
    return sums


@triton.jit
def _load_words(ptr, offs, offs_n, stride, in_k, STRIPS: tl.constexpr, APART: tl.constexpr, EVEN: tl.constexpr):
    """The packed words [STRIP, 32] of each strip at ptr + offs, the first's; EVEN: all lie in the weight, else those
    with in_k in K's padding."""
    words = ()
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]
        if EVEN:
            words = words + (tl.load(ptr + offs + q * APART),)
        else:
            mask = (offs_n + q * APART < stride)[:, None] & in_k
            words = words + (tl.load(ptr + offs + q * APART, mask=mask, other=0),)
    return words


@triton.jit
def _load_x(ptr, offs, in_k, TILES: tl.constexpr, EVEN_K: tl.constexpr):
    """The slices of each tile of x at ptr + its offsets [128, 8]; in_k [128, 1] says which rows of K there are."""
    tiles = ()
    for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
        if EVEN_K:
            tiles = tiles + (_slices(tl.load(ptr + offs[t])),)
        else:
            tiles = tiles + (_slices(tl.load(ptr + offs[t], mask=in_k, other=0.0)),)
    return tiles


@triton.jit
def _multiply(
    words, tiles, parts, sums, I: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, INTERPRET: tl.constexpr
):
    """Slice I into the strips' sums of q x and the tiles' sums of x."""
    DTYPE: tl.constexpr = tiles[0][0].dtype
    of_slice = ()
    new_sums = ()
    for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
        x = _scaled(tiles[t][I], I, INTERPRET)
        of_slice = of_slice + (x,)
        new_sums = new_sums + (tl.dot(_ones(I, words[0].shape[0], DTYPE, INTERPRET), x, sums[t]),)
    new_parts = ()
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]
        w = _nibbles(words[q], I, DTYPE, INTERPRET)
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            new_parts = new_parts + (tl.dot(w, of_slice[t], parts[q * TILES + t]),)
    return new_parts, new_sums


@triton.jit
def _end_group(accs, parts, sums, scales, zeros, group, STRIPS: tl.constexpr, TILES: tl.constexpr):
    """accs + scale (sum of q x - zero point (sum of x)) of a group."""
    new_accs = ()
    for q in tl.static_range(STRIPS):  # pyright: ignore[reportGeneralTypeIssues]
        zero = _nibble_as_float(zeros[q], group & 1)[:, None]
        scale = scales[q].to(tl.float32)[:, None]
        for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            part = parts[q * TILES + t] - sums[t] * zero
            new_accs = new_accs + (accs[q * TILES + t] + part * scale,)
    return new_accs


@triton.jit
def product(
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
    BLOCK_M: tl.constexpr,
    STRIPS: tl.constexpr,
    APART: tl.constexpr,
    STEP: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_TILES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """W^T @ x^T over the steps step_begin .. step_end - 1 as a tuple of fp32 [STRIP, 8], tiles of x fastest.

    offs_n [STRIP] are the columns of strip 0, offs_m [8] the rows of tile 0; the next strip's are APART columns on.
    """
    STRIP: tl.constexpr = offs_n.shape[0]
    TILES: tl.constexpr = BLOCK_M // 8
    IN_PAIRS: tl.constexpr = GROUP_SLICES > 0 and STEP * 4 // max(GROUP_SLICES, 1) % 2 == 0  # groups of a step
    w_ptr = w_ptr.to(tl.pointer_type(tl.int16))
    z_ptr = z_ptr.to(tl.pointer_type(tl.uint8))
    rows = tl.arange(0, 128)
    words_ptr = w_ptr + step_begin * (STEP * 32) * stride
    words_offs = tl.arange(0, 32)[None, :] * stride + offs_n[:, None]
    x_ptr += step_begin * (STEP * 128)
    x_offs = ()
    # Rows beyond the last read the last one: what they give is not stored.
    for t in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.minimum(offs_m + t * 8, m - 1)
        x_offs = x_offs + (row[None, :] * k + rows[:, None],)
    accs = _zeros(STRIPS * TILES, STRIP)
    group = _group_of(step_begin * STEP, 0, blocks_per_group, GROUP_SLICES)
    next_scales = _of_group(s_ptr, group, stride, offs_n, STRIPS, APART, EVEN_TILES)
    next_zeros = _of_group(z_ptr, group >> 1, stride, offs_n, STRIPS, APART, EVEN_TILES)
    for step in range(step_begin, step_end):
        for j in tl.static_range(STEP):
            block = step * STEP + j
            # K is padded to whole superblocks, not to steps
            words = _load_words(
                words_ptr + j * 32 * stride,
                words_offs,
                offs_n,
                stride,
                block * 128 < k,
                STRIPS,
                APART,
                EVEN_TILES and EVEN_K,
            )
            tiles = _load_x(x_ptr + j * 128, x_offs, (block * 128 + rows < k)[:, None], TILES, EVEN_K)
            parts, sums = _zeros(STRIPS * TILES, STRIP), _zeros(TILES, STRIP)
            for i in tl.static_range(4):
                if i == 0 or (GROUP_SLICES > 0 and i % GROUP_SLICES == 0):
                    scales, zeros = next_scales, next_zeros
                    group = _group_of(block, i, blocks_per_group, GROUP_SLICES)
                    following = block + 1 if GROUP_SLICES == 0 else block
                    ahead = _group_of(following, i + GROUP_SLICES, blocks_per_group, GROUP_SLICES)
                    ahead = tl.minimum(ahead, last_group)
                    next_scales = _of_group(s_ptr, ahead, stride, offs_n, STRIPS, APART, EVEN_TILES)
                    if not (IN_PAIRS and (j * 4 + i) // GROUP_SLICES % 2 == 0):  # else they are in the same bytes
                        next_zeros = _of_group(z_ptr, ahead >> 1, stride, offs_n, STRIPS, APART, EVEN_TILES)
                parts, sums = _multiply(words, tiles, parts, sums, i, STRIPS, TILES, INTERPRET)
                if i == 3 or (GROUP_SLICES > 0 and (i + 1) % GROUP_SLICES == 0):  # the group ends
                    accs = _end_group(accs, parts, sums, scales, zeros, group, STRIPS, TILES)
                    parts, sums = _zeros(STRIPS * TILES, STRIP), _zeros(TILES, STRIP)
        words_ptr += STEP * 32 * stride
        x_ptr += STEP * 128
    return accs


@triton.jit
def in_units(acc, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """A sum of `product` without the unit in which its integers count."""
    if INTERPRET:
        return acc
    elif DTYPE == tl.bfloat16:
        return acc * (1.0 / BF16_UNIT)
    else:
        return acc * (1.0 / FP16_UNIT)
