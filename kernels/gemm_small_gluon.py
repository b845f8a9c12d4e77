"""GEMM of few tokens for Hopper in Gluon: the weights are streamed once, at the speed of memory.

    y[t, n] = sum_k x[t, k] w[g, n, k]                                        16-bit types
    y[t, n] = sum_b xs[b, t] ws[g, n // 128, b] sum_{k in block b} x w        e4m3, blocks of 128 k
    y[t, f] = silu(gate) * up, gate = row f of w[g], up = row F + f           SWIGLU, products in float32

Operands are swapped: 64 rows of weights are the M side of a wgmma, tokens its N side (8 to 128), so that a few tokens
waste no tensor-core work and a tile of y^T [weights, tokens] accumulates in registers. Tensor maps and pointers:

    w [G, N, K], or its memory [G, K, N] if W_N_MAJOR (16 bits only)     boxes of 64 rows x BK
    x [L, M, K], xs [L, ceil(K/128), M_pad] float32 (FP8)                boxes of BT tokens
    ws [G, ceil(N/128), ceil(K/128)] float32 (FP8), y [L, M, N] of 16 bits, or [SPLITS, M, N] float32
    ends [G] int32: group g owns tokens ends[g-1] .. ends[g] - 1 ("ends"), or the first ends[g] of x[g] ("masked")

Work items are (group, weight tile, part of K, token tile), the last fastest, so that the token tiles of one weight tile
run side by side and read it from memory once. Groups without tokens have no items. Programs are persistent and take
every P-th item; each role finds its items itself from `ends`:

    load       one warp: per stage the boxes of a weight tile and one of tokens, as soon as the stage is free
    consume    1 or 2 warpgroups: 64 * BLOCKS weight rows of the tile each (SWIGLU: a block of gate rows and one of up
               rows)

A token tile may reach past its group's tokens on either side, into a neighbour's or what lies behind: the columns of a
wgmma are independent, so that these, NaN included, are computed and dropped. Rows past a tensor's end arrive as zeros
by TMA's own rule. The e4m3 product of 128 k is accumulated by the tensor cores from zero and added up in float32 with
its scales: their own accumulator keeps fewer bits. Parts of K leave float32 sums, joined by gemm_small_join.py.

Limits: compute capability 9.0; bases and strides multiples of 16 bytes; K of any size, the last block ends in zeros.
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

from dscompile.kernels.launch import aggregate, tma_load


@aggregate
class Config:
    """What is fixed when the kernel is compiled."""

    BT: gl.constexpr  # tokens of a tile
    BK: gl.constexpr
    BLOCKS: gl.constexpr  # of 64 weight rows, of a consumer
    BOXES: gl.constexpr  # and of the tile
    STAGES: gl.constexpr
    SPLITS: gl.constexpr
    LAYOUT: gl.constexpr  # "dense", "ends" or "masked"
    GROUPS: gl.constexpr  # a power of two, at least `groups`
    SWIGLU: gl.constexpr
    FP8: gl.constexpr
    W_N_MAJOR: gl.constexpr


@aggregate
class Problem:
    """What every role must know of the launch."""

    ends: gl.tensor
    groups: gl.tensor
    tokens: gl.tensor  # of a batch: M
    tiles: gl.tensor  # of weights
    k_blocks: gl.tensor  # of BK
    k_scales: gl.tensor  # of 128
    n_out: gl.tensor  # row length of y
    up: gl.tensor  # first weight row of the up half


@aggregate
class Buffers:
    """Shared memory and its barriers, STAGES of each."""

    w: gl.shared_memory_descriptor
    x: gl.shared_memory_descriptor
    xs: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@aggregate
class Item:
    """A work item: BT tokens of a batch from `token` on, of which lead .. left - 1 are the group's; weight rows of
    `tile`; blocks first .. end - 1 of K, which are part `part`."""

    group: gl.tensor
    batch: gl.tensor
    token: gl.tensor
    lead: gl.tensor
    left: gl.tensor
    tile: gl.tensor
    part: gl.tensor
    first: gl.tensor
    end: gl.tensor


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _slack(begin, c):
    """Tokens in front of a group that its first tile takes in: the scales' box must start at a multiple of 16 bytes."""
    if c.FP8:
        slack = begin % 4
    else:
        slack = begin * 0
    return slack


