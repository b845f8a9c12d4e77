"""Counting what a router chose and naming a replica for each choice, in plain Triton and integers.

    counter[e] += rows whose id is e            out[i] = log2phy[e, r],  e = idx[i],  0 <= r < logcnt[e]

Rows are choices, i = t K + k. Ids below 0 stay, those of `experts` or more become `slots`. Inputs: idx int64 or int32
[T, K], log2phy int64 [E, X], logcnt and counter int64 [E], all contiguous. Two rules for r:

    round robin     round_robin_kernel             one launch. r = t mod logcnt[e]; blocks of rows count with atomics
    water filling   filled_kernel, few rows        one launch; each program counts all rows and fills alike
                    fill_kernel, replica_kernel    many rows, behind moe_triton's histogram and scan

Water filling levels the loads of ranks: a thread holds an expert and the parts of its rows on its X replicas, a rank's
load is the sum of its slots in memory, and ROUNDS times each part goes halfway to what would level the expert's ranks
without it. All is exact in integers, in units of a 16th of a row, so that results are the reference's to the bit.
"""

import triton
import triton.language as tl

from dscompile.kernels.moe_triton import expert_of
from dscompile.kernels.overlap_triton import begin


@triton.jit
def add_rows(counter_ptr, idx_ptr, i, rows, experts, BINS: tl.constexpr):
    """counter[e] += rows i of expert e. Integer atomics: their order doesn't matter."""
    e = expert_of(idx_ptr, i, rows, experts)
    counts = tl.histogram(e, BINS, mask=e < experts)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counter_ptr + bins, counts.to(tl.int64), mask=(bins < experts) & (counts > 0), sem="relaxed")


@triton.jit
def write_slot(idx_ptr, log2phy_ptr, out_ptr, i, e, replica, rows, experts, slots, X: tl.constexpr):
    """The slot of each row i, from its expert and replica; ids that are no expert's as at the head of this file."""
    valid = (i < rows) & (e < experts)
    idx = tl.load(idx_ptr + i, mask=i < rows, other=-1).to(tl.int64)
    slot = tl.load(log2phy_ptr + e.to(tl.int64) * X + replica, mask=valid, other=0)
    slot = tl.where(e < experts, slot, tl.where(idx < 0, idx, slots))
    tl.store(out_ptr + i, slot.to(out_ptr.dtype.element_ty), mask=i < rows)


