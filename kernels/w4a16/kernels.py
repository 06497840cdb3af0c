"""The Triton kernels for more than 16 rows of x, y = x @ W, and dx = dy @ W^T and W itself. Imports triton.

All of them work on y^T = W^T @ x^T: the unpacked weight is the left operand of the matrix instruction and stays in
registers, x is the right one. Layout and nibble order: `layout.py`.

One loop step takes a pair of superblocks, 256 rows of K. With the group size 128 each superblock is one group, and the
two zero points of a column are the two nibbles of one byte: every shift is a constant, so that Triton loads the packed
words straight into the operand's layout (ldmatrix) and nothing moves between threads after that.

Unpacking two weights takes one logic operation and one packed multiply-add, and every second slice a shift: the low
eight bits of a bf16 whose other bits are 0 count in steps of 2^-133 (the denormal numbers and the first binade after
them are one even scale; in fp16 eleven bits count 2^-24). So a nibble that was only masked, in bits 0-3 or 4-7, times a
power of two is q UNIT, and the multiply-add takes z UNIT away: q - z is exact. PTX's packed fma takes subnormal numbers
(kernels that widen fp8 rely on it too). The product runs on these integers and the scale is applied to the fp32 partial
sum of a group, so the kernel rounds less than `reference.py`, whose weight is rounded to x's dtype.

Fewer rows have kernels of their own, `few_rows.py`.

Shapes are run-time arguments: one binary serves all. `*_units` arguments are shapes divided by 16, which is how Triton
learns that rows are aligned. Constants: GROUP_SLICES slices of 32 rows per group (1, 2, 4), or 0 for larger groups of
`blocks_per_group` superblocks, whose shift is not constant (correct, slower).
"""

import triton
import triton.language as tl


def _unpack_asm(powers: tuple[str, str], kind: str, i: int) -> str:
    """PTX for a pair of values: $0 = float pair(nibbles i of $1) * power + $2, q - z in UNIT where $2 = -z UNIT."""
    power, high = powers[i % 2], i // 2
    shifted = f"shr.b32 t, $1, {8 * high};" if high else "mov.b32 t, $1;"
    return (
        f"{{ .reg .b32 t, power; {shifted} and.b32 t, t, {0x000F000F << 4 * (i % 2):#010x}; "
        f"mov.b32 power, {power}; fma.rn.{kind} $0, t, power, $2; }}"
    )


def _zero_asm(power: str, kind: str) -> str:
    """PTX for a pair of zero points: $0 = -z UNIT, of nibbles as `_unpack_asm` takes them from slice 0."""
    return f"{{ .reg .b32 power, none; mov.b32 power, {power}; mov.b32 none, 0; fma.rn.{kind} $0, $1, power, none; }}"


BF16_POWERS = ("0x7F007F00", "0x7D007D00")  # 2^127, 2^123: 2^-133 and 2^-129 come to 2^-6
FP16_POWERS = ("0x78007800", "0x68006800")  # 2^15, 2^11: 2^-24 and 2^-20 come to 2^-9
BF16_ASM = tl.constexpr(tuple(_unpack_asm(BF16_POWERS, "bf16x2", i) for i in range(4)))
FP16_ASM = tl.constexpr(tuple(_unpack_asm(FP16_POWERS, "f16x2", i) for i in range(4)))
BF16_ZERO_ASM = tl.constexpr((_zero_asm("0xFF00FF00", "bf16x2"),))
FP16_ZERO_ASM = tl.constexpr((_zero_asm("0xF800F800", "f16x2"),))
BF16_UNIT = tl.constexpr(2.0**-6)
FP16_UNIT = tl.constexpr(2.0**-9)


