"""`dsinfra::experts`: the expert layer of a mixture of experts, which every written form becomes.

    y[t] = sum_k topk_weight[t,k] * W_down[e] h(W_gate_up[e] x[t] + b_gate_up[e]) + b_down[e]        e = topk_idx[t,k]

h is a gated activation of `lowering.activations`. The sum runs in float32 in the order of k. Ids outside [0,E) are
sentinels and add nothing. x may have another dtype than the weights: it is converted to theirs and y is in its own, as
the written forms do, also under autocast (torch's grouped_mm has no autocast rule).

Training is an operator of its own, `dsinfra::experts_forward`, which `experts` becomes where a gradient is needed. It
also returns gate_up [M,2F] and the plan of the sort, all that its gradient keeps besides the inputs. The gathered rows
[M,D] are gathered again, h [M,F] is computed again from gate_up, and the rows before the weighted sum [M,D] aren't
needed at all: with u = dy W_down, d topk_weight is u . h and the weight moves into h for dW_down. So a layer keeps 2F
elements a row where the written form keeps 2D + 5F; computing gate_up again too would save those and cost a third of
the forward's products, which checkpointing can still do. The gradient is made of this package's operators: products for
weights that need none fall away, and a schedule can move the others.

Refused: activations without a formula here, gradients of the gradient. With DSINFRA_DEBUG_CHECKS=1 in the environment
each call looks at the ids and raises at the first row with one below -1 or above 2E: a corrupted id, not a sentinel (it
waits for the device, and doesn't look while a CUDA graph is captured).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import moe
from dscompile.lowering.activations import ACTIVATIONS, gated, gated_backward
from dscompile.lowering.errors import DtypeMismatch, ExpertIdsError, NotDifferentiable
from dscompile.lowering.grouped import can_wait
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.mla import accumulation_dtype
from dscompile.lowering.ops.permute import empty_plan, valid_ids
from dscompile.lowering.ops.row_checks import (
    FLOATS,
    IDS,
    check_activation,
    check_devices,
    check_dtype,
    check_ids,
    check_rank,
    check_shape,
)
from dscompile.lowering.ops.training_form import define_training_form
from dscompile.lowering.select import YES, Decision, table

_ARGUMENTS = (
    "(Tensor x, Tensor topk_idx, Tensor topk_weight, Tensor w_gate_up, Tensor w_down, Tensor? b_gate_up,"
    " Tensor? b_down, str activation, bool interleaved, float alpha, float limit)"
)
debug_checks = os.environ.get("DSINFRA_DEBUG_CHECKS") == "1"

# ------------------------------------------------------------------ checks and shape functions


def check(
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> None:
    """Raise what is wrong with the arguments of `experts`, if anything is."""
    op = "experts"
    if (
        b_gate_up is None
        and b_down is None
        and activation in ACTIVATIONS
        and x.dtype in FLOATS
        and w_gate_up.dtype in FLOATS
        and w_down.dtype is w_gate_up.dtype
        and plainly_right(x, topk_idx, topk_weight, w_gate_up, w_down)
    ):
        return
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "w_gate_up", w_gate_up, FLOATS)
    for name, tensor in (("w_down", w_down), ("b_gate_up", b_gate_up), ("b_down", b_down)):
        if tensor is not None and tensor.dtype != w_gate_up.dtype:
            raise DtypeMismatch(
                f"{op}: {name} {list(tensor.shape)} is {tensor.dtype} but w_gate_up {list(w_gate_up.shape)} is "
                f"{w_gate_up.dtype}",
                "Weights and biases are computed with in one dtype",
                "Convert one of them",
            )
    check_layer(op, x, topk_idx, topk_weight, w_gate_up, w_down)
    E, D, F = w_down.shape
    if b_gate_up is not None:
        check_shape(op, "b_gate_up", b_gate_up, (E, 2 * F), "It is added to what w_gate_up gives", w_gate_up=w_gate_up)
    if b_down is not None:
        check_shape(op, "b_down", b_down, (E, D), "It is added to what w_down gives", w_down=w_down)
    check_devices(op, x, b_gate_up=b_gate_up, b_down=b_down)
    check_activation(op, activation)


def plainly_right(x: Tensor, topk_idx: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
    """The checks of `check_layer` at a fifth of their price, for a call with real sizes that passes them all: decode
    calls an expert layer for each layer and token."""
    if type(x) is not Tensor or x.dim() != 2 or topk_idx.dim() != 2 or w_down.dim() != 3:
        return False
    (T, D), (E, D_, F), device, ids = x.shape, w_down.shape, x.device, topk_idx.shape
    return (
        (ids[0], D_) == (T, D)
        and w_gate_up.shape == (E, 2 * F, D)
        and topk_weight.shape == ids
        and topk_idx.dtype in IDS
        and topk_weight.dtype in FLOATS
        and topk_idx.device == device
        and topk_weight.device == device
        and w_gate_up.device == device
        and w_down.device == device
    )


def check_layer(op: str, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
    """Raise what is wrong with the shapes, the routing or the devices of an expert layer, if anything is."""
    check_rank(op, "x", x, "TD")
    check_rank(op, "w_gate_up", w_gate_up, ("E", "2F", "D"))
    check_rank(op, "w_down", w_down, "EDF")
    check_ids(op, topk_idx, x.shape[0])
    check_shape(op, "topk_weight", topk_weight, tuple(topk_idx.shape), "It weighs each id", topk_idx=topk_idx)
    check_dtype(op, "topk_weight", topk_weight, FLOATS)
    E, _, F = w_down.shape
    check_shape(op, "w_down", w_down, (E, x.shape[1], F), "It returns to the width of x", x=x)
    why = "It holds F rows of the gate and F of up over the width of x, F being the last dimension of w_down"
    check_shape(op, "w_gate_up", w_gate_up, (E, 2 * F, x.shape[1]), why, x=x, w_down=w_down)
    check_devices(op, x, topk_idx=topk_idx, topk_weight=topk_weight, w_gate_up=w_gate_up, w_down=w_down)


def check_values(op: str, topk_idx: Tensor, experts: int) -> None:
    """Raise ExpertIdsError at the first row with an id that is neither an expert nor a sentinel. Waits for the device,
    so callers ask only where DSINFRA_DEBUG_CHECKS is on; nothing is looked at while a CUDA graph is captured."""
    if not can_wait(topk_idx):
        return
    bad = ((topk_idx < -1) | (topk_idx > 2 * experts)).any(-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ExpertIdsError(
            f"{op}: row {row} of topk_idx {list(topk_idx.shape)} holds {topk_idx[row].tolist()}, of {experts} experts",
            f"Ids are experts below {experts} or sentinels of -1 or up to {2 * experts}; others were overwritten or "
            "never written",
            "Look at what computes the ids: an uninitialised buffer, a router of more experts",
        )


def _fake(
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
) -> Tensor:
    check(x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, activation)
    return x.new_empty(x.shape)


def _fake_forward(
    x: Tensor, topk_idx: Tensor, topk_weight: Tensor, w_gate_up: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    check(x, topk_idx, topk_weight, w_gate_up, *rest[:4])
    rows = topk_idx.shape[0] * topk_idx.shape[1]
    gate_up = w_gate_up.new_empty(rows, w_gate_up.shape[1])
    return (x.new_empty(x.shape), gate_up, *empty_plan(x, topk_idx, w_gate_up.shape[0]))


# ------------------------------------------------------------------ reference


def reference(
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
) -> Tensor:
    """Plain PyTorch on any device, one expert after the other, in float32 throughout (float64 for float64)."""
    wide = accumulation_dtype(w_gate_up.dtype)

    def expert(e: int, rows: Tensor) -> Tensor:
        gate_up = rows @ w_gate_up[e].to(wide).t()
        gate_up = gate_up if b_gate_up is None else gate_up + b_gate_up[e].to(wide)
        z = gated(gate_up, activation, interleaved, alpha, limit) @ w_down[e].to(wide).t()
        return z if b_down is None else z + b_down[e].to(wide)

    rows = x.to(w_gate_up.dtype).to(wide)
    return weighted_sum(expert, w_down.shape[0], rows, topk_idx, topk_weight).to(x.dtype)


def weighted_sum(expert: Any, E: int, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    """sum_k topk_weight[t,k] * expert(e, x[t]) for e = topk_idx[t,k], in the dtype of x.

    Each expert sees its own rows, for which the ids are read on the host. Where that can't be, in a captured graph, it
    sees all rows, at E / K times the arithmetic.
    """
    T, K = topk_idx.shape
    z_TKD = x.new_zeros(T, K, x.shape[1])
    for e in range(E):
        chosen_TK = topk_idx == e
        if can_wait(x):
            t, k = chosen_TK.nonzero(as_tuple=True)
            if t.numel():
                z_TKD[t, k] = expert(e, x[t])
        else:
            z_TKD = torch.where(chosen_TK.unsqueeze(-1), expert(e, x).unsqueeze(1), z_TKD)
    y = torch.zeros_like(x)
    for k in range(K):
        weight = torch.where(valid_ids(topk_idx[:, k], E), topk_weight[:, k].to(x.dtype), 0.0)
        y = y + z_TKD[:, k] * weight.unsqueeze(1)
    return y


# ------------------------------------------------------------------ kernels


def _kernel(
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
) -> Tensor:
    check(x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, activation)
    if debug_checks:
        check_values("experts", topk_idx, w_down.shape[0])
    arguments = x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, activation, interleaved, alpha, limit
    return table("experts").run(*arguments)


def _kernel_forward(x: Tensor, topk_idx: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    check(x, topk_idx, *rest[:6])
    if debug_checks:
        check_values("experts", topk_idx, rest[2].shape[0])
    return moe.forward_pieces(x, topk_idx, *rest)


# ------------------------------------------------------------------ autograd


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, *ctx.settings = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, *kept)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 11
    x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, gate_up, order, position, ends = ctx.saved_tensors
    if b_gate_up is not None:
        gate_up = moe.add_by_expert(gate_up, b_gate_up, ends)
    if torch.is_grad_enabled() and (grad_y.requires_grad or x.requires_grad):
        raise NotDifferentiable(
            f"experts: a gradient of its gradient, for rows {list(x.shape)}",
            "The backward of experts keeps too little to be differentiated",
            "Call backward without create_graph=True",
        )
    ops, (want_x, _, want_weight, want_gate_up, want_down, want_b_gate_up, want_b_down, *_) = (
        torch.ops.dsinfra,
        ctx.needs_input_grad,
    )
    wide, E = accumulation_dtype(gate_up.dtype), w_down.shape[0]
    grad_rows = ops.moe_gather.default(grad_y.to(gate_up.dtype), order, position)
    u = ops.grouped_linear.default(grad_rows, w_down.transpose(1, 2), ends).to(wide)
    weight_M1 = topk_weight.to(wide).flatten().index_select(0, order).unsqueeze(1)
    grad_gate_up, h = gated_backward(gate_up, u * weight_M1, *ctx.settings)
    grads: list[Tensor | None] = [None] * 11
    if want_weight:
        per_row = (u * h).sum(-1)
        if b_down is not None:
            expert = moe.expert_of_rows(ends, order.shape[0])
            with_none = torch.cat((b_down, b_down.new_zeros(1, b_down.shape[1]))).to(wide)
            per_row = per_row + (with_none.index_select(0, expert) * grad_rows.to(wide)).sum(-1)
        grads[2] = per_row.index_select(0, position.flatten()).view_as(topk_weight).to(topk_weight.dtype)
    if want_down:
        grads[4] = ops.grouped_weight_grad.default(grad_rows, (h * weight_M1).to(gate_up.dtype), ends)
    if want_b_down:
        grads[6] = _sum_by_expert(grad_rows.to(wide) * weight_M1, ends).to(gate_up.dtype)
    if want_b_gate_up:
        grads[5] = _sum_by_expert(grad_gate_up.to(wide), ends).to(gate_up.dtype)
    if want_gate_up:
        rows = ops.moe_gather.default(x.to(gate_up.dtype), order, position)
        grads[3] = ops.grouped_weight_grad.default(grad_gate_up, rows, ends)
    if want_x:
        grad_rows_x = ops.grouped_linear.default(grad_gate_up, w_gate_up.transpose(1, 2), ends)
        grads[0] = ops.moe_combine.default(grad_rows_x, position, None, topk_idx, E, x.dtype)
    return tuple(grads)


def _sum_by_expert(rows_MN: Tensor, ends: Tensor) -> Tensor:
    """-> [E,N], as a product with a matrix of zeros and ones: repeatable, which atomic additions aren't."""
    expert, E = moe.expert_of_rows(ends, rows_MN.shape[0]), ends.shape[0]
    member_EM = torch.arange(E, device=ends.device).unsqueeze(1) == expert
    return member_EM.to(rows_MN.dtype) @ rows_MN.masked_fill((expert == E).unsqueeze(1), 0.0)


# ------------------------------------------------------------------ registration and FLOPs


def _supports_everything(*_: Any) -> Decision:
    return YES


define("experts", _ARGUMENTS + " -> Tensor", kernel=_kernel, fake=_fake, autocast=False)
define(
    "experts_forward",
    _ARGUMENTS + " -> (Tensor y, Tensor gate_up, Tensor order, Tensor position, Tensor ends)",
    kernel=_kernel_forward,
    fake=_fake_forward,
    autocast=False,
)
define_autograd("experts_forward", setup_context=_setup_context, backward=_backward)
define_training_form("experts", "experts_forward")
moe.register_experts()
table("experts").register("reference", _supports_everything, reference)


@register_flop_formula([torch.ops.dsinfra.experts, torch.ops.dsinfra.experts_forward])
def experts_flops(x: Any, topk_idx: Any, topk_weight: Any, w_gate_up: Any, w_down: Any, *_: Any, **__: Any) -> int:
    """Two products a row and choice; sentinels are counted too, the ids being on the device."""
    rows = topk_idx[0] * topk_idx[1]
    return 2 * rows * (w_gate_up[1] * w_gate_up[2] + w_down[1] * w_down[2])
