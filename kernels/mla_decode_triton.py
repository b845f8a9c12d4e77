"""MLA decode in plain Triton: the twin of `mla_decode_gluon` for any CUDA GPU and the interpreter.

Same formula, arguments and division of the work as there (with q as [B, S, H, width] of any strides), but by pointers
instead of tensor maps, so that neither alignment nor Hopper is asked for. A program takes TILE query rows of a request,
and of each of its segments KEYS keys at a time; keys at or behind the length are not read at all. Meant to be right
everywhere and good enough on GPUs without the fast kernel.

Over a float8 cache GROUP columns share a scale; 0 where the cache is in q's dtype.

Any widths: tiles are as wide as the next power of two, C_TILE and R_TILE, with zeros behind the columns. R may be 0.

Limits: widths up to 512 and 128, or 1024 and 64 in 16 bits; float32, float16 or bfloat16; in the interpreter not
bfloat16, which Triton computes wrongly there without a word.
"""

import triton
import triton.language as tl

from dscompile.kernels.mla_schedule_device import choose, start_of, weigh


@triton.jit
def _attend(q, q_rope, k, k_rope, visible, m, l, acc, scale_log2, HAS_ROPE: tl.constexpr):
    """One step of the running softmax: q [TILE, C], k [KEYS, C], visible [TILE, KEYS], m and l [TILE], acc [TILE, C].

    A row that has seen no key so far has m = -inf; its exponents are taken against 0, where -inf - -inf would be NaN.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_ROPE:
        s = tl.dot(q_rope, tl.trans(k_rope), s, input_precision="ieee")
    s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == -float("inf"), 0.0, m_new * scale_log2)
    alpha = tl.exp2(m * scale_log2 - base)
    p = tl.exp2(s * scale_log2 - base[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(k.dtype), k, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def _within(mask, column, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """A mask of rows [.., 1], and of columns where the tile is wider than the tensor; its zeros change no score."""
    if WIDTH < TILE:
        mask = mask & (column < WIDTH)[None, :]
    return mask


@triton.jit
def _stretch(
    seqlens, capacity, tiles, splits, rows, requests, pieces, piece_pages, PLANNED: tl.constexpr, LANES: tl.constexpr
):
    """-> this part's first item, pages of it to leave out, number of items, pages of the last."""
    part = tl.program_id(0) // tiles
    if PLANNED:
        parts = tl.num_programs(0) // tiles
        cost, end, total, longest = weigh(
            tl.arange(0, LANES), seqlens, capacity, requests * pieces, pieces, piece_pages
        )
        cut, used = choose(total, longest, requests, rows, tiles, parts, pieces)
        item, begin = start_of(
            part, cost, end, total, cut, used, seqlens, capacity, requests, rows, parts, pieces, piece_pages
        )
        last, stop = start_of(
            part + 1, cost, end, total, cut, used, seqlens, capacity, requests, rows, parts, pieces, piece_pages
        )
        items = last - item + tl.where(stop > 0, 1, 0)
        stop = tl.where(stop > 0, stop, piece_pages)
    else:
        item = part // splits
        per = tl.cdiv(tl.cdiv(tl.maximum(tl.minimum(tl.load(seqlens + item), capacity), 0), 64), splits)
        begin = part % splits * per  # at or past the last page where nothing is left for this split
        stop = begin + per
        items = 1
    return item, begin, items, stop


