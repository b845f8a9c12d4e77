"""Launches of the GEMM of few tokens: grids, tensor maps, register budgets. Nothing is chosen or checked here.

Kernels are imported at their first launch: their files need Triton, and interpreted ones must not meet Gluon's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.kernels.gemm_small_plan import SmallPlan
from dscompile.kernels.launch import sm_count, start
from dscompile.kernels.overlap import start_overlapped

MOST_GROUPS = 512
# Registers a thread, by consumers: what all warps start with, then a consumer's and a loading warp's share of it.
_REGISTERS = {1: (136, 232, 40), 2: (168, 232, 40)}


@dataclass(frozen=True)
class SmallCall:
    """One GEMM, all layouts brought to the same form.

    x [L, M, K], L = 1 unless "masked"; w [G, N, K], gate rows over up rows if swiglu; y [L, M, columns] contiguous.
    bounds: int32 [G], the groups' ends ("ends") or counts ("masked"); None if "dense".
    x_scale [L, ceil(K/128), M_pad] and w_scale [G, ceil(N/128), ceil(K/128)] for FP8, or neither.
    """

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    bounds: torch.Tensor | None
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    layout: str
    swiglu: bool

    def token_tiles(self, size: int) -> int:
        """Token tiles that the groups can fill together, whatever their sizes."""
        tokens, groups = self.x.shape[1], self.w.shape[0]
        if self.layout == "ends":
            return min(tokens, tokens // size + groups)
        return groups * -(-tokens // size)


def launch_small(call: SmallCall, plan: SmallPlan) -> None:
    """Fill y: one launch, and one more that joins the parts of K if there are several.

    Both start while the kernel before them on the stream drains, and wait for its end before they read anything.
    """
    if plan.splits == 1:
        _launch_product(call, plan, call.y, call.swiglu)
        return
    parts = torch.empty((plan.splits, call.x.shape[1], call.w.shape[1]), dtype=torch.float32, device=call.y.device)
    _launch_product(call, plan, parts, False)
    launch_join(parts, call.y[0], call.bounds, call.swiglu)


def _launch_product(call: SmallCall, plan: SmallPlan, target: torch.Tensor, swiglu: bool) -> None:
    from dscompile.kernels.gemm_small_gluon import gemm_small_kernel

    x, w, bounds = call.x, call.w, call.bounds
    n_major = w.stride(2) != 1
    columns, tile = target.shape[2], 64 * plan.boxes // (2 if swiglu else 1)
    tiles = -(-columns // tile)
    x_map = _tensor_map(x, (1, plan.tokens, plan.depth))
    w_map = _tensor_map(w.transpose(1, 2) if n_major else w, (1, plan.depth, 64) if n_major else (1, 64, plan.depth))
    scale_map = x_map if call.x_scale is None else _tensor_map(call.x_scale, (1, 1, max(plan.tokens, 32)), swizzle=0)
    launch_regs, worker_regs, load_regs = _REGISTERS[plan.consumers]
    start(
        gemm_small_kernel,
        (min(sm_count(x.device), call.token_tiles(plan.tokens) * tiles * plan.splits),),
        w_map,
        x_map,
        scale_map,
        target,
        target if call.w_scale is None else call.w_scale,
        target if bounds is None else bounds,
        w.shape[0],
        x.shape[1],
        tiles,
        -(-x.shape[2] // plan.depth),
        -(-x.shape[2] // 128),
        columns,
        columns if swiglu else 0,
        BT=plan.tokens,
        BLOCKS=plan.blocks,
        CONSUMERS=plan.consumers,
        WORKER_REGS=worker_regs,
        LOAD_REGS=load_regs,
        STAGES=plan.stages,
        SPLITS=plan.splits,
        LAYOUT=call.layout,
        GROUPS=max(32, 1 << (w.shape[0] - 1).bit_length()),
        SWIGLU=swiglu,
        W_N_MAJOR=n_major,
        num_warps=4,
        maxnreg=launch_regs,
        launch_pdl=True,
    )


def launch_join(parts: torch.Tensor, y: torch.Tensor, ends: torch.Tensor | None, swiglu: bool) -> None:
    """Fill y [M, columns] with the sums over the first dimension of parts [S, M, N]; zeros from row ends[-1] on."""
    from dscompile.kernels.gemm_small_join import gemm_small_join_kernel

    tokens, columns = y.shape
    block = min(1024, max(256, 1 << (columns - 1).bit_length()))
    start_overlapped(
        gemm_small_join_kernel,
        tokens * -(-columns // block),
        y.device,
        parts,
        y,
        y if ends is None else ends,
        tokens,
        1 if ends is None else len(ends),
        columns,
        SPLITS=len(parts),
        SWIGLU=swiglu,
        HAS_ENDS=ends is not None,
        BLOCK=block,
        num_warps=block // 256,
    )


@functools.cache
def _box_layout(element_bits: int, swizzle: int) -> Any:
    """How a box that a tensor map loads lies in shared memory: in rows of 128 bytes, swizzled, or flat."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=element_bits, rank=3)


def _tensor_map(x: torch.Tensor, box: tuple[int, int, int], swizzle: int = 128) -> Any:
    """Over [batches, rows, columns], columns contiguous. What lies past an edge is loaded as zeros."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batches, rows, columns = x.shape
    # Of a dimension of size 1, PyTorch lets the stride be anything: it is never used, but must pass TMA's rules.
    row_stride = x.stride(1) if rows > 1 else -(-columns // 16) * 16
    batch_stride = x.stride(0) if batches > 1 else rows * row_stride
    strides = [batch_stride, row_stride, 1]
    return TensorDescriptor(x, [batches, rows, columns], strides, list(box), _box_layout(8 * x.element_size(), swizzle))
