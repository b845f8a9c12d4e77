"""Launches of the MLA decode kernels: grids, tile sizes, tensor maps. Nothing is chosen or checked here.

Kernels are imported at their first launch: their files need Triton, and interpreted ones must not meet Gluon's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.kernels.launch import capability, interpreting, sm_count, start
from dscompile.kernels.mla_schedule import Deal

COMBINE_PROGRAMS = 4  # of the second kernel on an SM, where the lengths decide which requests it joins


def tile_rows(impl: str, rows: int, latent: torch.Tensor) -> int:
    """Query rows of one program.

    Plain Triton's, with the keys of a step, must fit the 99 KB of consumer GPUs.
    """
    if impl == "gluon":
        return 64
    small = latent.dtype in (torch.float32, torch.float8_e4m3fn) or latent.shape[-1] > 512
    return 16 if rows <= 16 or small else 32


def padded(width: int) -> int:
    """Columns of plain Triton's tile for so many: a power of two that its products take, or none."""
    return max(16, 1 << (width - 1).bit_length()) if width else 0


@dataclass(frozen=True)
class Outputs:
    """Where results go: final ones, and, unless None, partial ones and the slots that hold those of each request."""

    o: torch.Tensor
    lse: torch.Tensor
    o_part: torch.Tensor | None = None  # [slots, S*H, C] float32
    lse_part: torch.Tensor | None = None  # [slots, S*H] float32
    slots: torch.Tensor | None = None  # [B, 2] int32, where the lengths decide what is partial


@dataclass(frozen=True)
class Work:
    """What a launch computes beside its tensors. deal: how requests are dealt to programs; None: each in `splits`."""

    capacity: int
    splits: int
    deal: Deal | None
    causal: bool
    scale_log2: float


