"""MLA decode for Hopper in Gluon: tensor cores (wgmma), tensor-map loads (TMA), three roles in one CTA.

For each request b, query i, head h, over the keys j that the query may see:

    s_j = scale * (q_latent[b, i, h] . latent_j + q_rope[b, i, h] . k_rope_j)
    o[b, i, h] = sum_j softmax(s)_j latent_j,    lse[b, i, h] = ln sum_j exp(s_j)

The first four are tensor maps of one dtype, bfloat16 or float16, the rest pointers:

    q_latent [B, S*H, 512], q_rope [B, S*H, 64]        any row and request stride; row i*H + h
    latent [N, T, 512], k_rope [N, T, 64]              any row and block stride: requests, or pages of 64 rows
    o [B, S*H, 512], lse [B, S*H]                      contiguous, o of any float dtype
    o_part [slots, S*H, 512], lse_part [slots, S*H]    float32, of segments that are less than a request (mla_schedule)
    slots [B, 2] int32                                 the first and the last slot of each request
    seqlens [B] int32                                  keys of each request; read on the device
    page_table [B, pages] int32                        if PAGED: which block holds keys 64*p .. 64*p + 63 of a request
    mask [B, S, keys] uint8, any strides               if HAS_MASK: nonzero is visible, as far as the length allows

One program (grid: row tile fastest, then part) takes 64 query rows, since all rows of a request share its keys, through
its part of the batch: if PLANNED, the segments that `mla_schedule` deals to it by the lengths, else one of `splits`
equal runs of one request's pages of 64 keys, whose result goes to slot b * splits + i of o and lse, then partial too.
Where there are fewer rows than 64, zeros fill the tile. That costs no time: a page's products take 2200 cycles of the
tensor cores, however few rows count, and reading it takes 5700 (computed, an H100's 3 TB/s shared by 132 SMs).
The first 512 of a key's 576 columns are its value, so both products read the same shared memory: two stages of a page
(2 * 72 KB), the queries (72 KB) and P (8 KB).
The output tile, 64 x 512 in float32, is split by columns over two warpgroups:

    lead     scores, softmax, hands P and the rescaling of each row over in shared memory; output columns 0..255
    follow   output columns 256..511
    load     one warp: a page as soon as both others have left a stage, and each segment's queries behind its first

Keys at or behind a request's length never count, whatever lies there (NaN included): their scores are discarded, and
before P V, where 0 * NaN would be NaN, their values are zeroed in shared memory, on the request's last page only. Rows
past the end of a tensor arrive as zeros by TMA's own rule.

Limits: compute capability 9.0; widths 512 and 64; bases and strides multiples of 16 bytes; pages of 64 rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dscompile.kernels.launch import aggregate, cta_barrier, tma_load
from dscompile.kernels.mla_decode_parts_gluon import (
    Problem,
    next_stage,
    segment,
    softmax_step,
    store_half,
    store_lse,
    stretch,
)

# Accumulators of one warpgroup: scores [64, 64], and half of the output [64, 256].
QK = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
PV = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))


@aggregate
class Buffers:
    """Shared memory and its barriers. Latents lie in two halves of 256 columns, as the output does."""

    q_lo: gl.shared_memory_descriptor
    q_hi: gl.shared_memory_descriptor
    q_rope: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_lo: gl.shared_memory_descriptor
    k_hi: gl.shared_memory_descriptor
    k_rope: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor
    alpha: gl.shared_memory_descriptor
    p_full: gl.shared_memory_descriptor
    p_empty: gl.shared_memory_descriptor


@gluon.jit
def _load(descriptors, b, g, PAGED: gl.constexpr, PLANNED: gl.constexpr, STAGES: gl.constexpr):
    """Role of the loading warp. A segment's first page goes ahead of its queries, whose buffer is still in use."""
    q_latent, q_rope, latent, k_rope = descriptors
    row = g.tile * 64
    stage = 0
    phase = 0
    q_phase = 0
    for n in range(g.items):
        w = segment(g, n, PLANNED)
        table = g.page_table + w.request.to(gl.int64) * g.table_stride
        for page in range(w.first, w.end):
            if PAGED:
                block = gl.load(table + page)
                key = 0
            else:
                block = w.request
                key = page * 64
            mbarrier.wait(b.k_empty.index(stage), phase ^ 1)
            full = b.k_full.index(stage)
            mbarrier.expect(full, 2 * latent.block_type.nbytes + k_rope.block_type.nbytes)
            tma_load(latent, [block, key, 0], full, b.k_lo.index(stage))
            tma_load(latent, [block, key, 256], full, b.k_hi.index(stage))
            tma_load(k_rope, [block, key, 0], full, b.k_rope.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            if page == w.first:
                mbarrier.wait(b.q_empty, q_phase ^ 1)
                mbarrier.expect(b.q_full, 2 * q_latent.block_type.nbytes + q_rope.block_type.nbytes)
                tma_load(q_latent, [w.request, row, 0], b.q_full, b.q_lo)
                tma_load(q_latent, [w.request, row, 256], b.q_full, b.q_hi)
                tma_load(q_rope, [w.request, row, 0], b.q_full, b.q_rope)
                q_phase ^= 1


@gluon.jit
def _zero_rows_from(first, values):
    """Zero the rows of a [64, 256] tile in shared memory from `first` on, ahead of a wgmma that reads the tile."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    stale = gl.arange(0, 64, gl.SliceLayout(1, BY_ROW)) >= first
    for column in gl.static_range(0, 256, 64):  # in pieces: a whole half would take 64 registers from the accumulator
        piece = values.slice(column, 64, 1)
        piece.store(gl.where(gl.expand_dims(stale, 1), 0.0, piece.load(BY_ROW)))
    fence_async_shared()
    cta_barrier()  # of this role's warps; written out, so that no barrier is needed on pages that skip this


@gluon.jit
def _lead(outputs, mask, b, g, HAS_MASK: gl.constexpr, PLANNED: gl.constexpr, STAGES: gl.constexpr):
    """Role of the first warpgroup: scores and softmax of every page, output columns 0..255, lse."""
    o_ptr, o_part_ptr, lse_ptr, lse_part_ptr, slots_ptr = outputs
    row = g.tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, QK))
    query = gl.minimum(row // g.heads, g.s_q - 1)
    behind = g.causal * (g.s_q - 1 - query)  # keys at the end that a row may not see
    stage = 0
    phase = 0
    p_phase = 0
    q_phase = 0
    for n in range(g.items):
        w = segment(g, n, PLANNED)
        limit = w.length - behind
        least = w.length - g.causal * (g.s_q - 1)
        if HAS_MASK:
            mask_ptr, mask_stride_b, mask_stride_s, mask_stride_t = mask
            mask_row = mask_ptr + w.request.to(gl.int64) * mask_stride_b + query.to(gl.int64) * mask_stride_s
        m = gl.full((64,), -float("inf"), gl.float32, gl.SliceLayout(1, QK))
        l = gl.full((64,), 0.0, gl.float32, gl.SliceLayout(1, QK))
        acc = gl.zeros((64, 256), gl.float32, PV)
        for page in range(w.first, w.end):
            if page == w.first:
                mbarrier.wait(b.q_full, q_phase)
                q_phase ^= 1
            mbarrier.wait(b.k_full.index(stage), phase)
            k_lo = b.k_lo.index(stage)
            s = gl.zeros((64, 64), gl.float32, QK)
            s = warpgroup_mma(b.q_lo, k_lo.permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma(b.q_hi, b.k_hi.index(stage).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma(b.q_rope, b.k_rope.index(stage).permute((1, 0)), s, is_async=True)
            key = page * 64 + gl.arange(0, 64, gl.SliceLayout(0, QK))
            if HAS_MASK:
                reach = gl.expand_dims(key, 0) < gl.expand_dims(limit, 1)
                place = gl.expand_dims(mask_row, 1) + gl.expand_dims(key.to(gl.int64) * mask_stride_t, 0)
                visible = gl.load(place, mask=reach, other=0)  # issued behind the scores, whose wait hides it
                s = warpgroup_mma_wait(0, deps=[s])
                s = gl.where(visible != 0, s, -float("inf"))
            else:
                s = warpgroup_mma_wait(0, deps=[s])
                if (page + 1) * 64 > least:
                    s = gl.where(gl.expand_dims(key, 0) < gl.expand_dims(limit, 1), s, -float("inf"))
            if page == w.end - 1:
                mbarrier.arrive(b.q_empty, count=1)
            p, alpha, m, l = softmax_step(s, m, l, g.scale_log2)
            p16 = p.to(k_lo.dtype)
            mbarrier.wait(b.p_empty, p_phase ^ 1)
            b.p.store(p16)
            b.alpha.store(alpha)
            fence_async_shared()
            mbarrier.arrive(b.p_full, count=1)
            p_phase ^= 1
            if (page + 1) * 64 > w.length:
                _zero_rows_from(w.length - page * 64, k_lo)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, PV)), 1)
            acc = warpgroup_mma(gl.convert_layout(p16, gl.DotOperandLayout(0, PV, 2)), k_lo, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(b.k_empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        if n == g.items - 1:
            gdc_launch_dependents()  # not before: the next kernel's programs would crowd on the few SMs free by then
        inv_l = gl.where(l > 0, 1.0 / l, 0.0)
        mbarrier.wait(b.p_empty, p_phase ^ 1)
        b.alpha.store(inv_l)
        mbarrier.arrive(b.p_full, count=1)
        p_phase ^= 1
        w = segment(g, n, PLANNED)  # once more: kept in registers over the loop, it would cost the accumulator some
        if w.live:
            store_lse(m, l, (lse_ptr, lse_part_ptr, slots_ptr), w, g, PLANNED, QK)
            store_half(acc, inv_l, (o_ptr, o_part_ptr), w, g, 0, PLANNED, PV)


@gluon.jit
def _follow(outputs, b, g, PLANNED: gl.constexpr, STAGES: gl.constexpr):
    """Role of the second warpgroup: output columns 256..511 from the first one's P. It may zero stale values at once,
    since P arrives only when the scores that read the same tile are done."""
    stage = 0
    phase = 0
    p_phase = 0
    for n in range(g.items):
        w = segment(g, n, PLANNED)
        acc = gl.zeros((64, 256), gl.float32, PV)
        for page in range(w.first, w.end):
            mbarrier.wait(b.k_full.index(stage), phase)
            mbarrier.wait(b.p_full, p_phase)
            k_hi = b.k_hi.index(stage)
            if (page + 1) * 64 > w.length:
                _zero_rows_from(w.length - page * 64, k_hi)
            acc = acc * gl.expand_dims(b.alpha.load(gl.SliceLayout(1, PV)), 1)
            acc = warpgroup_mma(b.p, k_hi, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(b.p_empty, count=1)
            mbarrier.arrive(b.k_empty.index(stage), count=1)
            p_phase ^= 1
            stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(b.p_full, p_phase)
        inv_l = b.alpha.load(gl.SliceLayout(1, PV))
        mbarrier.arrive(b.p_empty, count=1)
        p_phase ^= 1
        w = segment(g, n, PLANNED)
        if w.live:
            store_half(acc, inv_l, outputs, w, g, 1, PLANNED, PV)


@gluon.jit(
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
    ],
    do_not_specialize_on_alignment=["seqlens_ptr", "table_ptr", "mask_ptr"],
)
def mla_decode_gluon_kernel(
    q_latent,
    q_rope,
    latent,
    k_rope,
    o_ptr,
    lse_ptr,
    o_part_ptr,
    lse_part_ptr,
    slots_ptr,
    seqlens_ptr,
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
    PAGED: gl.constexpr,
    HAS_MASK: gl.constexpr,
    PLANNED: gl.constexpr,
    LANES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Formula, arguments and roles: at the head of this file."""
    DTYPE: gl.constexpr = latent.dtype
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], DTYPE)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    gl.static_assert(q_latent.dtype == DTYPE, "wgmma multiplies operands of one dtype: queries and cache must agree")
    b = Buffers(
        gl.allocate_shared_memory(DTYPE, [64, 256], HALF),  # q_lo
        gl.allocate_shared_memory(DTYPE, [64, 256], HALF),  # q_hi
        gl.allocate_shared_memory(DTYPE, [64, 64], NARROW),  # q_rope
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),  # q_full
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),  # q_empty
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 256], HALF),  # k_lo
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 256], HALF),  # k_hi
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], NARROW),  # k_rope
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),  # k_full
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),  # k_empty
        gl.allocate_shared_memory(DTYPE, [64, 64], NARROW),  # p
        gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0])),  # alpha
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),  # p_full
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),  # p_empty
    )
    mbarrier.init(b.q_full, count=1)
    mbarrier.init(b.q_empty, count=1)
    mbarrier.init(b.p_full, count=1)
    mbarrier.init(b.p_empty, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(b.k_full.index(stage), count=1)
        mbarrier.init(b.k_empty.index(stage), count=2)
    fence_async_shared()
    gdc_wait()  # for what the kernel ahead has written: all above may run beside its end
    tile, part, item, begin, items, stop = stretch(
        seqlens_ptr, capacity, tiles, splits, rows, requests, pieces, piece_pages, PLANNED, LANES
    )
    g = Problem(
        seqlens_ptr,
        table_ptr,
        table_stride,
        capacity,
        rows,
        heads,
        s_q,
        causal,
        scale_log2,
        pieces,
        piece_pages,
        gl.where(pieces == 1, 1, 0),
        tile,
        part,
        item,
        begin,
        items,
        stop,
    )
    mask = (mask_ptr, mask_stride_b, mask_stride_s, mask_stride_t)
    # Registers of the workers: with the rest for `lead` they use up the 504 = 3 * 168 of `maxnreg`.
    gl.warp_specialize(
        [
            (_lead, ((o_ptr, o_part_ptr, lse_ptr, lse_part_ptr, slots_ptr), mask, b, g, HAS_MASK, PLANNED, STAGES)),
            (_follow, ((o_ptr, o_part_ptr), b, g, PLANNED, STAGES)),
            (_load, ((q_latent, q_rope, latent, k_rope), b, g, PAGED, PLANNED, STAGES)),
        ],
        [4, 1],
        [208, 48],
    )
