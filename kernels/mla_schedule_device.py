"""The rule of `mla_schedule` on the device: which stretch of all requests a program takes, from the lengths in memory.

Three functions over one vector of items (requests, or their pieces), which every program computes for itself: a scan of
the batch takes less time than a kernel more. They call only what both Triton and Gluon know, so that
`mla_decode_gluon` compiles the same functions again as its own.
"""

import triton
import triton.language as tl

from dscompile.kernels import mla_schedule

SEGMENT = tl.constexpr(mla_schedule.SEGMENT)
PART_ROWS = tl.constexpr(mla_schedule.PART_ROWS)
PART_PAGES = tl.constexpr(mla_schedule.PART_PAGES)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def weigh(item, seqlens_ptr, capacity, items, pieces, piece_pages):
    """Each item's cost, the end of its stretch (item: [LANES], from 0), the end of all, and the most pages of one."""
    piece = item % pieces
    length = tl.load(seqlens_ptr + item // pieces, mask=item < items, other=0)
    pages = (tl.minimum(length, capacity) + 63) // 64 - piece * piece_pages
    pages = tl.minimum(tl.maximum(pages, 0), piece_pages)
    cost = tl.where((item < items) & ((piece == 0) | (pages > 0)), pages + SEGMENT, 0)
    end = tl.associative_scan(cost, 0, _add)
    return cost, end, tl.reduce(cost, 0, _add), tl.reduce(pages, 0, _larger)


@triton.jit
def choose(total, longest, requests, rows, tiles, parts, pieces):
    """`mla_schedule.choose`: -> splits, 0 for "fair", and the parts that get a stretch."""
    partial = 1 + 3 * tl.minimum(rows, 64) // 64
    used = tl.maximum(tl.minimum(parts, tl.maximum(PART_ROWS // rows, total // PART_PAGES)), 1)
    fair = (total + used - 1) // used + 2 * partial
    memory = (total + parts - 1) // parts
    speed = tl.where(tiles == 1, 2, 3)
    group = (requests + parts - 1) // parts
    uncut = tl.maximum(memory, group * (longest + SEGMENT) * speed // 3)
    limit = tl.maximum(tl.maximum(PART_ROWS // (requests * rows), 4), longest // PART_PAGES)
    most = tl.minimum(parts // requests, limit)
    per = (longest + tl.maximum(most, 1) - 1) // tl.maximum(most, 1)
    cut = tl.maximum(memory + partial, (per + SEGMENT + partial) * speed // 3)
    keep = (most <= 1) | (uncut <= cut)
    per = tl.maximum(per, 1)  # of nothing where nothing is cached, and then nothing is cut
    splits = tl.where(keep, 1, (longest + per - 1) // per)
    return tl.where((pieces > 1) | (tl.where(keep, uncut, cut) > fair), 0, splits), used


@triton.jit
def start_of(part, cost, end, total, splits, used, seqlens_ptr, capacity, requests, rows, parts, pieces, piece_pages):
    """-> the item that a part starts in, and the pages of that item before it."""
    items = requests * pieces
    place = part.to(tl.int64) * total // used
    passed = end <= place
    fair_item = tl.reduce(tl.where(passed & (part < used), 1, 0), 0, _add)
    offset = (place - tl.reduce(tl.where(passed, cost, 0), 0, _add)).to(tl.int32)
    group = (requests + parts - 1) // parts
    each = tl.maximum(splits, 1)
    item = tl.where(splits > 0, part // each * group, tl.where(part < used, fair_item, items))
    inside = item < items
    length = tl.load(seqlens_ptr + item // pieces, mask=inside, other=0)
    pages = (tl.minimum(length, capacity) + 63) // 64 - item % pieces * piece_pages
    pages = tl.minimum(tl.maximum(pages, 0), piece_pages)
    # "even": equal parts, the last of which may find nothing left
    i = part % each
    even = i * ((pages + each - 1) // each)
    # "fair": to the nearer end of the item, if that is near
    before = tl.maximum(offset - SEGMENT, 0)
    near = tl.where(pieces == 1, 1 + 3 * tl.minimum(rows, 64) // 64, piece_pages)
    at_end = before > pages - before
    fair = tl.where(tl.minimum(before, pages - before) <= near, tl.where(at_end, pages, 0), before)
    page = tl.where(splits > 0, even, fair)
    past = inside & (page >= pages) & tl.where(splits > 0, i > 0, at_end)
    item = tl.where(past, item + 1, tl.minimum(item, items))
    return item, tl.where(inside & (page < pages), page, 0)
