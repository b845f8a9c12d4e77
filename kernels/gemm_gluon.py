"""Persistent GEMM for Hopper in Gluon, token rows on the tensor cores' M side: dense, by groups of rows, and masked.

    y[r, :] = x[r, :] . w[g]^T        for every row r of group g;    float32 accumulation
    y[r, :] = silu(x[r, :] . gate[g]^T) * (x[r, :] . up[g]^T)         if SWIGLU: w[g] is gate over up, y half as wide

16-bit types accumulate in the tensor cores. float8_e4m3fn comes with a scale for each 1 x 128 of x and each 128 x 128
of w: the product of 128 columns of K is made from zero and then promoted, scaled, into float32 registers, because the
tensor cores' own accumulator for FP8 keeps fewer bits.

    x [rows, K], y [rows, N]               tensor maps; any row stride
    w [G, N, K], or [G, K, N] if KN        tensor map; which of the two is contiguous is free for 16-bit types
    x_scale [ceil(K/128), rows_pad] float32    pointer; with masked groups one such table a group
    w_scale [G, ceil(N/128), ceil(K/128)] float32
    bounds [G] int32, read on the device   LAYOUT "ends": group g owns rows bounds[g-1] .. bounds[g] - 1
                                           LAYOUT "masked": group g owns the first bounds[g] of its `capacity` rows
                                           LAYOUT "dense": not read, one group owns all rows

One program an SM makes tile after tile of BM x BN outputs; gemm_gluon_items.py says which. Every role finds its tiles
by walking along `bounds`, so that nothing is padded, sorted or known on the host, and an empty group costs one load.
Rows behind the last group's end are written as zeros ("ends") or left alone ("masked").

    load      one warp: x and w of a step, as soon as all consumers have left a stage of the ring
    consume   CONSUMERS warpgroups: 64 rows each of the tile; scales; the way to the next tile behind a running product

A step is 128 bytes of K. Rows of a group's last tile that belong to the next group are multiplied with the rest but
stored by nobody: 64 rows that all belong to the tile's group leave by TMA, others row by row under a mask, and a
warpgroup whose 64 rows are all foreign only keeps the ring turning.

Limits: compute capability 9.0; bases and strides multiples of 16 bytes; N a multiple of 8; FP8 only with K contiguous.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dscompile.kernels.gemm_gluon_items import Problem, first_tile, next_tile
from dscompile.kernels.launch import aggregate, tma_load, tma_store


@aggregate
class Ring:
    """Stages in shared memory and their barriers."""

    a: gl.shared_memory_descriptor  # [STAGES, BM, step]
    b: gl.shared_memory_descriptor  # [STAGES, BN, step], or [STAGES, step, BN] if KN
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _stage_before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _load(x, w, ring, g, KN: gl.constexpr, SWIGLU: gl.constexpr, LAYOUT: gl.constexpr):
    """Role of the loading warp."""
    STAGES: gl.constexpr = ring.a.type.shape[0]
    BM: gl.constexpr = ring.a.type.shape[1]
    STEP: gl.constexpr = ring.a.type.shape[2]
    BN: gl.constexpr = ring.b.type.shape[2] if KN else ring.b.type.shape[1]
    BOX: gl.constexpr = w.block_type.shape[2] if KN else w.block_type.shape[1]
    BYTES: gl.constexpr = x.block_type.nbytes + BN // BOX * w.block_type.nbytes
    stage = 0
    phase = 0
    t = first_tile(g, BM, LAYOUT)
    while t.group < g.limit:
        for k in range(gl.where(t.group < g.groups, g.k_steps, 0)):
            mbarrier.wait(ring.empty.index(stage), phase ^ 1)
            full = ring.full.index(stage)
            mbarrier.expect(full, BYTES)
            tma_load(x, [t.row, k * STEP], full, ring.a.index(stage))
            for i in gl.static_range(BN // BOX):
                if SWIGLU:
                    first = t.column * (BN // 2) + i * g.n
                else:
                    first = t.column * BN + i * BOX
                if KN:
                    tma_load(w, [t.group, k * STEP, first], full, ring.b.index(stage).slice(i * BOX, BOX, 1))
                else:
                    tma_load(w, [t.group, first, k * STEP], full, ring.b.index(stage).slice(i * BOX, BOX, 0))
            stage, phase = _next_stage(stage, phase, STAGES)
        t = next_tile(t, g, BM, LAYOUT)


@gluon.jit
def _turn(ring, stage, phase, k_steps):
    """Leave every stage of a tile as it fills: this warpgroup has no row in it."""
    for _ in range(k_steps):
        mbarrier.wait(ring.full.index(stage), phase)
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage, phase = _next_stage(stage, phase, ring.a.type.shape[0])
    return stage, phase


@gluon.jit
def _issue(acc, ring, stage, phase, ROW: gl.constexpr, KN: gl.constexpr, USE_ACC: gl.constexpr):
    """Start a step's product of 16-bit types; one more may run."""
    mbarrier.wait(ring.full.index(stage), phase)
    b = ring.b.index(stage)
    if not KN:
        b = b.permute((1, 0))
    acc = warpgroup_mma(ring.a.index(stage).slice(ROW, 64), b, acc, use_acc=USE_ACC, is_async=True)
    return warpgroup_mma_wait(1, deps=[acc])


