"""Launches of the MLA decode kernels: grids, tile sizes, tensor maps. Nothing is chosen or checked here.

Kernels are imported at their first launch: their files need Triton, and interpreted ones must not meet Gluon's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dscompile.kernels.launch import start


def tile_rows(impl: str, rows: int, dtype: torch.dtype) -> int:
    """Query rows of one program. Plain Triton's, with the keys of a step, must fit the 99 KB of consumer GPUs."""
    if impl == "gluon":
        return 64
    return 16 if rows <= 16 or dtype == torch.float32 else 32


def launch_gluon(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    mask: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    capacity: int,
    splits: int,
    causal: bool,
    scale_log2: float,
) -> None:
    """One launch of the Gluon kernel. Fills o and lse, [B, splits, S*H, ...] in memory; mask is [B, S, keys] uint8.

    A tensor map has one stride for all query rows of a request: queries whose rows have two are copied.
    """
    from dscompile.kernels.mla_decode_gluon import mla_decode_gluon_kernel

    requests, s_q, heads, _ = q_latent.shape
    rows = s_q * heads
    tiles = -(-rows // tile_rows("gluon", rows, q_latent.dtype))
    start(
        mla_decode_gluon_kernel,
        (tiles * splits * requests,),
        _tensor_map(q_latent.flatten(1, 2), 256),
        _tensor_map(q_rope.flatten(1, 2), 64),
        _tensor_map(latent, 256),
        _tensor_map(k_rope, 64),
        o,
        lse,
        seqlens,
        *_table_arguments(page_table, seqlens),
        capacity,
        *_mask_arguments(mask, seqlens),
        tiles,
        splits,
        rows,
        heads,
        s_q,
        int(causal),
        scale_log2,
        PAGED=page_table is not None,
        HAS_MASK=mask is not None,
        STAGES=2,
        num_warps=4,
        maxnreg=168,
    )


def launch_triton(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    mask: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    capacity: int,
    splits: int,
    causal: bool,
    scale_log2: float,
) -> None:
    """One launch of the plain Triton kernel, arguments as for `launch_gluon`."""
    from dscompile.kernels.mla_decode_triton import mla_decode_triton_kernel

    requests, s_q, heads, width = q_latent.shape
    rows = s_q * heads
    tile = tile_rows("triton", rows, q_latent.dtype)
    tiles = -(-rows // tile)
    start(
        mla_decode_triton_kernel,
        (tiles * splits * requests,),
        q_latent,
        q_rope,
        latent,
        k_rope,
        o,
        lse,
        seqlens,
        *q_latent.stride()[:3],
        *q_rope.stride()[:3],
        *latent.stride()[:2],
        *k_rope.stride()[:2],
        *_table_arguments(page_table, seqlens),
        capacity,
        *_mask_arguments(mask, seqlens),
        tiles,
        splits,
        rows,
        heads,
        s_q,
        int(causal),
        scale_log2,
        C=width,
        R=q_rope.shape[-1],
        TILE=tile,
        KEYS=16 if q_latent.dtype == torch.float32 else 32,
        PAGED=page_table is not None,
        HAS_MASK=mask is not None,
        num_warps=tile // 4,
        num_stages=2,
    )


def launch_combine(o_part: torch.Tensor, lse_part: torch.Tensor, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Join o_part [B, splits, rows, C] and lse_part [B, splits, rows] into o and lse, [B, rows, ...] in memory."""
    from dscompile.kernels.mla_decode_triton import combine_splits_kernel

    requests, splits, rows, width = o_part.shape
    padded = 1 << (splits - 1).bit_length()
    columns = width if splits <= 8 else min(width, 128)  # many parts come with few rows, and registers hold them all
    start(
        combine_splits_kernel,
        (requests * rows, width // columns),
        o_part,
        lse_part,
        o,
        lse,
        rows,
        splits,
        C=width,
        SPLITS=padded,
        COLUMNS=columns,
        num_warps=4 if splits <= 32 else 8,
    )


def _table_arguments(page_table: torch.Tensor | None, stand_in: torch.Tensor) -> tuple:
    """Pointer and row stride; an absent table is never read, so that any pointer may stand in for it."""
    return (stand_in, 0) if page_table is None else (page_table, page_table.stride(0))


def _mask_arguments(mask: torch.Tensor | None, stand_in: torch.Tensor) -> tuple:
    """Pointer and three strides; as for the table."""
    return (stand_in, 0, 0, 0) if mask is None else (mask, *mask.stride())


@functools.cache
def _box_layout() -> Any:
    """How a box that a tensor map loads lies in shared memory: 16-bit elements, swizzled in rows of 128 bytes."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def _tensor_map(x: torch.Tensor, columns: int) -> Any:
    """Over [blocks, rows, width], loading boxes of 64 rows of one block; rows past the block's end arrive as zeros."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    blocks, rows, width = x.shape
    # Of a dimension of size 1, PyTorch lets the stride be anything: it is never used, but must pass TMA's rules.
    row_stride = x.stride(1) if rows > 1 else width
    block_stride = x.stride(0) if blocks > 1 else rows * row_stride
    return TensorDescriptor(x, [blocks, rows, width], [block_stride, row_stride, 1], [1, 64, columns], _box_layout())
