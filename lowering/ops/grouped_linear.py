"""`dsinfra::grouped_linear` and `dsinfra::grouped_weight_grad`: one product a group of consecutive rows.

    y[ends[g-1] : ends[g]] = x[ends[g-1] : ends[g]] W[g]^T          dW[g] = dy[rows of g]^T x[rows of g]

x [M,K] holds rows sorted by group, W [G,N,K] may be any strided view (parameters kept as [G,K,N] come transposed). The
ends are read on the device: no padding, no synchronisation, and an empty group costs nothing. Rows at or past the last
end are zero in y and count in no dW. The two operators are each other's gradients, to any order: dx = dy W is a
grouped_linear over the transposed view of W, and the gradient of grouped_weight_grad two grouped_linear.

Refused: rows and weights of different dtypes (no autocast rule, as torch's grouped_mm has none), FP8 (see
`fp8_grouped_linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import grouped
from dscompile.lowering.errors import DtypeMismatch
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.mla import accumulation_dtype
from dscompile.lowering.ops.row_checks import FLOATS, check_devices, check_dtype, check_ends, check_rank, check_shape
from dscompile.lowering.select import YES, Decision, table

LINEAR, WEIGHT_GRAD = "grouped_linear", "grouped_weight_grad"

# ------------------------------------------------------------------ checks and shape functions


def check(x: Tensor, w: Tensor, ends: Tensor) -> None:
    """Raise what is wrong with the arguments of `grouped_linear`, if anything is."""
    check_rank(LINEAR, "x", x, "MK")
    check_rank(LINEAR, "w", w, "GNK")
    _check_dtypes(LINEAR, "w", x, w)
    check_shape(LINEAR, "w", w, (*w.shape[:2], x.shape[1]), "It is contracted with the K columns of x", x=x)
    check_ends(LINEAR, "ends", ends, w.shape[0])
    check_devices(LINEAR, x, w=w, ends=ends)


def check_weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> None:
    """Raise what is wrong with the arguments of `grouped_weight_grad`, if anything is."""
    check_rank(WEIGHT_GRAD, "dy", dy, "MN")
    check_rank(WEIGHT_GRAD, "x", x, "MK")
    check_rank(WEIGHT_GRAD, "ends", ends, "G")
    _check_dtypes(WEIGHT_GRAD, "dy", x, dy)
    check_shape(WEIGHT_GRAD, "dy", dy, (x.shape[0], dy.shape[1]), "It is summed over the rows of x", x=x)
    check_ends(WEIGHT_GRAD, "ends", ends, ends.shape[0])
    check_devices(WEIGHT_GRAD, x, dy=dy, ends=ends)


def _check_dtypes(op: str, name: str, x: Tensor, other: Tensor) -> None:
    check_dtype(op, "x", x, FLOATS)
    if other.dtype != x.dtype:
        raise DtypeMismatch(
            f"{op}: {name} {list(other.shape)} is {other.dtype} but x {list(x.shape)} is {x.dtype}",
            "Both are multiplied as they are",
            f"Convert one of them, such as x.to({other.dtype})",
        )


def _fake(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    check(x, w, ends)
    return x.new_empty(x.shape[0], w.shape[1])


def _fake_weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    check_weight_grad(dy, x, ends)
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


# ------------------------------------------------------------------ references


def multiply_groups(x_MK: Tensor, weight: Callable[[int], Tensor], N: int, ends: Tensor) -> Tensor:
    """-> [M,N] in the dtype of `x_MK`; `weight(g)` gives [N,K] in that dtype.

    Each group's rows are sliced, for which the ends are read on the host. Where that can't be, in a captured graph,
    each group is multiplied with all rows and its own are kept, at G times the arithmetic.
    """
    y = x_MK.new_zeros(x_MK.shape[0], N)
    if grouped.can_wait(x_MK):
        start = 0
        for g, end in enumerate(ends.tolist()):
            if end > start:
                torch.mm(x_MK[start:end], weight(g).t(), out=y[start:end])
                start = end
        return y
    group_M1 = group_of_rows(ends, x_MK.shape[0]).unsqueeze(1)
    for g in range(ends.shape[0]):
        y = torch.where(group_M1 == g, x_MK @ weight(g).t(), y)
    return y


def group_of_rows(ends: Tensor, rows: int) -> Tensor:
    """-> int64 [rows]: the group that owns each row, G past the last end. Reads nothing on the host."""
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)


def reference(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Plain PyTorch on any device, in float32 throughout (float64 for float64)."""
    wide = accumulation_dtype(x.dtype)
    return multiply_groups(x.to(wide), lambda g: w[g].to(wide), w.shape[1], ends).to(x.dtype)


