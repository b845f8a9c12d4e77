"""Sorting rows by expert, moving them there and back: what surrounds the grouped GEMMs, in plain Triton.

    order = stable argsort of the experts of all rows i = t K + k        position = its inverse
    ends[e] = rows of experts 0 .. e        gathered[p] = x[order[p] // K]        y[t] = sum_k w[t, k] z[position[t, k]]

Inputs: topk_idx int64 or int32 [T, K] contiguous; ids outside [0, E) sort behind all experts and belong to none.
Outputs int32 order [M], position [T, K], ends [E]; x and z have contiguous columns. It is a counting sort without
atomics: a place is the number of rows that come before, counted by whoever needs it, so every run gives the same bits.

    few rows    plan_kernel                                     one launch; each program reads all ids. It can also
                                                                write the token's row, plain or in FP8, to its places
    many        histogram_kernel, scan_kernel, place_kernel     three; counts lie in a [blocks of rows, BINS] table

Rows are moved from the token's side: a token's row is read once and written to its K places.
"""

import triton
import triton.language as tl

from dscompile.kernels.overlap_triton import begin
from dscompile.kernels.quantize_triton import quantize_tile


@triton.jit
def expert_of(idx_ptr, i, rows, experts):
    """Experts of the flat rows i as int32; `experts` where the id is outside [0, experts) or i behind the last row."""
    e = tl.load(idx_ptr + i, mask=i < rows, other=-1)
    return tl.where((e >= 0) & (e < experts), e, experts).to(tl.int32)


@triton.jit
def rows_below(idx_ptr, bound, rows, experts, SLOTS: tl.constexpr):
    """bound [N] -> how many rows have a sort key, expert * rows + i, below each. SLOTS rows are compared at a time.

    Behind the last row, where i >= rows, keys are past those of all rows, and past all bounds that count.
    """
    count = tl.zeros((bound.shape[0], SLOTS), tl.int32)
    for start in range(0, rows, SLOTS):
        i = start + tl.arange(0, SLOTS)
        key = expert_of(idx_ptr, i, rows, experts) * rows + i
        count += (key[None, :] < bound[:, None]).to(tl.int32)
    return tl.sum(count, 1)