@triton.jit
def _unit(DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """What `_slice` counts in."""
    if INTERPRET:
        return 1.0
    elif DTYPE == tl.bfloat16:
        return BF16_UNIT
    else:
        return FP16_UNIT


@triton.jit
def _negative(zero, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 zero points 0..15 -> -z UNIT, exact in DTYPE."""
    if INTERPRET:
        return (-zero).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(BF16_ZERO_ASM[0], "=r,r", [zero], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(FP16_ZERO_ASM[0], "=r,r", [zero], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _slice(words, negative, I: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 words and -z UNIT (both of one shape) -> (q - z) UNIT of slice I, exact in DTYPE."""
    if INTERPRET:  # the interpreter has no inline PTX
        return (((words >> (4 * I)) & 15).to(DTYPE) + negative).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BF16_ASM[I], "=r,r,r", [words, negative], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            FP16_ASM[I], "=r,r,r", [words, negative], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def _zero_rows(z_ptr, group, last_group, stride, offs, mask):
    """The bytes holding the zero points of the groups `group` (even: low nibble) and `group` + 1."""
    row = tl.minimum(group, last_group) // 2
    return tl.load(z_ptr + row * stride + offs, mask=mask, other=0)


@triton.jit
def _scale_row(s_ptr, group, last_group, stride, offs, mask):
    return tl.load(s_ptr + tl.minimum(group, last_group) * stride + offs, mask=mask, other=0.0)


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
    pair_begin,
    pair_end,
    offs_n,
    offs_m,
    mask_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_M]: W[pairs, offs_n]^T @ x[offs_m, pairs]^T over the pairs pair_begin .. pair_end - 1."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    w_ptr = w_ptr.to(tl.pointer_type(tl.int16))
    z_ptr = z_ptr.to(tl.pointer_type(tl.int8))
    rows = tl.arange(0, 32)
    mask_m = (offs_m < m)[None, :]
    words_ptr = w_ptr + (pair_begin * 64 + rows)[None, :] * stride + offs_n[:, None]
    x_ptrs = x_ptr + offs_m[None, :] * k + (pair_begin * 256 + rows)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if GROUP_SLICES == 4:  # the scales are fetched one step ahead: Triton pipelines only what feeds a dot
        scale_0 = _scale_row(s_ptr, pair_begin * 2, last_group, stride, offs_n, mask_n)
        scale_1 = _scale_row(s_ptr, pair_begin * 2 + 1, last_group, stride, offs_n, mask_n)
    for pair in range(pair_begin, pair_end):
        if GROUP_SLICES == 4:
            this_0, this_1 = scale_0, scale_1
            scale_0 = _scale_row(s_ptr, pair * 2 + 2, last_group, stride, offs_n, mask_n)
            scale_1 = _scale_row(s_ptr, pair * 2 + 3, last_group, stride, offs_n, mask_n)
            zeros = _zero_rows(z_ptr, pair * 2, last_group, stride, offs_n, mask_n)
        for j in tl.static_range(2):
            mask_w = mask_n
            if not EVEN_K:  # K is padded to whole superblocks, not to pairs of them
                mask_w = mask_n & (pair * 256 + j * 128 < k)
            words = tl.load(words_ptr + j * 32 * stride, mask=mask_w[:, None], other=0)
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for i in tl.static_range(4):
                if GROUP_SLICES == 4:
                    zero = (zeros >> (4 * j)) & 15
                    scale = this_0 if j == 0 else this_1
                elif GROUP_SLICES == 0:
                    group = (pair * 2 + j) // blocks_per_group
                    if i == 0:
                        scale = _scale_row(s_ptr, group, last_group, stride, offs_n, mask_n)
                        pair_of_zeros = _zero_rows(z_ptr, group, last_group, stride, offs_n, mask_n)
                        zero = (pair_of_zeros >> ((group % 2) * 4).to(tl.int8)) & 15
                else:
                    group = pair * (8 // GROUP_SLICES) + (j * 4 + i) // GROUP_SLICES
                    if i % GROUP_SLICES == 0:
                        scale = _scale_row(s_ptr, group, last_group, stride, offs_n, mask_n)
                        pair_of_zeros = _zero_rows(z_ptr, group, last_group, stride, offs_n, mask_n)
                        zero = (pair_of_zeros >> (4 * ((j * 4 + i) // GROUP_SLICES % 2))) & 15
                mask_x = mask_m
                if not EVEN_K:
                    mask_x = mask_m & ((pair * 256 + j * 128 + i * 32 + rows) < k)[:, None]
                x = tl.load(x_ptrs + (j * 128 + i * 32), mask=mask_x, other=0.0)
                wide = tl.broadcast_to(zero.to(tl.int16)[:, None], (BLOCK_N, 32))
                negative = _negative(wide, DTYPE, INTERPRET)
                part = tl.dot(_slice(words, negative, i, DTYPE, INTERPRET), x, part)
                if i == 3 or (GROUP_SLICES > 0 and (i + 1) % GROUP_SLICES == 0):  # the group ends
                    acc += part * scale.to(tl.float32)[:, None]
                    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        words_ptr += 64 * stride
        x_ptrs += 256
    return acc * (1.0 / _unit(DTYPE, INTERPRET))


@triton.jit
def matmul_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    bias_ptr,
    residual_ptr,
    m,
    k_units,
    n,
    n_units,
    groups,
    blocks_per_group,
    pairs,
    pairs_per_split,
    y_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    K_UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y [splits, M, N]: program (i, j, s) computes the tile (i of N, j of M) of x @ W over the s-th part of K.

    With one split the epilogue (bias [N], residual [M, N]) is added and y is in its final dtype; with several, y holds
    fp32 partial sums that XLA adds (fused with what follows), which needs no atomics and gives the same bits each time.
    """
    stride = n_units * 16
    k = k_units * K_UNIT
    if EVEN_N:
        n = stride
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    pair_begin = split * pairs_per_split
    pair_end = tl.minimum(pair_begin + pairs_per_split, pairs)
    acc = _product(
        x_ptr,
        w_ptr,
        s_ptr,
        z_ptr,
        m,
        k,
        stride,
        groups - 1,
        blocks_per_group,
        pair_begin,
        pair_end,
        offs_n,
        offs_m,
        offs_n < stride,
        BLOCK_M,
        BLOCK_N,
        GROUP_SLICES,
        EVEN_K,
        INTERPRET,
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    out = offs_m[None, :] * n + offs_n[:, None]
    mask = (offs_n < n)[:, None] & (offs_m < m)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + split * m * n + out, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _block_group(
    s_ptr,
    z_ptr,
    block,
    last_group,
    stride,
    blocks_per_group,
    offs_n,
    mask_n,
    I: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
):
    """(zero point int16, scale fp32) [BLOCK_N] of slice I of a superblock."""
    if GROUP_SLICES == 0:
        group = block // blocks_per_group
    else:
        group = block * (4 // GROUP_SLICES) + I // GROUP_SLICES
    byte = _zero_rows(z_ptr, group, last_group, stride, offs_n, mask_n)
    if GROUP_SLICES == 1 or GROUP_SLICES == 2:
        zero = (byte >> (4 * ((I // GROUP_SLICES) % 2))) & 15
    else:
        zero = (byte >> ((group % 2) * 4).to(tl.int8)) & 15
    scale = _scale_row(s_ptr, group, last_group, stride, offs_n, mask_n)
    return zero.to(tl.int16), scale.to(tl.float32)


@triton.jit
def dequantize_kernel(
    w_ptr,
    s_ptr,
    z_ptr,
    k,
    n,
    n_units,
    groups,
    blocks_per_group,
    y_ptr,
    BLOCK_N: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """W [K, N]: program (b, i) writes the 128 rows of superblock b and BLOCK_N columns; (q - z) * s in fp32, cast."""
    stride = n_units * 16
    if EVEN_N:
        n = stride
    block = tl.program_id(0)
    rows = tl.arange(0, 32)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stride
    z_ptr = z_ptr.to(tl.pointer_type(tl.int8))
    words_ptr = w_ptr.to(tl.pointer_type(tl.int16)) + (block * 32 + rows)[:, None] * stride + offs_n[None, :]
    words = tl.load(words_ptr, mask=mask_n[None, :], other=0)
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        if i == 0 or (GROUP_SLICES > 0 and i % GROUP_SLICES == 0):
            zero, scale = _block_group(  # pyright: ignore[reportGeneralTypeIssues]: the decorator hides what it returns
                s_ptr, z_ptr, block, groups - 1, stride, blocks_per_group, offs_n, mask_n, i, GROUP_SLICES
            )
        integer = ((words >> (4 * i)) & 15) - zero[None, :]
        k_index = (block * 128 + i * 32 + rows)[:, None]
        w = integer.to(tl.float32) * scale[None, :]
        mask = (k_index < k) & (offs_n < n)[None, :]
        tl.store(y_ptr + k_index * n + offs_n[None, :], w.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def transposed_kernel(
    dy_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    m,
    k,
    n,
    n_units,
    groups,
    blocks_per_group,
    steps,
    steps_per_split,
    dx_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_SLICES: tl.constexpr,
    EVEN_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dx [splits, M, K] = dy @ W^T: program (b, j, s) computes superblock b of K, tile j of M, over a part of N.

    The scale varies along the summed dimension here, so it multiplies the weight before the product, rounded to dy's
    dtype as the reference does. Several splits leave fp32 partial sums, as in `matmul_kernel`.
    """
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    stride = n_units * 16
    if EVEN_N:
        n = stride
    w_ptr = w_ptr.to(tl.pointer_type(tl.int16))
    z_ptr = z_ptr.to(tl.pointer_type(tl.int8))
    block = tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.arange(0, 32)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    words_ptr = w_ptr + (block * 32 + rows)[:, None] * stride
    acc_0 = tl.zeros((32, BLOCK_M), dtype=tl.float32)
    acc_1 = tl.zeros((32, BLOCK_M), dtype=tl.float32)
    acc_2 = tl.zeros((32, BLOCK_M), dtype=tl.float32)
    acc_3 = tl.zeros((32, BLOCK_M), dtype=tl.float32)
    step_begin = split * steps_per_split
    for step in range(step_begin, tl.minimum(step_begin + steps_per_split, steps)):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < stride
        words = tl.load(words_ptr + offs_n[None, :], mask=mask_n[None, :], other=0)
        dy_mask = (offs_n < n)[:, None] & (offs_m < m)[None, :]
        dy = tl.load(dy_ptr + offs_m[None, :] * n + offs_n[:, None], mask=dy_mask, other=0.0)
        for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
            if i == 0 or (GROUP_SLICES > 0 and i % GROUP_SLICES == 0):
                zero, scale = _block_group(
                    s_ptr, z_ptr, block, groups - 1, stride, blocks_per_group, offs_n, mask_n, i, GROUP_SLICES
                )
            negative = _negative(tl.broadcast_to(zero[None, :], (32, BLOCK_N)), DTYPE, INTERPRET)
            integer = _slice(words, negative, i, DTYPE, INTERPRET)
            w = (integer.to(tl.float32) * (scale * (1.0 / _unit(DTYPE, INTERPRET)))[None, :]).to(DTYPE)
            if i == 0:
                acc_0 = tl.dot(w, dy, acc_0)
            elif i == 1:
                acc_1 = tl.dot(w, dy, acc_1)
            elif i == 2:
                acc_2 = tl.dot(w, dy, acc_2)
            else:
                acc_3 = tl.dot(w, dy, acc_3)
    dx_ptr += split * m * k
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]: its __next__ is for the compiler
        offs_k = block * 128 + i * 32 + rows
        acc = acc_0 if i == 0 else (acc_1 if i == 1 else (acc_2 if i == 2 else acc_3))
        mask = (offs_k < k)[:, None] & (offs_m < m)[None, :]
        tl.store(dx_ptr + offs_m[None, :] * k + offs_k[:, None], acc.to(dx_ptr.dtype.element_ty), mask=mask)
