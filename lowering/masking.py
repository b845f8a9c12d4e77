"""A mask as torch's attention kernels read it, an additive bias, and the repair of the rows that a bias gets wrong.

The kernels add a bias of the query's dtype to float32 scores and return softmax(scores) v and the log-sum-exp, from
which their backward computes p = exp(score - lse). Three things stand between a mask and that:

- cuDNN makes NaN of -inf. Hidden keys get a finite value there, far below any score. In a row where every key is hidden
  (a *dead* row) the kernel then averages over them: o = 0, lse = -inf and a zero gradient are put in afterwards.
- Many additive masks hide with the dtype's lowest value. Exponents are computed in base 2, where that overflows to
  -inf. Values below a floor are raised to it. Floor and hidden values are powers of two: their product with log2(e) is
  exact, so that a fused multiply-add in the exponent leaves no remainder of their own size.
- In a row that has nothing above the floor (a *flat* row: a padded query under such a mask) all scores round to the
  same number and softmax is uniform. That is torch.softmax's result too. But lse rounds as well and loses log(n), so
  the backward would find p = 1 for each of n keys: grad_o is divided by n there, which gives the same gradients.
  float16 has no values that large: its floor hides a key but leaves the scores their digits, so lse is merely shifted.

Rows are described by their *top*, the highest value that the mask has in them: -inf is dead, up to the floor is flat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The kernels read rows of the bias that start at multiples of this many elements.
_ROW_ALIGNMENT = 16
# In place of a dead row's lse: exp(score - lse) is 0 for every score, without arithmetic on infinities.
_DEAD_LSE = 2.0**100
_HIDDEN_BY_BOOL = torch.finfo(torch.float16).min


def floor_of(dtype: torch.dtype) -> float:
    """The lowest value that a kernel gets for a key that the mask doesn't hide outright."""
    return -(2.0**15) if dtype == torch.float16 else -(2.0**100)


def hidden_value(mask: Tensor, dtype: torch.dtype) -> float:
    """A finite stand-in for -inf: below the floor where the mask has finite values too, so that those still win."""
    if mask.dtype is torch.bool or dtype == torch.float16:
        return _HIDDEN_BY_BOOL
    return 2 * floor_of(dtype)


def kernel_bias(mask: Tensor, dtype: torch.dtype, T: int, hidden: float, *, rows: int | None = None) -> Tensor:
    """-> the bias [b,h,s,T], each row aligned; b, h and s as many as the mask has.

    Args:
        mask: broadcastable to [B,H,S,T]; bool (True = visible) or of `dtype` (added).
        dtype: of the query.
        hidden: what a hidden key gets, -inf or `hidden_value`.
        rows: s, for a kernel that wants a broadcast dimension of queries written out.
    """
    b, h, s = (1, 1, 1, *mask.shape[:-1])[-3:]
    bias = torch.zeros(b, h, rows or s, T + -T % _ROW_ALIGNMENT, dtype=dtype, device=mask.device)[..., :T]
    if mask.dtype is torch.bool:
        return bias.masked_fill_(~mask, hidden)
    return bias.copy_(mask).clamp_(min=floor_of(dtype)).masked_fill_(mask == -math.inf, hidden)


def row_tops(mask: Tensor) -> Tensor:
    """The highest value of each row in float32, [B,H,S] or broadcastable to it; a bool mask has 0 and -inf."""
    if mask.dtype is torch.bool:
        sees = mask.any(-1)
        return torch.zeros_like(sees, dtype=torch.float32).masked_fill_(~sees, -math.inf)
    return mask.amax(-1).to(torch.promote_types(mask.dtype, torch.float32))


def true_lse(lse_BHS: Tensor, tops: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel's log-sum-exp of floored scores -> that of the scores; -inf for dead rows."""
    floor = floor_of(dtype)
    rest = lse_BHS - floor if dtype == torch.float16 else 0.0
    return torch.where(tops <= floor, tops + rest, lse_BHS)


def clear_dead_rows(o_BHSV: Tensor, tops: Tensor) -> Tensor:
    """Write zeros into the dead rows of `o_BHSV` and return it."""
    return o_BHSV.masked_fill_((tops == -math.inf).unsqueeze(-1), 0.0)


def for_backward(grad_o_BHSV: Tensor, lse_BHS: Tensor, mask: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """-> grad_o, lse with which a kernel's backward over the floored bias gives the gradients of the mask's softmax."""
    dtype, tops = grad_o_BHSV.dtype, row_tops(mask)
    floor, dead = floor_of(dtype), tops == -math.inf
    rest = lse_BHS - tops if dtype == torch.float16 else 0.0
    lse_BHS = torch.where(tops <= floor, floor + rest, lse_BHS).masked_fill_(dead, _DEAD_LSE)
    if mask.dtype is not torch.bool and dtype != torch.float16:
        keys = (mask > -math.inf).expand(*mask.shape[:-1], T).sum(-1)
        share = torch.where((tops <= floor) & ~dead, 1.0 / keys, 1.0)
        grad_o_BHSV = grad_o_BHSV * share.unsqueeze(-1).to(dtype)
    return grad_o_BHSV, lse_BHS
