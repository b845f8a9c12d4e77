"""The pipelines behind whole expert layers, and what each takes.

An expert layer on a CUDA device is sorted by expert from the first step to the last:

    experts      `fused`   plan and gather -> grouped GEMM with SwiGLU -> grouped GEMM -> combine
                 `pieces`  the same steps, each by its own operator's table: other activations, biases, dtypes
    fp8_experts  `fused`   plan, gather and quantise -> FP8 grouped GEMM -> SwiGLU and quantise -> FP8 GEMM -> combine
                 `pieces`  as above

Shapes depend on T and K alone and nothing is read on the host, so a captured graph serves any routing. The kernels of
`dscompile.kernels` are imported when a CUDA tensor first asks for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscompile.lowering.activations import gated
from dscompile.lowering.block_scales import FP8, padded_rows
from dscompile.lowering.grouped import metadata, on_cuda, remembered, supports_gemm
from dscompile.lowering.rows import first_refusal, supports_combine, supports_quantize, supports_rows
from dscompile.lowering.select import Decision, no, size, table

# ------------------------------------------------------------------ experts, 16-bit


@remembered
def _supports_fused(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Decision:
    if activation != "silu" or interleaved or b_gate_up is not None or b_down is not None:
        return no("only silu(gate) * up in two halves without biases is fused into the first GEMM")
    present = on_cuda(x)
    if not present:
        return present
    dtype, E = w_down.dtype, size(w_down.shape[0])
    M = size(topk_idx.shape[0]) * size(topk_idx.shape[1])
    return first_refusal(
        supports_combine(w_down, topk_idx, topk_weight, topk_idx, E, x.dtype),
        supports_gemm(_rows_like(x, dtype, M, size(x.shape[1])), w_gate_up, swiglu=True),
        supports_gemm(_rows_like(x, dtype, M, size(w_down.shape[2])), w_down),
    )


def _fused(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *_: Any,
) -> Tensor:
    from dscompile.kernels import gemm, moe

    E = w_down.shape[0]
    rows, _, position, ends = moe.plan_and_gather(x.to(w_gate_up.dtype), topk_idx, E)
    h = gemm.grouped(rows, w_gate_up, ends, swiglu=True)
    z = gemm.grouped(h, w_down, ends)
    return moe.combine(z, position, topk_weight, topk_idx, E, x.dtype)


def _supports_pieces(x: Tensor, *_: Any) -> Decision:
    return on_cuda(x)  # Elsewhere nothing is gained by sorting first.


def _pieces(x: Tensor, topk_idx: Tensor, topk_weight: Tensor, *weights_and_settings: Any) -> Tensor:
    return forward_pieces(x, topk_idx, topk_weight, *weights_and_settings)[0]


def forward_pieces(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer step by step, each by its own table: -> y, and what a gradient needs: gate_up [M,2F] before its bias,
    order, position, ends. Biases are added to the products in their dtype, as the models do.
    """
    E = w_down.shape[0]
    order, position, ends = table("moe_plan").run(topk_idx, E)
    rows = table("moe_gather").run(x.to(w_gate_up.dtype), order, position)
    gate_up = table("grouped_linear").run(rows, w_gate_up, ends)
    h = _activate(gate_up, ends, b_gate_up, activation, interleaved, alpha, limit)
    z = table("grouped_linear").run(h, w_down, ends)
    arguments = position, topk_weight, topk_idx, E, x.dtype
    if b_down is not None and supports_combine(z, *arguments):
        from dscompile.kernels import moe

        y = moe.combine(z, *arguments, b_down)
    else:
        y = table("moe_combine").run(z if b_down is None else add_by_expert(z, b_down, ends), *arguments)
    return y, gate_up, order, position, ends


