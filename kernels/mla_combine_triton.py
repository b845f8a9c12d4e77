"""Joins partial results of MLA decode, in plain Triton: the second kernel of both implementations.

    o = sum_i w_i o_i / sum_i w_i,    lse = ln sum_i w_i,    w_i = exp(lse_i)

    o_part [slots, rows, C] float32, lse_part [slots, rows] float32     partial results, `rows` query rows of a request
    o [B, rows, C] of any float dtype, lse [B, rows] float32            contiguous
    slots [B, 2] int32      if PLANNED: a request's partial results lie in slots first .. last; where both are one slot,
                            the result was final and stands in o and lse already. Otherwise request b has the `splits`
                            slots from b * splits on

A unit of work is ROWS rows of one request in COLUMNS columns, CHUNK slots at a time, in their order: the bits depend on
CHUNK and on the partial results alone. A row that no part has seen gives o = 0 and lse = -inf. Grid: units, then column
blocks. Without a plan, each unit has a program. With one, programs count the requests that were cut and share out their
units: a batch in which none was cut costs a program one look at the slots. Under PDL a program starts while the first
kernel ends, and waits for it here.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _join(
    o_part_ptr,
    lse_part_ptr,
    o_ptr,
    lse_ptr,
    request,
    first,
    last,
    block,
    rows,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One unit: rows block * ROWS .. of a request whose partial results lie in slots first .. last."""
    row = block * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = row < rows
    kept = held[:, None]
    if C % COLUMNS != 0:
        kept = kept & (c < C)[None, :]
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last + 1, CHUNK):
        i = start + tl.arange(0, CHUNK)
        known = i <= last
        place = i.to(tl.int64)[:, None] * rows + row[None, :]  # [CHUNK, ROWS]
        lse = tl.load(lse_part_ptr + place, mask=known[:, None] & held[None, :], other=-float("inf"))
        o = tl.load(
            o_part_ptr + place[:, :, None] * C + c[None, None, :], mask=known[:, None, None] & kept[None], other=0.0
        )
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
    tl.store(o_ptr + out_row[:, None] * C + c[None, :], o.to(o_ptr.dtype.element_ty), mask=kept)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + out_row, tl.where(seen, top + tl.log(divisor), -float("inf")), mask=held)


@triton.jit(do_not_specialize=["requests", "rows", "splits"], do_not_specialize_on_alignment=["slots_ptr"])
def combine_splits_kernel(
    o_part_ptr,
    lse_part_ptr,
    o_ptr,
    lse_ptr,
    slots_ptr,
    requests,
    rows,
    splits,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANNED: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Formula, arguments and grid: at the head of this file."""
    if PDL:
        gdc_launch_dependents()  # what comes behind may set itself up meanwhile, and waits in its turn
        gdc_wait()
    blocks = tl.cdiv(rows, ROWS)
    if PLANNED:
        b = tl.arange(0, LANES)
        first = tl.load(slots_ptr + 2 * b, mask=b < requests, other=0)
        last = tl.load(slots_ptr + 2 * b + 1, mask=b < requests, other=0)
        cut = tl.where(first != last, 1, 0)
        upto = tl.associative_scan(cut, 0, _add)  # requests that were cut, each one's own included
        units = tl.sum(cut, 0) * blocks
        for unit in range(tl.program_id(0), units, tl.num_programs(0)):
            request = tl.sum(tl.where(upto <= unit // blocks, 1, 0), 0)
            from_slot = tl.load(slots_ptr + 2 * request)
            to_slot = tl.load(slots_ptr + 2 * request + 1)
            _join(
                *(o_part_ptr, lse_part_ptr, o_ptr, lse_ptr, request, from_slot, to_slot, unit % blocks, rows),
                C,
                CHUNK,
                ROWS,
                COLUMNS,
            )
    else:
        request = tl.program_id(0) // blocks
        from_slot = request * splits
        _join(
            *(o_part_ptr, lse_part_ptr, o_ptr, lse_ptr, request, from_slot, from_slot + splits - 1),
            tl.program_id(0) % blocks,
            rows,
            C,
            CHUNK,
            ROWS,
            COLUMNS,
        )
