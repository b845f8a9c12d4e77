"""`dsinfra::fp8_experts`: an expert layer over block-scaled FP8 weights.

    y[t] = sum_k topk_weight[t,k] * W_down[e] Q(h(W_gate_up[e] Q(x[t])))        e = topk_idx[t,k]

As `dsinfra::experts` without biases, gate before up. Q quantises rows to FP8 with a scale for 128 columns
(`dsinfra::quantize_1x128`); products are accumulated in float32. Weights are w_gate_up e4m3 [E,2F,D] with s_gate_up
float32 [E,ceil(2F/128),ceil(D/128)], and w_down [E,D,F] with s_down.

Rows that are quantised already, because they came over a group in FP8, are given as x e4m3 with x_scale float32
[ceil(D/128),ceil4(T)] and the dtype of y: they are Q(x[t]), and y has the same bits.

Refused: gradients (FP8 weights are frozen), and activations with settings of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import moe
from dscompile.lowering.activations import gated
from dscompile.lowering.block_scales import FP8, dequantize_rows, dequantize_weight, quantize_rows
from dscompile.lowering.errors import ActivationError
from dscompile.lowering.ops import experts
from dscompile.lowering.ops.library import define
from dscompile.lowering.ops.row_checks import (
    UNQUANTIZED,
    check_activation,
    check_devices,
    check_dtype,
    check_out_dtype,
    check_row_scale,
    check_weight_scale,
    refuse_gradients,
)
from dscompile.lowering.select import YES, Decision, table

_OP = "fp8_experts"


def check(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    s_gate_up: Tensor,
    w_down: Tensor,
    s_down: Tensor,
    activation: str,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise what is wrong with the arguments of `fp8_experts`, if anything is."""
    if not experts.plainly_right(x, topk_idx, topk_weight, w_gate_up, w_down):
        experts.check_layer(_OP, x, topk_idx, topk_weight, w_gate_up, w_down)
    _check_rows(x, x_scale, out_dtype)
    for name, tensor in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        check_dtype(_OP, name, tensor, (FP8,))
    check_weight_scale(_OP, "s_gate_up", w_gate_up, s_gate_up)
    check_weight_scale(_OP, "s_down", w_down, s_down)
    check_devices(_OP, x, s_gate_up=s_gate_up, s_down=s_down)
    check_activation(_OP, activation)
    if activation == "swiglu_oai":
        raise ActivationError(
            f"{_OP}: activation {activation!r}",
            "It has settings that this operator doesn't take",
            "Use dsinfra::experts",
        )
    way_out = "Call it under torch.no_grad(), or dequantise the weights and train with dsinfra::experts"
    refuse_gradients(_OP, way_out, x, topk_weight, w_gate_up, s_gate_up, w_down, s_down)


def _check_rows(x: Tensor, x_scale: Tensor | None, out_dtype: torch.dtype | None) -> None:
    check_dtype(_OP, "x", x, UNQUANTIZED if x_scale is None else (FP8,))
    if x_scale is not None:
        check_row_scale(_OP, x, x_scale)
        check_devices(_OP, x, x_scale=x_scale)
    if x_scale is not None or out_dtype is not None:
        check_out_dtype(_OP, out_dtype or x.dtype, UNQUANTIZED if x_scale is not None else (x.dtype,))


def _fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    s_gate_up: Tensor,
    w_down: Tensor,
    s_down: Tensor,
    activation: str,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check(x, topk_idx, topk_weight, w_gate_up, s_gate_up, w_down, s_down, activation, x_scale, out_dtype)
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def reference(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    s_gate_up: Tensor,
    w_down: Tensor,
    s_down: Tensor,
    activation: str,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch on any device: both quantisations as they are defined, everything else in float32."""

    def expert(e: int, rows: Tensor) -> Tensor:
        gate_up = rows @ dequantize_weight(w_gate_up[e], s_gate_up[e]).t()
        h = dequantize_rows(*quantize_rows(gated(gate_up, activation, False, 1.0, 0.0)))
        return h @ dequantize_weight(w_down[e], s_down[e]).t()

    rows = dequantize_rows(*(quantize_rows(x.float()) if x_scale is None else (x, x_scale)))
    return experts.weighted_sum(expert, w_down.shape[0], rows, topk_idx, topk_weight).to(out_dtype or x.dtype)


def _kernel(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    s_gate_up: Tensor,
    w_down: Tensor,
    s_down: Tensor,
    activation: str,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check(x, topk_idx, topk_weight, w_gate_up, s_gate_up, w_down, s_down, activation, x_scale, out_dtype)
    if experts.debug_checks:
        experts.check_values(_OP, topk_idx, w_down.shape[0])
    rows = (x, topk_idx, topk_weight, w_gate_up, s_gate_up, w_down, s_down, activation, x_scale, out_dtype)
    return table(_OP).run(*rows)


def _supports_everything(*_: Any) -> Decision:
    return YES


define(
    _OP,
    "(Tensor x, Tensor topk_idx, Tensor topk_weight, Tensor w_gate_up, Tensor s_gate_up, Tensor w_down,"
    " Tensor s_down, str activation, Tensor? x_scale=None, ScalarType? out_dtype=None) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    autocast=False,
)
moe.register_fp8_experts()
table(_OP).register("reference", _supports_everything, reference)


@register_flop_formula(torch.ops.dsinfra.fp8_experts)
def fp8_experts_flops(
    x: Any, topk_idx: Any, topk_weight: Any, w_gate_up: Any, s_gate_up: Any, w_down: Any, *_: Any, **__: Any
) -> int:
    """As `experts_flops`."""
    return experts.experts_flops(x, topk_idx, topk_weight, w_gate_up, w_down)
