"""`dsinfra::dispatch_*`, `combine_*`, `redispatch_*`: tokens to the ranks of their experts and back, each in halves.

    dispatch:    x [T,D], ids [T,K], weights [T,K]  ->  rows [M,D], ids [M,K], weights [M,K], arrived [M+W]
    combine:     rows [M,D]  ->  y [T,D], the sum over ranks in float32, in the order of ranks (repeatable)
    redispatch:  x [T,D]  ->  rows [M,D], along a plan that a dispatch made

A token has one row at each rank that holds one of its experts; ids there are counted from that rank's first expert, -1
where a choice is another rank's. Rows are grouped by the rank they come from, in its order; rows that are unused have
ids of -1 all over, and may hold anything. `experts` over them, with this rank's weights, skips what isn't its own, and

    experts(x, topk_idx, topk_weight, all weights)
        = combine(experts(*dispatch(x, topk_idx, topk_weight), own weights))

with M = W * capacity. `start` begins and returns a ticket: the plan [T+1,W] and the inbox, which is full only behind
`wait` (for the plan and `arrived` see `lowering.exchange`). `wait` takes what `start` was given, so that nothing is
freed or overwritten between the two, and is what has the gradient: that of dispatch is a combine of rows and of
weights, that of combine a redispatch. Shapes depend on T, K and the capacity alone, ranks may have any T up to the
capacity, and nothing is read on the host.

A dispatch also takes what `quantize_1x128` returns, x in e4m3 and `scale`: both travel as they are, in half the bytes,
and the scales of the rows arrive as `row_scale`, float32 [ceil(D/128),ceil4(M)]. It is [0,0] for other rows.

Refused: gradients of the gradient of routing weights; routing weights in 16 bits; gradients of a dispatch in FP8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering.block_scales import FP8, padded_rows
from dscompile.lowering.errors import NotDifferentiable
from dscompile.lowering.exchange import Exchange, ExchangeError, Payload, Spec, choose, spec_of
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.row_checks import (
    FLOATS,
    check_devices,
    check_dtype,
    check_ids,
    check_rank,
    check_row_scale,
    check_shape,
)

WEIGHTS = (torch.float32, torch.float64)

# ------------------------------------------------------------------ checks


def check_dispatch(op: str, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec) -> None:
    """Raise what is wrong with tokens that are to be sent to their experts, if anything is."""
    check_tokens(op, x, spec, FLOATS if scale is None else (FP8,))
    if scale is not None:
        check_row_scale(op, x, scale)
    check_rank(op, "topk_idx", topk_idx, "TK")
    check_ids(op, topk_idx, x.shape[0])
    check_shape(op, "topk_weight", topk_weight, tuple(topk_idx.shape), "It weighs each id", topk_idx=topk_idx)
    check_dtype(op, "topk_weight", topk_weight, WEIGHTS)
    check_devices(op, x, topk_idx=topk_idx, topk_weight=topk_weight, scale=scale)


def check_tokens(op: str, x: Tensor, spec: Spec, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raise if x is no [T,D], or T is more than the capacity; a symbolic T is looked at when it has a value."""
    check_rank(op, "x", x, "TD")
    check_dtype(op, "x", x, dtypes)
    T = x.shape[0]
    if isinstance(T, int) and T > spec.capacity:
        raise ExchangeError(
            f"{op}: x {list(x.shape)} has {T} tokens and the capacity is {spec.capacity}",
            "Ranks set room aside for the capacity, which no rank may exceed",
            "Give a larger options['ep_capacity'] on every rank, or fewer tokens",
        )


def check_rows(op: str, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec) -> None:
    """Raise what is wrong with rows that are to go back, if anything is."""
    check_rank(op, "rows", rows, "MD")
    check_dtype(op, "rows", rows, FLOATS)
    check_shape(op, "rows", rows, (spec.rows, rows.shape[1]), "It holds `capacity` rows of each rank")
    check_plan(op, plan, spec)
    check_arrived(op, arrived, spec)
    if row_weights is not None:
        check_shape(op, "row_weights", row_weights, (spec.rows, row_weights.shape[-1]), "It goes with rows", rows=rows)
        check_dtype(op, "row_weights", row_weights, WEIGHTS)
    check_devices(op, rows, plan=plan, arrived=arrived, row_weights=row_weights)


def check_plan(op: str, plan: Tensor, spec: Spec) -> None:
    """Raise if `plan` isn't one of this group."""
    check_dtype(op, "plan", plan, (torch.int32,))
    check_rank(op, "plan", plan, ("T+1", "W"))
    check_shape(op, "plan", plan, (plan.shape[0], spec.group.size), "It has a column for each rank")