@triton.jit(do_not_specialize=["rows", "experts", "slots"])
def round_robin_kernel(
    idx_ptr,
    counter_ptr,
    log2phy_ptr,
    logcnt_ptr,
    out_ptr,
    rows,
    experts,
    slots,
    K: tl.constexpr,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS rows a program: counted where there is a counter, placed where there is an out."""
    begin(OVERLAP)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if counter_ptr is not None:
        add_rows(counter_ptr, idx_ptr, i, rows, experts, BINS)
    if out_ptr is not None:
        e = expert_of(idx_ptr, i, rows, experts)
        replicas = tl.load(logcnt_ptr + e, mask=e < experts, other=1).to(tl.int32)
        write_slot(idx_ptr, log2phy_ptr, out_ptr, i, e, (i // K) % replicas, rows, experts, slots, X)


@triton.jit
def level_of(parts, load, units, replicas, X: tl.constexpr):
    """Where each expert's water would stand [E], given the loads of its ranks without it; also these loads, X of [E].

    It is the least mean, rounded down, of the expert's units and the j lowest loads, for any j.
    """
    others = ()
    for x in tl.static_range(X):
        others = others + (tl.where(x < replicas, load[x] - parts[x], 0x3FFFFFFF),)
    level = tl.full(units.shape, 0x3FFFFFFF, tl.int32)
    for y in tl.static_range(X):
        total = units
        number = tl.zeros(units.shape, tl.int32)
        for x in tl.static_range(X):
            lower = (x < replicas) & (others[x] <= others[y])
            total += tl.where(lower, others[x], 0)
            number += lower.to(tl.int32)
        level = tl.minimum(level, tl.where(y < replicas, total // tl.maximum(number, 1), 0x3FFFFFFF))
    return level, others


@triton.jit
def fill(
    log2phy_ptr,
    logcnt_ptr,
    scratch_ptr,
    counts,
    experts,
    ranks,
    each,
    X: tl.constexpr,
    BINS: tl.constexpr,
    RANKS: tl.constexpr,
    EACH: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """counts [BINS] rows of experts -> scratch[x * BINS + e], the ordinal behind replica x's last row of expert e.

    each: slots of a rank. Behind the ends scratch holds parts by slot, RANKS * EACH, and loads of ranks, RANKS. A
    program has one of its own.
    """
    slot_ptr = scratch_ptr + X * BINS
    load_ptr = slot_ptr + RANKS * EACH
    tl.store(slot_ptr + tl.arange(0, RANKS * EACH), tl.zeros((RANKS * EACH,), tl.int32))
    e = tl.arange(0, BINS)
    replicas = tl.load(logcnt_ptr + e, mask=e < experts, other=0).to(tl.int32)
    units = tl.where(e < experts, counts, 0) * 16
    at = ()
    parts = ()
    for x in tl.static_range(X):
        held = x < replicas
        slot = tl.load(log2phy_ptr + e.to(tl.int64) * X + x, mask=held, other=0).to(tl.int32)
        at = at + (slot // each * EACH + slot % each,)
        shared = tl.maximum(replicas, 1)
        parts = parts + (tl.where(held, units // shared + (x < units % shared).to(tl.int32), 0),)
    r = tl.arange(0, RANKS)
    for _ in range(ROUNDS):
        tl.debug_barrier()  # zeros, or loads that were read
        for x in tl.static_range(X):
            tl.store(slot_ptr + at[x], parts[x], mask=x < replicas)
        tl.debug_barrier()
        by_slot = tl.load(slot_ptr + r[:, None] * EACH + tl.arange(0, EACH)[None, :])
        tl.store(load_ptr + r, tl.sum(by_slot, 1))
        tl.debug_barrier()
        load = ()
        for x in tl.static_range(X):
            load = load + (tl.load(load_ptr + at[x] // EACH, mask=x < replicas, other=0),)
        level, others = level_of(parts, load, units, replicas, X)
        halves = ()
        for x in tl.static_range(X):
            halves = halves + (tl.where(x < replicas, (parts[x] + tl.maximum(level - others[x], 0)) // 2, 0),)
        parts = halves
    end = tl.zeros((BINS,), tl.int32)
    for x in tl.static_range(X):
        end += parts[x]
        tl.store(scratch_ptr + x * BINS + e, (end + 8) // 16)
    tl.debug_barrier()


@triton.jit
def replica_of(ends_ptr, logcnt_ptr, e, ordinal, experts, X: tl.constexpr, BINS: tl.constexpr):
    """Which replica serves a row that is its expert's ordinal-th: as many ends as lie at or below, at most the last."""
    replica = tl.zeros(e.shape, tl.int32)
    for x in tl.static_range(X):
        end = tl.load(ends_ptr + x * BINS + e, mask=e < experts, other=0)
        replica += (ordinal >= end).to(tl.int32)
    return tl.minimum(replica, tl.load(logcnt_ptr + e, mask=e < experts, other=1).to(tl.int32) - 1)


@triton.jit(do_not_specialize=["rows", "experts", "slots", "ranks", "each"])
def filled_kernel(
    idx_ptr,
    counter_ptr,
    log2phy_ptr,
    logcnt_ptr,
    scratch_ptr,
    out_ptr,
    rows,
    experts,
    slots,
    ranks,
    each,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTED: tl.constexpr,
    BINS: tl.constexpr,
    RANKS: tl.constexpr,
    EACH: tl.constexpr,
    ROUNDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Water filling of few rows, ROWS of them placed by each program; the first counts, where there is a counter."""
    begin(OVERLAP)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, rows, COUNTED):
        e = expert_of(idx_ptr, start + tl.arange(0, COUNTED), rows, experts)
        counts += tl.histogram(e, BINS, mask=e < experts)
    if counter_ptr is not None:
        bins = tl.arange(0, BINS)
        mine = (bins < experts) & (tl.program_id(0) == 0)
        before = tl.load(counter_ptr + bins, mask=mine, other=0)
        tl.store(counter_ptr + bins, before + counts, mask=mine)
    scratch_ptr += tl.program_id(0) * (X * BINS + RANKS * EACH + RANKS)
    fill(log2phy_ptr, logcnt_ptr, scratch_ptr, counts, experts, ranks, each, X, BINS, RANKS, EACH, ROUNDS)
    first = tl.program_id(0) * ROWS
    i = first + tl.arange(0, ROWS)
    e = expert_of(idx_ptr, i, rows, experts)
    ordinal = tl.zeros((ROWS,), tl.int32)
    for start in range(0, first + ROWS, ROWS):
        j = start + tl.arange(0, ROWS)
        other = expert_of(idx_ptr, j, rows, experts)
        ordinal += tl.sum(((other[None, :] == e[:, None]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
    replica = replica_of(scratch_ptr, logcnt_ptr, e, ordinal, experts, X, BINS)
    write_slot(idx_ptr, log2phy_ptr, out_ptr, i, e, replica, rows, experts, slots, X)


@triton.jit(do_not_specialize=["experts", "ranks", "each"])
def fill_kernel(
    totals_ptr,
    counter_ptr,
    log2phy_ptr,
    logcnt_ptr,
    scratch_ptr,
    experts,
    ranks,
    each,
    X: tl.constexpr,
    BINS: tl.constexpr,
    RANKS: tl.constexpr,
    EACH: tl.constexpr,
    ROUNDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: totals [BINS] rows of experts -> the ends of their replicas in scratch; counts them, if asked to."""
    begin(OVERLAP)
    bins = tl.arange(0, BINS)
    counts = tl.load(totals_ptr + bins, mask=bins < experts, other=0)
    if counter_ptr is not None:
        before = tl.load(counter_ptr + bins, mask=bins < experts, other=0)
        tl.store(counter_ptr + bins, before + counts, mask=bins < experts)
    fill(log2phy_ptr, logcnt_ptr, scratch_ptr, counts, experts, ranks, each, X, BINS, RANKS, EACH, ROUNDS)


@triton.jit(do_not_specialize=["rows", "experts", "slots"])
def replica_kernel(
    idx_ptr,
    counts_ptr,
    log2phy_ptr,
    logcnt_ptr,
    ends_ptr,
    out_ptr,
    rows,
    experts,
    slots,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    TABLE: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS rows a program: counts[b, e] of a table of TABLE bins are expert e's rows in the blocks before b."""
    begin(OVERLAP)
    block = tl.program_id(0)
    first = block * ROWS
    local = tl.arange(0, ROWS)
    e = expert_of(idx_ptr, first + local, rows, experts)
    ordinal = tl.load(counts_ptr + block.to(tl.int64) * TABLE + e)
    for start in range(0, ROWS, SLOTS):
        j = start + tl.arange(0, SLOTS)
        other = expert_of(idx_ptr, first + j, rows, experts)
        ordinal += tl.sum(((other[None, :] == e[:, None]) & (j[None, :] < local[:, None])).to(tl.int32), 1)
    replica = replica_of(ends_ptr, logcnt_ptr, e, ordinal, experts, X, BINS)
    write_slot(idx_ptr, log2phy_ptr, out_ptr, first + local, e, replica, rows, experts, slots, X)
