"""`dsinfra::mixed_linear`: y [M,N] float32 = x [M,K] times w [N,K] transposed, both bfloat16 or both float16.

The product of two such numbers is exact in float32, and sums are accumulated in float32: what a linear layer of upcast
operands computes (a router's logits), without writing either of them out in float32. Gradients are rounded to the
operands' dtype at the end, as those of the casts are.

On CUDA cuBLAS runs it, through `torch.mm(..., out_dtype=torch.float32)`. It is an operator of its own because Inductor
may take that call apart for one row and then rounds the result to 16 bits (torch 2.13, `coordinate_descent_tuning`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering.grouped import on_cuda
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.row_checks import check_devices, check_dtype, check_rank, check_shape
from dscompile.lowering.select import YES, Decision, table

HALVES = (torch.bfloat16, torch.float16)


def check(x: Tensor, w: Tensor) -> None:
    """Raise what is wrong with the arguments, if anything is."""
    check_rank("mixed_linear", "x", x, "MK")
    check_rank("mixed_linear", "w", w, "NK")
    check_dtype("mixed_linear", "x", x, HALVES)
    check_dtype("mixed_linear", "w", w, (x.dtype,))
    check_shape("mixed_linear", "w", w, (w.shape[0], x.shape[1]), "Rows of both are multiplied", x=x)
    check_devices("mixed_linear", x, w=w)


def _fake(x: Tensor, w: Tensor) -> Tensor:
    check(x, w)
    return x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)


def reference(x: Tensor, w: Tensor) -> Tensor:
    """Plain PyTorch on any device."""
    return x.float() @ w.float().t()


def _kernel(x: Tensor, w: Tensor) -> Tensor:
    check(x, w)
    return table("mixed_linear").run(x, w)


def _supports_cublas(x: Tensor, w: Tensor) -> Decision:
    return on_cuda(x)


def _cublas(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w.t(), out_dtype=torch.float32)


def _supports_everything(*_: Any) -> Decision:
    return YES


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, w = ctx.saved_tensors
    to_x, to_w = ctx.needs_input_grad
    return (
        (grad @ w.float()).to(x.dtype) if to_x else None,
        (grad.t() @ x.float()).to(w.dtype) if to_w else None,
    )


define("mixed_linear", "(Tensor x, Tensor w) -> Tensor", kernel=_kernel, fake=_fake, autocast=False)
define_autograd("mixed_linear", setup_context=_setup_context, backward=_backward)
table("mixed_linear").register("cublas", _supports_cublas, _cublas)
table("mixed_linear").register("reference", _supports_everything, reference)


@register_flop_formula(torch.ops.dsinfra.mixed_linear)
def mixed_linear_flops(x_shape: Any, w_shape: Any, *_: Any, **__: Any) -> int:
    """Two a multiplication and addition."""
    return 2 * x_shape[0] * x_shape[1] * w_shape[0]
