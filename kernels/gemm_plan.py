"""Which GEMM kernel, with which tiles: pure functions of the problem's size, from measurements on one H100 80GB HBM3.

Rows on the tensor cores' M side ("gluon", "cuda") pay for tiles of 64 or 128 rows a group; weights there and rows on
the N side ("small") pay for 8 at least. So the rows that a group has on average decide. Nothing here reads a tensor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SHARED = 232448  # bytes of shared memory that a CTA may have on Hopper
STEP_BYTES = 128  # of K in one step of the ring
IMPLS = ("gluon", "small", "cuda", "torch", "triton")
STORE_WIDTH = 64  # columns of y that leave a warpgroup at once


@dataclass(frozen=True)
class GemmPlan:
    """A kernel and its tiles. Only "gluon" and "triton" are told theirs: all but `impl` is 0 for the others.

    impl: one of IMPLS.
    bm, bn: rows of x and of w in a tile; with swiglu half of the latter are gate, half up.
    stages: of the ring in shared memory ("gluon"), or of Triton's pipeline.
    raster: row tiles of a block of tiles, within which rows come first.
    """

    impl: str
    bm: int = 0
    bn: int = 0
    stages: int = 0
    raster: int = 0


# Up to how many rows a group "small" is the fastest.
SMALL_ROWS = 128
SMALL_ROWS_OF_GROUPS = 256  # 16-bit: 401 us at 64 x 256 rows, n 2816, k 2048, torch 445
# What makes larger 16-bit groups: "torch", or "gluon" where `python -m bench.grouped_gemm` shows that it is faster.
LARGE_GROUPS = "gluon"
# Dense FP8: "gluon" is up to 8 % faster than "cuda", unless its tiles leave more of their last wave idle than this.
LEAST_FILL = 0.85


@functools.cache
def plan_gemm(
    m: int,
    n: int,
    k: int,
    groups: int,
    dtype: torch.dtype,
    layout: str,
    swiglu: bool,
    sms: int,
    available: tuple[str, ...] = IMPLS,
) -> GemmPlan:
    """The plan for y [m, n] from x [m, k] and `groups` weights.

    Args:
        m: rows of all groups together. Of "masked" groups, as many as are expected.
        n: columns of y; w has twice as many rows if swiglu.
        dtype: of x; float8_e4m3fn means scaled FP8.
        layout: "dense", "ends" or "masked".
        available: kernels that may take the call, at least one.
    """
    rows = -(-m // max(groups, 1))
    for impl in _preferred(rows, n, groups, dtype, layout, sms):
        if impl in available:
            break
    if impl == "gluon":
        return _gluon_plan(rows, m, n, groups, dtype, layout, swiglu, sms)
    return triton_plan(rows, n, dtype, swiglu) if impl == "triton" else GemmPlan(impl)


def _preferred(rows: int, n: int, groups: int, dtype: torch.dtype, layout: str, sms: int) -> list[str]:
    """All kernels, the fastest for groups of `rows` rows first. Each knows itself what it can't take."""
    fp8 = dtype == torch.float8_e4m3fn
    if fp8 and layout == "dense":
        tiles = -(-rows // 128) * -(-n // 256)
        large = ["gluon", "cuda"] if tiles >= LEAST_FILL * sms * -(-tiles // sms) else ["cuda", "gluon"]
    elif fp8:
        large = ["cuda", "gluon"]
    elif layout == "masked" or (layout == "ends" and LARGE_GROUPS == "gluon"):
        large = ["gluon", "torch"]
    else:
        large = ["torch", "gluon"]
    most = SMALL_ROWS if fp8 or layout == "dense" else SMALL_ROWS_OF_GROUPS
    few = ["small"] if rows <= most else []
    order = [*few, *large, "small", "triton", "torch", "cuda"]
    return sorted(set(order), key=order.index)


def _gluon_plan(
    rows: int, m: int, n: int, groups: int, dtype: torch.dtype, layout: str, swiglu: bool, sms: int
) -> GemmPlan:
    bm = 64 if rows <= 64 else 128
    tiles_m = m // bm + groups if layout == "ends" else groups * -(-rows // bm)
    # Narrower tiles where wide ones would leave multiprocessors idle, or be cut off at n.
    narrow = not swiglu and (n <= 128 or tiles_m * -(-n // 256) < sms)
    return gluon_plan(bm, 128 if narrow else 256, dtype)


def gluon_plan(bm: int, bn: int, dtype: torch.dtype, *, raster: int = 8, stages: int | None = None) -> GemmPlan:
    """The Gluon kernel with these tiles and, unless given, as many stages as fit into shared memory (12 at most)."""
    stage = STEP_BYTES * (bm + bn) + 16  # with its two barriers
    staging = 2 * 2 * bm * STORE_WIDTH  # two buffers of 16 bits a value
    return GemmPlan("gluon", bm, bn, stages or min(12, (SHARED - staging - 512) // stage), raster)


def triton_plan(rows: int, n: int, dtype: torch.dtype, swiglu: bool) -> GemmPlan:
    """The plain Triton kernel: tiles that fit the 99 KB of consumer GPUs."""
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
    bn = 64 if n <= 64 or swiglu or dtype == torch.float32 else 128
    return GemmPlan("triton", bm, bn, 3, 8)