@gluon.jit
def _token_tiles(g, c, VECTOR: gl.constexpr):
    """Token tiles of groups 0 .. i, for each i: [GROUPS], in registers. Dense: unused."""
    group = gl.arange(0, c.GROUPS, VECTOR)
    if c.LAYOUT == "dense":
        upto = group
    else:
        rows = gl.load(g.ends + group, mask=group < g.groups, other=0)
        slack = group * 0
        if c.LAYOUT == "ends":
            begin = gl.load(g.ends + group - 1, mask=(group > 0) & (group < g.groups), other=0)
            rows -= begin
            slack = _slack(begin, c)
        upto = gl.associative_scan(gl.where(rows > 0, (rows + slack + c.BT - 1) // c.BT, 0), 0, _add)
    return upto


@gluon.jit
def _count(g, c, upto):
    """Work items of the launch."""
    token_tiles = gl.cdiv(g.tokens, c.BT) if c.LAYOUT == "dense" else gl.max(upto, 0)
    return token_tiles * g.tiles * c.SPLITS


@gluon.jit
def _item(i, g, c, upto):
    units = g.tiles * c.SPLITS
    group = i * 0
    before = i * 0
    begin = i * 0
    rows = g.tokens
    if c.LAYOUT != "dense":
        behind = upto <= i // units  # groups that end before this item
        group = gl.sum(behind.to(gl.int32), 0)
        before = gl.max(gl.where(behind, upto, 0), 0)
        rows = gl.load(g.ends + group)
    batch = group
    if c.LAYOUT == "ends":
        batch = i * 0
        begin = gl.load(g.ends + group - 1, mask=group > 0, other=0)
        rows -= begin
    slack = _slack(begin, c)
    token_tiles = gl.cdiv(rows + slack, c.BT)
    inner = i - before * units
    unit = inner // token_tiles
    skip = (inner % token_tiles) * c.BT
    part = unit % c.SPLITS
    per_part = gl.cdiv(g.k_blocks, c.SPLITS)
    first = part * per_part
    end = gl.minimum(first + per_part, g.k_blocks)  # at or before `first` where nothing is left for this part
    lead = gl.maximum(slack - skip, 0)
    return Item(group, batch, begin - slack + skip, lead, rows + slack - skip, unit // c.SPLITS, part, first, end)


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _weight_row(w, g, c, SIDE: gl.constexpr):
    """First weight row of box SIDE of an item's tile. Under SWIGLU, odd boxes are the up rows of those before."""
    if c.SWIGLU:
        row = w.tile * (32 * c.BOXES) + (SIDE // 2) * 64 + (SIDE % 2) * g.up
    else:
        row = w.tile * (64 * c.BOXES) + SIDE * 64
    return row


@gluon.jit
def _load(w_map, x_map, xs_map, b, g, c):
    """Role of the loading warp."""
    SCALES: gl.constexpr = xs_map.block_type.nbytes * (c.BK // 128) if c.FP8 else 0
    BYTES: gl.constexpr = w_map.block_type.nbytes * c.BOXES + x_map.block_type.nbytes + SCALES
    gdc_wait()
    upto = _token_tiles(g, c, gl.BlockedLayout([1], [32], [1], [0]))
    stage = 0
    phase = 0
    for i in range(gl.program_id(0), _count(g, c, upto), gl.num_programs(0)):
        w = _item(i, g, c, upto)
        for kb in range(w.first, w.end):
            mbarrier.wait(b.empty.index(stage), phase ^ 1)
            full = b.full.index(stage)
            mbarrier.expect(full, BYTES)
            for side in gl.static_range(c.BOXES):
                row = _weight_row(w, g, c, side)
                box = b.w.index(stage * c.BOXES + side)
                if c.W_N_MAJOR:
                    tma_load(w_map, [w.group, kb * c.BK, row], full, box)
                else:
                    tma_load(w_map, [w.group, row, kb * c.BK], full, box)
            tma_load(x_map, [w.batch, w.token, kb * c.BK], full, b.x.index(stage))
            if c.FP8:
                for sub in gl.static_range(c.BK // 128):
                    block = kb * (c.BK // 128) + sub
                    tma_load(xs_map, [w.batch, block, w.token], full, b.xs.index(stage * (c.BK // 128) + sub))
            stage, phase = _next_stage(stage, phase, c.STAGES)


@gluon.jit
def _sum_16_bit(b, c, w, stage, phase, SELF: gl.constexpr, MMA: gl.constexpr):
    """An item's sums over its k, of consumer SELF's first block and its second, if it has one: [64, BT] each."""
    FIRST: gl.constexpr = SELF * c.BLOCKS
    acc0 = gl.zeros((64, c.BT), gl.float32, MMA)
    acc1 = gl.zeros((64, c.BT), gl.float32, MMA)
    for _ in range(w.first, w.end):
        mbarrier.wait(b.full.index(stage), phase)
        x = b.x.index(stage).permute((1, 0))
        box = b.w.index(stage * c.BOXES + FIRST)
        acc0 = warpgroup_mma(box.permute((1, 0)) if c.W_N_MAJOR else box, x, acc0, is_async=True)
        if c.BLOCKS == 2:
            box = b.w.index(stage * c.BOXES + FIRST + 1)
            acc1 = warpgroup_mma(box.permute((1, 0)) if c.W_N_MAJOR else box, x, acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        mbarrier.arrive(b.empty.index(stage), count=1)
        stage, phase = _next_stage(stage, phase, c.STAGES)
    return acc0, acc1, stage, phase


@gluon.jit
def _scale(scales, kb, last):
    return gl.load(scales + gl.minimum(kb, last))


@gluon.jit
def _sum_fp8(scales0, scales1, b, g, c, w, stage, phase, SELF: gl.constexpr, MMA: gl.constexpr):
    """The same over scaled blocks of 128 k. Weight scales may lie in memory, more than a block's time away: those of
    the next four blocks, p and under SWIGLU q, are always on their way."""
    FIRST: gl.constexpr = SELF * c.BLOCKS
    SUBS: gl.constexpr = c.BK // 128
    zero = gl.zeros((64, c.BT), gl.float32, MMA)
    acc0 = gl.zeros((64, c.BT), gl.float32, MMA)
    acc1 = gl.zeros((64, c.BT), gl.float32, MMA)
    kb = w.first * SUBS
    last = gl.maximum(gl.minimum(w.end * SUBS, g.k_scales) - 1, 0)
    p0, p1 = _scale(scales0, kb, last), _scale(scales0, kb + 1, last)
    p2, p3 = _scale(scales0, kb + 2, last), _scale(scales0, kb + 3, last)
    q0, q1, q2, q3 = p0, p1, p2, p3
    if c.SWIGLU:
        q0, q1 = _scale(scales1, kb, last), _scale(scales1, kb + 1, last)
        q2, q3 = _scale(scales1, kb + 2, last), _scale(scales1, kb + 3, last)
    for _ in range(w.first, w.end):
        mbarrier.wait(b.full.index(stage), phase)
        for sub in gl.static_range(SUBS):
            x = b.x.index(stage).permute((1, 0)).slice(128 * sub, 128)
            box = b.w.index(stage * c.BOXES + FIRST).slice(128 * sub, 128, 1)
            part0 = warpgroup_mma(box, x, zero, use_acc=False, is_async=True)
            part1 = part0
            if c.BLOCKS == 2:
                box = b.w.index(stage * c.BOXES + FIRST + 1).slice(128 * sub, 128, 1)
                part1 = warpgroup_mma(box, x, zero, use_acc=False, is_async=True)
            if c.BT == 128:  # 32 scales a thread beside 128 sums: better late than spilled
                part0 = warpgroup_mma_wait(0, deps=[part0])
            xs = b.xs.index(stage * SUBS + sub).slice(0, c.BT).load(gl.SliceLayout(0, MMA))
            scale0 = gl.expand_dims(xs * p0, 0)
            scale1 = scale0
            p0, p1, p2, p3 = p1, p2, p3, _scale(scales0, kb + 4, last)
            if c.SWIGLU:
                scale1 = gl.expand_dims(xs * q0, 0)
                q0, q1, q2, q3 = q1, q2, q3, _scale(scales1, kb + 4, last)
            kb += 1
            if c.BT < 128:
                part0 = warpgroup_mma_wait(c.BLOCKS - 1, deps=[part0])
            if c.BLOCKS == 2:
                acc0 += part0 * scale0
                part1 = warpgroup_mma_wait(0, deps=[part1])
            if sub == SUBS - 1:
                mbarrier.arrive(b.empty.index(stage), count=1)
            if c.BLOCKS == 2:
                acc1 += part1 * scale1
            else:
                acc0 += part0 * scale0
        stage, phase = _next_stage(stage, phase, c.STAGES)
    return acc0, acc1, stage, phase


@gluon.jit
def _store(acc, y_ptr, g, c, w, row, MMA: gl.constexpr):
    """Write a piece of y^T, acc [64, BT], transposed through shared memory so that threads run along rows of y.

    Parts go out as they lie: 8 lanes' float32 values of one token fill a sector of 32 bytes anyway.
    """
    RUN: gl.constexpr = 8 if c.BT >= 16 else 4
    TURNED: gl.constexpr = gl.BlockedLayout([RUN, 1], [64 // RUN, RUN // 2], [1, 4], [0, 1])
    ACROSS: gl.constexpr = MMA if c.SPLITS > 1 else TURNED
    out = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), ACROSS)
    n = row + gl.arange(0, 64, gl.SliceLayout(1, ACROSS))
    t = gl.arange(0, c.BT, gl.SliceLayout(0, ACROSS))
    first = (w.part + w.batch).to(gl.int64) * g.tokens + w.token  # parts and batches don't meet
    place = (y_ptr + first * g.n_out) + (gl.expand_dims(t * g.n_out, 0) + gl.expand_dims(n, 1))
    mask = t < w.left
    if c.FP8:
        mask &= t >= w.lead
    gl.store(place, out, mask=gl.expand_dims(mask, 0) & gl.expand_dims(n < g.n_out, 1))


@gluon.jit
def _zero_rest(y_ptr, g):
    """Rows of y behind the last group."""
    FLAT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    column = gl.arange(0, 1024, FLAT)
    zeros = gl.zeros((1024,), y_ptr.dtype.element_ty, FLAT)
    for row in range(gl.load(g.ends + g.groups - 1) + gl.program_id(0), g.tokens, gl.num_programs(0)):
        for start in range(0, g.n_out, 1024):
            place = y_ptr + row.to(gl.int64) * g.n_out + start + column
            gl.store(place, zeros, mask=start + column < g.n_out)


@gluon.jit
def _consume(y_ptr, ws_ptr, b, g, c, SELF: gl.constexpr):
    """Role of consumer SELF."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BT, 32 if c.FP8 else 16]
    )
    gdc_wait()
    upto = _token_tiles(g, c, gl.BlockedLayout([1], [32], [4], [0]))
    stage = 0
    phase = 0
    for i in range(gl.program_id(0), _count(g, c, upto), gl.num_programs(0)):
        w = _item(i, g, c, upto)
        row = _weight_row(w, g, c, SELF * c.BLOCKS)
        if c.FP8:
            strips = gl.cdiv(g.n_out + g.up, 128)
            scales = ws_ptr + w.group.to(gl.int64) * strips * g.k_scales
            scales0 = scales + gl.minimum(row // 128, strips - 1) * g.k_scales
            scales1 = scales + gl.minimum((row + g.up) // 128, strips - 1) * g.k_scales
            acc0, acc1, stage, phase = _sum_fp8(scales0, scales1, b, g, c, w, stage, phase, SELF, MMA)
        else:
            acc0, acc1, stage, phase = _sum_16_bit(b, c, w, stage, phase, SELF, MMA)
        if c.SWIGLU:
            h = acc0 / (1 + gl.exp2(acc0 * -1.4426950408889634)) * acc1
            _store(h, y_ptr, g, c, w, row, MMA)
        else:
            _store(acc0, y_ptr, g, c, w, row, MMA)
            if c.BLOCKS == 2:
                _store(acc1, y_ptr, g, c, w, row + 64, MMA)
    if c.LAYOUT == "ends" and c.SPLITS == 1 and SELF == 0:
        _zero_rest(y_ptr, g)


@gluon.jit(
    do_not_specialize=["groups", "tokens", "tiles", "k_blocks", "k_scales", "up"],
    do_not_specialize_on_alignment=["ends_ptr", "ws_ptr"],
)
def gemm_small_kernel(
    w_map,
    x_map,
    xs_map,
    y_ptr,
    ws_ptr,
    ends_ptr,
    groups,
    tokens,
    tiles,
    k_blocks,
    k_scales,
    n_out,
    up,
    BT: gl.constexpr,
    BLOCKS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    WORKER_REGS: gl.constexpr,
    LOAD_REGS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    LAYOUT: gl.constexpr,
    GROUPS: gl.constexpr,
    SWIGLU: gl.constexpr,
    W_N_MAJOR: gl.constexpr,
):
    """Formulas, arguments and roles: at the head of this file."""
    DTYPE: gl.constexpr = w_map.dtype
    FP8: gl.constexpr = DTYPE.primitive_bitwidth == 8
    BK: gl.constexpr = x_map.block_type.shape[2]
    BOXES: gl.constexpr = BLOCKS * CONSUMERS
    W_BOX: gl.constexpr = [BK, 64] if W_N_MAJOR else [64, BK]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    gl.static_assert(x_map.dtype == DTYPE, "wgmma multiplies operands of one dtype: tokens and weights must agree")
    gl.static_assert(BLOCKS == 2 or not SWIGLU, "a consumer takes a block of gate rows and one of up rows")
    gl.static_assert(LAYOUT == "ends" or LAYOUT == "dense" or SPLITS == 1, "parts and batches share an index of y")
    gl.static_assert(BK % 128 == 0 or not FP8, "scales are one a block of 128 k")
    gl.static_assert(not (FP8 and W_N_MAJOR), "wgmma reads 8-bit operands with k contiguous only")
    c = Config(
        gl.constexpr(BT),
        gl.constexpr(BK),
        gl.constexpr(BLOCKS),
        gl.constexpr(BOXES),
        gl.constexpr(STAGES),
        gl.constexpr(SPLITS),
        gl.constexpr(LAYOUT),
        gl.constexpr(GROUPS),
        gl.constexpr(SWIGLU),
        gl.constexpr(FP8),
        gl.constexpr(W_N_MAJOR),
    )
    b = Buffers(
        gl.allocate_shared_memory(DTYPE, [STAGES * BOXES] + W_BOX, gl.NVMMASharedLayout.get_default_for(W_BOX, DTYPE)),
        gl.allocate_shared_memory(DTYPE, [STAGES, BT, BK], gl.NVMMASharedLayout.get_default_for([BT, BK], DTYPE)),
        gl.allocate_shared_memory(  # at least 128 bytes a stage: TMA's alignment
            gl.float32, [STAGES * (BK // 128) if FP8 else 1, BT if BT > 32 else 32], gl.NVMMASharedLayout(0, 32, 1)
        ),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    for stage in gl.static_range(STAGES):
        mbarrier.init(b.full.index(stage), count=1)
        mbarrier.init(b.empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    gdc_launch_dependents()
    g = Problem(ends_ptr, groups, tokens, tiles, k_blocks, k_scales, n_out, up)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (y_ptr, ws_ptr, b, g, c, 0)),
                (_load, (w_map, x_map, xs_map, b, g, c)),
            ],
            [1],
            [LOAD_REGS],
        )
    else:
        gl.static_assert(CONSUMERS == 2, "registers suffice for one or two consumers")
        gl.warp_specialize(
            [
                (_consume, (y_ptr, ws_ptr, b, g, c, 0)),
                (_consume, (y_ptr, ws_ptr, b, g, c, 1)),
                (_load, (w_map, x_map, xs_map, b, g, c)),
            ],
            [4, 1],
            [WORKER_REGS, LOAD_REGS],
        )