def check_arrived(op: str, arrived: Tensor, spec: Spec) -> None:
    """Raise if `arrived` isn't what a dispatch of this group returned."""
    check_dtype(op, "arrived", arrived, (torch.int32,))
    check_shape(op, "arrived", arrived, (spec.rows + spec.group.size,), "It names each row's token, then counts them")


def _empty_inbox(way: Exchange, rows: Tensor, payload: Payload, spec: Spec) -> Tensor:
    shape, dtype = way.inbox(payload, spec)
    return rows.new_empty(shape, dtype=dtype)


def _enter(op: str, x: Tensor, spec: Spec, top_k: int | None = None) -> None:
    """One exchange more; the first of its kind is compared between ranks."""
    agreed: dict[str, Any] = {"capacity": spec.capacity, "width": x.shape[1], "dtype": str(x.dtype)}
    if top_k is not None:
        agreed |= {"experts": spec.experts, "choices a token": top_k}
    spec.group.enter(op, agreed)


# ------------------------------------------------------------------ the operators
#
# Each is one function: the operator where `real`, its shape function otherwise, with the same checks. `where` is the
# group's name, the number of experts, the capacity and the slot.


def _dispatch_start(
    real: bool, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, *where: Any
) -> tuple[Tensor, Tensor]:
    spec = spec_of(*where)
    check_dispatch("dispatch_start", x, topk_idx, topk_weight, scale, spec)
    payload = Payload.of(x, topk_idx, topk_weight)
    if real:
        _enter("dispatch_start", x, spec, topk_idx.shape[1])
        return choose(spec, payload).dispatch_start(x, topk_idx, topk_weight, scale, spec)
    plan = x.new_empty(x.shape[0] + 1, spec.group.size, dtype=torch.int32)
    return plan, _empty_inbox(choose(spec, payload), x, payload, spec)


def _dispatch_wait(
    real: bool,
    plan: Tensor,
    inbox: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weight: Tensor,
    scale: Tensor | None,
    *where: Any,
) -> tuple[Tensor, ...]:
    spec = spec_of(*where)
    if real:
        way = choose(spec, Payload.of(x, topk_idx, topk_weight))
        *came, scales = way.dispatch_wait(inbox, x, topk_idx, topk_weight, scale, spec)
        return *came, _no_scale(topk_weight) if scales is None else scales
    check_dispatch("dispatch_wait", x, topk_idx, topk_weight, scale, spec)
    M, K = spec.rows, topk_idx.shape[1]
    ids = topk_idx.new_empty(M, K, dtype=torch.int32)
    scales = _no_scale(topk_weight) if scale is None else scale.new_empty(scale.shape[0], padded_rows(M))
    return x.new_empty(M, x.shape[1]), ids, topk_weight.new_empty(M, K), ids.new_empty(M + spec.group.size), scales


def _no_scale(like: Tensor) -> Tensor:
    return like.new_empty(0, 0, dtype=torch.float32)


