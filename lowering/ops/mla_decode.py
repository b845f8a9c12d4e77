"""`dsinfra::mla_decode`: the absorbed form of MLA over a latent cache, for decode.

    scores = scale * (q_latent . c + q_rope . k_rope)        o = softmax(scores) c

With q_latent = W_uk^T q_nope the up-projection has left the cache side: all heads read one latent, and o (a mixture of
latents) is multiplied by W_uv afterwards. The cache is two plain tensors [B,T,.] with any row pitch (a StaticCache's in
place, or slices of one [B,T,C+R] tensor) or, with a page table, pages of 64 rows. `seqlens` lives on the device:
nothing here reads a value on the host, so a captured CUDA graph serves every length. Rows at or past a request's length
never influence the result, whatever they hold.

With `latent_scale` the latent is float8_e4m3fn, each group of its columns times a scale, rounded to the queries' dtype:
slices of one pool of 656-byte rows, or tensors of their own (`dscompile.kernels.mla_cache`). k_rope stays as it is.

With `batch_invariant`, the bits of a request depend on its own data, on the cache's capacity and on nothing else: not
on how many requests there are, nor on their lengths. Work is then cut by the capacity alone, which costs time (up to
half as much again on an H100, measured up to 128 requests).

With `equal_lengths`, the caller says that all requests are equally long: only speed depends on it. Requests of two
plain tensors are taken to be so.

Refused: gradients (use `dsinfra::mla` to train), pages of another size, masks that aren't bool.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering import decode
from dscompile.lowering.errors import (
    MaskError,
    NotDifferentiable,
    PageTableError,
    ScaleError,
    SeqlensError,
    ShapeMismatch,
)
from dscompile.lowering.ops.checks import COMPUTE_DTYPES, check_device, check_dims, check_floating, same, shapes
from dscompile.lowering.ops.library import define
from dscompile.lowering.ops.mla import accumulation_dtype, softmax_and_lse
from dscompile.lowering.select import YES, Decision, table

PAGE = 64

_SCHEMA = (
    "(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor seqlens, Tensor? mask, Tensor? page_table,"
    " float scale, bool causal, Tensor? latent_scale=None, bool batch_invariant=False,"
    " bool equal_lengths=False) -> (Tensor o, Tensor lse)"
)
_DIMS = {"q_latent": 4, "q_rope": 4, "latent": 3, "k_rope": 3}


# ------------------------------------------------------------------ checks and shape function


def check(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    seqlens: Tensor,
    mask: Tensor | None,
    page_table: Tensor | None,
    latent_scale: Tensor | None = None,
) -> None:
    """Raise the error of `lowering.errors` that says what is wrong with the arguments of `mla_decode`, if anything."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_latent, q_rope, latent, k_rope)):
        raise NotDifferentiable(
            f"mla_decode: an argument requires grad, query {list(q_latent.shape)}",
            "The absorbed form is for decode and has no gradient formula",
            "Call it under torch.no_grad() or torch.inference_mode(), or use dsinfra::mla to train",
        )
    if mask is None and latent_scale is None and _plainly_right(q_latent, q_rope, latent, k_rope, seqlens, page_table):
        return
    others = {"q_rope": q_rope, "latent": latent, "k_rope": k_rope}
    check_dims("mla_decode", _DIMS, q_latent=q_latent, **others)
    if latent_scale is not None:
        _check_scale(latent_scale, latent, q_latent)
        others["latent"] = latent.new_empty(0, dtype=q_latent.dtype)  # its own dtype is checked with its scales
    check_floating("mla_decode", q_latent, **others)
    (B, S, H, C), R = q_latent.shape, q_rope.shape[3]
    if not all(map(same, q_rope.shape[:3], (B, S, H))):
        raise ShapeMismatch(
            f"mla_decode: {shapes(q_latent=q_latent, q_rope=q_rope)}",
            "Both are parts of one query [B,S,H,.]",
            "Give them the same requests, length and heads",
        )
    if not (same(latent.shape[2], C) and same(k_rope.shape[2], R)):
        raise ShapeMismatch(
            f"mla_decode: {shapes(q_latent=q_latent, latent=latent, q_rope=q_rope, k_rope=k_rope)}",
            "Query and cache are multiplied along their last dimension",
            "Make C and R agree",
        )
    if not all(map(same, latent.shape[:2], k_rope.shape[:2])):
        raise ShapeMismatch(
            f"mla_decode: {shapes(latent=latent, k_rope=k_rope)}",
            "They are the two parts of the same cached rows",
            "Give them the same leading dimensions",
        )
    _check_seqlens(seqlens, q_latent)
    T = latent.shape[1]
    if page_table is not None:
        _check_pages(page_table, latent, q_latent)
        T = page_table.shape[1] * PAGE
    elif not same(latent.shape[0], B):
        raise ShapeMismatch(
            f"mla_decode: {shapes(q_latent=q_latent, latent=latent)} and no page table",
            "Without a page table the cache holds the rows of each of the B requests",
            "Give latent [B,T,C], or pages",
        )
    if mask is not None:
        _check_mask(mask, q_latent, T)


