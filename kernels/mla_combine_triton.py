"""Joins partial results of MLA decode, in plain Triton: the second kernel of both implementations.

    o = sum_i w_i o_i / sum_i w_i,    lse = ln sum_i w_i,    w_i = exp(lse_i)

    o_part [slots, rows, C] float32, lse_part [slots, rows] float32     partial results, `rows` query rows of a request
    o [B, rows, C] of any float dtype, lse [B, rows] float32            contiguous
    slots [B, 2] int32      if PLANNED: a request's partial results lie in slots first .. last; where both are one slot,
                            the result was final and stands in o and lse already. Otherwise request b has the `splits`
                            slots from b * splits on

One program (grid: row block fastest, then request; then column block) joins ROWS rows in COLUMNS columns, CHUNK slots
at a time, in their order: the bits depend on CHUNK and on the partial results alone. A row that no part has seen gives
o = 0 and lse = -inf. Under PDL it starts while the first kernel ends, and waits for it here.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=["slots_ptr"])
def combine_splits_kernel(
    o_part_ptr,
    lse_part_ptr,
    o_ptr,
    lse_ptr,
    slots_ptr,
    rows,
    splits,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Formula, arguments and grid: at the head of this file."""
    if PDL:
        gdc_wait()
    blocks = tl.cdiv(rows, ROWS)
    request = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if PLANNED:
        first = tl.load(slots_ptr + 2 * request)
        last = tl.load(slots_ptr + 2 * request + 1)
        if first == last:
            return
    else:
        first = request * splits
        last = first + splits - 1
    held = row < rows
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last + 1, CHUNK):
        i = start + tl.arange(0, CHUNK)
        known = (i <= last)[:, None] & held[None, :]
        place = i.to(tl.int64)[:, None] * rows + row[None, :]  # [CHUNK, ROWS]
        lse = tl.load(lse_part_ptr + place, mask=known, other=-float("inf"))
        o = tl.load(o_part_ptr + place[:, :, None] * C + c[None, None, :], mask=known[:, :, None], other=0.0)
        top_new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(top_new == -float("inf"), 0.0, top_new)
        before = tl.exp(top - base)
        w = tl.exp(lse - base[None, :])
        total = total * before + tl.sum(w, 0)
        acc = acc * before[:, None] + tl.sum(o * w[:, :, None], 0)
        top = top_new
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    out_row = request.to(tl.int64) * rows + row
    o = acc / divisor[:, None]
    tl.store(o_ptr + out_row[:, None] * C + c[None, :], o.to(o_ptr.dtype.element_ty), mask=held[:, None])
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + out_row, tl.where(seen, top + tl.log(divisor), -float("inf")), mask=held)
