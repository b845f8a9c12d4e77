"""A kernel that writes down where each part of a batch starts, for the interpreter tests of the rule."""

import triton
import triton.language as tl

from dscompile.kernels.mla_schedule_device import choose, start_of, weigh


@triton.jit
def starts_kernel(seqlens, out, capacity, requests, rows, tiles, parts, pieces, piece_pages, LANES: tl.constexpr):
    """One program a part; out [parts + 1, 2]: item, page."""
    cost, end, total, longest = weigh(tl.arange(0, LANES), seqlens, capacity, requests * pieces, pieces, piece_pages)
    splits, used = choose(total, longest, requests, rows, tiles, parts, pieces)
    part = tl.program_id(0)
    item, page = start_of(
        part, cost, end, total, splits, used, seqlens, capacity, requests, rows, parts, pieces, piece_pages
    )
    tl.store(out + 2 * part, item)
    tl.store(out + 2 * part + 1, page)
