"""GEMM of few tokens on Hopper: what it takes, and its three layouts. The kernel is gemm_small_gluon.py.

For decode, where weights are read once and little is computed with them: up to about 128 tokens a group. Same arguments
as kernels/gemm.py, whose checks are not repeated here, and a plan of its own. No host synchronisation, no state between
calls, bitwise repeatable: parts of K are joined in a fixed order.
"""

from __future__ import annotations

import contextlib

import torch

from dscompile.kernels import launch
from dscompile.kernels.gemm_small_launch import MOST_GROUPS, SmallCall, launch_small
from dscompile.kernels.gemm_small_plan import FP8, SmallPlan, plan_small
from dscompile.kernels.refusals import refuse_if

__all__ = ["grouped", "linear", "masked", "supports"]

EXPECTED = 20  # tokens a group where nobody says: any number is right, and up to 32 share one reading of the weights


def supports(
    x: torch.Tensor,
    w: torch.Tensor,
    bounds: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    swiglu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernel can't take these tensors, or None. Reads metadata only.

    x [M, K] or [L, max, K], w [N, K] or [G, N, K] (twice as many rows if swiglu), scales as for kernels/gemm.py; any
    bounds are taken.
    """
    if not launch.has_gluon() or launch.interpreting():
        return "There is no Gluon for Hopper here. The kernel is written in it. Install Triton 3.6 or later."
    capability = launch.capability(x.device)
    if capability != (9, 0):
        return f"x is on {x.device}, compute capability {capability}. Only Hopper (9, 0) has the kernel's instructions."
    out = out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)
    if x.dtype not in (torch.bfloat16, torch.float16, FP8) or out not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype} and y {out}. The kernel reads 8 or 16 bits a value and writes 16. Convert x."
    groups = w.shape[0] if w.dim() == 3 else 1
    if groups > MOST_GROUPS:
        return f"w {tuple(w.shape)}: {groups} groups. Their ends stay in registers. Pass {MOST_GROUPS} at most."
    n_major = w.stride(-1) != 1
    if x.dtype == FP8 and n_major:
        return f"FP8 w {tuple(w.shape)} has strides {w.stride()}. wgmma reads 8-bit weights along K only. Copy it so."
    if x.dtype == FP8 and swiglu and w.shape[-2] % 128:
        return (
            f"FP8 w {tuple(w.shape)} with swiglu: a block of 64 rows of the up half would lie across two scales. "
            "Pad both halves to multiples of 64 rows."
        )
    if n_major and swiglu and w.shape[-2] % 16:
        return f"w {tuple(w.shape)} along N, with swiglu: TMA reads from multiples of 16 bytes. Pad halves to 8 rows."
    if x_scale is not None and w_scale is not None and x_scale.shape[-1] % 4:
        return f"x_scale is {tuple(x_scale.shape)}. TMA reads rows that are multiples of 16 bytes apart. Pad it to 4."
    return _misaligned("x", x, -1) or _misaligned("w", w, -2 if n_major else -1)


def _misaligned(name: str, tensor: torch.Tensor, inner: int) -> str | None:
    """Why a tensor map can't describe the tensor, or None: one contiguous dimension, others 16 bytes apart."""
    size, inner = tensor.element_size(), inner % tensor.dim()
    outer = [s * size for i, s in enumerate(tensor.stride()) if i != inner and tensor.shape[i] > 1]
    offset = tensor.data_ptr() % 16
    if (tensor.stride(inner) != 1 and tensor.shape[inner] > 1) or offset or any(s <= 0 or s % 16 for s in outer):
        return (
            f"{name} {tuple(tensor.shape)} has strides {tensor.stride()} and lies {offset} bytes past 16. "
            "TMA reads aligned rows that are contiguous and multiples of 16 bytes apart. Copy it."
        )
    return None


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: SmallPlan | None = None,
) -> torch.Tensor:
    """y [M, N] = x [M, K] w [N, K]^T; scales [ceil(K/128), M_pad] and [ceil(N/128), ceil(K/128)] for FP8."""
    scales = {"x_scale": _one(x_scale), "w_scale": _one(w_scale)}
    return _run(x.unsqueeze(0), w.unsqueeze(0), None, "dense", False, out_dtype, plan, len(x), **scales)[0]


def grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    ends: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    swiglu: bool = False,
    out_dtype: torch.dtype | None = None,
    plan: SmallPlan | None = None,
) -> torch.Tensor:
    """y [M, N]: tokens ends[g-1] .. ends[g] - 1 of x [M, K] by w[g] [N, K]; zeros from ends[-1] on.

    If swiglu, w is [G, 2N, K], gate rows first, and y is silu(gate) * up, rounded once.
    """
    return _run(
        x.unsqueeze(0), w, ends, "ends", swiglu, out_dtype, plan, len(x), x_scale=_one(x_scale), w_scale=w_scale
    )[0]


def masked(
    x: torch.Tensor,
    w: torch.Tensor,
    counts: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: SmallPlan | None = None,
    expected: int | None = None,
) -> torch.Tensor:
    """y [L, max, N]: the first counts[l] tokens of x[l] [max, K] by w[l] [N, K]; other rows are not written.

    expected: tokens that a group is likely to have; only the speed depends on it.
    """
    likely = min(expected or EXPECTED, x.shape[1]) * x.shape[0]
    return _run(x, w, counts, "masked", False, out_dtype, plan, likely, x_scale=x_scale, w_scale=w_scale)


def _one(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else scale.unsqueeze(0)


def _run(
    x: torch.Tensor,
    w: torch.Tensor,
    bounds: torch.Tensor | None,
    layout: str,
    swiglu: bool,
    out_dtype: torch.dtype | None,
    plan: SmallPlan | None,
    rows: int,
    *,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
) -> torch.Tensor:
    refuse_if(supports(x, w, x_scale=x_scale, w_scale=w_scale, swiglu=swiglu, out_dtype=out_dtype))
    columns = w.shape[1] // 2 if swiglu else w.shape[1]
    out = out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)
    y = torch.empty((*x.shape[:2], columns), dtype=out, device=x.device)
    if y.numel() == 0 or w.numel() == 0:
        return y.zero_()
    if plan is None:
        sms = launch.sm_count(x.device)
        plan = plan_small(rows, columns, x.shape[2], w.shape[0], x.dtype, layout, swiglu, sms)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        launch_small(SmallCall(x, w, y, bounds, x_scale, w_scale, layout, swiglu), plan)
    return y
