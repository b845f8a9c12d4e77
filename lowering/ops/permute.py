"""`dsinfra::moe_plan`, `moe_gather` and `moe_combine`: rows sorted by expert, and their weighted sum in token order.

    plan:     order[p] = t*K + k of the row at sorted place p     position[t,k] = p     ends[e] = end of expert e's rows
    gather:   rows[p] = x[order[p] // K], which is rows[position[t,k]] = x[t]
    combine:  y[t] = sum_k topk_weight[t,k] * z[position[t,k]]     in float32, in the order of k

The sort is stable. Ids outside [0,E) come last, belong to no expert and add nothing. Shapes are static (M = T*K rows)
and nothing is read on the host, so a captured graph serves any routing. These are the pieces of `dsinfra::experts` and
of its gradient; each has a gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import rows
from dscompile.lowering.errors import ExpertIdsError
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.mla import accumulation_dtype
from dscompile.lowering.ops.row_checks import (
    FLOATS,
    check_devices,
    check_dtype,
    check_ids,
    check_out_dtype,
    check_rank,
    check_shape,
)
from dscompile.lowering.select import YES, Decision, table

# ------------------------------------------------------------------ checks and shape functions


def check_plan(topk_idx: Tensor, num_experts: int) -> None:
    """Raise what is wrong with the arguments of `moe_plan`, if anything is."""
    check_rank("moe_plan", "topk_idx", topk_idx, "TK")
    check_ids("moe_plan", topk_idx, topk_idx.shape[0])
    if num_experts < 1:
        raise ExpertIdsError(f"moe_plan: {num_experts} experts", "Rows are sorted by expert", "Give at least one")


def check_gather(x: Tensor, order: Tensor, position: Tensor) -> None:
    """Raise what is wrong with the arguments of `moe_gather`, if anything is."""
    op = "moe_gather"
    check_rank(op, "x", x, "TD")
    check_rank(op, "position", position, "TK")
    T, K = position.shape
    check_shape(op, "position", position, (x.shape[0], K), "It places each row of x", x=x)
    check_shape(op, "order", order, (T * K,), "It is the inverse of position", position=position)
    for name, tensor in (("order", order), ("position", position)):
        check_dtype(op, name, tensor, (torch.int32,))
    check_devices(op, x, order=order, position=position)


def check_combine(
    z: Tensor, position: Tensor, topk_weight: Tensor | None, topk_idx: Tensor, out_dtype: torch.dtype
) -> None:
    """Raise what is wrong with the arguments of `moe_combine`, if anything is."""
    op = "moe_combine"
    check_rank(op, "z", z, "MD")
    check_dtype(op, "z", z, FLOATS)
    check_rank(op, "topk_idx", topk_idx, "TK")
    check_ids(op, topk_idx, topk_idx.shape[0])
    T, K = topk_idx.shape
    check_shape(op, "position", position, (T, K), "It places each id", topk_idx=topk_idx)
    check_dtype(op, "position", position, (torch.int32,))
    check_shape(op, "z", z, (T * K, z.shape[1]), "It holds a row for each id", topk_idx=topk_idx)
    if topk_weight is not None:
        check_shape(op, "topk_weight", topk_weight, (T, K), "It weighs each id", topk_idx=topk_idx)
        check_dtype(op, "topk_weight", topk_weight, FLOATS)
    check_out_dtype(op, out_dtype, FLOATS)
    check_devices(op, z, position=position, topk_weight=topk_weight, topk_idx=topk_idx)


def _fake_plan(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_plan(topk_idx, num_experts)
    return empty_plan(topk_idx, topk_idx, num_experts)


def empty_plan(like: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised order, position and ends."""
    T, K = topk_idx.shape
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in ((T * K,), (T, K), (num_experts,)))  # type: ignore[return-value]


