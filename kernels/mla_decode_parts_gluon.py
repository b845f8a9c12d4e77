"""What the Hopper kernels of MLA decode share: the stretch of a batch that a program takes, softmax, and storing.

A program takes one tile of 64 query rows through a stretch of the batch (`mla_schedule`): one request's pages after the
other's. Every role of a program walks the same `Segment`s. The first of two warpgroups has the scores, rows by `scores`
layout, and the output columns 0..255; the second the others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dscompile.kernels import mla_schedule_device
from dscompile.kernels.launch import aggregate


@aggregate
class Problem:
    """What every role must know of the launch, and this program's stretch of the batch."""

    seqlens: gl.tensor
    page_table: gl.tensor
    table_stride: gl.tensor
    capacity: gl.tensor  # keys that the cache has room for in a request
    rows: gl.tensor
    heads: gl.tensor
    s_q: gl.tensor
    causal: gl.tensor
    scale_log2: gl.tensor
    pieces: gl.tensor  # of a request, cut beforehand; items are numbered request * pieces + piece
    piece_pages: gl.tensor
    cuts: gl.tensor  # 1 where parts may begin within an item
    tile: gl.tensor
    part: gl.tensor
    item: gl.tensor  # the first, from page `begin` of it on
    begin: gl.tensor
    items: gl.tensor  # how many
    stop: gl.tensor  # pages of the last, or more


@aggregate
class Segment:
    """Query rows tile*64 .. of a request, against its pages first .. end - 1."""

    request: gl.tensor
    length: gl.tensor
    first: gl.tensor
    end: gl.tensor
    live: gl.tensor  # whether there is anything to do or to write
    opens: gl.tensor  # whether the request's first page is among them
    closes: gl.tensor  # its last
    slot: gl.tensor  # for a partial result


@gluon.jit
def segment(g, n, PLANNED: gl.constexpr):
    """The n-th of a program. Every role computes it for itself: two loads that all of them hit in cache."""
    item = g.item + n
    request = item // g.pieces
    piece = item % g.pieces
    length = gl.maximum(gl.minimum(gl.load(g.seqlens + request), g.capacity), 0)
    pages = gl.cdiv(length, 64)
    base = piece * g.piece_pages
    held = gl.minimum(gl.maximum(pages - base, 0), g.piece_pages)
    first = base + gl.where(n == 0, gl.minimum(g.begin, held), 0)
    end = base + gl.where(n == g.items - 1, gl.minimum(g.stop, held), held)
    slot = g.part
    if PLANNED:
        slot = item + g.cuts * g.part
    return Segment(request, length, first, end, (piece == 0) | (held > 0), first == 0, end == pages, slot)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def softmax_step(s, m, l, scale_log2):
    """One page of the running softmax, in base 2: s [64, 64] and m [64] unscaled -> p, alpha, m, l.

    A row that has seen no key so far has m = -inf; its exponents are taken against 0, where -inf - -inf would be NaN.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    base = gl.where(m_new == -float("inf"), 0.0, m_new * scale_log2)
    alpha = gl.exp2(m * scale_log2 - base)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(base, 1))
    return p, alpha, m_new, l * alpha + gl.sum(p, 1)


@gluon.jit
def store_half(acc, inv_l, outputs, w, g, HALF: gl.constexpr, PLANNED: gl.constexpr, PV: gl.constexpr):
    o_ptr, o_part_ptr = outputs
    acc = acc * gl.expand_dims(gl.convert_layout(inv_l, gl.SliceLayout(1, PV)), 1)
    row = g.tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, PV))
    column = HALF * 256 + gl.arange(0, 256, gl.SliceLayout(0, PV))
    kept = gl.expand_dims(row < g.rows, 1)
    if PLANNED:
        if w.opens & w.closes:
            place = gl.expand_dims((w.request.to(gl.int64) * g.rows + row) * 512, 1) + gl.expand_dims(column, 0)
            gl.store(o_ptr + place, acc.to(o_ptr.dtype.element_ty), mask=kept)
        else:
            place = gl.expand_dims((w.slot.to(gl.int64) * g.rows + row) * 512, 1) + gl.expand_dims(column, 0)
            gl.store(o_part_ptr + place, acc, mask=kept)
    else:
        place = gl.expand_dims((w.slot.to(gl.int64) * g.rows + row) * 512, 1) + gl.expand_dims(column, 0)
        gl.store(o_ptr + place, acc.to(o_ptr.dtype.element_ty), mask=kept)


@gluon.jit
def store_lse(m, l, outputs, w, g, PLANNED: gl.constexpr, SCORES: gl.constexpr):
    """And, for the second kernel, which slots hold the request's partial results."""
    lse_ptr, lse_part_ptr, slots_ptr = outputs
    row = g.tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    lse = gl.where(l > 0, (m * g.scale_log2 + gl.log2(l)) * 0.6931471805599453, -float("inf"))
    if PLANNED:
        if w.opens & w.closes:
            gl.store(lse_ptr + w.request.to(gl.int64) * g.rows + row, lse, mask=row < g.rows)
        else:
            gl.store(lse_part_ptr + w.slot.to(gl.int64) * g.rows + row, lse, mask=row < g.rows)
        if g.tile == 0:
            if w.opens:
                gl.store(slots_ptr + 2 * w.request, w.slot)
            if w.closes:
                gl.store(slots_ptr + 2 * w.request + 1, w.slot)
    else:
        gl.store(lse_ptr + w.slot.to(gl.int64) * g.rows + row, lse, mask=row < g.rows)


# The schedule's functions call nothing that Gluon hasn't: compiled once more, as Gluon's.
_weigh = gluon.jit(mla_schedule_device.weigh.fn)
_choose = gluon.jit(mla_schedule_device.choose.fn)
_start_of = gluon.jit(mla_schedule_device.start_of.fn)


@gluon.jit
def stretch(
    seqlens, capacity, tiles, splits, rows, requests, pieces, piece_pages, PLANNED: gl.constexpr, LANES: gl.constexpr
):
    """-> tile, part, and this part's first item, pages of it to leave out, number of items, pages of the last."""
    tile = gl.program_id(0) % tiles
    part = gl.program_id(0) // tiles
    if PLANNED:
        parts = gl.num_programs(0) // tiles
        # Up to 512 items, each warp holds all of them: nothing is exchanged through shared memory.
        WARPS: gl.constexpr = 1 if LANES <= 512 else 4
        lanes: gl.constexpr = gl.BlockedLayout([LANES // (32 * WARPS)], [32], [4], [0])
        cost, end, total, longest = _weigh(
            gl.arange(0, LANES, lanes), seqlens, capacity, requests * pieces, pieces, piece_pages
        )
        cut, used = _choose(total, longest, requests, rows, tiles, parts, pieces)
        item, begin = _start_of(
            part, cost, end, total, cut, used, seqlens, capacity, requests, rows, parts, pieces, piece_pages
        )
        last, stop = _start_of(
            part + 1, cost, end, total, cut, used, seqlens, capacity, requests, rows, parts, pieces, piece_pages
        )
        items = last - item + gl.where(stop > 0, 1, 0)
        stop = gl.where(stop > 0, stop, piece_pages)
    else:
        item = part // splits
        per = gl.cdiv(gl.cdiv(gl.maximum(gl.minimum(gl.load(seqlens + item), capacity), 0), 64), splits)
        begin = part % splits * per  # at or past the last page where nothing is left for this split
        stop = begin + per
        items = 1
    return tile, part, item, begin, items, stop
