"""The kernels behind quantisation, routing and the permutation of rows by expert, and what each takes.

Each table has `kernel` before the reference: `dscompile.kernels.quantize`, `.route` and `.moe`, imported when a CUDA
tensor first asks for them. They take bfloat16, float16 and float32 on any CUDA device with Triton, FP8 where it
converts; nothing is read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dscompile.lowering.grouped import concrete, on_cuda
from dscompile.lowering.select import YES, Decision, no, size, table

_MOST_EXPERTS = 4096  # of the kernels that sort and add rows

# ------------------------------------------------------------------ quantisation and routing


def first_refusal(*decisions: Decision) -> Decision:
    """The first that isn't a yes, or a yes."""
    return next((decision for decision in decisions if not decision), YES)


def _asked(refusal: str | None) -> Decision:
    return no(refusal) if refusal else YES


def supports_quantize(x: Tensor, *_: Any) -> Decision:
    """Whether the quantisations take rows like x."""
    present = on_cuda(x)
    if not present:
        return present
    from dscompile.kernels import quantize

    return _asked(quantize.refusal(concrete(x)))


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    from dscompile.kernels import quantize

    return quantize.quantize_1x128(x)


def _silu_mul_quantize(gate_up: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    from dscompile.kernels import quantize

    return quantize.silu_mul_quantize_1x128(gate_up, ends)


def _supports_silu_mul(gate_up: Tensor, ends: Tensor | None) -> Decision:
    if ends is not None and size(ends.shape[0]) == 0:
        return no("there are no groups, and the kernel reads the last end")
    return supports_quantize(gate_up)


def _supports_route(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> Decision:
    present = on_cuda(logits)
    if not present:
        return present
    if bias is not None and bias.dtype == torch.float64:
        return no("bias is float64, and the kernel computes in float32")
    from dscompile.kernels import route

    return _asked(route.refusal(concrete(logits), top_k))


def _route(*args: Any) -> tuple[Tensor, Tensor]:
    from dscompile.kernels import route

    return route.route(*args)


# ------------------------------------------------------------------ permutation


def _supports_plan(topk_idx: Tensor, num_experts: int) -> Decision:
    present = on_cuda(topk_idx)
    if not present:
        return present
    if num_experts > _MOST_EXPERTS:
        return no(f"there are {num_experts} experts, and the kernel counts the rows of at most {_MOST_EXPERTS}")
    from dscompile.kernels.refusals import device_refusal

    return _asked(device_refusal("topk_idx", topk_idx, integers=True))


def _plan(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    from dscompile.kernels import moe

    return moe.plan(topk_idx, num_experts)


def supports_rows(x: Tensor, *_: Any) -> Decision:
    """Whether the kernels that move and add rows take ones like x."""
    present = on_cuda(x)
    if not present:
        return present
    from dscompile.kernels.refusals import device_refusal

    return _asked(device_refusal("x", x))


def _gather(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    from dscompile.kernels import moe

    return moe.gather_rows(x, order.contiguous(), position.shape[1], position.contiguous())


def supports_combine(
    z: Tensor,
    position: Tensor,
    topk_weight: Tensor | None,
    topk_idx: Tensor,
    num_experts: int,
    out_dtype: torch.dtype,
) -> Decision:
    """Whether the weighted sum takes rows like z, to add and round as the operator `moe_combine` says."""
    if torch.float64 in (out_dtype, None if topk_weight is None else topk_weight.dtype):
        return no("a weight or the result is float64, and the kernel computes in float32")
    return first_refusal(supports_rows(z), _supports_plan(topk_idx, num_experts))


def _combine(
    z: Tensor,
    position: Tensor,
    topk_weight: Tensor | None,
    topk_idx: Tensor,
    num_experts: int,
    out_dtype: torch.dtype,
) -> Tensor:
    from dscompile.kernels import moe

    return moe.combine(z, position.contiguous(), topk_weight, topk_idx, num_experts, out_dtype)


# ------------------------------------------------------------------ tables


def register_quantize() -> None:
    """Add `kernel` to the tables of both quantisations."""
    table("quantize_1x128").register("kernel", supports_quantize, _quantize)
    table("silu_mul_quantize_1x128").register("kernel", _supports_silu_mul, _silu_mul_quantize)


def register_route() -> None:
    """Add `kernel` to the table of `route`."""
    table("route").register("kernel", _supports_route, _route)


def register_permute() -> None:
    """Add `kernel` to the tables of `moe_plan`, `moe_gather` and `moe_combine`."""
    table("moe_plan").register("kernel", _supports_plan, _plan)
    table("moe_gather").register("kernel", supports_rows, _gather)
    table("moe_combine").register("kernel", supports_combine, _combine)
