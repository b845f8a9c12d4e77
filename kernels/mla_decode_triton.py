"""MLA decode in plain Triton: the twin of `mla_decode_gluon` for any CUDA GPU and the interpreter, and the combine.

Same formula and arguments as there (with q as [B, S, H, width] of any strides), but by pointers instead of tensor maps,
so that neither alignment nor Hopper is asked for. One program (grid: row tile fastest, then split, then request) takes
TILE query rows of one request and the split's part of its keys, KEYS at a time; keys at or behind the length are not
read at all. Meant to be right everywhere and good enough on GPUs without the fast kernel.

Limits: widths that are powers of two from 16 on, the latent's at most 512; float32, float16 or bfloat16; in the
interpreter not bfloat16, which Triton computes wrongly there without a word.
"""

import triton
import triton.language as tl


@triton.jit
def _attend(q, q_rope, k, k_rope, visible, m, l, acc, scale_log2):
    """One step of the running softmax: q [TILE, C], k [KEYS, C], visible [TILE, KEYS], m and l [TILE], acc [TILE, C].

    A row that has seen no key so far has m = -inf; its exponents are taken against 0, where -inf - -inf would be NaN.
    """
    s = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q, tl.trans(k), input_precision="ieee"), input_precision="ieee")
    s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == -float("inf"), 0.0, m_new * scale_log2)
    alpha = tl.exp2(m * scale_log2 - base)
    p = tl.exp2(s * scale_log2 - base[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(k.dtype), k, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


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
    ],
    do_not_specialize_on_alignment=["seqlens_ptr", "table_ptr", "mask_ptr"],
)
def mla_decode_triton_kernel(
    q_ptr,
    q_rope_ptr,
    k_ptr,
    k_rope_ptr,
    o_ptr,
    lse_ptr,
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
    C: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Formula, arguments and limits: at the heads of this file and of mla_decode_gluon.py."""
    tl.static_assert(64 % KEYS == 0, "a step must stay within one page of 64 keys")
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    request = (part // splits).to(tl.int64)
    length = tl.minimum(tl.load(seqlens_ptr + request), capacity)
    pages = tl.cdiv(length, 64)
    per_split = tl.cdiv(pages, splits)
    first = (part % splits) * per_split
    end = tl.minimum(first + per_split, pages)  # at or before `first` where nothing is left for this split

    row = tile * TILE + tl.arange(0, TILE)
    query = tl.minimum(row // heads, s_q - 1)
    head = row % heads
    limit = length - causal * (s_q - 1 - query)  # keys that a row may see
    c = tl.arange(0, C)
    r = tl.arange(0, R)
    q_row = request * q_stride_b + query.to(tl.int64) * q_stride_s + head.to(tl.int64) * q_stride_h
    q = tl.load(q_ptr + q_row[:, None] + c[None, :], mask=(row < rows)[:, None], other=0.0)
    q_row = request * q_rope_stride_b + query.to(tl.int64) * q_rope_stride_s + head.to(tl.int64) * q_rope_stride_h
    q_rope = tl.load(q_rope_ptr + q_row[:, None] + r[None, :], mask=(row < rows)[:, None], other=0.0)

    m = tl.full((TILE,), -float("inf"), tl.float32)
    l = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, C), tl.float32)
    for start_key in range(first * 64, end * 64, KEYS):
        key = start_key + tl.arange(0, KEYS)
        if PAGED:
            block = tl.load(table_ptr + request * table_stride + start_key // 64).to(tl.int64)
            place = (key % 64).to(tl.int64)
        else:
            block = request
            place = key.to(tl.int64)
        held = (key < length)[:, None]
        k = tl.load(k_ptr + (block * k_stride_b + place * k_stride_t)[:, None] + c[None, :], mask=held, other=0.0)
        k_rope = tl.load(
            k_rope_ptr + (block * k_rope_stride_b + place * k_rope_stride_t)[:, None] + r[None, :], mask=held, other=0.0
        )
        visible = key[None, :] < limit[:, None]
        if HAS_MASK:
            mask_row = mask_ptr + request * mask_stride_b + query.to(tl.int64) * mask_stride_s
            mask_column = key.to(tl.int64) * mask_stride_t
            visible = tl.load(mask_row[:, None] + mask_column[None, :], mask=visible, other=0) != 0
        m, l, acc = _attend(q, q_rope, k, k_rope, visible, m, l, acc, scale_log2)

    seen = l > 0
    out_row = part.to(tl.int64) * rows + row
    lse = tl.where(seen, (m * scale_log2 + tl.log2(tl.where(seen, l, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(lse_ptr + out_row, lse, mask=row < rows)
    o = acc * tl.where(seen, 1.0 / tl.where(seen, l, 1.0), 0.0)[:, None]
    tl.store(o_ptr + out_row[:, None] * C + c[None, :], o.to(o_ptr.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_splits_kernel(
    o_part_ptr, lse_part_ptr, o_ptr, lse_ptr, rows, splits, C: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Join the splits of one query row: o = sum_i w_i o_i / sum_i w_i, lse = ln sum_i w_i, with w_i = exp(lse_i).

    o_part [B, splits, rows, C] float32, lse_part [B, splits, rows] float32 -> o [B, rows, C] in its own dtype,
    lse [B, rows] float32, all contiguous. One program a query row and COLUMNS columns, so that a single request still
    fills the chip; SPLITS is the power of two at or above `splits`.
    A row that no split has seen gives o = 0 and lse = -inf.
    """
    request = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    i = tl.arange(0, SPLITS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part_row = (request * splits + i) * rows + row
    lse = tl.load(lse_part_ptr + part_row, mask=i < splits, other=-float("inf"))  # [SPLITS]
    o = tl.load(o_part_ptr + part_row[:, None] * C + c[None, :], mask=(i < splits)[:, None], other=0.0)
    top = tl.max(lse, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    w = tl.exp(lse - base)
    total = tl.sum(w, 0)
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    out_row = request * rows + row
    tl.store(o_ptr + out_row * C + c, (tl.sum(o * w[:, None], 0) / divisor).to(o_ptr.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + out_row, tl.where(seen, base + tl.log(divisor), -float("inf")))