def _plainly_right(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, seqlens: Tensor, page_table: Tensor | None
) -> bool:
    """The checks below at a fifth of their price, for a call with real sizes that passes them all: decode calls this
    operator for each layer and token."""
    if type(q_latent) is not Tensor:
        return False
    dtype, device, ndims = q_latent.dtype, q_latent.device, (q_latent.dim(), q_rope.dim(), latent.dim(), k_rope.dim())
    if ndims != (4, 4, 3, 3) or dtype not in COMPUTE_DTYPES:
        return False
    (B, S, H, C), (B_, S_, H_, R), (P, T, C_), (P_, T_, R_) = q_latent.shape, q_rope.shape, latent.shape, k_rope.shape
    if page_table is not None:
        leading_fits = T == PAGE and page_table.dtype is torch.int32 and page_table.device == device
        leading_fits = leading_fits and page_table.dim() == 2 and page_table.shape[0] == B
    else:
        leading_fits = P == B
    return (
        leading_fits
        and (B, S, H, C, R, P, T) == (B_, S_, H_, C_, R_, P_, T_)
        and q_rope.dtype is dtype
        and latent.dtype is dtype
        and k_rope.dtype is dtype
        and seqlens.dtype is torch.int32
        and seqlens.shape == (B,)
        and q_rope.device == device
        and latent.device == device
        and k_rope.device == device
        and seqlens.device == device
    )


def _check_scale(latent_scale: Tensor, latent: Tensor, q_latent: Tensor) -> None:
    right = latent_scale.dim() == 3 and latent.dtype is torch.float8_e4m3fn and latent_scale.dtype is torch.float32
    if not right or not all(map(same, latent_scale.shape[:2], latent.shape[:2])):
        raise ScaleError(
            f"mla_decode: latent {list(latent.shape)} of {latent.dtype}, latent_scale {list(latent_scale.shape)} of "
            f"{latent_scale.dtype}",
            "A float8 cache has one float32 scale for each group of columns of a row",
            "Give latent as float8_e4m3fn and latent_scale as float32 [.., .., C / 128], or neither",
        )
    if not same(latent.shape[2] % latent_scale.shape[2], 0):
        raise ScaleError(
            f"mla_decode: {latent.shape[2]} latent columns and {latent_scale.shape[2]} scales a row",
            "Groups of columns are equal",
            "Give C / 128 scales",
        )
    check_device("mla_decode", q_latent, latent_scale=latent_scale)


def _check_seqlens(seqlens: Tensor, q_latent: Tensor) -> None:
    if seqlens.dtype is not torch.int32 or seqlens.dim() != 1 or not same(seqlens.shape[0], q_latent.shape[0]):
        raise SeqlensError(
            f"mla_decode: seqlens {list(seqlens.shape)} of {seqlens.dtype} for {q_latent.shape[0]} requests",
            "Each request has one length, queries included, read on the device as int32",
            "Give an int32 tensor [B]",
        )
    check_device("mla_decode", q_latent, seqlens=seqlens)


def _check_pages(page_table: Tensor, latent: Tensor, q_latent: Tensor) -> None:
    B = q_latent.shape[0]
    if page_table.dtype is not torch.int32 or page_table.dim() != 2 or not same(page_table.shape[0], B):
        raise PageTableError(
            f"mla_decode: a page table {list(page_table.shape)} of {page_table.dtype} for {B} requests",
            "It holds the page numbers of each request as int32",
            "Give an int32 tensor [B, max_pages]",
        )
    if not same(latent.shape[1], PAGE):
        raise PageTableError(
            f"mla_decode: pages of {latent.shape[1]} rows, latent {list(latent.shape)}",
            f"The kernels read pages of {PAGE} rows",
            f"Allocate the pool as [P, {PAGE}, C + R]",
        )
    check_device("mla_decode", q_latent, page_table=page_table)


def _check_mask(mask: Tensor, q_latent: Tensor, T: int) -> None:
    B, S = q_latent.shape[:2]
    if mask.dtype is not torch.bool:
        raise MaskError(
            f"mla_decode: a mask {list(mask.shape)} of {mask.dtype}",
            "The decode kernels read visible or not",
            "Give a bool mask, True = visible",
        )
    if (
        mask.dim() != 3
        or not (same(mask.shape[0], B) or same(mask.shape[0], 1))
        or not (same(mask.shape[1], S) and same(mask.shape[2], T))
    ):
        raise MaskError(
            f"mla_decode: a mask {list(mask.shape)} for B {B}, S {S}, T {T} (the cache's capacity)",
            "One mask serves all heads: [B or 1, S, T]",
            "Drop the head dimension and cover the whole capacity",
        )
    check_device("mla_decode", q_latent, mask=mask)


