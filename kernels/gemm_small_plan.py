"""How a GEMM of few tokens is cut up: pure functions of its size, from measurements on one H100 80GB HBM3.

What they show (torch 2.11, Triton 3.6, calls in a CUDA graph, weights from memory):

- Stages of 256 bytes of a weight row are 3 to 5 % faster than ones of 128, in every type.
- Few tokens: some 64 KB of weights on their way to a multiprocessor are best. Twice as much costs 1 to 6 %.
- 64 rows of weights a tile are as fast as 128 up to 32 tokens and balance better; from 64 tokens on, which are read
  again by every weight tile, wider tiles win.
- A part of K costs 1.5 us for its join with one token and up to 5 us with 128, so that it must be needed to fill the
  multiprocessors: half of them draw all that memory gives, but not with 128 tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
SHARED = 232448  # bytes of shared memory that a CTA may have on Hopper
ROW_BYTES = 256  # of K in a stage
IN_FLIGHT = 65536  # bytes of weights that stages are for, where there are few tokens
FEW_STAGES = 3


@dataclass(frozen=True)
class SmallPlan:
    """Tile and pipeline of one launch.

    tokens: of a tile, the columns of a wgmma: 8, 16, 32, 64 or 128.
    blocks: of 64 weight rows, of a consumer: 1 or 2; with swiglu a gate block and its up block.
    consumers: warpgroups, 1 or 2. A tile has 64 * blocks * consumers rows of weights.
    depth: of K in one stage.
    splits: equal parts of K, joined by a second kernel where there are several.
    """

    tokens: int
    blocks: int
    consumers: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def boxes(self) -> int:
        """Blocks of 64 weight rows in a tile."""
        return self.blocks * self.consumers


@functools.cache
def plan_small(
    m: int, n: int, k: int, groups: int, dtype: torch.dtype, layout: str, swiglu: bool, sms: int
) -> SmallPlan:
    """The plan for y [m, n] from m tokens and `groups` weights.

    Args:
        m: tokens of all groups together, as far as the host knows: if "masked", those that are likely.
        n: columns of y; w has twice as many rows if swiglu.
        dtype: of x and w.
        layout: "dense", "ends" or "masked".
        sms: multiprocessors.
    """
    fp8 = dtype == FP8
    tokens = tile_tokens(m, groups, layout)
    if fp8 and swiglu:
        tokens = min(tokens, 64)  # sums of two blocks and the products being scaled, in one thread's registers
    if layout == "dense" and not swiglu:
        consumers = 2 if fp8 and k <= 512 else 1  # a short sum: what is left is writing y
        return small_plan(dtype, tokens, 1, consumers, splits=parts_of_k(m, n, k, tokens, dtype, sms))
    if swiglu:
        consumers = 2 if tokens >= 64 and not fp8 else 1
        return small_plan(dtype, tokens, 2, consumers, depth=128 if fp8 and tokens == 64 else None)
    if tokens >= 64 and not fp8:
        return small_plan(dtype, tokens, 2, 2)
    consumers = 2 if tokens >= (64 if fp8 else 32) else 1
    return small_plan(dtype, tokens, 1, consumers, depth=128 if fp8 and tokens == 128 else None)


def tile_tokens(m: int, groups: int, layout: str) -> int:
    """Tokens of a tile: few groups should need a second one, which computes and, through L2, reads everything again."""
    mean = m / max(1, groups)
    if layout == "dense":
        rows = float(m)
    else:
        rows = 1.5 * mean + 1 if mean > 1 else 1.0
    return next((tokens for tokens in (8, 16, 32, 64) if tokens >= rows), 128)


def parts_of_k(m: int, n: int, k: int, tokens: int, dtype: torch.dtype, sms: int) -> int:
    """Parts of K of one dense product: as many as fill the multiprocessors, where its tiles leave too many idle."""
    tiles = -(-n // 64) * -(-m // tokens)
    if tiles * 4 >= sms * (3 if tokens == 128 else 1.4):
        return 1
    steps = -(-k * dtype.itemsize // ROW_BYTES)
    wanted = max(1, min(sms // tiles, steps // 2))
    return -(-steps // -(-steps // wanted))  # none of them empty


def small_plan(
    dtype: torch.dtype,
    tokens: int,
    blocks: int,
    consumers: int,
    *,
    depth: int | None = None,
    stages: int | None = None,
    splits: int = 1,
) -> SmallPlan:
    """A plan with these tiles and, unless given, the depth and the number of stages that measurements favour."""
    depth = depth or ROW_BYTES // dtype.itemsize
    weights = 64 * blocks * consumers * depth * dtype.itemsize
    scales = (depth // 128) * 4 * max(tokens, 32) if dtype == FP8 else 0
    stage = weights + tokens * depth * dtype.itemsize + scales + 16  # with its two barriers
    scratch = 1024 + 2304 * consumers  # of reductions, and of output tiles turned piece by piece
    most = min(24, (SHARED - scratch) // stage)
    if stages is None and tokens <= (32 if dtype == FP8 else 16):
        stages = max(FEW_STAGES, IN_FLIGHT // weights)
    return SmallPlan(tokens, blocks, consumers, depth, min(stages or most, most), splits)
