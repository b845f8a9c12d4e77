"""`dsinfra::fp8_linear` and `dsinfra::fp8_linear_bf16`: y = x W^T over FP8 values with block scales.

    y = sum over K blocks of (q_x . q_w) * scale_x * scale_w  + bias        accumulated in float32, rounded once

The first takes rows that are quantised already (1 x 128, see `dsinfra::quantize_1x128`) and has no gradient. The second
takes 16- or 32-bit rows, quantises them inside and returns their dtype; W is frozen FP8, so its gradient is
dx = dy dequantised(W): rounding x is taken as the identity (straight through) and dy isn't quantised.

Refused: gradients of the raw operator and of FP8 weights; scales of another layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import grouped
from dscompile.lowering.block_scales import dequantize_rows, dequantize_weight
from dscompile.lowering.errors import NotDifferentiable
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.row_checks import (
    FLOATS,
    UNQUANTIZED,
    check_devices,
    check_dtype,
    check_fp8_pair,
    check_out_dtype,
    check_rank,
    check_row_scale,
    check_shape,
    check_weight_scale,
    refuse_gradients,
)
from dscompile.lowering.select import YES, Decision, table

# ------------------------------------------------------------------ checks and shape functions


def check(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """Raise what is wrong with the arguments of `fp8_linear`, if anything is."""
    op = "fp8_linear"
    check_rank(op, "x", x, "MK")
    check_fp8_pair(op, x, w)
    _check_weight(op, x, w, w_scale, bias)
    check_row_scale(op, x, x_scale)
    check_devices(op, x, x_scale=x_scale)
    check_out_dtype(op, out_dtype)
    refuse_gradients(op, "Use dsinfra::fp8_linear_bf16, which quantises inside", x_scale, w_scale, bias)


def check_bf16(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    """Raise what is wrong with the arguments of `fp8_linear_bf16`, if anything is."""
    op = "fp8_linear_bf16"
    check_rank(op, "x", x, "MK")
    check_dtype(op, "x", x, UNQUANTIZED)
    check_dtype(op, "w", w, (torch.float8_e4m3fn,))
    _check_weight(op, x, w, w_scale, bias)


def _check_weight(op: str, x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    check_rank(op, "w", w, "NK")
    check_shape(op, "w", w, (w.shape[0], x.shape[1]), "It is contracted with the K columns of x", x=x)
    check_weight_scale(op, "w_scale", w, w_scale)
    if bias is not None:
        check_shape(op, "bias", bias, (w.shape[0],), "It is added to the N columns that w gives", w=w)
        check_dtype(op, "bias", bias, FLOATS)
    check_devices(op, x, w=w, w_scale=w_scale, bias=bias)


def _fake(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    check(x, x_scale, w, w_scale, bias, out_dtype)
    return x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)


def _fake_bf16(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_bf16(x, w, w_scale, bias)
    return x.new_empty(x.shape[0], w.shape[0])


# ------------------------------------------------------------------ reference


def reference(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch on any device, in float32."""
    y = dequantize_rows(x, x_scale) @ dequantize_weight(w, w_scale).t()
    return (y if bias is None else y + bias).to(out_dtype)


# ------------------------------------------------------------------ kernels, autograd, FLOPs


def _kernel(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    check(x, x_scale, w, w_scale, bias, out_dtype)
    return table("fp8_linear").run(x, x_scale, w, w_scale, bias, out_dtype)


def _kernel_bf16(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_bf16(x, w, w_scale, bias)
    q, scale = table("quantize_1x128").run(x)
    return table("fp8_linear").run(q, scale, w, w_scale, bias, x.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, w_scale, bias = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotDifferentiable(
            f"fp8_linear_bf16: an FP8 weight {list(w.shape)} or its scales require grad",
            "FP8 weights are frozen: a step of an optimizer would be lost in their rounding",
            "Detach them, or keep a 16-bit copy to train and quantise it after each step",
        )
    ctx.save_for_backward(w, w_scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    w, w_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_y @ dequantize_weight(w, w_scale).to(grad_y.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias


def _supports_everything(*_: Any) -> Decision:
    return YES


define(
    "fp8_linear",
    "(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    autocast=False,
)
define(
    "fp8_linear_bf16",
    "(Tensor x, Tensor w, Tensor w_scale, Tensor? bias) -> Tensor",
    kernel=_kernel_bf16,
    fake=_fake_bf16,
    autocast=False,  # As the layers it replaces: they quantise whatever dtype comes and return it.
)
define_autograd("fp8_linear_bf16", setup_context=_setup_context, backward=_backward)
grouped.register_fp8_linear()
table("fp8_linear").register("reference", _supports_everything, reference)


@register_flop_formula(torch.ops.dsinfra.fp8_linear)
def fp8_linear_flops(x: Any, x_scale: Any, w: Any, *_: Any, **__: Any) -> int:
    """One product."""
    return 2 * x[0] * w[0] * w[1]


@register_flop_formula(torch.ops.dsinfra.fp8_linear_bf16)
def fp8_linear_bf16_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    """One product."""
    return 2 * x[0] * w[0] * w[1]