@triton.jit
def write_row(x, chunk, place, held, rows, columns, out_ptr, scale_ptr, scale_stride, COLUMNS: tl.constexpr):
    """x [COLUMNS], a chunk of a token's row, to the rows place [K_PAD] of out, in FP8 where there is a scale."""
    if scale_ptr is not None:
        tl.static_assert(COLUMNS % 128 == 0, "a scale belongs to 128 columns")
        q, scale = quantize_tile(tl.reshape(x, (COLUMNS // 128, 128)).to(tl.float32))
        x = tl.reshape(q, (COLUMNS,))
        block = chunk * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
        scale_row = scale_ptr + block.to(tl.int64)[None, :] * scale_stride
        inside = (block * 128 < columns)[None, :]
        tl.store(scale_row + place[:, None], scale[None, :], mask=held[:, None] & inside)
        padding = rows + tl.arange(0, 4)[:, None]
        tl.store(scale_row + padding, 0.0, mask=(padding < scale_stride) & inside & (tl.program_id(0) == chunk))
    c = chunk * COLUMNS + tl.arange(0, COLUMNS)
    at = place.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(out_ptr + at, x[None, :], mask=held[:, None] & (c < columns)[None, :])


@triton.jit(do_not_specialize=["tokens", "experts", "scale_stride"])
def plan_kernel(
    idx_ptr,
    order_ptr,
    position_ptr,
    ends_ptr,
    x_ptr,
    out_ptr,
    scale_ptr,
    tokens,
    experts,
    columns,
    x_stride,
    scale_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The whole plan of few rows and, where there is an x [T, D], its rows at their places.

    Programs (t, chunk of COLUMNS columns) come first: the places of token t, and that part of its row written to each.
    Those behind have K_PAD entries of `ends` each. Both count rows below a bound: a row's own key, or the first key of
    the next expert.
    """
    begin(OVERLAP)
    rows = tokens * K
    chunks = 1
    if x_ptr is not None:
        chunks = tl.cdiv(columns, COLUMNS)
    token = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    k = tl.arange(0, K_PAD)
    if token < tokens:
        if x_ptr is not None:  # on its way while the rows are counted
            c = chunk * COLUMNS + tl.arange(0, COLUMNS)
            x = tl.load(x_ptr + token.to(tl.int64) * x_stride + c, mask=c < columns, other=0.0)
        i = token * K + k
        held = k < K
        place = rows_below(idx_ptr, expert_of(idx_ptr, i, rows, experts) * rows + i, rows, experts, SLOTS)
        if chunk == 0:
            tl.store(position_ptr + i, place, mask=held)
            tl.store(order_ptr + place, i, mask=held)
        if x_ptr is not None:
            write_row(x, chunk, place, held, rows, columns, out_ptr, scale_ptr, scale_stride, COLUMNS)
    else:
        e = (tl.program_id(0) - tokens * chunks) * K_PAD + k
        tl.store(ends_ptr + e, rows_below(idx_ptr, (e + 1) * rows, rows, experts, SLOTS), mask=e < experts)


@triton.jit(do_not_specialize=["rows", "experts"])
def histogram_kernel(idx_ptr, counts_ptr, rows, experts, ROWS: tl.constexpr, BINS: tl.constexpr, OVERLAP: tl.constexpr):
    """counts[b, e] = rows of expert e among the ROWS rows of block b, a program a block. Bin `experts` is no one's."""
    begin(OVERLAP)
    block = tl.program_id(0).to(tl.int64)
    i = (block * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    counts = tl.histogram(expert_of(idx_ptr, i, rows, experts), BINS)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(
    counts_ptr,
    totals_ptr,
    blocks,
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """counts[b, e] in place -> rows of expert e in the blocks before b; totals[e] of all. One program COLUMNS bins."""
    begin(OVERLAP)
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        b = (start + tl.arange(0, BLOCKS))[:, None]
        at = counts_ptr + b.to(tl.int64) * BINS + e[None, :]
        counts = tl.load(at, mask=b < blocks, other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + before[None, :], mask=b < blocks)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + e, before)


@triton.jit(do_not_specialize=["rows", "experts"])
def place_kernel(
    idx_ptr,
    counts_ptr,
    totals_ptr,
    order_ptr,
    position_ptr,
    ends_ptr,
    rows,
    experts,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Places of the rows of one block: rows of lower experts, of its own in blocks before, and in its own block."""
    begin(OVERLAP)
    block = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    ends = tl.cumsum(totals, 0)
    if block == 0:
        tl.store(ends_ptr + bins, ends, mask=bins < experts)
    first = (block * ROWS).to(tl.int32)
    local = tl.arange(0, ROWS)
    e = expert_of(idx_ptr, first + local, rows, experts)
    place = tl.gather(ends - totals + tl.load(counts_ptr + block * BINS + bins), e, 0)
    same = tl.zeros((ROWS, SLOTS), tl.int32)
    for start in range(0, ROWS, SLOTS):
        j = start + tl.arange(0, SLOTS)
        other = expert_of(idx_ptr, first + j, rows, experts)
        same += ((other[None, :] == e[:, None]) & (j[None, :] < local[:, None])).to(tl.int32)
    place += tl.sum(same, 1)
    tl.store(position_ptr + first + local, place, mask=first + local < rows)
    tl.store(order_ptr + place, first + local, mask=first + local < rows)


@triton.jit(do_not_specialize=["tokens", "scale_stride"])
def gather_kernel(
    x_ptr,
    position_ptr,
    out_ptr,
    scale_ptr,
    tokens,
    columns,
    x_stride,
    scale_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[position[t, k]] = x[t] for all k, in FP8 where there is a scale, one program COLUMNS columns of a token."""
    begin(OVERLAP)
    chunks = tl.cdiv(columns, COLUMNS)
    token = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    k = tl.arange(0, K_PAD)
    place = tl.load(position_ptr + token * K + k, mask=k < K, other=0)
    c = chunk * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + c, mask=c < columns, other=0.0)
    write_row(x, chunk, place, k < K, tokens * K, columns, out_ptr, scale_ptr, scale_stride, COLUMNS)


@triton.jit
def gather_by_order_kernel(
    x_ptr, order_ptr, out_ptr, columns, x_stride, K: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr
):
    """out[p] = x[order[p] // K], one program COLUMNS columns of a row."""
    begin(OVERLAP)
    chunks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    c = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    source = (tl.load(order_ptr + row) // K).to(tl.int64)
    tl.store(out_ptr + row * columns + c, tl.load(x_ptr + source * x_stride + c, mask=c < columns), mask=c < columns)


@triton.jit(do_not_specialize=["experts"])
def combine_kernel(
    z_ptr,
    position_ptr,
    weight_ptr,
    idx_ptr,
    bias_ptr,
    y_ptr,
    experts,
    columns,
    z_stride,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """y[t] = sum_k w[t, k] z[position[t, k]] in float32 in the order of k, one program COLUMNS columns of a token.

    Where there is a bias [E, D], its expert's row is added to each row of z in z's dtype, as a linear layer's is. No
    weights are weights of 1. Rows of ids outside [0, experts) are not read, their weights don't count.
    """
    begin(OVERLAP)
    chunks = tl.cdiv(columns, COLUMNS)
    token = (tl.program_id(0) // chunks).to(tl.int64)
    c = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(idx_ptr + token * K + k)
        place = tl.load(position_ptr + token * K + k).to(tl.int64)
        w = 1.0
        if weight_ptr is not None:
            w = tl.load(weight_ptr + token * K + k).to(tl.float32)
        held = (e >= 0) & (e < experts)
        z = tl.load(z_ptr + place * z_stride + c, mask=(c < columns) & held, other=0.0)
        if bias_ptr is not None:
            b = tl.load(bias_ptr + e.to(tl.int64) * columns + c, mask=(c < columns) & held, other=0.0)
            z = (z.to(tl.float32) + b.to(tl.float32)).to(z.dtype)
        y += tl.where(held, w, 0.0) * z.to(tl.float32)
    tl.store(y_ptr + token * columns + c, y.to(y_ptr.dtype.element_ty), mask=c < columns)
