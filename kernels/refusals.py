"""What all kernels in plain Triton refuse: no Triton, no CUDA device, a dtype that the interpreter gets wrong."""

from __future__ import annotations

import torch

from dscompile.kernels import launch
from dscompile.kernels.mla_decode import BadArguments, KernelLimit

__all__ = ["BadArguments", "KernelLimit", "device_refusal", "refuse_if"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def device_refusal(name: str, x: torch.Tensor, *, integers: bool = False) -> str | None:
    """Why no kernel in plain Triton can use `x`, which holds floats or else `integers`, or None. Metadata only."""
    if not launch.has_triton():
        return "Triton is not installed. The kernel is written in it. Install a CUDA build of torch, which brings it."
    if not launch.interpreting() and launch.capability(x.device) is None:
        return (
            f"{name} is on {x.device}. The kernel runs on CUDA devices. Move the tensors to one, or set "
            "TRITON_INTERPRET=1 to debug it on the CPU."
        )
    dtypes = FLOATS[1:] if launch.interpreting() else FLOATS
    if not integers and x.dtype not in dtypes:
        return (
            f"{name} is {x.dtype}. The kernel computes with {', '.join(map(str, dtypes))} only (Triton's interpreter "
            "gets bfloat16 wrong without a word). Convert to one of these."
        )
    return None


def refuse_if(refusal: str | None) -> None:
    """Raise `KernelLimit` where there is a refusal."""
    if refusal:
        raise KernelLimit(refusal)