def _activate(
    gate_up: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    """h [M,F] of gate_up plus its expert's bias: one kernel where there is one."""
    if supports_rows(gate_up):
        from dscompile.kernels import activation as kernels

        settings: dict[str, Any] = {
            "activation": activation,
            "interleaved": interleaved,
            "alpha": alpha,
            "limit": limit,
        }
        return kernels.gated_activation(gate_up, ends, bias, **settings)
    biased = gate_up if bias is None else add_by_expert(gate_up, bias, ends)
    return gated(biased, activation, interleaved, alpha, limit)


def expert_of_rows(ends: Tensor, rows: int) -> Tensor:
    """-> int64 [rows]: the expert of each sorted row, E for rows of none."""
    places = torch.arange(rows, device=ends.device, dtype=torch.int32)
    return torch.searchsorted(ends, places, right=True)


def add_by_expert(rows_MN: Tensor, bias_EN: Tensor, ends: Tensor) -> Tensor:
    """Each sorted row plus its expert's bias; rows of no expert get any."""
    expert = expert_of_rows(ends, rows_MN.shape[0]).clamp(max=ends.shape[0] - 1)
    return rows_MN + bias_EN.index_select(0, expert)


def _rows_like(x: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Any:
    """Metadata of a contiguous matrix that doesn't exist yet, beside `x`."""
    return metadata(dtype, x.device, (rows, columns), (columns, 1), 0)


# ------------------------------------------------------------------ experts, FP8


@remembered
def _supports_fp8_fused(
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
) -> Decision:
    if activation != "silu":
        return no("only silu(gate) * up is fused into a quantisation")
    present = on_cuda(x)
    if not present:
        return present
    E, M, D, F = size(w_down.shape[0]), size(topk_idx.shape[0]) * size(topk_idx.shape[1]), *map(size, w_down.shape[1:])
    y = out_dtype or x.dtype
    if y == torch.float32:
        return no("rows are float32, and what lies between the GEMMs is kept in 16 bits")
    return first_refusal(
        supports_quantize(_rows_like(x, y, size(x.shape[0]), D)),
        supports_combine(_rows_like(x, y, M, D), topk_idx, topk_weight, topk_idx, E, y),
        supports_gemm(_rows_like(x, FP8, M, D), w_gate_up, out_dtype=y),
        supports_gemm(_rows_like(x, FP8, M, F), w_down, out_dtype=y),
    )


def _fp8_fused(
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
    from dscompile.kernels import gemm, moe, quantize

    E, y = w_down.shape[0], out_dtype or x.dtype
    if x_scale is None:
        q, scale, _, position, ends = moe.plan_and_gather_quantize(x, topk_idx, E)
    else:
        pairs = x.contiguous().view(torch.float16)  # two values each, which are moved as they are
        pairs, order, position, ends = moe.plan_and_gather(pairs, topk_idx, E)
        q, scale = pairs.view(FP8), _gather_scale(x_scale, order, position)
    s_gate_up, s_down = s_gate_up.contiguous(), s_down.contiguous()
    gate_up = gemm.grouped(q, w_gate_up, ends, x_scale=scale, w_scale=s_gate_up, out_dtype=y)
    q, scale = quantize.silu_mul_quantize_1x128(gate_up, ends)
    z = gemm.grouped(q, w_down, ends, x_scale=scale, w_scale=s_down, out_dtype=y)
    return moe.combine(z, position, topk_weight, topk_idx, E)


def _fp8_pieces(
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
    E, y = w_down.shape[0], out_dtype or x.dtype
    order, position, ends = table("moe_plan").run(topk_idx, E)
    if x_scale is None:
        q, scale = table("quantize_1x128").run(table("moe_gather").run(x, order, position))
    else:
        q = table("moe_gather").run(x.view(torch.uint8), order, position).view(FP8)
        scale = _gather_scale(x_scale, order, position)
    gate_up = table("fp8_grouped_linear").run(q, scale, w_gate_up, s_gate_up, ends, y)
    if activation == "silu":
        q, scale = table("silu_mul_quantize_1x128").run(gate_up, ends)
    else:
        q, scale = table("quantize_1x128").run(gated(gate_up.float(), activation, False, 1.0, 0.0))
    z = table("fp8_grouped_linear").run(q, scale, w_down, s_down, ends, y)
    return table("moe_combine").run(z, position, topk_weight, topk_idx, E, y)


def _gather_scale(scale: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """Scales [B,ceil4(T)] of tokens -> [B,ceil4(T*K)] of their sorted rows."""
    rows = order.shape[0]
    return F.pad(scale.index_select(1, order // max(position.shape[1], 1)), (0, padded_rows(rows) - rows))


# ------------------------------------------------------------------ tables


def register_experts() -> None:
    """Add `fused` and `pieces` to the table of `experts`, `pieces` to that of its form for training."""
    table("experts").register("fused", _supports_fused, _fused)
    table("experts").register("pieces", _supports_pieces, _pieces)


def register_fp8_experts() -> None:
    """Add `fused` and `pieces` to the table of `fp8_experts`."""
    table("fp8_experts").register("fused", _supports_fp8_fused, _fp8_fused)
    table("fp8_experts").register("pieces", _supports_pieces, _fp8_pieces)