def _fake(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    seqlens: Tensor,
    mask: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: Tensor | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> tuple[Tensor, Tensor]:
    check(q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, latent_scale)
    B, S, H, C = q_latent.shape
    return q_latent.new_empty(B, S, H, C), q_latent.new_empty(B, S, H, dtype=torch.float32)


# ------------------------------------------------------------------ reference


def reference(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    seqlens: Tensor,
    mask: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: Tensor | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on any device, in float32 throughout (float64 for float64); see `dsinfra::mla_decode`."""
    if batch_invariant and len(seqlens) > 1:  # torch picks its kernels by the batch
        by_request = q_latent, q_rope, seqlens, mask, page_table
        return _one_by_one(len(seqlens), by_request, (latent, k_rope, latent_scale), scale, causal)
    if page_table is not None:
        latent, k_rope = (_gather_pages(pool, page_table, seqlens) for pool in (latent, k_rope))
    if latent_scale is not None:
        from dscompile.kernels.mla_cache import dequantize  # for these calls alone: others import no kernel

        if page_table is not None:
            latent_scale = _gather_pages(latent_scale, page_table, seqlens)
        latent = dequantize(latent, latent_scale, q_latent.dtype)
    S, T, wide = q_latent.shape[1], latent.shape[1], accumulation_dtype(q_latent.dtype)
    keys = torch.arange(T, device=seqlens.device)
    valid_BT = keys < seqlens.unsqueeze(1)
    # 0 * NaN is NaN: rows past the length are replaced, not only masked.
    latent, k_rope = (x.to(wide).masked_fill(~valid_BT.unsqueeze(-1), 0.0) for x in (latent, k_rope))
    scores = torch.einsum("bshc,btc->bsht", q_latent.to(wide), latent)
    scores = (scores + torch.einsum("bshr,btr->bsht", q_rope.to(wide), k_rope)) * scale
    visible_BST = valid_BT.unsqueeze(1)
    if causal:
        behind = torch.arange(S - 1, -1, -1, device=seqlens.device)
        visible_BST = visible_BST & (keys < (seqlens.unsqueeze(1) - behind).unsqueeze(-1))
    if mask is not None:
        visible_BST = visible_BST & mask
    p, lse = softmax_and_lse(scores.masked_fill(~visible_BST.unsqueeze(2), -math.inf))
    o = torch.einsum("bsht,btc->bshc", p, latent)
    return o.to(q_latent.dtype).contiguous(), lse.to(torch.float32)


def _one_by_one(
    requests: int, by_request: tuple[Tensor | None, ...], cache: tuple[Tensor | None, ...], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """`reference` of each request alone; the cache is a request's own where no table of pages shares it."""
    *_, page_table = by_request
    found = []
    for b in range(requests):
        q_latent, q_rope, length, mask, pages = (_request(x, b) for x in by_request)
        latent, k_rope, latent_scale = (_request(x, b) for x in cache) if page_table is None else cache
        found.append(reference(q_latent, q_rope, latent, k_rope, length, mask, pages, scale, causal, latent_scale))
    return torch.cat([o for o, _ in found]), torch.cat([lse for _, lse in found])


def _request(x: Tensor | None, b: int) -> Tensor | None:
    """Its part of request b; a mask of one serves all."""
    return x if x is None or len(x) == 1 else x[b : b + 1]


def _gather_pages(pool_PRX: Tensor, page_table: Tensor, seqlens: Tensor) -> Tensor:
    """-> [B, max_pages * 64, X]. Table entries past a request's last page may hold anything and are not followed."""
    first_row = torch.arange(page_table.shape[1], device=page_table.device) * PAGE
    pages = torch.where(first_row < seqlens.unsqueeze(1), page_table, 0)
    return pool_PRX[pages].flatten(1, 2)


# ------------------------------------------------------------------ kernel and FLOPs


def _kernel(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    seqlens: Tensor,
    mask: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: Tensor | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> tuple[Tensor, Tensor]:
    check(q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, latent_scale)
    tensors, how = (q_latent, q_rope, latent, k_rope, seqlens, mask, page_table), (batch_invariant, equal_lengths)
    return table("mla_decode").run(*tensors, scale, causal, latent_scale, *how)


def _supports_everything(*_: Any) -> Decision:
    return YES


define("mla_decode", _SCHEMA, kernel=_kernel, fake=_fake)
decode.register()
table("mla_decode").register("reference", _supports_everything, reference)


@register_flop_formula(torch.ops.dsinfra.mla_decode)
def mla_decode_flops(
    q_latent: Any,
    q_rope: Any,
    latent: Any,
    k_rope: Any,
    seqlens: Any,
    mask: Any = None,
    page_table: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    """Both products with every row of the capacity: the lengths are on the device, so this is an upper bound."""
    (B, S, H, C), R = q_latent, q_rope[3]
    T = latent[1] if page_table is None else page_table[1] * PAGE
    return 2 * B * S * H * T * (2 * C + R)
