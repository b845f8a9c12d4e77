"""GEMM in plain Triton: the twin of the Hopper kernels, for any CUDA GPU with the dtype and for the interpreter.

    y[r, :] = x[r, :] . w[g]^T        for every row r of group g;    float32 accumulation
    y[r, :] = silu(x[r, :] . gate[g]^T) * (x[r, :] . up[g]^T)         if SWIGLU: w[g] is gate over up, y half as wide

    x [rows, K], y [rows, N]               pointers; x of any strides, y contiguous
    w [G, N, K]                            pointer, any strides
    x_scale [ceil(K/128), rows_pad] float32    FP8: a scale for each 1 x 128 of x; one such table a group if "masked"
    w_scale [G, ceil(N/128), ceil(K/128)] float32    FP8: a scale for each 128 x 128 of w
    bounds [G] int32, on the device        LAYOUT "ends": group g owns rows bounds[g-1] .. bounds[g] - 1
                                           LAYOUT "masked": group g owns the first bounds[g] of its `capacity` rows
                                           LAYOUT "dense": not read, one group owns all rows

One program makes one tile of BM x BN outputs; it walks along `bounds` to the group that its number falls into. The host
launches as many as there can be, those beyond the last tile end at once. Rows behind the last group's end are written
as zeros ("ends") or left alone ("masked"). Rows outside the tile's group are never read.

Limits: FP8 needs BK = 128 and BN <= 128, so that a tile's product over one step has one scale of w.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(group, end_before, bounds, groups, capacity, rows, LAYOUT: tl.constexpr):
    """First row of a group and the row behind its last. Group `groups` has the rows behind all others, if "ends"."""
    bound = rows
    if LAYOUT != "dense":
        bound = tl.load(bounds + tl.minimum(group, groups - 1))
    if LAYOUT == "masked":
        start = group * capacity
        end = start + tl.minimum(tl.maximum(bound, 0), capacity)
    else:
        start = end_before
        end = tl.where(group < groups, tl.minimum(tl.maximum(bound, start), rows), rows)
    return start, end


@triton.jit
def _product(x, w, x_scale, w_scale, valid_rows, valid_columns, k_size, stride_xk, stride_wk, scale_stride, BK, FP8):
    """The tile's [BM, BN] in float32, from pointers to its rows of x [BM, 1] and of w [1, BN]."""
    acc = tl.zeros((x.shape[0], w.shape[1]), dtype=tl.float32)
    inner = tl.arange(0, BK)
    for k in range(0, k_size, BK):
        there = k + inner < k_size
        a = tl.load(x + inner[None, :] * stride_xk, mask=valid_rows[:, None] & there[None, :], other=0.0)
        b = tl.load(w + inner[:, None] * stride_wk, mask=there[:, None] & valid_columns[None, :], other=0.0)
        x += BK * stride_xk
        w += BK * stride_wk
        if FP8:
            scale = tl.load(x_scale + k // BK * scale_stride, mask=valid_rows, other=0.0) * tl.load(w_scale + k // BK)
            acc += tl.dot(a, b) * scale[:, None]
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(
    do_not_specialize=["groups", "capacity", "rows", "n", "tiles_n", "scale_stride"],
)
def gemm_triton_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bounds_ptr,
    stride_xm,
    stride_xk,
    stride_wg,
    stride_wn,
    stride_wk,
    groups,
    capacity,
    rows,
    n,
    k_size,
    tiles_n,
    scale_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FP8: tl.constexpr,
    SWIGLU: tl.constexpr,
    LAYOUT: tl.constexpr,
    RASTER: tl.constexpr,
):
    """Formula, arguments and tiles: at the head of this file."""
    tile = tl.program_id(0)
    group = 0
    start, end = _rows_of(group, 0, bounds_ptr, groups, capacity, rows, LAYOUT)
    last = groups - 1
    if LAYOUT == "ends":
        last = groups
    while (group < last) & (tile >= tl.cdiv(end - start, BM) * tiles_n):
        tile -= tl.cdiv(end - start, BM) * tiles_n
        group += 1
        start, end = _rows_of(group, end, bounds_ptr, groups, capacity, rows, LAYOUT)
    tiles_m = tl.cdiv(end - start, BM)
    if tile < tiles_m * tiles_n:
        block = tile // (RASTER * tiles_n)
        rest = tile - block * RASTER * tiles_n
        height = tl.minimum(tiles_m - block * RASTER, RASTER)
        row = start + (block * RASTER + rest % height) * BM + tl.arange(0, BM)
        column = rest // height * BN + tl.arange(0, BN)
        valid_rows = row < end
        valid_columns = column < n
        if group == groups:
            k_size = 0
        x = x_ptr + row.to(tl.int64)[:, None] * stride_xm
        w = w_ptr + group.to(tl.int64) * stride_wg + column.to(tl.int64)[None, :] * stride_wn
        blocks_k = tl.cdiv(k_size, 128)
        w_scale = w_scale_ptr
        x_scale = x_scale_ptr + row
        if FP8:
            w_scale += (group * tl.cdiv(n, 128) + rest // height * BN // 128) * blocks_k
            if LAYOUT == "masked":
                x_scale += group * (blocks_k * scale_stride - capacity)
        out = _product(
            x, w, x_scale, w_scale, valid_rows, valid_columns, k_size, stride_xk, stride_wk, scale_stride, BK, FP8
        )
        if SWIGLU:
            up = _product(
                x,
                w + n.to(tl.int64) * stride_wn,
                x_scale,
                w_scale,
                valid_rows,
                valid_columns,
                k_size,
                stride_xk,
                stride_wk,
                scale_stride,
                BK,
                FP8,
            )
            out = out / (1 + tl.exp(-out)) * up
        place = y_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(place, out.to(y_ptr.dtype.element_ty), mask=valid_rows[:, None] & valid_columns[None, :])


@triton.jit(do_not_specialize=["groups", "rows"])
def zero_behind_kernel(y_ptr, ends_ptr, groups, rows, n, BLOCK: tl.constexpr):
    """y[r, :] = 0 for rows r from ends[groups - 1] on. y [rows, n] contiguous; a program takes every so-manieth row."""
    first = tl.minimum(tl.maximum(tl.load(ends_ptr + groups - 1), 0), rows)
    for row in range(first + tl.program_id(0), rows, tl.num_programs(0)):
        for column in range(0, n, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            place = y_ptr + tl.cast(row, tl.int64) * n + columns
            tl.store(place, tl.zeros((BLOCK,), y_ptr.dtype.element_ty), mask=columns < n)