# Strides are left to Triton's specialisation: it vectorises loads only where it knows them to be multiples of 16.
@triton.jit(
    do_not_specialize=[
        "table_stride",
        "capacity",
        "mask_stride_b",
        "mask_stride_s",
        "mask_stride_t",
        "tiles",
        "splits",
        "rows",
        "heads",
        "s_q",
        "causal",
        "requests",
        "pieces",
        "piece_pages",
        "scale_stride_b",
        "scale_stride_t",
    ],
    do_not_specialize_on_alignment=["seqlens_ptr", "table_ptr", "mask_ptr", "scale_ptr"],
)
def mla_decode_triton_kernel(
    q_ptr,
    q_rope_ptr,
    k_ptr,
    k_rope_ptr,
    o_ptr,
    lse_ptr,
    o_part_ptr,
    lse_part_ptr,
    slots_ptr,
    seqlens_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    q_rope_stride_b,
    q_rope_stride_s,
    q_rope_stride_h,
    k_stride_b,
    k_stride_t,
    k_rope_stride_b,
    k_rope_stride_t,
    scale_ptr,
    scale_stride_b,
    scale_stride_t,
    table_ptr,
    table_stride,
    capacity,
    mask_ptr,
    mask_stride_b,
    mask_stride_s,
    mask_stride_t,
    tiles,
    splits,
    rows,
    heads,
    s_q,
    causal,
    scale_log2,
    requests,
    pieces,
    piece_pages,
    C: tl.constexpr,
    R: tl.constexpr,
    C_TILE: tl.constexpr,
    R_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PLANNED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Formula, arguments and limits: at the heads of this file and of mla_decode_gluon.py."""
    tl.static_assert(64 % KEYS == 0, "a step must stay within one page of 64 keys")
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    item_0, begin, items, stop = _stretch(
        seqlens_ptr, capacity, tiles, splits, rows, requests, pieces, piece_pages, PLANNED, LANES
    )
    row = tile * TILE + tl.arange(0, TILE)
    query = tl.minimum(row // heads, s_q - 1)
    head = row % heads
    c = tl.arange(0, C_TILE)
    for n in range(items):
        item = item_0 + n
        request = (item // pieces).to(tl.int64)
        piece = item % pieces
        length = tl.maximum(tl.minimum(tl.load(seqlens_ptr + request), capacity), 0)
        pages = tl.cdiv(length, 64)
        base = piece * piece_pages
        held_pages = tl.minimum(tl.maximum(pages - base, 0), piece_pages)
        first = base + tl.where(n == 0, tl.minimum(begin, held_pages), 0)
        end = base + tl.where(n == items - 1, tl.minimum(stop, held_pages), held_pages)

        limit = length - causal * (s_q - 1 - query)  # keys that a row may see
        q_row = request * q_stride_b + query.to(tl.int64) * q_stride_s + head.to(tl.int64) * q_stride_h
        q = tl.load(q_ptr + q_row[:, None] + c[None, :], mask=_within((row < rows)[:, None], c, C, C_TILE), other=0.0)
        q_rope = q
        if R > 0:
            r = tl.arange(0, R_TILE)
            q_row = request * q_rope_stride_b + query.to(tl.int64) * q_rope_stride_s
            q_row += head.to(tl.int64) * q_rope_stride_h
            asked = _within((row < rows)[:, None], r, R, R_TILE)
            q_rope = tl.load(q_rope_ptr + q_row[:, None] + r[None, :], mask=asked, other=0.0)

        m = tl.full((TILE,), -float("inf"), tl.float32)
        l = tl.zeros((TILE,), tl.float32)
        acc = tl.zeros((TILE, C_TILE), tl.float32)
        for start_key in range(first * 64, end * 64, KEYS):
            key = start_key + tl.arange(0, KEYS)
            if PAGED:
                block = tl.load(table_ptr + request * table_stride + start_key // 64).to(tl.int64)
                place = (key % 64).to(tl.int64)
            else:
                block = request
                place = key.to(tl.int64)
            held = (key < length)[:, None]
            k_row = block * k_stride_b + place * k_stride_t
            k = tl.load(k_ptr + k_row[:, None] + c[None, :], mask=_within(held, c, C, C_TILE), other=0.0)
            if GROUP > 0:
                GROUPS: tl.constexpr = C_TILE // GROUP
                k_row = block * scale_stride_b + place * scale_stride_t
                group = tl.arange(0, GROUPS)
                scaled = _within(held, group, C // GROUP, GROUPS)
                scales = tl.load(scale_ptr + k_row[:, None] + group[None, :], mask=scaled, other=0.0)
                k = tl.reshape(k.to(tl.float32), (KEYS, GROUPS, GROUP)) * scales[:, :, None]
                k = tl.reshape(k, (KEYS, C_TILE)).to(q.dtype)
            k_rope = k
            if R > 0:
                r = tl.arange(0, R_TILE)
                k_row = block * k_rope_stride_b + place * k_rope_stride_t
                turned = _within(held, r, R, R_TILE)
                k_rope = tl.load(k_rope_ptr + k_row[:, None] + r[None, :], mask=turned, other=0.0)
            visible = key[None, :] < limit[:, None]
            if HAS_MASK:
                mask_row = mask_ptr + request * mask_stride_b + query.to(tl.int64) * mask_stride_s
                mask_column = key.to(tl.int64) * mask_stride_t
                visible = tl.load(mask_row[:, None] + mask_column[None, :], mask=visible, other=0) != 0
            m, l, acc = _attend(q, q_rope, k, k_rope, visible, m, l, acc, scale_log2, R > 0)

        seen = l > 0
        lse = tl.where(seen, (m * scale_log2 + tl.log2(tl.where(seen, l, 1.0))) * 0.6931471805599453, -float("inf"))
        o = acc * tl.where(seen, 1.0 / tl.where(seen, l, 1.0), 0.0)[:, None]
        if PLANNED:
            slot = item + tl.where(pieces == 1, part, 0)
            whole = (first == 0) & (end == pages)
            live = (row < rows) & ((piece == 0) | (held_pages > 0))
            kept = live & whole
            out_row = request * rows + row
            tl.store(lse_ptr + out_row, lse, mask=kept)
            stored = _within(kept[:, None], c, C, C_TILE)
            tl.store(o_ptr + out_row[:, None] * C + c[None, :], o.to(o_ptr.dtype.element_ty), mask=stored)
            kept = live & (whole == 0)
            out_row = slot.to(tl.int64) * rows + row
            tl.store(lse_part_ptr + out_row, lse, mask=kept)
            stored = _within(kept[:, None], c, C, C_TILE)
            tl.store(o_part_ptr + out_row[:, None] * C + c[None, :], o, mask=stored)
            writes = (tile == 0) & ((piece == 0) | (held_pages > 0))
            tl.store(slots_ptr + 2 * request, slot, mask=writes & (first == 0))
            tl.store(slots_ptr + 2 * request + 1, slot, mask=writes & (end == pages))
        else:
            out_row = part.to(tl.int64) * rows + row
            tl.store(lse_ptr + out_row, lse, mask=row < rows)
            o = o.to(o_ptr.dtype.element_ty)
            stored = _within((row < rows)[:, None], c, C, C_TILE)
            tl.store(o_ptr + out_row[:, None] * C + c[None, :], o, mask=stored)