def _setup_dispatch(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    plan, _, x, _, _, scale, *ctx.settings = inputs
    if scale is not None:
        raise NotDifferentiable(
            f"dispatch_wait: a gradient through rows {list(x.shape)} in {x.dtype}",
            "They were rounded to FP8 before they were sent, and rounding has no gradient",
            "Call it under torch.no_grad(), or dispatch the rows in 16 bits",
        )
    _, ids, _, arrived, no_scale = output
    ctx.mark_non_differentiable(ids, arrived, no_scale)
    ctx.save_for_backward(plan, arrived, ids)


def _backward_dispatch(
    ctx: Any, grad_rows: Tensor, _: None, grad_weights: Tensor, *__: None
) -> tuple[Tensor | None, ...]:
    plan, arrived, ids = ctx.saved_tensors
    # What a row has for another rank's choices was never computed.
    grad_weights = torch.where(ids >= 0, grad_weights, 0.0)
    grad_x, grad_weight = combine(grad_rows, grad_weights, plan, arrived, *ctx.settings)
    return None, None, grad_x, None, grad_weight, None, None, None, None, None


def _redispatch_start(real: bool, x: Tensor, plan: Tensor, *where: Any) -> Tensor:
    spec = spec_of(*where)
    check_tokens("redispatch_start", x, spec)
    check_plan("redispatch_start", plan, spec)
    payload = Payload.of(x)
    if real:
        _enter("redispatch_start", x, spec)
        return choose(spec, payload).redispatch_start(x, plan, spec)
    return _empty_inbox(choose(spec, payload), x, payload, spec)


def _redispatch_wait(real: bool, inbox: Tensor, x: Tensor, plan: Tensor, arrived: Tensor, *where: Any) -> Tensor:
    spec = spec_of(*where)
    if real:
        return choose(spec, Payload.of(x)).redispatch_wait(inbox, x, plan, arrived, spec)
    return x.new_empty(spec.rows, x.shape[1])


def _setup_redispatch(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, plan, arrived, *ctx.settings = inputs
    ctx.save_for_backward(plan, arrived)


def _backward_redispatch(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, _ = combine(grad_rows, None, *ctx.saved_tensors, *ctx.settings)
    return None, grad_x, None, None, None, None, None, None


def combine(
    rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, *where: Any
) -> tuple[Tensor, Tensor]:
    """Both halves, one behind the other."""
    ops = torch.ops.dsinfra
    inbox = ops.combine_start.default(rows, row_weights, plan, arrived, *where)
    return ops.combine_wait.default(inbox, rows, row_weights, plan, arrived, *where)


def _combine_start(
    real: bool, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, *where: Any
) -> Tensor:
    spec = spec_of(*where)
    check_rows("combine_start", rows, row_weights, plan, arrived, spec)
    payload = Payload.of(rows, row_weights, back=True)
    if real:
        _enter("combine_start", rows, spec)
        return choose(spec, payload).combine_start(rows, row_weights, plan, arrived, spec)
    return _empty_inbox(choose(spec, payload), rows, payload, spec)


def _combine_wait(
    real: bool, inbox: Tensor, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, *where: Any
) -> tuple[Tensor, Tensor]:
    T = plan.shape[0] - 1
    if real:
        spec = spec_of(*where)
        way = choose(spec, Payload.of(rows, row_weights, back=True))
        y, weights = way.combine_wait(inbox, rows, row_weights, plan, arrived, spec)
        return y, rows.new_empty(T, 0) if weights is None else weights
    weights = rows.new_empty(T, 0) if row_weights is None else row_weights.new_empty(T, row_weights.shape[1])
    return rows.new_empty(T, rows.shape[1]), weights


def _setup_combine(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, row_weights, plan, arrived, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.has_weights = row_weights is not None
    ctx.save_for_backward(plan, arrived)


def _backward_combine(ctx: Any, grad_y: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if ctx.has_weights:
        raise NotDifferentiable(
            f"combine_wait: a gradient through a sum of rows and weights, for rows {list(grad_y.shape)}",
            "That sum is the gradient of a dispatch, and gradients of gradients aren't kept track of",
            "Call backward without create_graph=True",
        )
    plan, arrived = ctx.saved_tensors
    ops = torch.ops.dsinfra
    inbox = ops.redispatch_start.default(grad_y, plan, *ctx.settings)
    grad_rows = ops.redispatch_wait.default(inbox, grad_y, plan, arrived, *ctx.settings)
    return None, grad_rows, None, None, None, None, None, None, None


# ------------------------------------------------------------------ registration and FLOPs

_WHERE = "str group, int num_experts, int capacity, int slot)"
_TICKET = "Tensor plan, Tensor inbox"
_ROUTED = "Tensor x, Tensor topk_idx, Tensor topk_weight, Tensor? scale"
_BACK = "Tensor rows, Tensor? row_weights, Tensor plan, Tensor arrived"
_ARRIVED = "(Tensor rows, Tensor ids, Tensor weights, Tensor arrived, Tensor row_scale)"
for _name, _arguments, _results, _operator in (
    ("dispatch_start", _ROUTED, f"({_TICKET})", _dispatch_start),
    ("dispatch_wait", f"{_TICKET}, {_ROUTED}", _ARRIVED, _dispatch_wait),
    ("redispatch_start", "Tensor x, Tensor plan", "Tensor", _redispatch_start),
    ("redispatch_wait", "Tensor inbox, Tensor x, Tensor plan, Tensor arrived", "Tensor", _redispatch_wait),
    ("combine_start", _BACK, "Tensor", _combine_start),
    ("combine_wait", f"Tensor inbox, {_BACK}", "(Tensor y, Tensor y_weights)", _combine_wait),
):
    _schema = f"({_arguments}, {_WHERE} -> {_results}"
    define(_name, _schema, kernel=partial(_operator, True), fake=partial(_operator, False), autocast=False)
define_autograd("dispatch_wait", setup_context=_setup_dispatch, backward=_backward_dispatch)
define_autograd("redispatch_wait", setup_context=_setup_redispatch, backward=_backward_redispatch)
define_autograd("combine_wait", setup_context=_setup_combine, backward=_backward_combine)


@register_flop_formula(
    [
        getattr(torch.ops.dsinfra, f"{_name}_{_half}")
        for _name in ("dispatch", "redispatch", "combine")
        for _half in ("start", "wait")
    ]
)
def exchange_flops(*_: Any, **__: Any) -> int:
    """Copies and sums aren't counted (torch's convention)."""
    return 0