def _fake_gather(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    check_gather(x, order, position)
    return x.new_empty(order.shape[0], x.shape[1])


def _fake_combine(
    z: Tensor,
    position: Tensor,
    topk_weight: Tensor | None,
    topk_idx: Tensor,
    num_experts: int,
    out_dtype: torch.dtype,
) -> Tensor:
    check_combine(z, position, topk_weight, topk_idx, out_dtype)
    return z.new_empty(topk_idx.shape[0], z.shape[1], dtype=out_dtype)


# ------------------------------------------------------------------ references


def valid_ids(topk_idx: Tensor, num_experts: int) -> Tensor:
    """-> bool: which ids name an expert."""
    return (topk_idx >= 0) & (topk_idx < num_experts)


def reference_plan(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch on any device, without a look at the host."""
    key = torch.where(valid_ids(topk_idx, num_experts), topk_idx, num_experts).flatten()
    by_expert, order = key.sort(stable=True)
    experts = torch.arange(num_experts, device=key.device, dtype=key.dtype)
    ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    order = order.to(torch.int32)
    return order, inverse(order).view_as(topk_idx), ends


def inverse(order: Tensor) -> Tensor:
    """The inverse of an int32 permutation."""
    places = torch.arange(order.shape[0], device=order.device, dtype=torch.int32)
    return torch.empty_like(order).scatter(0, order.long(), places)


def reference_gather(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """Plain PyTorch on any device."""
    return x.index_select(0, order // max(position.shape[1], 1))


def reference_combine(
    z: Tensor,
    position: Tensor,
    topk_weight: Tensor | None,
    topk_idx: Tensor,
    num_experts: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch on any device, in float32 (float64 for float64), one k after the other."""
    wide, valid = accumulation_dtype(z.dtype), valid_ids(topk_idx, num_experts)
    y = z.new_zeros(topk_idx.shape[0], z.shape[1], dtype=wide)
    for k in range(topk_idx.shape[1]):
        # Rows of no expert may hold anything: they are replaced, not multiplied by zero.
        row = z.index_select(0, position[:, k]).to(wide).masked_fill(~valid[:, k : k + 1], 0.0)
        y = y + (row if topk_weight is None else row * topk_weight[:, k : k + 1].to(wide))
    return y.to(out_dtype)


# ------------------------------------------------------------------ kernels, autograd, FLOPs


def _kernel_plan(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_plan(topk_idx, num_experts)
    return table("moe_plan").run(topk_idx, num_experts)


def _kernel_gather(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    check_gather(x, order, position)
    return table("moe_gather").run(x, order, position)


def _kernel_combine(
    z: Tensor,
    position: Tensor,
    topk_weight: Tensor | None,
    topk_idx: Tensor,
    num_experts: int,
    out_dtype: torch.dtype,
) -> Tensor:
    check_combine(z, position, topk_weight, topk_idx, out_dtype)
    return table("moe_combine").run(z, position, topk_weight, topk_idx, num_experts, out_dtype)


def _setup_gather(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward_gather(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
    (position,) = ctx.saved_tensors
    every = torch.zeros_like(position)  # Every row counts, those of no expert too: they were copied like the others.
    grad_x = torch.ops.dsinfra.moe_combine.default(grad_rows, position, None, every, 1, grad_rows.dtype)
    return grad_x, None, None


def _setup_combine(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, position, topk_weight, topk_idx, ctx.num_experts, _ = inputs
    ctx.z_dtype = z.dtype
    # z itself is needed by the gradient of the weights only.
    ctx.save_for_backward(z if ctx.needs_input_grad[2] else None, position, topk_weight, topk_idx)


def _backward_combine(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    z, position, topk_weight, topk_idx = ctx.saved_tensors
    T, K = topk_idx.shape
    valid = valid_ids(topk_idx, ctx.num_experts)
    grad_z = grad_weight = None
    wide = accumulation_dtype(ctx.z_dtype)
    grad_wide = grad_y.to(wide).unsqueeze(1)
    if ctx.needs_input_grad[0]:
        weight = valid.to(wide) if topk_weight is None else torch.where(valid, topk_weight.to(wide), 0.0)
        grad_TKD = (grad_wide * weight.unsqueeze(-1)).to(ctx.z_dtype)
        order = inverse(position.flatten())
        grad_z = grad_TKD.flatten(0, 1).index_select(0, order)
    if ctx.needs_input_grad[2]:
        rows_TKD = z.index_select(0, position.flatten()).view(T, K, -1).to(wide)
        grad_weight = torch.where(valid, (rows_TKD * grad_wide).sum(-1), 0.0).to(topk_weight.dtype)
    return grad_z, None, grad_weight, None, None, None


def _supports_everything(*_: Any) -> Decision:
    return YES


define(
    "moe_plan",
    "(Tensor topk_idx, int num_experts) -> (Tensor order, Tensor position, Tensor ends)",
    kernel=_kernel_plan,
    fake=_fake_plan,
    autocast=False,
)
define(
    "moe_gather",
    "(Tensor x, Tensor order, Tensor position) -> Tensor",
    kernel=_kernel_gather,
    fake=_fake_gather,
    autocast=False,
)
define(
    "moe_combine",
    "(Tensor z, Tensor position, Tensor? topk_weight, Tensor topk_idx, int num_experts, ScalarType out_dtype)"
    " -> Tensor",
    kernel=_kernel_combine,
    fake=_fake_combine,
    autocast=False,
)
define_autograd("moe_gather", setup_context=_setup_gather, backward=_backward_gather)
define_autograd("moe_combine", setup_context=_setup_combine, backward=_backward_combine)
rows.register_permute()
for _op, _reference in (
    ("moe_plan", reference_plan),
    ("moe_gather", reference_gather),
    ("moe_combine", reference_combine),
):
    table(_op).register("reference", _supports_everything, _reference)


@register_flop_formula([torch.ops.dsinfra.moe_plan, torch.ops.dsinfra.moe_gather, torch.ops.dsinfra.moe_combine])
def permute_flops(*_: Any, **__: Any) -> int:
    """Sorting, copies and elementwise work aren't counted (torch's convention)."""
    return 0
