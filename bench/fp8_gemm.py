"""Shared by the FP8 benchmarks: problems of random values, the check before a timing, the anchor's table.

Times are of one call of kernels/gemm.py in a CUDA graph, with the plan that it makes itself. The anchor's are of its
kernel alone, taken before, on the card that its name says: the ratio holds on that card only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.timing import buffer_sets, graph_us
from dscompile.kernels import gemm
from tests.kernels.gemm_cases import FP8, Case, Problem, expected, problems

ANCHORS = json.loads((Path(__file__).parent / "anchors" / "fp8_gemm.json").read_text())
ANCHOR = f"{ANCHORS['source']}, kernel alone, from bench/anchors/fp8_gemm.json"
CHUNK = 1 << 26


def time_dense(m: int, n: int, k: int) -> float:
    """Median microseconds of `gemm.linear`, after a check of some of its rows."""
    what = f"FP8 linear m {m}, n {n}, k {k}"
    calls = []
    for _ in range(buffer_sets(m * k + n * k + 2 * m * n)):
        p = problem("dense", [m], n, k)
        check_rows(p, what)
        calls.append(lambda p=p: p.run())
    return graph_us(calls)


def time_groups(layout: str, sizes: Sequence[int], n: int, k: int, room: int = 0, likely: int | None = None) -> float:
    """Median microseconds of `gemm.grouped` or `gemm.masked`, after a check of some of their rows."""
    what = f"FP8 {layout} rows {sum(sizes)} in {len(sizes)} groups, n {n}, k {k}"
    calls = []
    for _ in range(buffer_sets(sum(sizes) * (k + 2 * n) + len(sizes) * n * k)):
        p = problem(layout, sizes, n, k, room)
        check_rows(p, what, likely)
        calls.append(lambda p=p: run(p, likely))
    return graph_us(calls)


def run(p: Problem, likely: int | None = None) -> torch.Tensor:
    """The call that is timed; `likely` rows a group are promised to a masked one."""
    if p.case.layout != "masked":
        return p.run()
    return gemm.masked(p.x, p.w, p.bounds, x_scale=p.x_scale, w_scale=p.w_scale, expected=likely)


def problem(layout: str, sizes: Sequence[int], n: int, k: int, room: int = 0) -> Problem:
    """Random values and scales, made piece by piece since they can be large; rows without a group are 0, not NaN."""
    groups, blocks = len(sizes), -(-k // 128)
    lead = (groups,) if layout == "masked" else ()
    rows = room if layout == "masked" else sum(sizes)
    counts = torch.tensor(sizes)
    x, w = _fp8(*lead, rows, k), _fp8(groups, n, k)
    x_scale = torch.rand(*lead, blocks, -(-rows // 4) * 4, device="cuda") / 100 + 1e-3
    w_scale = torch.rand(groups, -(-n // 128), blocks, device="cuda") / 100 + 1e-3
    if layout == "masked":
        owner = torch.where(torch.arange(room) < counts[:, None], torch.arange(groups)[:, None], -1)
    else:
        owner = torch.arange(groups).repeat_interleave(counts)
    bounds = counts if layout == "masked" else counts.cumsum(0)
    bounds = None if layout == "dense" else bounds.int().cuda()
    return Problem(Case(tuple(sizes), n, k, layout, FP8), x, w, bounds, x_scale, w_scale, owner.cuda())


def check_rows(p: Problem, what: str, likely: int | None = None) -> None:
    """Compare up to 8 rows of the first and the last group with float64; all must be finite."""
    y = run(p, likely)
    results.check(bool(y[p.owner >= 0].isfinite().all()), f"{what}: finite outputs")
    owners = p.owner.flatten()
    present = owners[owners >= 0].unique()
    for group in {int(present[0]), int(present[-1])}:
        rows = (owners == group).nonzero().flatten()
        rows = rows[torch.linspace(0, len(rows) - 1, min(8, len(rows)), device="cuda").long()]
        some, out = _rows(p, group, rows), y.flatten(0, -2)[rows]
        results.check(not (wrong := problems(out, some, expected(some))), f"{what}: {'; '.join(wrong)}")


def _rows(p: Problem, group: int, rows: torch.Tensor) -> Problem:
    """Some rows of one group as a dense problem."""
    scale = p.x_scale.transpose(-1, -2)[..., : p.x.shape[-2], :].flatten(0, -2)[rows].T
    case = Case((len(rows),), p.case.n, p.case.k, "dense", FP8)
    x, w = p.x.flatten(0, -2)[rows], p.w[group : group + 1]
    return Problem(case, x, w, None, scale, p.w_scale[group : group + 1], torch.zeros_like(rows))


def _fp8(*shape: int) -> torch.Tensor:
    values = torch.empty(shape, device="cuda", dtype=FP8)
    for piece in values.view(-1).split(CHUNK):
        # Not beyond the dtype's largest value, which would become NaN.
        piece.copy_((torch.randn(len(piece), device="cuda", dtype=torch.bfloat16) * 100).clamp_(-448, 448))
    return values


def spread(groups: int, rows: int, seed: int = 0) -> list[int]:
    """Sizes of groups, uneven by up to 30 % to each side, that add up to `rows`."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(groups, generator=g) * 0.6 + 0.7
    whole = (sizes / sizes.sum() * rows).long()
    whole[0] += rows - whole.sum()
    return whole.tolist()


def rows_of(kind: str) -> list[dict[str, Any]]:
    """The anchor's rows: "dense", "contiguous" or "masked"."""
    return ANCHORS[kind]