def reference_weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Plain PyTorch on any device, in float32 throughout (float64 for float64); reads the ends as `multiply_groups`."""
    wide, G = accumulation_dtype(x.dtype), ends.shape[0]
    dw = x.new_zeros(G, dy.shape[1], x.shape[1])
    if grouped.can_wait(x):
        start = 0
        for g, end in enumerate(ends.tolist()):
            if end > start:
                dw[g] = dy[start:end].to(wide).t() @ x[start:end].to(wide)
                start = end
        return dw
    group_M1 = group_of_rows(ends, x.shape[0]).unsqueeze(1)
    wide_x, wide_dy = x.to(wide), dy.to(wide)
    for g in range(G):
        # Both are masked: a row of another group may hold NaN, and 0 * NaN is NaN.
        own_dy, own_x = (t.masked_fill(group_M1 != g, 0.0) for t in (wide_dy, wide_x))
        dw[g] = own_dy.t() @ own_x
    return dw


# ------------------------------------------------------------------ kernels, autograd, FLOPs


def _kernel(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    check(x, w, ends)
    return table(LINEAR).run(x, w, ends)


def _kernel_weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    check_weight_grad(dy, x, ends)
    return table(WEIGHT_GRAD).run(dy, x, ends)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, ends = ctx.saved_tensors
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.dsinfra.grouped_linear.default(grad_y, w.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        grad_w = torch.ops.dsinfra.grouped_weight_grad.default(grad_y, x, ends)
    return grad_x, grad_w, None


def _backward_weight_grad(ctx: Any, grad_w: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    dy, x, ends = ctx.saved_tensors
    grad_dy = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_dy = torch.ops.dsinfra.grouped_linear.default(x, grad_w, ends)
    if ctx.needs_input_grad[1]:
        grad_x = torch.ops.dsinfra.grouped_linear.default(dy, grad_w.transpose(1, 2), ends)
    return grad_dy, grad_x, None


def _supports_everything(*_: Any) -> Decision:
    return YES


define(LINEAR, "(Tensor x, Tensor w, Tensor ends) -> Tensor", kernel=_kernel, fake=_fake, autocast=False)
define(
    WEIGHT_GRAD,
    "(Tensor dy, Tensor x, Tensor ends) -> Tensor",
    kernel=_kernel_weight_grad,
    fake=_fake_weight_grad,
    autocast=False,
)
define_autograd(LINEAR, setup_context=_setup_context, backward=_backward)
define_autograd(WEIGHT_GRAD, setup_context=_setup_context, backward=_backward_weight_grad)
grouped.register_grouped_linear()
table(LINEAR).register("reference", _supports_everything, reference)
table(WEIGHT_GRAD).register("reference", _supports_everything, reference_weight_grad)


@register_flop_formula(torch.ops.dsinfra.grouped_linear)
def grouped_linear_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    """Each row meets one group's weight; rows past the last end are counted too, the ends being on the device."""
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.dsinfra.grouped_weight_grad)
def grouped_weight_grad_flops(dy: Any, x: Any, *_: Any, **__: Any) -> int:
    """As `grouped_linear_flops`."""
    return 2 * x[0] * dy[1] * x[1]
