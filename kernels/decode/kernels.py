"""The Triton kernels of a decode step between the products: residual + RMSNorm; RoPE + cache + attention of one token.

Both read the products' split sums as they lie ([splits, rows, columns], fp32 or, of one split, the compute dtype), so
that adding them up is no launch of its own. Imports triton.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_of_splits(ptr, delta_ptr, offs, splits, stride, mask, HAS_DELTA: tl.constexpr, DTYPE: tl.constexpr):
    """sum of tl.load(ptr + offs + s stride) over s, and delta [...] where there is one, in fp32, rounded to DTYPE."""
    total = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for s in range(1, splits):
        total += tl.load(ptr + offs + s * stride, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        total += tl.load(delta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return total.to(DTYPE)


@triton.jit
def norm_kernel(
    parts_ptr,
    residual_ptr,
    weight_ptr,
    splits,
    m,
    n,
    h_ptr,
    x_ptr,
    zeros_ptr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """Program i: row i of h = residual + sum of parts [splits, M, N] and of x = RMSNorm(h) * weight, both [M, N].

    zeros: as in `w4a16.few_rows_kernels.matmul_kernel`.
    """
    DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    row = tl.program_id(0)
    if ZEROS > 0 and row == 0:
        tl.store(zeros_ptr + tl.arange(0, ZEROS), tl.zeros((ZEROS,), dtype=tl.int32))
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    total = tl.load(parts_ptr + row * n + columns, mask=mask, other=0.0).to(tl.float32)
    for s in range(1, splits):
        total += tl.load(parts_ptr + (s * m + row) * n + columns, mask=mask, other=0.0).to(tl.float32)
    h = (total + tl.load(residual_ptr + row * n + columns, mask=mask, other=0.0).to(tl.float32)).to(DTYPE)
    tl.store(h_ptr + row * n + columns, h, mask=mask)
    h = h.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / n + EPS)
    x = h * scale * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * n + columns, x.to(DTYPE), mask=mask)


@triton.jit
def _rotated(
    ptr, delta_ptr, offs, partners, splits, stride, cos, sin, mask, HAS_DELTA: tl.constexpr, DTYPE: tl.constexpr
):
    """A head's numbers times cos plus their partners' (the other half's) times sin, sin signed; rounded to DTYPE."""
    own = _sum_of_splits(ptr, delta_ptr, offs, splits, stride, mask, HAS_DELTA, DTYPE).to(tl.float32)
    partner = _sum_of_splits(ptr, delta_ptr, partners, splits, stride, mask, HAS_DELTA, DTYPE).to(tl.float32)
    return (own * cos + partner * sin).to(DTYPE)


@triton.jit
def _merge(parts_ptr, stats_ptr, out_ptr, query, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Query head `query` of out [B N, H] from its parts; a part that saw no slot has a sum of 0 and counts nothing.

    Other programs wrote them in this launch, so they are read from where all see the same (.cg: the L2 cache).
    """
    parts = tl.arange(0, BLOCK_P)
    dims = tl.arange(0, HEAD_DIM)
    stats = stats_ptr + (query * PARTS + parts) * 2
    largest = tl.load(stats, mask=parts < PARTS, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(stats + 1, mask=parts < PARTS, other=0.0, cache_modifier=".cg")
    weight = tl.exp(largest - tl.max(largest, axis=0))  # part 0 has the token's own slot: the maximum is finite
    rows = parts_ptr + (query * PARTS + parts)[:, None] * HEAD_DIM + dims[None, :]
    acc = tl.load(rows, mask=(parts < PARTS)[:, None], other=0.0, cache_modifier=".cg")
    out = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out_ptr + query * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty))


@triton.jit
def attention_kernel(
    qkv_ptr,
    delta_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    old_keys_ptr,
    old_values_ptr,
    zeros_ptr,
    splits,
    batch,
    num_slots,
    out_ptr,
    keys_ptr,
    values_ptr,
    parts_ptr,
    stats_ptr,
    counts_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """Program (b, k, p): RoPE on the token's queries and key of kv head k, its key and value to the cache (by part 0),
    and the attention of the GROUP query heads over part p of the slots before the token's; part 0 has its own too.

    qkv [splits, B, (N + 2 K) H]; delta [B, (N + 2 K) H], added to it, where there is one; cos, sin fp32 [B, H / 2];
    keys, values [B, K, S, H], of which old_* are the same memory; out [B, N, H]. A position beyond the last slot writes
    nothing. Where there are several parts, each leaves its sums in parts fp32 [B, N, PARTS, H], not yet divided, and
    their maximum and sum of exponentials in stats fp32 [B, N, PARTS, 2], and counts itself in counts int32 [B K or
    more], zero before (zeros is the same memory); the last one merges them, in one order whoever is last.
    """
    DTYPE: tl.constexpr = keys_ptr.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (KV_HEADS * GROUP + 2 * KV_HEADS) * HEAD_DIM
    b = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    position = tl.load(positions_ptr + b)
    dims = tl.arange(0, HEAD_DIM)
    partners = (dims + HALF) % HEAD_DIM
    group = tl.arange(0, BLOCK_G)
    cos = tl.load(cos_ptr + b * HALF + dims % HALF)
    sin = tl.load(sin_ptr + b * HALF + dims % HALF)
    sin = tl.where(dims < HALF, -sin, sin)
    token = b * WIDTH
    stride = batch * WIDTH
    in_group = (group < GROUP)[None, :]
    q_offs = token + (head * GROUP + group)[None, :] * HEAD_DIM
    q = _rotated(  # [H, G]
        qkv_ptr,
        delta_ptr,
        q_offs + dims[:, None],
        q_offs + partners[:, None],
        splits,
        stride,
        cos[:, None],
        sin[:, None],
        in_group,
        HAS_DELTA,
        DTYPE,
    )
    k_offs = token + (KV_HEADS * GROUP + head) * HEAD_DIM
    all_dims = dims >= 0
    new_key = _rotated(  # [H]
        qkv_ptr, delta_ptr, k_offs + dims, k_offs + partners, splits, stride, cos, sin, all_dims, HAS_DELTA, DTYPE
    )
    v_offs = k_offs + KV_HEADS * HEAD_DIM
    new_value = _sum_of_splits(qkv_ptr, delta_ptr, v_offs + dims, splits, stride, all_dims, HAS_DELTA, DTYPE)  # [H]
    cache = (b * KV_HEADS + head).to(tl.int64) * num_slots * HEAD_DIM
    if part == 0:
        here = (dims >= 0) & (position < num_slots)
        tl.store(keys_ptr + cache + position * HEAD_DIM + dims, new_key, mask=here)
        tl.store(values_ptr + cache + position * HEAD_DIM + dims, new_value, mask=here)
    # The token's own slot is taken from registers, and only by part 0; the others start from nothing.
    own = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[:, None], axis=0) * SCALE  # [G]
    first = part == 0
    largest = tl.where(first & (group >= 0), own, float("-inf"))
    total = tl.where(first & (group >= 0), 1.0, 0.0)
    acc = tl.where(first, new_value.to(tl.float32), 0.0)[:, None] + tl.zeros((HEAD_DIM, BLOCK_G), dtype=tl.float32)
    before = tl.minimum(position, num_slots)
    each = tl.cdiv(tl.cdiv(before, PARTS), BLOCK_S) * BLOCK_S
    slots = tl.arange(0, BLOCK_S)
    end = tl.minimum((part + 1) * each, before)
    for start in range(part * each, end, BLOCK_S):
        slot = start + slots
        seen = slot < end
        rows = cache + slot[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(old_keys_ptr + rows, mask=seen[:, None], other=0.0)
        values = tl.load(old_values_ptr + rows, mask=seen[:, None], other=0.0)
        scores = tl.where(seen[:, None], tl.dot(keys, q) * SCALE, float("-inf"))  # [S, G]
        larger = tl.maximum(largest, tl.max(scores, axis=0))
        weights = tl.exp(scores - larger[None, :])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink[None, :] + tl.dot(tl.trans(values), weights.to(DTYPE))
        largest = larger
    if PARTS == 1:
        places = out_ptr + ((b * KV_HEADS + head) * GROUP + group)[None, :] * HEAD_DIM + dims[:, None]
        tl.store(places, (acc / total[None, :]).to(DTYPE), mask=in_group)
    else:
        query = ((b * KV_HEADS + head) * GROUP + group) * PARTS + part
        tl.store(parts_ptr + query[None, :] * HEAD_DIM + dims[:, None], acc, mask=in_group)
        tl.store(stats_ptr + query * 2, largest, mask=group < GROUP)
        tl.store(stats_ptr + query * 2 + 1, total, mask=group < GROUP)
        tl.debug_barrier()  # all threads have written before one of them says so
        before_this = tl.atomic_add(counts_ptr + b * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
        if before_this == PARTS - 1:
            for i in range(GROUP):
                _merge(parts_ptr, stats_ptr, out_ptr, (b * KV_HEADS + head) * GROUP + i, HEAD_DIM, PARTS, BLOCK_P)
