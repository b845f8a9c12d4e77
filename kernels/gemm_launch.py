"""Launches of the Gluon GEMM and of its twin in plain Triton: grids, tensor maps, register budgets. Nothing is chosen
or checked here.

Kernels are imported at their first launch: their files need Triton, and interpreted ones must not meet Gluon's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.kernels import launch
from dscompile.kernels.gemm_plan import STEP_BYTES, STORE_WIDTH, GemmPlan
from dscompile.kernels.overlap import start_known


@dataclass(frozen=True)
class Call:
    """One GEMM, groups of all layouts brought to the same form.

    x [rows, K]; w [G, N, K], twice as many rows as y has columns if swiglu; y [rows, columns], contiguous.
    bounds: int32 [G], the groups' ends ("ends") or counts ("masked"); None if "dense".
    x_scale, w_scale: both for FP8, or neither; x_scale [ceil(K/128), rows_pad], if "masked" one for each group.
    capacity: rows of a group, if "masked".
    """

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    bounds: torch.Tensor | None
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    layout: str
    capacity: int
    swiglu: bool

    def tiles_at_most(self, bm: int, tiles_n: int) -> int:
        """Tiles that the groups can fill together, whatever their sizes: each may end in a part of one."""
        rows, groups = self.x.shape[0], self.w.shape[0]
        if self.layout == "ends":
            return (rows // bm + groups + 1) * tiles_n
        return (groups if self.layout == "masked" else 1) * -(-(self.capacity or rows) // bm) * tiles_n


def launch_gluon(call: Call, plan: GemmPlan) -> None:
    """One launch of the Gluon kernel; plan.bn columns of w a tile, so half as many of y if swiglu."""
    from dscompile.kernels.gemm_gluon import gemm_gluon_kernel

    x, w, y = call.x, call.w, call.y
    fp8 = call.x_scale is not None
    kn = w.stride(2) != 1
    step = STEP_BYTES // x.element_size()
    consumers = plan.bm // 64
    box = plan.bn // 2 if call.swiglu else plan.bn
    tiles_n = -(-y.shape[1] // box)
    stand_in = x if call.bounds is None else call.bounds
    start_known(
        gemm_gluon_kernel,
        min(launch.sm_count(x.device), call.tiles_at_most(plan.bm, tiles_n)),
        x.device,
        _tensor_map(x, (plan.bm, step)),
        _tensor_map(w.transpose(1, 2) if kn else w, (1, step, box) if kn else (1, box, step)),
        _tensor_map(y, (64, STORE_WIDTH)),
        y,
        call.x_scale if fp8 else stand_in,
        call.w_scale if fp8 else stand_in,
        stand_in,
        w.shape[0],
        call.capacity,
        x.shape[0],
        y.shape[1],
        tiles_n,
        -(-x.shape[1] // step),
        call.x_scale.shape[-1] if fp8 else 0,
        plan.raster,
        BN=plan.bn,
        STAGES=plan.stages,
        CONSUMERS=consumers,
        KN=kn,
        SWIGLU=call.swiglu,
        LAYOUT=call.layout,
        num_warps=4,
        maxnreg=232 if consumers == 1 else 168,
    )


def launch_triton(call: Call, plan: GemmPlan) -> None:
    """One launch of the plain Triton kernel; plan.bn columns of y a tile."""
    from dscompile.kernels.gemm_triton import gemm_triton_kernel

    x, w, y = call.x, call.w, call.y
    fp8 = call.x_scale is not None
    tiles_n = -(-y.shape[1] // plan.bn)
    launch.start(
        gemm_triton_kernel,
        (call.tiles_at_most(plan.bm, tiles_n),),
        x,
        w,
        y,
        call.x_scale if fp8 else x,
        call.w_scale if fp8 else x,
        x if call.bounds is None else call.bounds,
        *x.stride(),
        *w.stride(),
        w.shape[0],
        call.capacity,
        x.shape[0],
        y.shape[1],
        x.shape[1],
        tiles_n,
        call.x_scale.shape[-1] if fp8 else 0,
        BM=plan.bm,
        BN=plan.bn,
        BK=128 if fp8 else 128 // x.element_size(),
        FP8=fp8,
        SWIGLU=call.swiglu,
        LAYOUT=call.layout,
        RASTER=plan.raster,
        num_warps=4 if plan.bm * plan.bn * max(2, x.element_size()) <= 8192 else 8,
        num_stages=plan.stages,
    )


@functools.cache
def _box_layout(element_bits: int, rank: int) -> Any:
    """How a box that a tensor map moves lies in shared memory: in rows of 128 bytes, swizzled."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=element_bits, rank=rank)


def _tensor_map(x: torch.Tensor, box: tuple[int, ...]) -> Any:
    """Over a tensor with contiguous last dimension. What lies past its ends is loaded as zeros and not stored."""
    of_nothing = _map_of(x.shape, x.stride(), x.dtype, box)
    found = object.__new__(type(of_nothing))  # its constructor checks at length what is known to be right
    found.__dict__.update(of_nothing.__dict__, base=x)
    return found


@functools.lru_cache(maxsize=4096)
def _map_of(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, box: tuple[int, ...]) -> Any:
    """A tensor map of nothing yet, kept for each shape."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    nothing = torch.empty(0, dtype=dtype)
    usable, span = [1], shape[-1]
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1])):
        # Of a dimension of size 1, PyTorch lets the stride be anything: it is never used, but must pass TMA's rules.
        usable.insert(0, stride if size > 1 else -(-span // 16) * 16)
        span = usable[0] * size
    return TensorDescriptor(nothing, list(shape), usable, list(box), _box_layout(8 * nothing.element_size(), len(box)))
