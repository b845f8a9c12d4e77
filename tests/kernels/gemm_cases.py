"""Inputs, expected values and bars of the GEMM tests and their benchmarks.

Rows that belong to no group and rows behind a masked group's count are NaN, and so are the scales' paddings: none may
reach a result. Scales are uneven, so that a wrong one shows. Expected values are products in float64 of what the kernel
was given (FP8 dequantised); the bars are calc_diff = 1 - 2 sum(x y) / sum(x^2 + y^2) below 1e-3 for FP8 and, for other
types, the rounding of the result beside the error of a float32 sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dscompile.kernels import gemm
from dscompile.kernels.gemm_plan import GemmPlan

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One call. `sizes` are the groups' rows, `tail` the rows behind the last ("ends") or more room ("masked")."""

    sizes: tuple[int, ...]
    n: int = 256
    k: int = 512
    layout: str = "ends"
    dtype: torch.dtype = torch.bfloat16
    swiglu: bool = False
    kn: bool = False  # N is the contiguous dimension of w
    tail: int = 0
    out_dtype: torch.dtype | None = None

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)


@dataclass
class Problem:
    """A call's arguments, and for the expected values which group a row belongs to (-1: none)."""

    case: Case
    x: torch.Tensor
    w: torch.Tensor
    bounds: torch.Tensor | None
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    owner: torch.Tensor

    def run(self, plan: GemmPlan | None = None) -> torch.Tensor:
        scales = dict(x_scale=self.x_scale, w_scale=self.w_scale, out_dtype=self.case.out_dtype, plan=plan)
        if self.case.layout == "dense":
            return gemm.linear(self.x, self.w[0], **_dense(scales))
        if self.case.layout == "masked":
            return gemm.masked(self.x, self.w, self.bounds, **scales)
        return gemm.grouped(self.x, self.w, self.bounds, swiglu=self.case.swiglu, **scales)


def _dense(scales: dict) -> dict:
    return {**scales, "w_scale": None if scales["w_scale"] is None else scales["w_scale"][0]}


def make(case: Case, device: str, seed: int = 0) -> Problem:
    """The case's tensors on a device, poisoned."""
    g = torch.Generator(device=device).manual_seed(seed)
    groups = len(case.sizes)
    sizes = torch.tensor(case.sizes)
    if case.layout == "masked":
        room = max(case.sizes) + case.tail
        owner = torch.where(torch.arange(room) < sizes[:, None], torch.arange(groups)[:, None], -1)
        bounds = sizes
    else:
        owner = torch.cat([torch.arange(groups).repeat_interleave(sizes), torch.full((case.tail,), -1)])
        bounds = sizes.cumsum(0)
    owner = owner.to(device)
    x = torch.randn(*owner.shape, case.k, generator=g, device=device)
    x = (x.mul_(100).clamp_(-448, 448) if case.dtype == FP8 else x.div_(4)).to(case.dtype)
    nan = torch.tensor(float("nan"), device=device)
    x = torch.where((owner < 0).unsqueeze(-1), nan.to(case.dtype).float(), x.float()).to(case.dtype)
    rows = case.n * (2 if case.swiglu else 1)
    w = torch.randn(groups, *((case.k, rows) if case.kn else (rows, case.k)), generator=g, device=device)
    w = (w.mul_(100).clamp_(-448, 448) if case.dtype == FP8 else w.div_(4)).to(case.dtype)
    if case.kn:
        w = w.transpose(1, 2)
    x_scale = w_scale = None
    if case.dtype == FP8:
        blocks = -(-case.k // 128)
        x_scale = torch.full((*owner.shape[:-1], blocks, -(-owner.shape[-1] // 4) * 4), float("nan"), device=device)
        fine = torch.rand(*owner.shape[:-1], blocks, owner.shape[-1], generator=g, device=device) / 100 + 1e-3
        x_scale[..., : owner.shape[-1]] = fine.masked_fill_(owner.unsqueeze(-2) < 0, float("nan"))
        w_scale = torch.rand(groups, -(-rows // 128), blocks, generator=g, device=device) / 100 + 1e-3
    bounds = None if case.layout == "dense" else bounds.to(torch.int32).to(device)
    return Problem(case, x, w, bounds, x_scale, w_scale, owner)


def expected(p: Problem) -> torch.Tensor:
    """In float64, zero where a row belongs to nobody."""
    x = p.x.flatten(0, -2).double()
    if p.x_scale is not None:
        scale = p.x_scale[..., : p.x.shape[-2]].transpose(-1, -2).flatten(0, -2)
        x *= scale.repeat_interleave(128, 1)[:, : x.shape[1]].double()
    owner = p.owner.flatten()
    y = x.new_zeros(len(x), p.w.shape[1])
    for group in range(len(p.w)):
        w = p.w[group].double()
        if p.w_scale is not None:
            wide = p.w_scale[group].repeat_interleave(128, 0).repeat_interleave(128, 1)
            w = w * wide[: w.shape[0], : w.shape[1]].double()
        y[owner == group] = x[owner == group] @ w.T
    if p.case.swiglu:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    return y.view(*p.owner.shape, -1)


def problems(got: torch.Tensor, p: Problem, want: torch.Tensor | None = None) -> list[str]:
    """What is wrong with a result, in words; empty when it is within the bars."""
    want = expected(p) if want is None else want
    if got.shape != want.shape or not got.is_contiguous():
        return [f"y is {tuple(got.shape)} contiguous={got.is_contiguous()}, not {tuple(want.shape)}"]
    owned = p.owner >= 0
    found = []
    if p.case.layout == "ends" and bool(got[~owned].ne(0).any()):
        found.append("rows behind the last group are not zero")
    x, y = got[owned].double(), want[owned]
    if not len(x):
        return found
    if not bool(x.isfinite().all()):
        return [*found, f"{int((~x.isfinite()).any(1).sum())} of {len(x)} rows are not finite"]
    difference = 1 - 2 * float((x * y).sum()) / max(float((x * x + y * y).sum()), 1e-30)
    if difference >= (1e-3 if p.case.dtype == FP8 else 1e-5):
        found.append(f"calc_diff is {difference:.2e}")
    # Rounding of the result, and of a float32 sum over K of terms as large as the result's root mean square says.
    rounding = torch.finfo(got.dtype).eps
    bar = rounding * y.abs() + (2e-2 if p.case.dtype == FP8 else 1e-4 + rounding / 8) * y.square().mean().sqrt()
    off = ((x - y).abs() > bar).sum()
    if off:
        found.append(f"{int(off)} of {x.numel()} values are off, the worst by {float((x - y).abs().max()):.2e}")
    return found
