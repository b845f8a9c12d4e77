"""How a GEMM of few tokens is cut up: pure functions of its size, from measurements on one H100 80GB HBM3."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
SHARED = 232448  # bytes of shared memory that a CTA may have on Hopper
MOST_TOKENS = 128  # of a tile


@dataclass(frozen=True)
class SmallPlan:
    """Tile and pipeline of one launch.

    tokens: of a tile, the columns of a wgmma: 8, 16, 32, 64 or 128.
    blocks, consumers, halves: a tile has 64 * blocks * consumers / halves rows of weights. A consumer, a warpgroup,
        takes 64 * blocks of them (with swiglu a gate and its up block) by all tokens of the tile, or half of them.
    depth: of K in one stage.
    splits: equal parts of K, joined by a second kernel where there are several.
    """

    tokens: int
    blocks: int
    consumers: int
    depth: int
    stages: int
    splits: int = 1
    halves: int = 1
    per_sm: int = 1
    turn: bool = False

    @property
    def boxes(self) -> int:
        """Blocks of 64 weight rows in a tile."""
        return self.blocks * self.consumers // self.halves


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
    most = 64 if dtype == FP8 and swiglu else MOST_TOKENS
    tokens = tile_tokens(m, groups, layout, most)
    if swiglu:
        blocks, consumers = 2, 2 if tokens == 64 and dtype != FP8 else 1
    else:
        blocks, consumers = (2, 2) if tokens >= 64 and dtype != FP8 else (1, 2)
    splits = 1
    if layout == "dense" and not swiglu:
        tiles = -(-n // (64 * blocks * consumers)) * -(-m // tokens)
        splits = max(1, min(8, round(sms / tiles), k // 512))
    return small_plan(dtype, tokens, blocks, consumers, splits=splits)


def tile_tokens(m: int, groups: int, layout: str, most: int = MOST_TOKENS) -> int:
    """Tokens of a tile: few groups should need a second one, which computes and, through L2, reads everything again."""
    if layout == "dense":
        rows = m
    else:
        mean = m / max(1, groups)
        rows = 1.5 * mean + 1 if mean > 1 else 1
    tokens = 8
    while tokens < min(rows, most):
        tokens *= 2
    return tokens


def small_plan(
    dtype: torch.dtype,
    tokens: int,
    blocks: int,
    consumers: int,
    *,
    depth: int = 128,
    stages: int | None = None,
    splits: int = 1,
    halves: int = 1,
    per_sm: int = 1,
    turn: bool = False,
) -> SmallPlan:
    """A plan with these tiles and, unless given, as many stages as fit into shared memory (24 at most)."""
    scales = (depth // 128) * 4 * max(tokens, 32) if dtype == FP8 else 0
    boxes = blocks * consumers // halves
    stage = (64 * boxes + tokens) * depth * dtype.itemsize + scales + 16  # with its two barriers
    scratch = 1024 + 2304 * consumers  # of reductions, and of output tiles turned piece by piece
    most = min(24, (SHARED // per_sm - 1024 * (per_sm - 1) - scratch) // stage)
    return SmallPlan(tokens, blocks, consumers, depth, min(stages or most, most), splits, halves, per_sm, turn)
