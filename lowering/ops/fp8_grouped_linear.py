"""`dsinfra::fp8_grouped_linear` and `dsinfra::fp8_grouped_linear_masked`: one FP8 product a group of rows.

    y[rows of g] = sum over K blocks of (q_x . q_w[g]) * scale_x * scale_w[g]    accumulated in float32, rounded once

The first takes rows sorted by group, x [M,K] and `ends` as `dsinfra::grouped_linear`; rows at or past the last end are
zero. The second takes room for `max` rows a group, x [L,max,K], of which counts[l] are filled: what lies behind them is
neither read nor written, so those rows of y hold anything. Weights are [G,N,K] with scales [G,ceil(N/128),ceil(K/128)].

Refused: gradients (FP8 weights are frozen, see `dsinfra::fp8_linear_bf16` for dense layers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import grouped
from dscompile.lowering.block_scales import dequantize_rows, dequantize_weight
from dscompile.lowering.ops.grouped_linear import multiply_groups
from dscompile.lowering.ops.library import define
from dscompile.lowering.ops.row_checks import (
    check_devices,
    check_ends,
    check_fp8_pair,
    check_out_dtype,
    check_rank,
    check_row_scale,
    check_shape,
    check_weight_scale,
    refuse_gradients,
)
from dscompile.lowering.select import YES, Decision, table

SORTED, MASKED = "fp8_grouped_linear", "fp8_grouped_linear_masked"
_ARGUMENTS = "Tensor x, Tensor x_scale, Tensor w, Tensor w_scale"

# ------------------------------------------------------------------ checks and shape functions


def check(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out_dtype: torch.dtype) -> None:
    """Raise what is wrong with the arguments of `fp8_grouped_linear`, if anything is."""
    check_rank(SORTED, "x", x, "MK")
    _check(SORTED, x, x_scale, w, w_scale, out_dtype)
    check_ends(SORTED, "ends", ends, w.shape[0])
    check_devices(SORTED, x, ends=ends)


def check_masked(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> None:
    """Raise what is wrong with the arguments of `fp8_grouped_linear_masked`, if anything is."""
    check_rank(MASKED, "x", x, ("L", "max", "K"))
    check_shape(MASKED, "w", w, (x.shape[0], *w.shape[1:]), "Each group of x has its weight", x=x)
    _check(MASKED, x, x_scale, w, w_scale, out_dtype)
    check_ends(MASKED, "counts", counts, w.shape[0])
    check_devices(MASKED, x, counts=counts)


def _check(op: str, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out_dtype: torch.dtype) -> None:
    check_rank(op, "w", w, "GNK")
    check_fp8_pair(op, x, w)
    check_shape(op, "w", w, (*w.shape[:2], x.shape[-1]), "It is contracted with the K columns of x", x=x)
    check_row_scale(op, x, x_scale)
    check_weight_scale(op, "w_scale", w, w_scale)
    check_devices(op, x, x_scale=x_scale, w=w, w_scale=w_scale)
    check_out_dtype(op, out_dtype)
    way_out = "Call it under torch.no_grad(), or train 16-bit weights with dsinfra::grouped_linear"
    refuse_gradients(op, way_out, x_scale, w_scale)


def _fake(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    check(x, x_scale, w, w_scale, ends, out_dtype)
    return x.new_empty(x.shape[0], w.shape[1], dtype=out_dtype)


def _fake_masked(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    check_masked(x, x_scale, w, w_scale, counts, out_dtype)
    return x.new_empty(*x.shape[:2], w.shape[1], dtype=out_dtype)


# ------------------------------------------------------------------ references


def reference(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Plain PyTorch on any device, in float32."""
    x_wide = dequantize_rows(x, x_scale)
    return multiply_groups(x_wide, lambda g: dequantize_weight(w[g], w_scale[g]), w.shape[1], ends).to(out_dtype)


def reference_masked(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch on any device, in float32; rows behind a group's count are 0."""
    (L, rows, _), N = x.shape, w.shape[1]
    y = x.new_zeros(L, rows, N, dtype=out_dtype)
    filled = torch.arange(rows, device=x.device) < counts.unsqueeze(1)
    for l in range(L):
        product = dequantize_rows(x[l], x_scale[l]) @ dequantize_weight(w[l], w_scale[l]).t()
        y[l] = torch.where(filled[l].unsqueeze(1), product, 0).to(out_dtype)
    return y


# ------------------------------------------------------------------ kernels and FLOPs


def _kernel(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    check(x, x_scale, w, w_scale, ends, out_dtype)
    return table(SORTED).run(x, x_scale, w, w_scale, ends, out_dtype)


def _kernel_masked(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    check_masked(x, x_scale, w, w_scale, counts, out_dtype)
    return table(MASKED).run(x, x_scale, w, w_scale, counts, out_dtype)


def _supports_everything(*_: Any) -> Decision:
    return YES


define(
    SORTED, f"({_ARGUMENTS}, Tensor ends, ScalarType out_dtype) -> Tensor", kernel=_kernel, fake=_fake, autocast=False
)
define(
    MASKED,
    f"({_ARGUMENTS}, Tensor counts, ScalarType out_dtype) -> Tensor",
    kernel=_kernel_masked,
    fake=_fake_masked,
    autocast=False,
)
grouped.register_fp8_grouped_linear()
table(SORTED).register("reference", _supports_everything, reference)
table(MASKED).register("reference", _supports_everything, reference_masked)


@register_flop_formula(torch.ops.dsinfra.fp8_grouped_linear)
def fp8_grouped_linear_flops(x: Any, x_scale: Any, w: Any, *_: Any, **__: Any) -> int:
    """Each row meets one group's weight; rows past the last end are counted too, the ends being on the device."""
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.dsinfra.fp8_grouped_linear_masked)
def fp8_grouped_linear_masked_flops(x: Any, x_scale: Any, w: Any, *_: Any, **__: Any) -> int:
    """As if every group were full: the counts are on the device, so this is an upper bound."""
    return 2 * x[0] * x[1] * w[1] * w[2]