def launch_gluon(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    mask: torch.Tensor | None,
    outputs: Outputs,
    work: Work,
) -> None:
    """One launch of the Gluon kernel; mask is [B, S, keys] uint8.

    A tensor map has one stride for all query rows of a request: queries whose rows have two are copied.
    """
    from dscompile.kernels.mla_decode_gluon import mla_decode_gluon_kernel

    requests, s_q, heads, _ = q_latent.shape
    tiles = -(-s_q * heads // 64)
    start(
        mla_decode_gluon_kernel,
        (_programs(work, tiles, requests),),
        _tensor_map(q_latent.flatten(1, 2), 64, 256),
        _tensor_map(q_rope.flatten(1, 2), 64, 64),
        _tensor_map(latent, 64, 256),
        _tensor_map(k_rope, 64, 64),
        *_output_arguments(outputs, work, seqlens),
        seqlens,
        *_table_arguments(page_table, seqlens),
        work.capacity,
        *_mask_arguments(mask, seqlens),
        tiles,
        work.splits,
        s_q * heads,
        heads,
        s_q,
        int(work.causal),
        work.scale_log2,
        requests,
        *_pieces(work),
        PAGED=page_table is not None,
        HAS_MASK=mask is not None,
        PLANNED=work.deal is not None,
        LANES=_lanes(work),
        num_warps=4,
        STAGES=2,
        maxnreg=168,
        launch_pdl=True,
    )


def launch_triton(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    mask: torch.Tensor | None,
    latent_scale: torch.Tensor | None,
    outputs: Outputs,
    work: Work,
) -> None:
    """One launch of the plain Triton kernel, arguments as for `launch_gluon`."""
    from dscompile.kernels.mla_decode_triton import mla_decode_triton_kernel

    requests, s_q, heads, width = q_latent.shape
    rows = s_q * heads
    tile = tile_rows("triton", rows, latent)
    wide, odd = width > 512, padded(width) != width
    tiles = -(-rows // tile)
    start(
        mla_decode_triton_kernel,
        (_programs(work, tiles, requests),),
        q_latent,
        q_rope,
        latent,
        k_rope,
        *_output_arguments(outputs, work, seqlens),
        seqlens,
        *q_latent.stride()[:3],
        *q_rope.stride()[:3],
        *latent.stride()[:2],
        *k_rope.stride()[:2],
        *((latent, 0, 0) if latent_scale is None else (latent_scale, *latent_scale.stride()[:2])),
        *_table_arguments(page_table, seqlens),
        work.capacity,
        *_mask_arguments(mask, seqlens),
        tiles,
        work.splits,
        rows,
        heads,
        s_q,
        int(work.causal),
        work.scale_log2,
        requests,
        *_pieces(work),
        C=width,
        R=q_rope.shape[-1],
        C_TILE=padded(width),
        R_TILE=padded(q_rope.shape[-1]),
        GROUP=0 if latent_scale is None else width // latent_scale.shape[-1],
        TILE=tile,
        KEYS=16 if q_latent.dtype == torch.float32 or latent_scale is not None or wide or odd else 32,
        PAGED=page_table is not None,
        HAS_MASK=mask is not None,
        PLANNED=work.deal is not None,
        LANES=_lanes(work),
        num_warps=8 if latent_scale is not None or wide else tile // 4,
        num_stages=1 if wide else 2,
    )


def launch_combine(outputs: Outputs, work: Work) -> None:
    """Join the partial results into o and lse, [B, rows, ...] in memory."""
    from dscompile.kernels.mla_combine_triton import combine_splits_kernel

    o, lse, o_part, lse_part, slots = outputs.o, outputs.lse, outputs.o_part, outputs.lse_part, outputs.slots
    assert o_part is not None and lse_part is not None
    rows, width = o_part.shape[1:]
    expected = work.splits if work.deal is None else work.deal.parts // work.deal.requests
    if work.deal is not None and work.deal.pieces > 1:
        expected = 0  # one form for all batches: its bits depend on it
    # Slots at once, rows and columns of a program: many slots come with few rows, and need many programs each.
    chunk, block, columns = (2, 4, 512) if expected <= 4 else (8, 1, 512) if expected <= 16 else (32, 1, 128)
    columns = min(columns, 1 << (width - 1).bit_length())
    hopper = (capability(o.device) or (0, 0)) >= (9, 0) and not interpreting()
    requests = o.shape[0]
    units = requests * -(-rows // block)
    if slots is not None:  # shared out among programs that all run at a time: most requests may not have been cut
        units = min(units, COMBINE_PROGRAMS * sm_count(o.device))
    start(
        combine_splits_kernel,
        (units, -(-width // columns)),
        o_part,
        lse_part,
        o,
        lse,
        lse if slots is None else slots,
        requests,
        rows,
        work.splits,
        C=width,
        CHUNK=chunk,
        ROWS=block,
        COLUMNS=columns,
        PLANNED=slots is not None,
        LANES=_lanes(work),
        PDL=hopper,
        num_warps=4,
        **({"launch_pdl": True} if hopper else {}),
    )


def _programs(work: Work, tiles: int, requests: int) -> int:
    return tiles * (requests * work.splits if work.deal is None else work.deal.parts)


def _pieces(work: Work) -> tuple[int, int]:
    return (1, -(-work.capacity // 64)) if work.deal is None else (work.deal.pieces, work.deal.piece_pages)


def _lanes(work: Work) -> int:
    """Items that a program weighs at once: few sizes, as each is a kernel of its own."""
    return 128 if work.deal is None or work.deal.items <= 128 else 512 if work.deal.items <= 512 else 2048


def _output_arguments(outputs: Outputs, work: Work, stand_in: torch.Tensor) -> tuple:
    """Five pointers. Without a plan the kernel's results are all partial or all final, and go to the first two."""
    o, lse, o_part, lse_part, slots = outputs.o, outputs.lse, outputs.o_part, outputs.lse_part, outputs.slots
    if work.deal is not None:
        return o, lse, o_part, lse_part, slots
    first = (o, lse) if o_part is None else (o_part, lse_part)
    return *first, *first, stand_in


def _table_arguments(page_table: torch.Tensor | None, stand_in: torch.Tensor) -> tuple:
    """Pointer and row stride; an absent table is never read, so that any pointer may stand in for it."""
    return (stand_in, 0) if page_table is None else (page_table, page_table.stride(0))


def _mask_arguments(mask: torch.Tensor | None, stand_in: torch.Tensor) -> tuple:
    """Pointer and three strides; as for the table."""
    return (stand_in, 0, 0, 0) if mask is None else (mask, *mask.stride())


@functools.cache
def _box_layout(bits: int) -> Any:
    """How a box that a tensor map loads lies in shared memory: swizzled in rows of 128 bytes."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=3)


def _tensor_map(x: torch.Tensor, box_rows: int, columns: int) -> Any:
    """Over [blocks, rows, width], loading boxes of rows of one block; rows past the block's end arrive as zeros."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    blocks, rows, width = x.shape
    # Of a dimension of size 1, PyTorch lets the stride be anything: it is never used, but must pass TMA's rules.
    row_stride = x.stride(1) if rows > 1 else width
    block_stride = x.stride(0) if blocks > 1 else rows * row_stride
    layout = _box_layout(8 * x.element_size())
    return TensorDescriptor(x, [blocks, rows, width], [block_stride, row_stride, 1], [1, box_rows, columns], layout)
