"""FP8 quantisation in blocks of 1 x 128: the entries, what they refuse, and their launches.

A row of activations is cut into blocks of 128 columns, each with a float32 scale, max |x| / 448, by which it is
divided and rounded to float8_e4m3fn. The scales come in the layout that the FP8 GEMM reads: [ceil(K / 128), M_pad], one
block of columns after another, M_pad = `padded_rows(M)`, padding 0. SwiGLU and the gather of expert rows are fused in
front, so that what feeds a GEMM is written once. kernels/quantize_triton.py has the formula, NaN and infinity.
No host synchronisation and no state: safe in a CUDA graph. Results are bitwise repeatable.
"""

from __future__ import annotations

import torch

from dscompile.kernels import launch
from dscompile.kernels.overlap import start_overlapped
from dscompile.kernels.refusals import BadArguments, device_refusal, refuse_if

BLOCK = 128  # columns that share a scale


def padded_rows(rows: int) -> int:
    """M_pad, the row length of the scales of M rows: the next multiple of 4, so that TMA can read them."""
    return -(-rows // 4) * 4


def empty_quantized(like: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised q [M, K] and scale [ceil(K / 128), M_pad] on the device of a tensor."""
    scale_shape = -(-columns // BLOCK), padded_rows(rows)
    return (
        torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=like.device),
        torch.empty(scale_shape, dtype=torch.float32, device=like.device),
    )


def quantize_1x128(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] bfloat16, float16 or float32 -> q float8_e4m3fn [M, K], scale float32 [ceil(K / 128), M_pad].

    Columns of x need not be contiguous, but are copied where they aren't.

    Raises:
        BadArguments: x is no matrix.
        KernelLimit: `refusal(x)`.
    """
    _check_matrix("x", x)
    return _launch(x, x.shape[0], x.shape[1])


def silu_mul_quantize_1x128(
    gate_up: torch.Tensor, ends: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises silu(gate) * up, computed in float32 from gate_up [M, 2F], gate first -> as `quantize_1x128` of [M, F].

    ends: int32 [G] on the device; rows at or past ends[G - 1] belong to no group: they are not read and give zeros.

    Raises:
        BadArguments: gate_up is no matrix of an even number of columns, or ends no vector of int32 beside it.
        KernelLimit: `refusal(gate_up)`.
    """
    _check_matrix("gate_up", gate_up)
    rows, columns = gate_up.shape
    if columns % 2:
        raise BadArguments(
            f"gate_up is {tuple(gate_up.shape)}. Its first half is the gate, its second what the gate multiplies. "
            "Pass [M, 2F]."
        )
    if ends is not None and (
        ends.dtype != torch.int32
        or ends.dim() != 1
        or not len(ends)
        or not ends.is_contiguous()
        or ends.device != gate_up.device
    ):
        raise BadArguments(
            f"ends is {ends.dtype} {tuple(ends.shape)} on {ends.device}. The kernel reads its last entry beside "
            f"gate_up. Pass contiguous int32 [G] on {gate_up.device}."
        )
    return _launch(gate_up, rows, columns // 2, ends=ends, swiglu=True)


def gather_quantize_1x128(
    x: torch.Tensor, order: torch.Tensor, top_k: int, position: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the rows x[order // top_k] of x [T, K]: what `moe.gather_rows` and `quantize_1x128` give, in one pass.

    Args:
        order: int32 [M] with M = T * top_k, a permutation, by `moe.plan`.
        top_k: places of a token.
        position: int32 [T, top_k], the inverse of order by the same `plan`. With it each token is read and quantised
            once and written to its places; without, once for each of them.

    Raises:
        BadArguments: x is no matrix, or order or position don't fit it.
        KernelLimit: `refusal(x)`.
    """
    _check_matrix("x", x)
    check_plan(x, order, top_k, position)
    refuse_if(refusal(x))
    if position is None:
        return _launch(x, order.shape[0], x.shape[1], order=order, top_k=top_k)
    from dscompile.kernels.moe_launch import launch_gather  # which quantises with this file's blocks and layout

    q, scale = launch_gather(x, order, position, top_k, quantized=True)
    assert scale is not None
    return q, scale


def refusal(x: torch.Tensor) -> str | None:
    """Why these kernels can't quantise x, or None. Reads metadata only."""
    found = device_refusal("x", x)
    if found:
        return found
    capability = launch.capability(x.device)
    if capability is not None and capability < (8, 9):
        return (
            f"x is on {x.device} of compute capability {capability}. float8_e4m3fn is converted in hardware from "
            "(8, 9) on. Keep this model's activations in 16 bits."
        )
    return None


def check_plan(x: torch.Tensor, order: torch.Tensor, top_k: int, position: torch.Tensor | None) -> None:
    """Raise `BadArguments` where order or position can't be those of x's rows, `top_k` places each."""
    rows = x.shape[0] * top_k
    if order.dtype != torch.int32 or order.shape != (rows,) or not order.is_contiguous() or order.device != x.device:
        raise BadArguments(
            f"order is {order.dtype} {tuple(order.shape)} on {order.device} for {x.shape[0]} tokens of {top_k} places. "
            f"It names the source of each sorted row. Pass the plan's, contiguous int32 [{rows}] on {x.device}."
        )
    if position is not None and (
        position.dtype != torch.int32
        or position.shape != (x.shape[0], top_k)
        or not position.is_contiguous()
        or position.device != x.device
    ):
        raise BadArguments(
            f"position is {position.dtype} {tuple(position.shape)} on {position.device} for {x.shape[0]} tokens of "
            f"{top_k} places. It names the sorted row of each place. Pass the plan's, contiguous int32 "
            f"[{x.shape[0]}, {top_k}] on {x.device}."
        )


def tile_of(rows: int) -> tuple[int, int]:
    """Rows of a program, a multiple of 4, and its warps. Few rows make more programs, each with less to wait for."""
    return (4, 1) if rows <= 64 else (16, 4)


def _check_matrix(name: str, x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise BadArguments(f"{name} is {tuple(x.shape)}. Scales belong to rows of a matrix. Pass [M, K].")


def _launch(
    x: torch.Tensor,
    rows: int,
    columns: int,
    *,
    order: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    top_k: int = 1,
    swiglu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    refuse_if(refusal(x))
    from dscompile.kernels.quantize_triton import quantize_kernel

    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = empty_quantized(x, rows, columns)
    if q.numel() == 0:
        return q, scale.zero_()
    tile, warps = tile_of(rows)
    start_overlapped(
        quantize_kernel,
        -(-columns // BLOCK) * -(-rows // tile),
        x.device,
        x,
        q,
        scale,
        order,
        ends,
        rows,
        columns,
        x.stride(0),
        scale.shape[1],
        0 if ends is None else ends.shape[0],
        COPIES=top_k,
        SWIGLU=swiglu,
        ROWS=tile,
        num_warps=warps,
    )
    return q, scale
