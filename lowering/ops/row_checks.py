"""Checks of the arguments of the operators on rows of tokens: experts, routers and GEMMs, FP8 or not.

As `checks`, they read metadata only and take symbolic sizes; each raises one class of `lowering.errors` that names the
operator and argument, what was found, what is needed and how to get there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dscompile.lowering.activations import ACTIVATIONS
from dscompile.lowering.block_scales import FP8, blocks, padded_rows
from dscompile.lowering.errors import (
    ActivationError,
    DeviceMismatch,
    DtypeMismatch,
    ExpertIdsError,
    GroupEndsError,
    NotDifferentiable,
    ScaleError,
    ShapeMismatch,
)
from dscompile.lowering.ops.checks import same, shapes

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
IDS = (torch.int64, torch.int32)
# What can be quantised to FP8, and what an FP8 product can be rounded to.
UNQUANTIZED = (torch.bfloat16, torch.float16, torch.float32)


def has_shape(tensor: Tensor, shape: tuple) -> bool:
    """Whether the tensor has that shape; a size that nobody knows before run time agrees with all."""
    return tensor.dim() == len(shape) and all(map(same, tensor.shape, shape))


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple, why: str, **beside: Tensor) -> None:
    """Raise ShapeMismatch unless the tensor has that shape; `beside` are the tensors that it must fit."""
    if not has_shape(tensor, shape):
        raise ShapeMismatch(
            f"{op}: {shapes(**{name: tensor}, **beside)}", why, f"Give {name} of shape {list(shape)}, or fit the others"
        )


def check_rank(op: str, name: str, tensor: Tensor, letters: str | tuple[str, ...]) -> None:
    """Raise ShapeMismatch unless the tensor has as many dimensions as `letters`."""
    if tensor.dim() != len(letters):
        raise ShapeMismatch(
            f"{op}: {name} has {tensor.dim()} dimensions, shape {list(tensor.shape)}",
            f"The operator reads [{','.join(letters)}] there",
            "Reshape it",
        )


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise DtypeMismatch unless the tensor has one of the dtypes."""
    if tensor.dtype not in allowed:
        raise DtypeMismatch(
            f"{op}: {name} {list(tensor.shape)} is {tensor.dtype}",
            f"The operator reads {' or '.join(str(d) for d in allowed)} there",
            "Convert it",
        )


def check_devices(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Raise DeviceMismatch unless all tensors are on `first`'s device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise DeviceMismatch(
                f"{op}: {name} {list(tensor.shape)} is on {tensor.device} but the rows {list(first.shape)} are on "
                f"{first.device}",
                "One kernel reads all arguments",
                f"Move {name} to {first.device}",
            )


def check_out_dtype(op: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...] = UNQUANTIZED) -> None:
    """Raise DtypeMismatch unless a sum can be rounded to it."""
    if dtype not in allowed:
        raise DtypeMismatch(
            f"{op}: out_dtype is {dtype}",
            f"A sum is rounded to {' or '.join(str(d) for d in allowed)}",
            "Ask for one of them, and quantise the result with dsinfra::quantize_1x128 if FP8 is wanted",
        )


def check_ends(op: str, name: str, ends: Tensor, groups: Any) -> None:
    """Raise GroupEndsError unless it holds an int32 a group."""
    if ends.dtype is not torch.int32 or not has_shape(ends, (groups,)):
        raise GroupEndsError(
            f"{op}: {name} {list(ends.shape)} of {ends.dtype} for {groups} groups",
            "The kernels read where each group's rows lie on the device, as int32",
            f"Give an int32 tensor [{groups}]; from counts, ends are counts.cumsum(0, dtype=torch.int32)",
        )


def check_row_scale(op: str, x: Tensor, scale: Tensor) -> None:
    """Raise ScaleError unless `scale` is what dsinfra::quantize_1x128 gives for rows like `x` ([M,K] or [L,M,K])."""
    *lead, M, K = x.shape
    wanted = (*lead, blocks(K), padded_rows(M))
    if scale.dtype is not torch.float32 or not has_shape(scale, wanted):
        raise ScaleError(
            f"{op}: x_scale {list(scale.shape)} of {scale.dtype} for x {list(x.shape)}",
            f"Each row has a float32 scale for 128 columns, K-block-major and padded to 4 rows: {list(wanted)}",
            "Quantise with dsinfra::quantize_1x128, or transpose scales of [M, K/128] and pad the rows",
        )
    empty = isinstance(M, int) and M == 0  # torch strides an empty tensor as if it held one
    if not empty and not (same(scale.stride(-1), 1) and same(scale.stride(-2), scale.shape[-1])):
        raise ScaleError(
            f"{op}: x_scale {list(scale.shape)} with strides {list(scale.stride())}",
            "The kernels read the scales of neighbouring rows in one piece",
            "Call .contiguous() on the [ceil(K/128), M] tensor: a transposed view of [M, K/128] is not that layout",
        )


def check_weight_scale(op: str, name: str, w: Tensor, scale: Tensor) -> None:
    """Raise ScaleError unless `scale` holds a contiguous float32 for 128 x 128 of `w` ([N,K] or [G,N,K])."""
    *lead, N, K = w.shape
    wanted = (*lead, blocks(N), blocks(K))
    if scale.dtype is not torch.float32 or not has_shape(scale, wanted):
        raise ScaleError(
            f"{op}: {name} {list(scale.shape)} of {scale.dtype} for a weight {list(w.shape)}",
            f"Each 128 x 128 block has a float32 scale: {list(wanted)}",
            "Convert power-of-two scales with .float(); drop rows or columns that no block of the weight uses",
        )


def check_fp8_pair(op: str, x: Tensor, w: Tensor) -> None:
    """Raise DtypeMismatch unless both hold float8_e4m3fn."""
    for name, tensor in (("x", x), ("w", w)):
        if tensor.dtype is not FP8:
            raise DtypeMismatch(
                f"{op}: {name} {list(tensor.shape)} is {tensor.dtype}",
                "The product is of float8_e4m3fn values with block scales",
                "Quantise activations with dsinfra::quantize_1x128; use dsinfra::grouped_linear or torch for others",
            )


def check_ids(op: str, topk_idx: Tensor, rows: Any) -> None:
    """Raise ExpertIdsError unless it holds int32 or int64 ids of top-k experts for each row."""
    if topk_idx.dtype not in IDS or topk_idx.dim() != 2:
        raise ExpertIdsError(
            f"{op}: topk_idx {list(topk_idx.shape)} of {topk_idx.dtype}",
            "Each row names its top-k experts as int64 or int32",
            "Give [T,K] of torch.int64, as torch.topk returns it",
        )
    if not same(topk_idx.shape[0], rows):
        raise ExpertIdsError(
            f"{op}: topk_idx {list(topk_idx.shape)} for {rows} rows", "Each row names its experts", f"Give [{rows},K]"
        )


def check_activation(op: str, activation: str) -> None:
    """Raise ActivationError unless experts compute it."""
    if activation not in ACTIVATIONS:
        raise ActivationError(
            f"{op}: activation {activation!r}",
            "Only gated activations with a kernel or formula here can be computed",
            f"Use one of {', '.join(ACTIVATIONS)}, or keep the layer as it is written",
        )


def refuse_gradients(op: str, way_out: str, *tensors: Tensor | None) -> None:
    """Raise NotDifferentiable if autograd would have to differentiate an operator that has no formula."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        first = next(x for x in tensors if x is not None and x.requires_grad)
        raise NotDifferentiable(
            f"{op}: an argument of shape {list(first.shape)} requires grad", "The operator has no gradient", way_out
        )
