"""Layouts at the border of torch's kernels: parts that already lie side by side are joined as a view, and what must be
copied is copied in words.

MLA's queries and keys have two parts, nope and rope, that the attention kernels read as one row. A kernel's time is
bound by memory long before such copies are free: at 128 heads and 4096 queries one pass over q costs a tenth of the
attention itself. Strides are looked at when the operator runs, on real tensors, so this holds whatever Inductor chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = torch.int64
# The kernels read rows in pieces of this many bytes, from addresses that are multiples of it.
_ROW_ALIGNMENT = 16


def in_bshd(x_BHSD: Tensor) -> Tensor:
    """The same values laid out as the transpose of a contiguous [B,S,H,D]; no copy where they are already."""
    return x_BHSD.transpose(1, 2).contiguous().transpose(1, 2)


def join_columns(left_BHSN: Tensor, right_BHSR: Tensor) -> Tensor:
    """-> [B,H,S,N+R]: a view where both are adjacent slices of one tensor, else a new transpose of [B,S,H,N+R]."""
    B, H, S, N = left_BHSN.shape
    R = right_BHSR.shape[3]
    if _adjacent(left_BHSN, right_BHSR):
        return left_BHSN.as_strided((B, H, S, N + R), left_BHSN.stride(), left_BHSN.storage_offset())
    joined = left_BHSN.new_empty(B, S, H, N + R).transpose(1, 2)
    copy_rows(joined[..., :N], left_BHSN)
    copy_rows(joined[..., N:], right_BHSR)
    return joined


def _adjacent(left: Tensor, right: Tensor) -> bool:
    """Whether each row of `right` follows the same row of `left` in memory, in rows that the kernels take in place."""
    strides, itemsize = left.stride(), left.element_size()
    if strides != right.stride() or strides[3] != 1 or left.numel() == 0 or right.numel() == 0:
        return False
    if right.storage_offset() != left.storage_offset() + left.shape[3]:
        return False
    if left.untyped_storage().data_ptr() != right.untyped_storage().data_ptr():
        return False
    steps = [stride * itemsize for stride in strides[:3]]
    return left.data_ptr() % _ROW_ALIGNMENT == 0 and all(step and step % _ROW_ALIGNMENT == 0 for step in steps)


def copy_rows(out: Tensor, source: Tensor) -> None:
    """`out.copy_(source)` for equal dtypes, 8 bytes at a time where both hold whole words.

    torch copies a tensor that isn't contiguous element by element: with 2-byte elements a thread moves a quarter of
    what it could.
    """
    if _holds_words(out) and _holds_words(source):
        out, source = out.view(_WORD), source.view(_WORD)
    out.copy_(source)


def _holds_words(x: Tensor) -> bool:
    per_word = _WORD.itemsize // x.element_size()
    return (
        x.stride(-1) == 1
        and x.shape[-1] % per_word == 0
        and x.storage_offset() % per_word == 0
        and all(stride % per_word == 0 for stride in x.stride()[:-1])
        and x.data_ptr() % _WORD.itemsize == 0
    )
