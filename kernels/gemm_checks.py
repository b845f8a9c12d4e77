"""What the GEMM kernels take: whether arguments fit together, and what each of our own kernels refuses.

Reads metadata only, so that it costs a call a few microseconds.
"""

from __future__ import annotations

import torch

from dscompile.kernels import launch
from dscompile.kernels.refusals import BadArguments

FP8 = torch.float8_e4m3fn
WIDE = (torch.bfloat16, torch.float16, torch.float32)


def check(
    x: torch.Tensor,
    w: torch.Tensor,
    x_rank: int,
    w_rank: int,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise BadArguments unless x of `x_rank` dimensions and w of `w_rank`, with their scales, fit together."""
    if x.dim() != x_rank or w.dim() != w_rank or x.shape[-1] != w.shape[-1]:
        raise BadArguments(
            f"x is {tuple(x.shape)} and w {tuple(w.shape)}. They are contracted over the last dimension of both. "
            f"Pass x with {x_rank} dimensions, w with {w_rank}, the last ones equal."
        )
    if x.dtype != w.dtype or x.dtype not in (*WIDE, FP8):
        raise BadArguments(
            f"x is {x.dtype} and w {w.dtype}. The tensor cores multiply two operands of one dtype, bfloat16, float16, "
            "float32 or float8_e4m3fn. Convert one of them."
        )
    if (x_scale is not None) != (x.dtype == FP8) or (w_scale is not None) != (x.dtype == FP8):
        raise BadArguments(
            f"x is {x.dtype}, x_scale is {'given' if x_scale is not None else 'None'}, w_scale "
            f"{'given' if w_scale is not None else 'None'}. FP8 values mean nothing without both scales, others have "
            "none. Quantise with kernels/quantize.py, or leave the scales out."
        )
    if out_dtype is not None and out_dtype not in WIDE:
        raise BadArguments(f"out_dtype is {out_dtype}. Sums are rounded to bfloat16, float16 or float32. Ask for one.")
    tensors = {"w": w}
    if x_scale is not None and w_scale is not None:
        blocks = -(-x.shape[-1] // 128)
        _check_scale("x_scale", x_scale, (*x.shape[:-2], blocks, -(-x.shape[-2] // 4) * 4), x)
        _check_scale("w_scale", w_scale, (*w.shape[:-2], -(-w.shape[-2] // 128), blocks), w)
        tensors |= {"x_scale": x_scale, "w_scale": w_scale}
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise BadArguments(f"x is on {x.device}, {name} on {tensor.device}. One kernel reads both. Move one.")


def _check_scale(name: str, scale: torch.Tensor, shape: tuple[int, ...], of: torch.Tensor) -> None:
    if scale.dtype != torch.float32 or scale.shape != shape or not scale.is_contiguous():
        raise BadArguments(
            f"{name} is {scale.dtype} {tuple(scale.shape)} with strides {scale.stride()}, beside values of shape "
            f"{tuple(of.shape)}. The kernels read one float32 for 128 columns of K, in their own order. "
            f"Pass contiguous float32 {shape}."
        )


def check_bounds(name: str, bounds: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Raise BadArguments unless `bounds` holds an int32 for each group of w, beside x."""
    good = bounds.dtype == torch.int32 and bounds.shape == w.shape[:1] and bounds.device == x.device
    if not good or not bounds.is_contiguous():
        raise BadArguments(
            f"{name} is {bounds.dtype} {tuple(bounds.shape)} on {bounds.device}. The kernel reads one 32-bit number a "
            f"group. Pass contiguous int32 [{w.shape[0]}] on {x.device}."
        )


def gluon_refusal(
    x: torch.Tensor, w: torch.Tensor, swiglu: bool = False, out_dtype: torch.dtype | None = None
) -> str | None:
    """Why the Gluon kernel can't take these tensors, or None. Reads metadata only; `w` as `grouped` takes it."""
    if not launch.has_gluon() or launch.interpreting():
        return "There is no Gluon for Hopper here. The kernel is written in it. Install Triton 3.6 or later."
    capability = launch.capability(x.device)
    if capability != (9, 0):
        return f"x is on {x.device}, compute capability {capability}. Only Hopper (9, 0) has the kernel's instructions."
    out = out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)
    if torch.float32 in (x.dtype, out):
        return f"x is {x.dtype} and y {out}. The kernel reads and writes at most 16 bits a value."
    fp8 = x.dtype == FP8
    if fp8 and (swiglu or w.stride(-1) != 1):
        return (
            f"FP8 w {tuple(w.shape)} has strides {w.stride()}, swiglu is {swiglu}. wgmma reads 8-bit weights along K "
            "only, and two accumulators with their partial products don't fit. Copy w so, and multiply afterwards."
        )
    columns = w.shape[-2] // 2 if swiglu else w.shape[-2]
    if columns % 8:
        return f"y has {columns} columns. TMA writes rows at multiples of 16 bytes. Pad w to a multiple of 8."
    return misaligned("x", x, -1) or misaligned("w", w, -1 if w.stride(-1) == 1 else -2)


def triton_refusal(x: torch.Tensor) -> str | None:
    """Why the plain Triton kernel can't take these tensors, or None. Reads metadata only."""
    if not launch.has_triton():
        return "Triton is not installed. The kernel is written in it. Install a CUDA build of torch, which brings it."
    if launch.interpreting():
        if x.dtype == torch.bfloat16:
            return "x is bfloat16. Triton's interpreter gets it wrong without a word. Convert to float16."
        return None
    capability = launch.capability(x.device)
    if capability is None:
        return f"x is on {x.device}. The kernel runs on CUDA devices. Move it to one, or set TRITON_INTERPRET=1."
    if x.dtype == FP8 and capability < (8, 9):
        return f"x is {x.dtype} on compute capability {capability}. FP8 needs (8, 9) or later. Dequantise it first."
    return None


def misaligned(name: str, tensor: torch.Tensor, inner: int) -> str | None:
    """Why a tensor map can't describe the tensor, or None: one contiguous dimension, others 16 bytes apart."""
    size = tensor.element_size()
    outer = [
        stride * size for i, stride in enumerate(tensor.stride()) if i != inner % tensor.dim() and tensor.shape[i] > 1
    ]
    if tensor.stride(inner) != 1 or tensor.data_ptr() % 16 or any(stride % 16 or stride == 0 for stride in outer):
        return (
            f"{name} {tuple(tensor.shape)} has strides {tensor.stride()} and lies at an address of remainder "
            f"{tensor.data_ptr() % 16}. TMA reads rows that are contiguous and multiples of 16 bytes apart. Copy it."
        )
    return None