@gluon.jit
def _multiply(ring, stage, phase, t, g, ROW: gl.constexpr, KN: gl.constexpr, LAYOUT: gl.constexpr):
    """[64, BN], the tile's product over K of 16-bit types: a step is multiplied while the next is awaited."""
    STAGES: gl.constexpr = ring.a.type.shape[0]
    BM: gl.constexpr = ring.a.type.shape[1]
    BN: gl.constexpr = ring.b.type.shape[2] if KN else ring.b.type.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros((64, BN), gl.float32, MMA)
    acc = _issue(acc, ring, stage, phase, ROW, KN, False)
    following = next_tile(t, g, BM, LAYOUT)
    stage, phase = _next_stage(stage, phase, STAGES)
    for _ in range(1, g.k_steps):
        acc = _issue(acc, ring, stage, phase, ROW, KN, True)
        mbarrier.arrive(ring.empty.index(_stage_before(stage, STAGES)), count=1)
        stage, phase = _next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(ring.empty.index(_stage_before(stage, STAGES)), count=1)
    return acc, stage, phase, following


@gluon.jit
def _scales_of(scales, t, g, ROW: gl.constexpr, LAYOUT: gl.constexpr, BY_ROW: gl.constexpr):
    """Pointers to the first step's scales: of x for the warpgroup's 64 rows, of w for the tile's columns."""
    x_scale, w_scale = scales
    row = gl.minimum(t.row + ROW + gl.arange(0, 64, BY_ROW), t.end - 1)  # a foreign row's may be out of bounds
    if LAYOUT == "masked":
        row += t.group * (g.k_steps * g.scale_stride - g.capacity)
    return x_scale + row, w_scale + t.group * gl.cdiv(g.n, 128) * g.k_steps


