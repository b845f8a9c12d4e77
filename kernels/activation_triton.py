"""Gated activations of expert layers in plain Triton, where no GEMM or quantisation has them fused.

    silu, gelu, gelu_tanh    h = act(gate) * up
    swiglu_oai               gate' = min(gate, limit), up' = clamp(up, -limit, limit)
                             h = (up' + 1) * gate' * sigmoid(alpha * gate')

Inputs: gate_up [M, 2F] with contiguous columns, gate and up the halves of the columns or, interleaved, the even and the
odd ones; ends int32 [E] and bias [E, 2F], or None. Output: h [M, F] contiguous. The bias of a row's expert is added in
the dtype of gate_up, as a linear layer's is; the rest is float32, rounded once. One program (grid: chunk of columns
fastest) takes COLUMNS columns of h of one row. Rows at or past ends[E - 1] are not read and give zeros.
"""

import triton
import triton.language as tl

from dscompile.kernels.overlap_triton import begin


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr):
    """h of float32 gate and up."""
    if ACTIVATION == "swiglu_oai":
        if CLAMPED:
            gate = tl.where(gate > limit, limit, gate)  # comparisons, not minima: NaN stays
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    # 0.5 (1 + tanh u) = sigmoid(2 u)
    doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-doubled)) * up


@triton.jit
def both_halves(row_ptr, chunk, columns, held, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr):
    """Gate and up, [COLUMNS] each, of one row of gate_up or of bias; zeros where not held."""
    if INTERLEAVED:
        c = chunk * 2 * COLUMNS + tl.arange(0, 2 * COLUMNS)
        both = tl.load(row_ptr + c, mask=(c < 2 * columns) & held, other=0.0)
        gate, up = tl.split(tl.reshape(both, (COLUMNS, 2)))
    else:
        c = chunk * COLUMNS + tl.arange(0, COLUMNS)
        gate = tl.load(row_ptr + c, mask=(c < columns) & held, other=0.0)
        up = tl.load(row_ptr + columns + c, mask=(c < columns) & held, other=0.0)
    return gate, up


@triton.jit(do_not_specialize=["groups"])
def activation_kernel(
    gate_up_ptr,
    ends_ptr,
    bias_ptr,
    h_ptr,
    columns,
    gate_up_stride,
    bias_stride,
    groups,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Formula and layout: at the head of this file. GROUPS is a power of two at or above `groups`."""
    begin(OVERLAP)
    chunks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    held = True
    if ends_ptr is not None:
        held = row < tl.load(ends_ptr + groups - 1)
    gate, up = both_halves(gate_up_ptr + row * gate_up_stride, chunk, columns, held, INTERLEAVED, COLUMNS)
    if bias_ptr is not None:
        g = tl.arange(0, GROUPS)
        ends = tl.load(ends_ptr + g, mask=g < groups, other=0x7FFFFFFF)
        expert = tl.sum((ends <= row).to(tl.int32), 0).to(tl.int64)
        b_gate, b_up = both_halves(bias_ptr + expert * bias_stride, chunk, columns, held, INTERLEAVED, COLUMNS)
        gate = (gate.to(tl.float32) + b_gate.to(tl.float32)).to(gate_up_ptr.dtype.element_ty)
        up = (up.to(tl.float32) + b_up.to(tl.float32)).to(gate_up_ptr.dtype.element_ty)
    h = activate(gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACTIVATION, CLAMPED)
    c = chunk * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(h_ptr + row * columns + c, h.to(h_ptr.dtype.element_ty), mask=c < columns)
