"""Launches of the kernels in moe_triton.py: outputs, grids, tile sizes. Nothing is checked here.

Kernels are imported at their first launch: their file needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from dscompile.kernels import quantize
from dscompile.kernels.overlap import start_overlapped

PLAN_BLOCK = 256  # rows of a block of the plan in three launches
SCAN_BLOCKS = 512  # blocks whose counts are summed up at once


def plan_in_one(topk_idx: torch.Tensor, experts: int, x: torch.Tensor | None = None, quantized: bool = False) -> Any:
    """-> order, position, ends, the gathered rows of x if given, their scales if quantized."""
    from dscompile.kernels.moe_triton import plan_kernel

    (tokens, top_k), device = topk_idx.shape, topk_idx.device
    rows, columns = tokens * top_k, 0 if x is None else x.shape[1]
    order, position, ends = _empty_plan(topk_idx, experts)
    out, scale = (None, None) if x is None else _empty_rows(x, rows, quantized)
    if rows == 0:
        return order, position, ends.zero_(), out, scale
    x = None if x is None or columns == 0 else _rows_contiguous(x)
    slots = _power_of_two(top_k)
    width, warps = plan_chunk(rows, columns) if columns else (1, 4)
    start_overlapped(
        plan_kernel,
        tokens * max(1, -(-columns // width)) + -(-experts // slots),
        device,
        topk_idx.contiguous(),
        order,
        position,
        ends,
        x,
        out,
        scale,
        tokens,
        experts,
        columns,
        0 if x is None else x.stride(0),
        0 if scale is None else scale.shape[1],
        K=top_k,
        K_PAD=slots,
        SLOTS=plan_slots(rows, slots, warps),
        COLUMNS=width,
        num_warps=warps,
    )
    return order, position, ends, out, scale


def plan_in_three(topk_idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> order, position, ends."""
    from dscompile.kernels.moe_triton import place_kernel

    rows, topk_idx = topk_idx.numel(), topk_idx.contiguous()
    order, position, ends = _empty_plan(topk_idx, experts)
    counts, totals = count_by_block(topk_idx, experts)
    start_overlapped(
        place_kernel,
        len(counts),
        topk_idx.device,
        topk_idx,
        counts,
        totals,
        order,
        position,
        ends,
        rows,
        experts,
        ROWS=PLAN_BLOCK,
        BINS=counts.shape[1],
        SLOTS=32,
        num_warps=4,
    )
    return order, position, ends


def count_by_block(topk_idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous ids -> counts int32 [blocks of PLAN_BLOCK rows, BINS], rows of an expert in the blocks before, and
    totals [BINS]. BINS is a power of two above `experts`: ids of no expert have a bin."""
    from dscompile.kernels.moe_triton import histogram_kernel, scan_kernel

    rows, device = topk_idx.numel(), topk_idx.device
    blocks, bins = -(-rows // PLAN_BLOCK), max(32, _power_of_two(experts + 1))
    table = torch.empty((blocks + 1, bins), dtype=torch.int32, device=device)
    counts, totals = table[:blocks], table[blocks]
    start_overlapped(
        histogram_kernel, blocks, device, topk_idx, counts, rows, experts, ROWS=PLAN_BLOCK, BINS=bins, num_warps=4
    )
    step = _bounded(blocks, 32, SCAN_BLOCKS)
    start_overlapped(
        scan_kernel,
        bins // 8,
        device,
        counts,
        totals,
        blocks,
        BINS=bins,
        BLOCKS=step,
        COLUMNS=8,
        num_warps=8 if step > 128 else 4,
    )
    return counts, totals


def launch_gather(
    x: torch.Tensor, order: torch.Tensor, position: torch.Tensor | None, top_k: int, quantized: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> the rows of x [T, D] at their sorted places, by position where it is given, else by order; the scales or None.

    Only rows by position can be quantized.
    """
    from dscompile.kernels.moe_triton import gather_by_order_kernel, gather_kernel

    tokens, columns = x.shape
    out, scale = _empty_rows(x, tokens * top_k, quantized)
    if out.numel() == 0:
        return out, scale
    x = _rows_contiguous(x)
    width, warps = row_chunk(columns)
    chunks = -(-columns // width)
    if position is None:
        start_overlapped(
            gather_by_order_kernel,
            tokens * top_k * chunks,
            x.device,
            x,
            order,
            out,
            columns,
            x.stride(0),
            K=top_k,
            COLUMNS=width,
            num_warps=warps,
        )
    else:
        start_overlapped(
            gather_kernel,
            tokens * chunks,
            x.device,
            x,
            position,
            out,
            scale,
            tokens,
            columns,
            x.stride(0),
            0 if scale is None else scale.shape[1],
            K=top_k,
            K_PAD=_power_of_two(top_k),
            COLUMNS=width,
            num_warps=warps,
        )
    return out, scale


def launch_combine(
    z: torch.Tensor,
    position: torch.Tensor,
    topk_weight: torch.Tensor | None,
    topk_idx: torch.Tensor,
    experts: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """Fills y [T, D]."""
    from dscompile.kernels.moe_triton import combine_kernel

    tokens, columns = y.shape
    if y.numel() == 0 or z.shape[0] == 0:
        y.zero_()
        return
    z = _rows_contiguous(z)
    width, warps = combine_chunk(tokens, columns)
    start_overlapped(
        combine_kernel,
        tokens * -(-columns // width),
        z.device,
        z,
        position,
        None if topk_weight is None else topk_weight.contiguous(),
        topk_idx.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        experts,
        columns,
        z.stride(0),
        K=topk_idx.shape[1],
        COLUMNS=width,
        num_warps=warps,
    )


def _empty_plan(topk_idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    position = torch.empty_like(topk_idx, dtype=torch.int32, memory_format=torch.contiguous_format)
    return position.new_empty(topk_idx.numel()), position, position.new_empty(experts)


def _empty_rows(x: torch.Tensor, rows: int, quantized: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if quantized:
        return quantize.empty_quantized(x, rows, x.shape[1])
    return x.new_empty(rows, x.shape[1]), None


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def plan_chunk(rows: int, columns: int) -> tuple[int, int]:
    """Columns of a program that counts and then moves rows, and its warps: the more rows to count, the wider."""
    width = _bounded(columns, 128, 256 if rows <= 64 else 1024 if rows <= 256 else 2048)
    return width, max(1, width // 256)


def plan_slots(rows: int, slots: int, warps: int) -> int:
    """Rows whose keys are compared at once with `slots` bounds: 32 comparisons a thread, unless there are few rows."""
    return 32 * warps if rows <= 32 * warps else max(32 * warps, 1024 * warps // slots)


def row_chunk(columns: int) -> tuple[int, int]:
    """Columns of a program that moves rows, and its warps: 8 columns, 16 bytes of 16-bit values, a thread."""
    width = _bounded(columns, 256, 1024)
    return width, width // 256


def combine_chunk(tokens: int, columns: int) -> tuple[int, int]:
    """Columns of a program that adds rows up, and its warps: with many programs, 16 columns a thread."""
    width = _bounded(columns, 256, 1024)
    return width, max(1, width // (256 if tokens <= 32 else 512))


def _bounded(n: int, least: int, most: int) -> int:
    return min(most, max(least, _power_of_two(n)))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
