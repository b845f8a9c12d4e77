"""Quantisation to float8_e4m3fn in blocks of 1 x 128, alone or behind a gather or SwiGLU, in plain Triton.

    scale[b, m] = max_j |x[m, 128 b + j]| / 448          q[m, 128 b + j] = round(x[m, 128 b + j] / scale[b, m])

Inputs: x [M, K] with contiguous columns, or gate_up [M, 2K], gate first. Outputs: q [M, K] contiguous; scale float32
[ceil(K / 128), M_pad], as the GEMM reads it, M_pad the next multiple of 4, padding 0. One program (grid: block of
columns fastest) takes ROWS rows of one block: x is read once, q written once. Both divisions round to nearest, so that
q and scale are those of the formula in PyTorch's float32, bit for bit. NaN and infinity do as they do there: a block
with a NaN is NaN altogether; one with an infinity has scale inf, its finite values 0 and the infinite ones NaN.
A scale is never below the smallest normal float32, so that a block of zeros is divided by that.
"""

import triton
import triton.language as tl

from dscompile.kernels.overlap_triton import begin


@triton.jit
def quantize_tile(x):
    """x [ROWS, 128] float32 -> q [ROWS, 128] float8_e4m3fn, scale [ROWS] float32."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)  # as integers, NaN is the largest of all
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = tl.where(scale < 1.17549435e-38, 1.17549435e-38, scale)
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return quotient.to(tl.float8e4nv), scale


@triton.jit
def silu(x):
    """x * sigmoid(x), float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["rows", "scale_stride", "groups"])
def quantize_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    order_ptr,
    ends_ptr,
    rows,
    columns,
    x_stride,
    scale_stride,
    groups,
    COPIES: tl.constexpr,
    SWIGLU: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """q and scale of x; of silu(gate) * up if SWIGLU; of x[order // COPIES] where there is an order.

    Where there are ends, rows at or past ends[groups - 1] are not read and count as zeros.
    """
    begin(OVERLAP)
    blocks = tl.cdiv(columns, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    c = block * 128 + tl.arange(0, 128)
    limit = rows
    if ends_ptr is not None:
        limit = tl.minimum(rows, tl.load(ends_ptr + groups - 1))
    source = row
    if order_ptr is not None:
        source = tl.load(order_ptr + row, mask=row < rows, other=0) // COPIES
    held = (row < limit)[:, None] & (c < columns)[None, :]
    at = source.to(tl.int64)[:, None] * x_stride + c[None, :]
    x = tl.load(x_ptr + at, mask=held, other=0.0).to(tl.float32)
    if SWIGLU:
        x = silu(x) * tl.load(x_ptr + at + columns, mask=held, other=0.0).to(tl.float32)
    q, scale = quantize_tile(x)
    tl.store(
        q_ptr + row.to(tl.int64)[:, None] * columns + c[None, :], q, mask=(row < rows)[:, None] & (c < columns)[None, :]
    )
    # ROWS is a multiple of 4: the last tile covers the padding.
    scale_at = block.to(tl.int64) * scale_stride + row
    tl.store(scale_ptr + scale_at, tl.where(row < rows, scale, 0.0), mask=row < scale_stride)
