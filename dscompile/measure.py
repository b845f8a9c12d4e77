"""How far two results are from each other, and how far they may be: one yardstick for the self-check and for bisect.

An error is that of the worst row: the norm of a row's difference over the norm of the row, or over the mean norm of all
rows where that is larger, so that one wrong token among thousands is seen and a row of almost nothing is not divided
by. Rows that are not finite in the original have nothing to compare; a row that only the result lost is wrong.
"""

from __future__ import annotations

import torch

WRONG = 1e9  # the error of a result that is not finite, or of another shape: JSON has no infinity

#: Largest error between two computations in a dtype, where no wider run can say what rounding costs.
BARS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
#: Allowed beside twice the original's own error: sums in another order, the last bits of a result.
FLOORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: For values that are quantised to FP8 in a rewrite and not in the original (one e4m3 rounding is 2**-4 at most).
FP8_BAR = 0.2
#: What a wider run computes in.
WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


def error(result: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """Relative error of the worst row (of the last dimension); for integers, the share of elements that differ.

    ``least``: a norm of rows below which they count as nothing (a gradient that is 0 in theory).
    """
    if result.shape != expected.shape:
        return WRONG
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((result != expected).double().mean())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (x.detach().to(wide).reshape(-1, x.shape[-1] if x.dim() else 1) for x in (result, expected))
    known = b.isfinite().all(-1)
    if not known.any():
        return 0.0
    difference, norms = (a - b)[known].norm(dim=-1), b[known].norm(dim=-1)
    scale = torch.maximum(norms, norms.mean()).clamp_min(max(least, torch.finfo(torch.float64).tiny))
    worst = float((difference / scale).max())
    return min(worst, WRONG) if worst == worst else WRONG


def bar(dtype: torch.dtype, own: float | None = None) -> float:
    """How large an error may be; ``own`` is that of the original against a wider run, if there was one."""
    return BARS.get(dtype, 0.0) if own is None else 2 * own + FLOORS.get(dtype, 0.0)