@gluon.jit
def _multiply_scaled(scales, ring, stage, phase, t, g, ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """[64, BN], the tile's scaled product over K of FP8; BN <= 128, so one scale of w a step."""
    STAGES: gl.constexpr = ring.a.type.shape[0]
    BM: gl.constexpr = ring.a.type.shape[1]
    BN: gl.constexpr = ring.b.type.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    x_scale, w_scale = _scales_of(scales, t, g, ROW, LAYOUT, gl.SliceLayout(1, MMA))
    w_scale += t.column * BN // 128 * g.k_steps
    part = gl.zeros((64, BN), gl.float32, MMA)
    acc = gl.zeros((64, BN), gl.float32, MMA)
    x_next = gl.load(x_scale)
    w_next = gl.load(w_scale)
    following = t
    for k in range(g.k_steps):
        scale = x_next * w_next
        mbarrier.wait(ring.full.index(stage), phase)
        a = ring.a.index(stage).slice(ROW, 64)
        part = warpgroup_mma(a, ring.b.index(stage).permute((1, 0)), part, use_acc=False, is_async=True)
        more = (k + 1 < g.k_steps).to(gl.int32)
        x_scale += more * g.scale_stride
        w_scale += more
        x_next = gl.load(x_scale)
        w_next = gl.load(w_scale)
        if k == 0:
            following = next_tile(t, g, BM, LAYOUT)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(ring.empty.index(stage), count=1)
        acc += part * gl.expand_dims(scale, 1)
        stage, phase = _next_stage(stage, phase, STAGES)
    return acc, stage, phase, following


@gluon.jit
def _multiply_scaled_twice(scales, ring, stage, phase, t, g, ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """`_multiply_scaled` for 256 columns: two accumulators of 128, one partial product at a time."""
    STAGES: gl.constexpr = ring.a.type.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    x_scale, w_scale = _scales_of(scales, t, g, ROW, LAYOUT, gl.SliceLayout(1, MMA))
    w_scale += 2 * t.column * g.k_steps
    beside = gl.where(2 * t.column + 1 < gl.cdiv(g.n, 128), g.k_steps, 0)
    part = gl.zeros((64, 128), gl.float32, MMA)
    left = gl.zeros((64, 128), gl.float32, MMA)
    right = gl.zeros((64, 128), gl.float32, MMA)
    x_next = gl.load(x_scale)
    left_next = gl.load(w_scale)
    right_next = gl.load(w_scale + beside)
    for k in range(g.k_steps):
        scale_left = x_next * left_next
        scale_right = x_next * right_next
        mbarrier.wait(ring.full.index(stage), phase)
        a = ring.a.index(stage).slice(ROW, 64)
        b = ring.b.index(stage)
        part = warpgroup_mma(a, b.slice(0, 128).permute((1, 0)), part, use_acc=False, is_async=True)
        more = (k + 1 < g.k_steps).to(gl.int32)
        x_scale += more * g.scale_stride
        w_scale += more
        x_next = gl.load(x_scale)
        left_next = gl.load(w_scale)
        right_next = gl.load(w_scale + beside)
        part = warpgroup_mma_wait(0, deps=[part])
        left += part * gl.expand_dims(scale_left, 1)
        # Nothing to wait for: it only keeps the next product from starting in other registers, which aren't there.
        part, left = warpgroup_mma_wait(0, deps=[part, left])
        part = warpgroup_mma(a, b.slice(128, 128).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(ring.empty.index(stage), count=1)
        right += part * gl.expand_dims(scale_right, 1)
        stage, phase = _next_stage(stage, phase, STAGES)
    return left, right, stage, phase


@gluon.jit
def _halves(values):
    """[64, 2*W] -> its left and its right [64, W], no element changing its thread."""
    W: gl.constexpr = values.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    left, right = values.reshape([64, 2, W]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, LAYOUT, assert_trivial=True), gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def _store_piece(values, y, y_ptr, staging, row, column, end, g, LAYOUT: gl.constexpr, PENDING: gl.constexpr):
    """Write [64, 64] outputs from `row` and `column` on, as far as their rows lie before `end`, through `staging`,
    which is free when at most PENDING of this warpgroup's stores are still reading."""
    if LAYOUT == "dense":  # rows past the end of y are cut off by TMA's own rule
        tma.store_wait(PENDING)
        staging.store(values.to(y.dtype))
        fence_async_shared()
        tma_store(y, [row, column], staging)
    elif row + 64 <= end:
        tma.store_wait(PENDING)
        staging.store(values.to(y.dtype))
        fence_async_shared()
        tma_store(y, [row, column], staging)
    else:
        tma.store_wait(0)
        staging.store(values.to(y.dtype))
        BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        _store_some(staging.load(BY_ROW), y_ptr, row, column, end, g)


@gluon.jit
def _store_some(values, y_ptr, row, column, end, g):
    """Write [64, W] outputs by 16 bytes a thread: rows before `end`, columns that y has."""
    LAYOUT: gl.constexpr = values.type.layout
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = column + gl.arange(0, values.shape[1], gl.SliceLayout(0, LAYOUT))
    # n is a multiple of 8, which the compiler learns only from this spelling.
    place = y_ptr + gl.expand_dims(rows.to(gl.int64) * (g.n // 8 * 8), 1) + gl.expand_dims(columns, 0)
    gl.store(place, values, mask=gl.expand_dims(rows < end, 1) & gl.expand_dims(columns // 8 < g.n // 8, 0))


@gluon.jit
def _store(values, outputs, staging, row, column, end, g, WG: gl.constexpr, LAYOUT: gl.constexpr):
    """Write [64, W] outputs, W at most 256, in pieces that take turns in two buffers."""
    y, y_ptr = outputs
    W: gl.constexpr = values.shape[1]
    if W == 64:
        _store_piece(values, y, y_ptr, staging.index(2 * WG), row, column, end, g, LAYOUT, 0)
    elif W == 128:
        left, right = _halves(values)
        _store_piece(left, y, y_ptr, staging.index(2 * WG), row, column, end, g, LAYOUT, 1)
        _store_piece(right, y, y_ptr, staging.index(2 * WG + 1), row, column + 64, end, g, LAYOUT, 1)
    else:
        left, right = _halves(values)
        first, second = _halves(left)
        third, fourth = _halves(right)
        _store_piece(first, y, y_ptr, staging.index(2 * WG), row, column, end, g, LAYOUT, 1)
        _store_piece(second, y, y_ptr, staging.index(2 * WG + 1), row, column + 64, end, g, LAYOUT, 1)
        _store_piece(third, y, y_ptr, staging.index(2 * WG), row, column + 128, end, g, LAYOUT, 1)
        _store_piece(fourth, y, y_ptr, staging.index(2 * WG + 1), row, column + 192, end, g, LAYOUT, 1)


@gluon.jit
def _consume(
    outputs,
    staging,
    scales,
    ring,
    g,
    WG: gl.constexpr,
    KN: gl.constexpr,
    SWIGLU: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Role of warpgroup WG: rows 64*WG .. 64*WG + 63 of each tile."""
    BM: gl.constexpr = ring.a.type.shape[1]
    BN: gl.constexpr = ring.b.type.shape[2] if KN else ring.b.type.shape[1]
    FP8: gl.constexpr = ring.a.dtype == gl.float8e4nv
    ROW: gl.constexpr = 64 * WG
    stage = 0
    phase = 0
    t = first_tile(g, BM, LAYOUT)
    while t.group < g.limit:
        row = t.row + ROW
        if t.group == g.groups:
            BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
            WIDTH: gl.constexpr = BN // 2 if SWIGLU else BN
            zeros = gl.zeros((64, WIDTH), outputs[0].dtype, BY_ROW)
            _store_some(zeros, outputs[1], row, t.column * WIDTH, t.end, g)
            t = next_tile(t, g, BM, LAYOUT)
        elif row >= t.end:
            stage, phase = _turn(ring, stage, phase, g.k_steps)
            t = next_tile(t, g, BM, LAYOUT)
        elif not FP8:
            acc, stage, phase, following = _multiply(ring, stage, phase, t, g, ROW, KN, LAYOUT)
            if SWIGLU:
                gate, up = _halves(acc)
                acc = gate / (1 + gl.exp(-gate)) * up
            _store(acc, outputs, staging, row, t.column * acc.shape[1], t.end, g, WG, LAYOUT)
            t = following
        elif BN <= 128:
            acc, stage, phase, following = _multiply_scaled(scales, ring, stage, phase, t, g, ROW, LAYOUT)
            _store(acc, outputs, staging, row, t.column * BN, t.end, g, WG, LAYOUT)
            t = following
        else:
            left, right, stage, phase = _multiply_scaled_twice(scales, ring, stage, phase, t, g, ROW, LAYOUT)
            _store(left, outputs, staging, row, t.column * BN, t.end, g, WG, LAYOUT)
            _store(right, outputs, staging, row, t.column * BN + 128, t.end, g, WG, LAYOUT)
            t = next_tile(t, g, BM, LAYOUT)  # only now: the product leaves no registers for the walk over the groups
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["groups", "capacity", "rows", "n", "tiles_n", "k_steps", "scale_stride", "raster"],
    do_not_specialize_on_alignment=["bounds_ptr", "x_scale_ptr", "w_scale_ptr"],
)
def gemm_gluon_kernel(
    x,
    w,
    y,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bounds_ptr,
    groups,
    capacity,
    rows,
    n,
    tiles_n,
    k_steps,
    scale_stride,
    raster,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    KN: gl.constexpr,
    SWIGLU: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Formula, arguments and roles: at the head of this file."""
    DTYPE: gl.constexpr = x.dtype
    BM: gl.constexpr = x.block_type.shape[0]
    STEP: gl.constexpr = x.block_type.shape[1]
    FP8: gl.constexpr = DTYPE == gl.float8e4nv
    B_SHAPE: gl.constexpr = [STEP, BN] if KN else [BN, STEP]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    gl.static_assert(w.dtype == DTYPE, "wgmma multiplies operands of one dtype: x and w must agree")
    gl.static_assert(BM == 64 * CONSUMERS, "a warpgroup takes 64 rows of the tile")
    gl.static_assert(not (FP8 and (KN or SWIGLU)), "FP8 needs K contiguous and has no fused activation")
    ring = Ring(
        gl.allocate_shared_memory(DTYPE, [STAGES, BM, STEP], gl.NVMMASharedLayout.get_default_for([BM, STEP], DTYPE)),
        gl.allocate_shared_memory(DTYPE, [STAGES] + B_SHAPE, gl.NVMMASharedLayout.get_default_for(B_SHAPE, DTYPE)),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    staging = gl.allocate_shared_memory(y.dtype, [2 * CONSUMERS] + y.block_type.shape, y.layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(stage), count=1)
        mbarrier.init(ring.empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    limit = groups + (LAYOUT == "ends")
    g = Problem(bounds_ptr, limit, groups, capacity, rows, n, tiles_n, k_steps, scale_stride, raster)
    outputs = (y, y_ptr)
    scales = (x_scale_ptr, w_scale_ptr)
    # Registers of the workers: with the rest for the first consumer they use up 504 = 3 * 168 of `maxnreg`.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (outputs, staging, scales, ring, g, 0, KN, SWIGLU, LAYOUT)),
                (_load, (x, w, ring, g, KN, SWIGLU, LAYOUT)),
            ],
            [1],
            [40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (outputs, staging, scales, ring, g, 0, KN, SWIGLU, LAYOUT)),
                (_consume, (outputs, staging, scales, ring, g, 1, KN, SWIGLU, LAYOUT)),
                (_load, (x, w, ring, g, KN, SWIGLU, LAYOUT)),
            ],
            [4, 1],
            [232, 40],
        )
