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
IMPLS = ("gluon", "small", "cuda", "triton")
STORE_WIDTH = 64  # columns of y that leave a warpgroup at once


@dataclass(frozen=True)
class GemmPlan:
    """A kernel and its tiles. "small" and "cuda" choose their own: all but `impl` is 0 for them.

    impl: "gluon", "triton", "small" or "cuda".
    bm, bn: rows of x and of w in a tile; with swiglu half of the latter are gate, half up.
    stages: of the ring in shared memory ("gluon"), or of Triton's pipeline.
    raster: row tiles of a block of tiles, within which rows come first.
    """

    impl: str
    bm: int = 0
    bn: int = 0
    stages: int = 0
    raster: int = 0


SMALL_ROWS = 128  # rows a group up to which "small" is the fastest
CUDA_ROWS = 256  # rows a group from which "cuda" is, with FP8


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
        m: rows of x. What is known of them on the host: of "ends", all; of "masked", the room.
        n: columns of y; w has twice as many rows if swiglu.
        dtype: of x; float8_e4m3fn means scaled FP8.
        layout: "dense", "ends" or "masked".
        available: kernels that may take the call, at least one.
    """
    rows = -(-m // max(groups, 1))
    if "small" in available and rows <= SMALL_ROWS:
        return GemmPlan("small")
    fp8 = dtype == torch.float8_e4m3fn
    if "cuda" in available and fp8 and rows >= CUDA_ROWS:
        return GemmPlan("cuda")
    if "gluon" not in available:
        if "triton" not in available:
            return GemmPlan(available[0])
        return triton_plan(rows, n, dtype, swiglu)
    bm = 64 if rows <= 64 else 128
    bn = 256
    if not swiglu:
        tiles_m = m // bm + groups if layout == "ends" else groups * -(-rows // bm)
        # Narrower tiles where wide ones would leave multiprocessors idle, or be cut off at N.
        if n <= 128 or tiles_m * -(-n // 256) < sms:
            bn = 128
    return gluon_plan(bm, bn, dtype)


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
