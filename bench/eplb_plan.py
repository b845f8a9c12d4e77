"""Planning where experts live: time of one core beside 50 ms, and how balanced the placements are.

Times are those the thread spent computing, which other work on the machine doesn't lengthen.

Loads are drawn: every layer permutes expert popularity by Zipf's law, and 65,536 choices are counted. The table that is
printed beside the rows compares no placement, EPLB's and `place_experts`: mean and least balancedness over layers. That
ours is never the worse is checked, layer by layer, where EPLB puts no expert twice on a GPU, and in the mean.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.results import check
from dscompile.runtime import eplb
from dscompile.runtime.eplb_moves import choose, frontier, moved
from dscompile.runtime.eplb_search import has_pair, place_experts

GPUS = 0
LAYERS, EXPERTS = 58, 256
_CHOICES = 65536
_BUDGET_US = 50_000.0
_BUDGET = "budget of 50 ms of one core"


@dataclass(frozen=True)
class Row:
    """One setting; ``at_least``: mean balancedness that `place_experts` must reach."""

    exponent: float
    gpus: int
    spare: int
    at_least: float
    groups: int = 1
    nodes: int = 1
    locality: str = "none"

    def __str__(self) -> str:
        nodes = f", {self.nodes} nodes {self.locality}" if self.nodes > 1 else ""
        return f"Zipf {self.exponent}, EP{self.gpus}, {self.spare} spare{nodes}"

    def theirs(self, weight: Tensor) -> Tensor:
        return eplb.rebalance_experts(weight, weight.shape[1] + self.spare, self.groups, self.nodes, self.gpus)[0]

    def ours(self, weight: Tensor, starts: int | None = None) -> Tensor:
        slots, rule = weight.shape[1] + self.spare, self.locality
        return place_experts(weight, slots, self.gpus, self.groups, self.nodes, locality=rule, starts=starts)


TABLE = (
    Row(0.6, 4, 0, 0.999),
    Row(1.0, 4, 0, 0.999),
    Row(0.6, 8, 0, 0.999),
    Row(1.0, 8, 0, 0.66),  # the largest expert alone bounds it
    Row(1.0, 8, 16, 0.999),
    Row(1.0, 32, 32, 0.7, 8, 4, "strict"),
    Row(1.0, 32, 32, 0.95, 8, 4, "primary"),
    Row(1.0, 32, 32, 0.999),
    Row(0.6, 144, 32, 0.7),
)


def zipf(layers: int, experts: int, exponent: float, seed: int = 0) -> Tensor:
    """Counts [layers, experts] of 65,536 choices a layer, the popularity of ranks falling as rank^-exponent."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, experts + 1, dtype=torch.float32) ** -exponent
    each = torch.stack([popularity[torch.randperm(experts, generator=generator)] for _ in range(layers)])
    chosen = torch.multinomial(each, _CHOICES, replacement=True, generator=generator)
    return torch.zeros(layers, experts).scatter_add_(1, chosen, torch.ones(chosen.shape))


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of planning times; prints the table of balancedness, of fewer layers if quick."""
    check(eplb.rebalance_experts(*_README)[0][0].tolist() == _README_FIRST, "EPLB's published example")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(4 if quick else LAYERS, 2 if quick else 9)
    finally:
        torch.set_num_threads(threads)


_README = (torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]), 16, 4, 2, 8)
_README_FIRST = [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]


def _rows(layers: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    print(
        f"{'balancedness, mean (least) of ' + str(layers) + ' layers':<44} {'none':>6} {'EPLB':>16} {'ours':>16}  bound"
    )
    for row in TABLE:
        weight = zipf(layers, EXPERTS, row.exponent)
        theirs, us = _timed(row.theirs, weight, repeats)
        ours, ours_us = _timed(row.ours, weight, 1)
        check(not has_pair(ours, row.gpus).any().item(), f"{row}: an expert twice on a GPU")
        _never_worse(row, weight, theirs, ours)
        _print(row, weight, theirs, ours)
        case = f"{layers} layers x {EXPERTS} experts, {row}"
        if row.locality != "primary":  # which EPLB has none of
            rows.append({"case": f"{case}, EPLB's policy", "us": us, "anchor": _BUDGET, "anchor_us": _BUDGET_US})
        rows.append({"case": f"{case}, search", "us": ours_us, "anchor": None, "anchor_us": None})
    _movement(layers)
    return rows


def _timed(make: Callable[[Tensor], Tensor], weight: Tensor, repeats: int) -> tuple[Tensor, float]:
    """(the placement, median microseconds)."""
    seconds, found = [], make(weight)
    for _ in range(repeats):
        start = time.thread_time()
        make(weight)
        seconds.append(time.thread_time() - start)
    return found, statistics.median(seconds) * 1e6


def _never_worse(row: Row, weight: Tensor, theirs: Tensor, ours: Tensor) -> None:
    """Layer by layer; EPLB may only be the better where it puts an expert twice on a GPU, which we never do."""
    balance, other = (eplb.balancedness(eplb.gpu_loads(weight, p, row.gpus)) for p in (ours, theirs))
    worse = balance < other * (1 - 1e-9)
    alike = worse & ~has_pair(theirs, row.gpus)
    check(not alike.any().item(), f"{row}: worse than EPLB in {int(alike.sum())} layers")
    check(balance.mean().item() >= max(row.at_least, other.mean().item() - 1e-9), f"{row}: worse in the mean")
    if worse.any():
        print(f"  in {int(worse.sum())} layers of the next line EPLB is better, with an expert twice on a GPU")


def _print(row: Row, weight: Tensor, theirs: Tensor, ours: Tensor) -> None:
    G, slots = row.gpus, EXPERTS + row.spare
    cells = ["     -"]
    if EXPERTS % G == 0:
        none = eplb.balancedness(weight.view(len(weight), G, -1).sum(2).double())
        cells = [f"{none.mean():6.3f}"]
    for placement in (theirs, ours):
        balance = eplb.balancedness(eplb.gpu_loads(weight, placement, G))
        cells.append(f"{balance.mean():.4f} ({balance.min():.4f})")
    bound = (weight.double().sum(1) / G / eplb.lower_bound(weight, slots, G)).mean()
    print(f"{row!s:<44} {cells[0]} {cells[1]:>16} {cells[2]:>16}  {bound:.4f}", flush=True)


def _movement(layers: int) -> None:
    """Loads that drifted by up to 50 %: balance and moves of the old placement, the chosen one, and EPLB's."""
    print("after a drift of up to 50 %, balancedness (moves a layer)")
    for gpus, spare in ((4, 0), (8, 16), (32, 32)):
        before, slots = zipf(layers, EXPERTS, 1.0), EXPERTS + spare
        now = before * (1 + 0.5 * torch.rand(before.shape, generator=torch.Generator().manual_seed(1)))
        old = place_experts(before, slots, gpus)
        options = frontier(now, old, gpus)
        chosen = [choose(each) for each in options]
        theirs = eplb.rebalance_experts(now, slots, 1, 1, gpus)[0]
        balance = eplb.balancedness(eplb.gpu_loads(now, theirs, gpus)).mean()
        mean = statistics.fmean
        print(
            f"EP{gpus}, {spare} spare: old {mean(o[0].balance for o in options):.4f}, chosen "
            f"{mean(o.balance for o in chosen):.4f} ({mean(o.moves for o in chosen):.1f}), EPLB "
            f"{balance:.4f} ({moved(old, theirs, gpus).sum(1).double().mean():.1f})",
            flush=True,
        )
