"""`dsinfra::route`: which experts a token goes to, and with what weight, from the router's logits [T,E].

    s = softmax(logits) or sigmoid(logits)          choice = s + bias
    n_group > 1: only experts of the topk_group best groups can be chosen; a group's score is its best expert's choice
                 ("max") or the sum of its two best ("top2"), and experts left out count as -inf, or as 0 ("_zero")
    idx = top-k of choice        w = s[idx]         w = w / (sum w + eps) if renormalize        w = w * scale

"softmax_topk" chooses from the logits and takes the softmax of the chosen. Everything in float32. As torch.topk with
sorted=True values come in descending order, but equal ones in the order of their indices, so that the choice is
repeatable. The gradient goes to the logits through the weights; the choice and `bias` have none.

Refused: settings that contradict each other; a gradient of `bias`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import rows
from dscompile.lowering.errors import NotDifferentiable, RouterError
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.ops.mla import accumulation_dtype
from dscompile.lowering.ops.row_checks import FLOATS, check_devices, check_dtype, check_rank, check_shape
from dscompile.lowering.select import YES, Decision, table

SCORES = ("softmax", "sigmoid", "softmax_topk")
GROUP_SCORES = ("max", "top2", "max_zero", "top2_zero")

_SCHEMA = (
    "(Tensor logits, Tensor? bias, int top_k, str score, int n_group, int topk_group, str group_score,"
    " bool renormalize, float eps, float scale) -> (Tensor topk_idx, Tensor topk_weight)"
)

# ------------------------------------------------------------------ checks and shape function


def check(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int, group_score: str
) -> None:
    """Raise what is wrong with the arguments of `route`, if anything is."""
    check_rank("route", "logits", logits, "TE")
    check_dtype("route", "logits", logits, FLOATS)
    E = logits.shape[1]
    if bias is not None:
        check_shape("route", "bias", bias, (E,), "It is added to each expert's score", logits=logits)
        check_dtype("route", "bias", bias, FLOATS)
        check_devices("route", logits, bias=bias)
    for name, value, allowed in (("score", score, SCORES), ("group_score", group_score, GROUP_SCORES)):
        if value not in allowed:
            raise RouterError(f"route: {name} is {value!r}", "No such score is defined", f"Use one of {allowed}")
    if not 1 <= top_k <= E:
        raise RouterError(
            f"route: top_k {top_k} of {E} experts",
            "A token goes to at least one expert and to each once",
            f"Use 1 to {E}",
        )
    if n_group > 1:
        _check_groups(E, top_k, n_group, topk_group, group_score)


def _check_groups(E: Any, top_k: int, n_group: int, topk_group: int, group_score: str) -> None:
    each = E // n_group
    if each * n_group != E or not 1 <= topk_group <= n_group or (group_score.startswith("top2") and each < 2):
        raise RouterError(
            f"route: {E} experts in {n_group} groups, {topk_group} of them kept, scored by {group_score!r}",
            "Groups are of one size, at least one is kept, and top2 adds two experts of each",
            "Choose n_group that divides the experts and 1 <= topk_group <= n_group",
        )
    if top_k > topk_group * each and not group_score.endswith("_zero"):
        raise RouterError(
            f"route: top_k {top_k}, but {topk_group} groups of {each} experts are kept",
            "Experts of the other groups would be chosen among equal scores of -inf",
            "Keep more groups or lower top_k",
        )


def _fake(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check(logits, bias, top_k, score, n_group, topk_group, group_score)
    T = logits.shape[0]
    weight = logits.new_empty(T, top_k, dtype=accumulation_dtype(logits.dtype))
    return logits.new_empty(T, top_k, dtype=torch.int64), weight


# ------------------------------------------------------------------ reference


def reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on any device, in float32 (float64 for float64)."""
    scores = _scores(logits, score)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if n_group > 1:
        choice = _keep_best_groups(choice, n_group, topk_group, group_score)
    idx = first_top_k(choice, top_k)
    return idx, _weights(scores, idx, score, renormalize, eps, scale)


def first_top_k(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, descending, the lowest index first among equal values."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def _scores(logits: Tensor, score: str) -> Tensor:
    wide = logits.to(accumulation_dtype(logits.dtype))
    if score == "softmax_topk":
        return wide
    return wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)


def _keep_best_groups(choice_TE: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    grouped_TGE = choice_TE.unflatten(-1, (n_group, -1))
    kind, _, out = group_score.partition("_")
    of_group_TG = grouped_TGE.amax(-1) if kind == "max" else grouped_TGE.topk(2, -1).values.sum(-1)
    kept = first_top_k(of_group_TG, topk_group)
    dropped_TG = torch.ones_like(of_group_TG, dtype=torch.bool).scatter_(-1, kept, False)
    return grouped_TGE.masked_fill(dropped_TG.unsqueeze(-1), 0.0 if out else -math.inf).flatten(-2)


def _weights(scores: Tensor, idx: Tensor, score: str, renormalize: bool, eps: float, scale: float) -> Tensor:
    """The part that has a gradient, in operators that trace."""
    weight = scores.gather(-1, idx)
    if score == "softmax_topk":
        weight = weight.softmax(-1)
    if renormalize:
        weight = weight / (weight.sum(-1, keepdim=True) + eps)
    return weight * scale


# ------------------------------------------------------------------ kernel, autograd, FLOPs


def _kernel(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check(logits, bias, top_k, score, n_group, topk_group, group_score)
    return table("route").run(logits, bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, bias, _, score, *_, renormalize, eps, scale = inputs
    if ctx.needs_input_grad[1]:
        raise NotDifferentiable(
            f"route: a bias {list(bias.shape)} that requires grad",
            "It only takes part in the choice, which has no gradient",
            "Detach it, and adjust it from the experts' loads",
        )
    idx, _ = output
    ctx.save_for_backward(logits, idx)
    ctx.settings = score, renormalize, eps, scale
    ctx.mark_non_differentiable(idx)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_idx: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """From the scores again, which cost less than keeping them: back through scale, quotient, gather and score."""
    if grad is None:
        return (None,) * 10
    logits, idx = ctx.saved_tensors
    score, renormalize, eps, scale = ctx.settings
    scores = _scores(logits, score)
    chosen = scores.gather(-1, idx)
    weight = chosen.softmax(-1) if score == "softmax_topk" else chosen
    grad = grad.to(weight.dtype) * scale
    if renormalize:
        total = weight.sum(-1, keepdim=True) + eps
        grad = (grad - (grad * weight).sum(-1, keepdim=True) / total) / total
    if score == "softmax_topk":
        grad = weight * (grad - (grad * weight).sum(-1, keepdim=True))
    grad_scores = torch.zeros_like(scores).scatter(-1, idx, grad)
    if score == "sigmoid":
        grad_scores = grad_scores * scores * (1 - scores)
    elif score == "softmax":
        grad_scores = scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))
    return (grad_scores.to(logits.dtype), *(None,) * 9)


def _supports_everything(*_: Any) -> Decision:
    return YES


define("route", _SCHEMA, kernel=_kernel, fake=_fake, autocast=False)
define_autograd("route", setup_context=_setup_context, backward=_backward)
rows.register_route()
table("route").register("reference", _supports_everything, reference)


@register_flop_formula(torch.ops.dsinfra.route)
def route_flops(*_: Any, **__: Any) -> int:
    """Elementwise work and sorting aren't counted (torch's convention)."""
    return 0
