"""Joins the parts of K that gemm_small_gluon.py was split into: plain Triton, one pass, always in the same order.

    y[t, n] = sum_s parts[s, t, n]                       parts [SPLITS, T, N] float32, y [T, N] of any float type
    y[t, f] = silu(gate) * up, gate = column f of that sum, up = column F + f         SWIGLU: parts [SPLITS, T, 2F]

One program (grid: block of columns fastest, then row): BLOCK columns of one row. Rows behind the last group, whose
parts nobody wrote, are zero.
"""

import triton
import triton.language as tl

from dscompile.kernels.overlap_triton import begin


@triton.jit
def _sum(p_part, stride, mask, SPLITS: tl.constexpr):
    total = tl.load(p_part, mask=mask, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(p_part + s * stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["tokens", "groups"], do_not_specialize_on_alignment=["ends_ptr"])
def gemm_small_join_kernel(
    part_ptr,
    y_ptr,
    ends_ptr,
    tokens,
    groups,
    n_out,
    SPLITS: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Formulas and arguments: at the head of this file."""
    begin(OVERLAP)
    blocks = tl.cdiv(n_out, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n_out
    valid = mask
    if HAS_ENDS:
        valid = mask & (row < tl.load(ends_ptr + groups - 1))
    width = n_out * 2 if SWIGLU else n_out
    p_part = part_ptr + row * width + column
    stride = tokens.to(tl.int64) * width
    value = _sum(p_part, stride, valid, SPLITS)
    if SWIGLU:
        up = _sum(p_part + n_out, stride, valid, SPLITS)
        value = value / (1 + tl.exp(-value)) * up
    tl.store(y_ptr + row * n_out + column, value.to(y_ptr.dtype.element_ty), mask=mask)
