"""`dsinfra::quantize_1x128` and `dsinfra::silu_mul_quantize_1x128`: rows to FP8 with a scale for 128 columns.

    scale = max|x| / 448 over a block        q = x / scale, rounded to float8_e4m3fn

The second computes x = silu(gate) * up in float32 from [gate, up] columns first, so that an expert's hidden rows are
never rounded to 16 bits on their way to FP8. Scales come in the GEMM's own layout, K-block-major: float32
[ceil(K/128), ceil4(M)], pad entries 0 (see `lowering.block_scales`). A block of zeros gives q = 0, one that holds NaN
or infinity isn't finite afterwards either.

Refused: gradients (rounding has none; `dsinfra::fp8_linear_bf16` is the differentiable composite).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import rows
from dscompile.lowering.activations import gated
from dscompile.lowering.block_scales import FP8, blocks, padded_rows, quantize_rows
from dscompile.lowering.errors import ShapeMismatch
from dscompile.lowering.ops.checks import same
from dscompile.lowering.ops.library import define
from dscompile.lowering.ops.row_checks import (
    UNQUANTIZED,
    check_devices,
    check_dtype,
    check_ends,
    check_rank,
    refuse_gradients,
)
from dscompile.lowering.select import YES, Decision, table

_WAY_OUT = "Call it under torch.no_grad(), or use dsinfra::fp8_linear_bf16, which differentiates around the rounding"

# ------------------------------------------------------------------ checks and shape functions


def check(x: Tensor) -> None:
    """Raise what is wrong with the argument of `quantize_1x128`, if anything is."""
    check_rank("quantize_1x128", "x", x, "MK")
    check_dtype("quantize_1x128", "x", x, UNQUANTIZED)
    refuse_gradients("quantize_1x128", _WAY_OUT, x)


def check_silu_mul(gate_up: Tensor, ends: Tensor | None) -> None:
    """Raise what is wrong with the arguments of `silu_mul_quantize_1x128`, if anything is."""
    op = "silu_mul_quantize_1x128"
    check_rank(op, "gate_up", gate_up, "MN")
    check_dtype(op, "gate_up", gate_up, UNQUANTIZED)
    if not same(gate_up.shape[1] % 2, 0):
        raise ShapeMismatch(
            f"{op}: gate_up {list(gate_up.shape)}",
            "Its columns are F of the gate and then F of up, so their number is even",
            "Give both halves",
        )
    if ends is not None:
        check_rank(op, "ends", ends, "G")
        check_ends(op, "ends", ends, ends.shape[0])
        check_devices(op, gate_up, ends=ends)
    refuse_gradients(op, _WAY_OUT, gate_up)


def empty_quantized(like: Tensor, M: Any, K: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised q and scale for rows [M,K]."""
    return like.new_empty(M, K, dtype=FP8), like.new_empty(blocks(K), padded_rows(M), dtype=torch.float32)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check(x)
    return empty_quantized(x, *x.shape)


def _fake_silu_mul(gate_up: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    check_silu_mul(gate_up, ends)
    return empty_quantized(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)


# ------------------------------------------------------------------ references


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on any device."""
    return quantize_rows(x.float())


def reference_silu_mul(gate_up: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on any device. Rows at or past the last end may hold anything and give q = 0."""
    gate_up = gate_up.float()
    if ends is not None and ends.shape[0]:
        past = torch.arange(gate_up.shape[0], device=gate_up.device) >= ends[-1]
        gate_up = gate_up.masked_fill(past.unsqueeze(1), 0.0)
    return quantize_rows(gated(gate_up, "silu", False, 1.0, 0.0))


# ------------------------------------------------------------------ kernels and FLOPs


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    check(x)
    return table("quantize_1x128").run(x)


def _kernel_silu_mul(gate_up: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    check_silu_mul(gate_up, ends)
    return table("silu_mul_quantize_1x128").run(gate_up, ends)


def _supports_everything(*_: Any) -> Decision:
    return YES


define("quantize_1x128", "(Tensor x) -> (Tensor q, Tensor scale)", kernel=_kernel, fake=_fake, autocast=False)
define(
    "silu_mul_quantize_1x128",
    "(Tensor gate_up, Tensor? ends) -> (Tensor q, Tensor scale)",
    kernel=_kernel_silu_mul,
    fake=_fake_silu_mul,
    autocast=False,
)
rows.register_quantize()
table("quantize_1x128").register("reference", _supports_everything, reference)
table("silu_mul_quantize_1x128").register("reference", _supports_everything, reference_silu_mul)


@register_flop_formula([torch.ops.dsinfra.quantize_1x128, torch.ops.dsinfra.silu_mul_quantize_1x128])
def quantize_flops(*_: Any, **__: Any) -> int:
    """Elementwise work isn't counted (torch's convention)."""
    return 0
