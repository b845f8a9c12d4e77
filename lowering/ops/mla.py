"""`dsinfra::mla`: multi-head latent attention over keys and values that are given as a latent and its up-projections.

    scores = scale * (q_nope . (W_uk c) + q_rope . k_rope)        o = softmax(scores) (W_uv c)

One form for prefill, training and decode over any cache; the rotary part comes already rotated. `mask` and `causal` are
exclusive: a mask that is proved causal is passed as `causal`, because a kernel with a mask operand skips nothing and
takes three times as long. The gradient is an operator of its own, `dsinfra::mla_backward`, which builds keys and values
again.

Refused: float8 and integer inputs (dequantise first), a gradient of a float mask, of `lse`, and of the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import expanded
from dscompile.lowering.errors import LatentWidthMismatch, MaskError, NotDifferentiable, ShapeMismatch
from dscompile.lowering.ops.checks import broadcasts, check_device, check_dims, check_floating, same, shapes
from dscompile.lowering.ops.library import define, define_autograd
from dscompile.lowering.select import YES, Decision, table

_ARGUMENTS = "Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor w_uk, Tensor w_uv, Tensor? mask"
_SCHEMA = f"({_ARGUMENTS}, float scale, bool causal) -> (Tensor o, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_o, {_ARGUMENTS}, Tensor o, Tensor lse, float scale, bool causal)"
    " -> (Tensor grad_q, Tensor grad_latent, Tensor grad_k_rope, Tensor grad_w_uk, Tensor grad_w_uv)"
)
_DIMS = {"q_nope": 4, "q_rope": 4, "latent": 3, "k_rope": 3, "w_uk": 3, "w_uv": 3}


# ------------------------------------------------------------------ checks and shape functions


def check(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> None:
    """Raise the error of `lowering.errors` that says what is wrong with the arguments of `mla`, if anything is."""
    others = {"q_rope": q_rope, "latent": latent, "k_rope": k_rope, "w_uk": w_uk, "w_uv": w_uv}
    check_dims("mla", _DIMS, q_nope=q_nope, **others)
    check_floating("mla", q_nope, **others)
    (B, H, S, N), (_, T, C) = q_nope.shape, latent.shape
    if not all(map(same, q_rope.shape[:3], (B, H, S))):
        raise ShapeMismatch(
            f"mla: {shapes(q_nope=q_nope, q_rope=q_rope)}",
            "Both are parts of one query [B,H,S,.]",
            "Give them the same requests, heads and length",
        )
    if not (same(latent.shape[0], B) and all(map(same, k_rope.shape[:2], (B, T)))):
        raise ShapeMismatch(
            f"mla: {shapes(q_nope=q_nope, latent=latent, k_rope=k_rope)}",
            "The cache holds one latent [C] and one rotated key [R] for each of the B requests and T keys",
            "Give latent [B,T,C] and k_rope [B,T,R]",
        )
    if not same(k_rope.shape[2], q_rope.shape[3]):
        raise ShapeMismatch(
            f"mla: {shapes(q_rope=q_rope, k_rope=k_rope)}", "Their last dimensions are multiplied", "Make R agree"
        )
    if not (all(map(same, w_uk.shape[:2], (H, N))) and same(w_uv.shape[0], H)):
        raise ShapeMismatch(
            f"mla: {shapes(q_nope=q_nope, w_uk=w_uk, w_uv=w_uv)}",
            "The up-projections hold [N,C] and [V,C] for each of the H heads",
            "Give w_uk [H,N,C] and w_uv [H,V,C]",
        )
    if not (same(w_uk.shape[2], C) and same(w_uv.shape[2], C)):
        raise LatentWidthMismatch(
            f"mla: {shapes(latent=latent, w_uk=w_uk, w_uv=w_uv)}",
            "The up-projections contract their last dimension with the latent's",
            "Give weights of the latent's width",
        )
    if mask is not None:
        _check_mask(mask, q_nope, (B, H, S, T), causal)


def _check_mask(mask: Tensor, q_nope: Tensor, target: tuple, causal: bool) -> None:
    if causal:
        raise MaskError(
            f"mla: a mask {list(mask.shape)} and causal=True",
            "They are two ways to say which keys are visible",
            "Pass one: fold causality into the mask, or drop a mask that is only causal",
        )
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        raise MaskError(
            f"mla: a mask {list(mask.shape)} of {mask.dtype}",
            "A mask is bool (True = visible) or float (added)",
            "Convert it, with .bool() if it holds 0 and 1",
        )
    if not broadcasts(mask.shape, target):
        raise MaskError(
            f"mla: a mask {list(mask.shape)} for scores [B,H,S,T] = {list(target)}",
            "It can't be broadcast to them",
            "Give each dimension that size, or 1",
        )
    check_device("mla", q_nope, mask=mask)


def _fake(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    check(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, causal)
    B, H, S, _ = q_nope.shape
    o = q_nope.new_empty(B, S, H, w_uv.shape[1]).transpose(1, 2)
    return o, q_nope.new_empty(B, H, S, dtype=torch.float32)


def _fake_backward(
    grad_o: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_double_backward(grad_o, q_nope, latent, w_uk)
    B, H, S, N = q_nope.shape
    grad_q = q_nope.new_empty(B, S, H, N + q_rope.shape[3]).transpose(1, 2)
    return (grad_q, *(x.new_empty(x.shape) for x in (latent, k_rope, w_uk, w_uv)))


# ------------------------------------------------------------------ reference


def reference(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on any device, in float32 throughout (float64 for float64); see `dsinfra::mla` for the shapes."""
    q, k, v = _expand_wide(q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    p, lse = softmax_and_lse(_scores(q, k, mask, scale, causal))
    o_BSHV = torch.einsum("bhst,bhtv->bshv", p, v).to(q_nope.dtype).contiguous()
    return o_BSHV.transpose(1, 2), lse.to(torch.float32)


def reference_backward(
    grad_o: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient written out, in float32 throughout (float64 for float64): -> grad_q [B,H,S,N+R] (the transpose of a
    contiguous [B,S,H,N+R]) and contiguous gradients of latent, k_rope, w_uk, w_uv."""
    q, k, v = _expand_wide(q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    p, _ = softmax_and_lse(_scores(q, k, mask, scale, causal))
    N, wide = q_nope.shape[3], q.dtype
    grad_o, latent_wide = grad_o.to(wide), latent.to(wide)
    dv = torch.einsum("bhst,bhsv->bhtv", p, grad_o)
    dp = torch.einsum("bhsv,bhtv->bhst", grad_o, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bhst,bhtd->bshd", ds, k)
    dk = torch.einsum("bhst,bhsd->bhtd", ds, q)
    dk_nope = dk[..., :N]
    dlatent = torch.einsum("bhtn,hnc->btc", dk_nope, w_uk.to(wide))
    dlatent = dlatent + torch.einsum("bhtv,hvc->btc", dv, w_uv.to(wide))
    gradients = (
        dq,
        dlatent,
        dk[..., N:].sum(1),
        torch.einsum("bhtn,btc->hnc", dk_nope, latent_wide),
        torch.einsum("bhtv,btc->hvc", dv, latent_wide),
    )
    grad_q, *rest = (g.to(q_nope.dtype).contiguous() for g in gradients)
    return (grad_q.transpose(1, 2), *rest)


def softmax_and_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last dimension; a row of -inf alone gives zeros and -inf, not NaN."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    # Not exp(scores - lse): beside scores of finfo.min the log(n) in lse rounds away, and each of n keys would weigh 1.
    lse = torch.logsumexp(scores, -1)
    return torch.softmax(scores, -1).masked_fill((lse == -math.inf).unsqueeze(-1), 0.0), lse


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a reference computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _expand_wide(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> q [B,H,S,N+R], k [B,H,T,N+R], v [B,H,T,V] in the accumulation dtype."""
    wide = accumulation_dtype(q_nope.dtype)
    latent = latent.to(wide)
    k_nope = torch.einsum("btc,hnc->bhtn", latent, w_uk.to(wide))
    v = torch.einsum("btc,hvc->bhtv", latent, w_uv.to(wide))
    k_rope_BHTR = k_rope.to(wide).unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)
    return torch.cat([q_nope, q_rope], -1).to(wide), torch.cat([k_nope, k_rope_BHTR], -1), v


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * scale
    if causal:
        S, T = scores.shape[-2:]
        visible = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
        return scores.masked_fill(~visible, -math.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask


# ------------------------------------------------------------------ kernels, autograd, FLOPs


def _kernel(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    check(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, causal)
    return table("mla").run(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal)


def _kernel_backward(grad_o: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _refuse_double_backward(grad_o, *args[:6])
    return table("mla_backward").run(grad_o, *args)


def _refuse_double_backward(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotDifferentiable(
            f"mla: a gradient of its gradient, for a query {list(tensors[1].shape)}",
            "The backward of mla has no gradient formula",
            "Call backward without create_graph=True",
        )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, mask, scale, causal = inputs
    o, lse = output
    if ctx.needs_input_grad[6]:
        raise NotDifferentiable(
            f"mla: a float mask {list(mask.shape)} that requires grad",
            "The attention kernels give no gradient of a mask",
            "Detach the mask, or compute this attention with torch's own operators",
        )
    ctx.save_for_backward(*tensors, mask, o, lse)
    ctx.scale, ctx.causal = scale, causal
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_o is None:
        return (None,) * 9
    q_nope, *_ = saved = ctx.saved_tensors
    grad_q, *rest = torch.ops.dsinfra.mla_backward.default(grad_o, *saved, ctx.scale, ctx.causal)
    N = q_nope.shape[3]
    return (grad_q[..., :N], grad_q[..., N:], *rest, None, None, None)


def _supports_everything(*_: Any) -> Decision:
    return YES


define("mla", _SCHEMA, kernel=_kernel, fake=_fake)
define("mla_backward", _BACKWARD_SCHEMA, kernel=_kernel_backward, fake=_fake_backward, autocast=False)
define_autograd("mla", setup_context=_setup_context, backward=_backward)
expanded.register()
table("mla").register("reference", _supports_everything, reference)
table("mla_backward").register("reference", _supports_everything, reference_backward)


@register_flop_formula(torch.ops.dsinfra.mla)
def mla_flops(q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any, *_: Any, **__: Any) -> int:
    """The expanded form: two up-projections and two products with all T keys, causal or not (torch's convention)."""
    (B, H, S, N), (_, T, C), R, V = q_nope, latent, q_rope[3], w_uv[1]
    return 2 * B * T * H * C * (N + V) + 2 * B * H * S * T * (N + R + V)


@register_flop_formula(torch.ops.dsinfra.mla_backward)
def mla_backward_flops(
    grad_o: Any, q_nope: Any, q_rope: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any, *_: Any, **__: Any
) -> int:
    """Up-projections once more and their two gradients each; scores once more and the gradients of p, v, q and k."""
    (B, H, S, N), (_, T, C), R, V = q_nope, latent, q_rope[3], w_uv[1]
    return 3 * 2 * B * T * H * C * (N + V) + 2 * B * H * S * T * (3 * (N + R) + 2 * V)
