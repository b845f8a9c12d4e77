"""Torch's own 16-bit products, for sizes at which they are the fastest: dense by cuBLAS, groups by torch._grouped_mm.

Same arguments as kernels/gemm.py, whose checks are not repeated here. What torch leaves open is closed here: rows
behind the last group are zeros. With SwiGLU the product is rounded to x's dtype before the activation, which is a
kernel of its own; the other kernels round once, at the end.
"""

from __future__ import annotations

import contextlib

import torch

from dscompile.kernels import launch
from dscompile.kernels.activation import gated_activation
from dscompile.kernels.gemm_checks import misaligned


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
    """Why torch can't compute the call, or None. Reads metadata only. x [M, K]; w [N, K], or [G, N, K] with ends."""
    if x.device.type != "cuda":
        return f"x is on {x.device}. These are the products of CUDA devices. Move the tensors to one."
    if x_scale is not None or w_scale is not None or out_dtype not in (None, x.dtype) or x.dim() != 2:
        return (
            f"x is {x.dtype} {tuple(x.shape)}, y {out_dtype}. Only unscaled products of x's own dtype, without masks."
        )
    if bounds is None:
        return None if x.dtype in (torch.bfloat16, torch.float16) else f"x is {x.dtype}. 16 bits a value are preferred."
    if x.dtype != torch.bfloat16 or launch.capability(x.device) != (9, 0):
        return f"x is {x.dtype} on {x.device}. torch._grouped_mm is fast with bfloat16 on Hopper. Use another kernel."
    return misaligned("x", x, -1) or misaligned("w", w, -1 if w.stride(-1) == 1 else -2)


def linear(x: torch.Tensor, w: torch.Tensor, **_: object) -> torch.Tensor:
    """y [M, N] = x [M, K] w [N, K]^T."""
    return torch.nn.functional.linear(x, w)


def grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, *, swiglu: bool = False, **_: object) -> torch.Tensor:
    """y [M, N]: rows ends[g-1] .. ends[g] - 1 of x [M, K] by w[g]^T; zeros from ends[-1] on."""
    y = torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
    return gated_activation(y, ends) if swiglu else zero_behind(y, ends)


def zero_behind(y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Zero the rows of contiguous y [M, N] from ends[-1] on, in place."""
    from dscompile.kernels.gemm_triton import zero_behind_kernel

    programs = min(y.shape[0], 2 * launch.sm_count(y.device))
    with torch.cuda.device(y.device) if y.device.type == "cuda" else contextlib.nullcontext():
        launch.start(zero_behind_kernel, (programs,), y, ends, ends.shape[0], *y.shape, BLOCK=1024, num_warps=4)
    return y
