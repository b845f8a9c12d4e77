"""Inputs, expected values and bars of the tests of the GEMM of few tokens.

What must not count is poisoned: outputs start as NaN, tokens that no group owns are NaN. The expected values are
products in float64 of the same, dequantised, inputs. A result may be off by its own rounding and by what its sum can
gather: float32 accumulation for 16-bit types, and for e4m3 the tensor cores' accumulator, which keeps 14 bits of a
block of 128 k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

FP8 = torch.float8_e4m3fn
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
GATHERED = {torch.bfloat16: 2e-6, torch.float16: 2e-6, FP8: 2.0**-13}  # of the sum of absolute products
UNEVEN = (0, 1, 7, 8, 9, 63, 64, 65, 0, 3)


@dataclass(frozen=True)
class Case:
    """One call. `counts` are the groups' tokens, one group's if dense; n columns of y."""

    counts: tuple[int, ...] = UNEVEN
    n: int = 320
    k: int = 448
    layout: str = "ends"
    dtype: torch.dtype = torch.bfloat16
    swiglu: bool = False
    n_major: bool = False
    extra: int = 0  # tokens behind the last group, or room in each group if masked

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)

    @property
    def tokens(self) -> int:
        """Rows of x in a batch."""
        return (max(self.counts) if self.layout == "masked" else sum(self.counts)) + self.extra

    def owned(self) -> list[tuple[int, int, int]]:
        """Of each group its batch and its first token, and the one past its last."""
        if self.layout == "masked":
            return [(g, 0, count) for g, count in enumerate(self.counts)]
        ends = [sum(self.counts[: g + 1]) for g in range(len(self.counts))]
        return [(0, end - count, end) for end, count in zip(ends, self.counts)]


@dataclass(frozen=True)
class Inputs:
    """x [L, M, K], w [G, N, K], scales for e4m3, bounds [G] int32 or None; dense tensors keep their leading 1."""

    x: torch.Tensor
    w: torch.Tensor
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    bounds: torch.Tensor | None


def make(case: Case, device: str, seed: int = 0) -> Inputs:
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g, device=device) * 4 / 448 + 1e-3

    groups, rows = len(case.counts), case.n * (2 if case.swiglu else 1)
    batches = groups if case.layout == "masked" else 1
    x, w = normal(batches, case.tokens, case.k), normal(groups, rows, case.k)
    x_scale = w_scale = None
    if case.dtype == FP8:
        x, w = (100 * x).clamp(-448, 448), (100 * w).clamp(-448, 448)
        blocks = -(-case.k // 128)
        x_scale = scales(batches, blocks, -(-case.tokens // 4) * 4)
        w_scale = scales(groups, -(-rows // 128), blocks)
    else:
        w /= math.sqrt(case.k)
    for batch in range(batches):
        x[batch, max(end for b, _, end in case.owned() if b == batch) :] = torch.nan
    x, w = x.to(case.dtype), w.to(case.dtype)
    if case.n_major:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    bounds = None
    if case.layout != "dense":
        numbers = case.counts if case.layout == "masked" else [end for _, _, end in case.owned()]
        bounds = torch.tensor(numbers, dtype=torch.int32, device=device)
    return Inputs(x, w, x_scale, w_scale, bounds)


def expected(case: Case, i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """y [L, M, n] in float64, and the sum of absolute products behind each value, for the bar."""
    x, w = i.x.double(), i.w.double()
    if i.x_scale is not None and i.w_scale is not None:
        x *= _spread(i.x_scale[:, :, : case.tokens].transpose(1, 2), 1, case.k)
        w *= _spread(i.w_scale, 128, case.k)[:, : w.shape[1]]
    y = torch.zeros(*x.shape[:2], case.n, dtype=torch.float64, device=x.device)
    size = torch.zeros_like(y)
    for group, (batch, first, end) in enumerate(case.owned()):
        rows = x[batch, first:end]
        value, gathered = rows @ w[group].T, rows.abs() @ w[group].abs().T
        if case.swiglu:
            (gate, up), (gate_size, up_size) = value.chunk(2, -1), gathered.chunk(2, -1)
            value = torch.nn.functional.silu(gate) * up
            gathered = 1.1 * (gate_size * up.abs() + up_size * gate.abs())  # the slope of silu is at most 1.1
        y[batch, first:end], size[batch, first:end] = value, gathered
    return y, size


def _spread(scale: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    return scale.double().repeat_interleave(128, -1)[..., :k].repeat_interleave(rows, -2)


def problems(case: Case, got: torch.Tensor, i: Inputs) -> list[str]:
    """What is wrong with y [L, M, n], in words; empty when it is within the bars. Masked: y started as NaN."""
    want, size = expected(case, i)
    if got.shape != want.shape or not got.is_contiguous():
        return [f"y {tuple(got.shape)} contiguous={got.is_contiguous()}, not {tuple(want.shape)}"]
    checked = torch.ones(want.shape[:2], dtype=torch.bool, device=want.device)
    found = []
    if case.layout == "masked":
        for batch, _, end in case.owned():
            checked[batch, end:] = False
        if not bool(got[~checked].isnan().all()):
            found.append("rows past a count were written")
    else:
        tail = got[:, case.owned()[-1][2] :]
        if bool(tail.ne(0).any()):
            found.append("rows behind the last group must be zero")
    bar = ROUNDING[got.dtype] * want.abs() + GATHERED[case.dtype] * size
    error = (got.double() - want).abs()
    off = ~(error <= bar) & checked[..., None]
    if bool(off.any()):
        worst = float((error / bar.clamp(min=1e-30))[off].nan_to_num(torch.inf).max())
        found.append(f"{int(off.sum())} of {off.numel()} values are off, the worst by {worst:.2f} times its bar")
    return found
