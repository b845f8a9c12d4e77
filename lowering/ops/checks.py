"""Checks of an operator's arguments, shared by its kernel and its shape function.

They read metadata only and cost a few microseconds of an eager call. Sizes may be symbolic: a comparison of backed
sizes installs the guard that the operator's contract is anyway, and a comparison of sizes known only at run time is
left to the kernel, which checks the real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dscompile.lowering.errors import DeviceMismatch, DtypeMismatch, ShapeMismatch

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes agree; True for sizes that nobody knows before run time."""
    equal = a == b
    if equal is True or equal is False:
        return equal
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(equal)


def broadcasts(shape: Any, target: Any) -> bool:
    """Whether `shape` expands to `target`, aligned at the last dimension."""
    return len(shape) <= len(target) and all(
        same(a, 1) or same(a, b) for a, b in zip(reversed(shape), reversed(target))
    )


def shapes(**tensors: Tensor) -> str:
    """`name [2, 3]` of each tensor, for a message."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def check_dims(op: str, dims: dict[str, int], **tensors: Tensor) -> None:
    """Raise ShapeMismatch unless each tensor has its number of dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != dims[name]:
            raise ShapeMismatch(
                f"{op}: {name} has {tensor.dim()} dimensions, shape {list(tensor.shape)}",
                f"The operator reads {dims[name]} dimensions there",
                "Reshape it",
            )


def check_floating(op: str, first: Tensor, **tensors: Tensor) -> None:
    """Raise DtypeMismatch or DeviceMismatch unless all share `first`'s dtype, a supported one, and its device."""
    dtype = first.dtype
    if dtype not in COMPUTE_DTYPES:
        raise DtypeMismatch(
            f"{op}: the query {list(first.shape)} is {dtype}",
            f"The operator computes in {', '.join(str(d) for d in COMPUTE_DTYPES)}",
            "Convert it, or dequantise first",
        )
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise DtypeMismatch(
                f"{op}: {name} {list(tensor.shape)} is {tensor.dtype} but the query {list(first.shape)} is {dtype}",
                "All floating arguments must share one dtype",
                "Convert one of them, or run under torch.autocast",
            )
        check_device(op, first, **{name: tensor})


def check_device(op: str, first: Tensor, **tensors: Tensor) -> None:
    """Raise DeviceMismatch unless all tensors are on `first`'s device."""
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise DeviceMismatch(
                f"{op}: {name} {list(tensor.shape)} is on {tensor.device} but the query is on {first.device}",
                "One kernel reads all arguments",
                f"Move {name} to {first.device}",
            )
