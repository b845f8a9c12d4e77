"""Counters and replicas of placed experts: the entry to the kernels, their limits, their launches.

`load` counts what a router chose, `place` names the slot of each choice, and `place` with a counter does both in one
launch. kernels/place_triton.py has the formulas. Nothing is read on the host, and maps and counters are read where they
lie: safe in a CUDA graph, also while plans change. Results are those of the operators' references to the bit.
"""

from __future__ import annotations

from typing import Any

import torch

from dscompile.kernels.overlap import start_overlapped
from dscompile.kernels.refusals import BadArguments, device_refusal, refuse_if

POLICIES = ("round_robin", "water_filling")
ROUNDS = 8  # of water filling
MAX_EXPERTS = 2048
MAX_REPLICAS = 8  # in the width of log2phy, under water filling: a thread compares each with each
MAX_SLOTS = 8192  # of all ranks, each rank's rounded up to a power of two
MAX_ROWS = 1 << 20  # in 16ths, 8 of them added up, they fit 32 bits
FEW_ROWS = 2048  # of water filling in one launch, whose every program reads all ids
BLOCK = 256  # rows of a program
_FEW_BLOCK = 64  # of one that fills, too


def load(topk_idx: torch.Tensor, counter: torch.Tensor) -> None:
    """counter[e] += entries of topk_idx [T, K] that are e, int64 [E] in place; ids outside [0, E) are left out.

    Raises:
        BadArguments: shapes or dtypes that don't fit together.
        KernelLimit: `refusal` says why.
    """
    _check(topk_idx, counter=counter)
    refuse_if(refusal(topk_idx, counter.shape[0]))
    if topk_idx.numel():
        _round_robin(topk_idx, counter, None, None, None, 0)


def place(
    topk_idx: torch.Tensor,
    log2phy: torch.Tensor,
    logcnt: torch.Tensor,
    slots: int,
    ranks: int,
    policy: str,
    counter: torch.Tensor | None = None,
) -> torch.Tensor:
    """topk_idx int64 or int32 [T, K] -> the slot of each choice, alike; counts, too, where a counter is given.

    Args:
        log2phy: int64 [E, X], the slots of each expert, of which logcnt int64 [E] count.
        slots: of all ranks; slot p is on rank p // (slots // ranks).
        policy: "round_robin" by token, or "water_filling" of this batch.
        counter: int64 [E] or None, as in `load`.

    Raises:
        BadArguments: shapes, dtypes or numbers that don't fit together.
        KernelLimit: `refusal` says why.
    """
    _check(topk_idx, counter=counter, log2phy=log2phy, logcnt=logcnt)
    if policy not in POLICIES or ranks < 1 or slots % ranks:
        raise BadArguments(
            f"policy is {policy!r}, of {slots} slots on {ranks} ranks. Ranks have equally many, and rules are "
            f"{' and '.join(POLICIES)}. Use one of these, and a multiple."
        )
    refuse_if(refusal(topk_idx, log2phy.shape[0], log2phy.shape[1], slots, ranks, policy))
    out = torch.empty_like(topk_idx, memory_format=torch.contiguous_format)
    if not topk_idx.numel():
        return out
    if policy == "round_robin":
        _round_robin(topk_idx, counter, log2phy, logcnt, out, slots)
    elif topk_idx.numel() <= FEW_ROWS:
        _fill_few(topk_idx, counter, log2phy, logcnt, out, slots, ranks)
    else:
        _fill_many(topk_idx, counter, log2phy, logcnt, out, slots, ranks)
    return out


def refusal(
    topk_idx: torch.Tensor, experts: int, replicas: int = 1, slots: int = 1, ranks: int = 1, policy: str = "round_robin"
) -> str | None:
    """Why the kernels can't take these, or None. Reads metadata only."""
    found = device_refusal("topk_idx", topk_idx, integers=True)
    if found:
        return found
    if experts > MAX_EXPERTS or topk_idx.numel() >= 1 << 31:
        return (
            f"{experts} experts and {topk_idx.numel()} choices. A program has a count for each expert, at most "
            f"{MAX_EXPERTS}, and rows are numbered in 32 bits. Use the operator's reference."
        )
    if policy == "water_filling":
        sized = 0 if ranks < 1 else _power_of_two(ranks) * _power_of_two(-(-slots // ranks))
        if replicas > MAX_REPLICAS or sized > MAX_SLOTS or topk_idx.numel() > MAX_ROWS:
            return (
                f"{topk_idx.numel()} choices, up to {replicas} replicas of an expert, {slots} slots on {ranks} ranks. "
                f"One program levels them all: at most {MAX_ROWS}, {MAX_REPLICAS}, and {MAX_SLOTS} with powers of two. "
                "Use round_robin, or the operator's reference."
            )
    return None


# ------------------------------------------------------------------ launches


def _round_robin(idx: torch.Tensor, counter: Any, log2phy: Any, logcnt: Any, out: Any, slots: int) -> None:
    from dscompile.kernels.place_triton import round_robin_kernel

    experts = counter.shape[0] if log2phy is None else log2phy.shape[0]
    start_overlapped(
        round_robin_kernel,
        -(-idx.numel() // BLOCK),
        idx.device,
        idx.contiguous(),
        counter,
        None if log2phy is None else log2phy.contiguous(),
        None if logcnt is None else logcnt.contiguous(),
        out,
        idx.numel(),
        experts,
        slots,
        K=idx.shape[1],
        X=1 if log2phy is None else log2phy.shape[1],
        ROWS=BLOCK,
        BINS=_bins(experts),
        num_warps=4,
    )


def _fill_few(idx: torch.Tensor, counter: Any, log2phy: Any, logcnt: Any, out: Any, slots: int, ranks: int) -> None:
    from dscompile.kernels.place_triton import filled_kernel

    experts, programs = log2phy.shape[0], -(-idx.numel() // _FEW_BLOCK)
    sizes = _sizes(log2phy, slots, ranks)
    start_overlapped(
        filled_kernel,
        programs,
        idx.device,
        idx.contiguous(),
        counter,
        log2phy.contiguous(),
        logcnt.contiguous(),
        _scratch(idx, programs, sizes),
        out,
        idx.numel(),
        experts,
        slots,
        ranks,
        slots // ranks,
        ROWS=_FEW_BLOCK,
        COUNTED=min(1024, max(128, _power_of_two(idx.numel()))),
        **sizes,
        num_warps=8,
    )


def _fill_many(idx: torch.Tensor, counter: Any, log2phy: Any, logcnt: Any, out: Any, slots: int, ranks: int) -> None:
    from dscompile.kernels.moe_launch import PLAN_BLOCK, count_by_block
    from dscompile.kernels.place_triton import fill_kernel, replica_kernel

    experts, rows, idx = log2phy.shape[0], idx.numel(), idx.contiguous()
    sizes, device = _sizes(log2phy, slots, ranks), idx.device
    counts, totals = count_by_block(idx, experts)
    scratch, log2phy, logcnt = _scratch(idx, 1, sizes), log2phy.contiguous(), logcnt.contiguous()
    start_overlapped(
        fill_kernel,
        1,
        device,
        totals,
        counter,
        log2phy,
        logcnt,
        scratch,
        experts,
        ranks,
        slots // ranks,
        **sizes,
        num_warps=8,
    )
    start_overlapped(
        replica_kernel,
        len(counts),
        device,
        idx,
        counts,
        log2phy,
        logcnt,
        scratch,
        out,
        rows,
        experts,
        slots,
        X=sizes["X"],
        ROWS=PLAN_BLOCK,
        SLOTS=32,
        TABLE=counts.shape[1],
        BINS=sizes["BINS"],
        num_warps=4,
    )


def _sizes(log2phy: torch.Tensor, slots: int, ranks: int) -> dict[str, int]:
    experts, replicas = log2phy.shape
    each = _power_of_two(slots // ranks)
    return {
        "X": replicas,
        "BINS": _bins(experts),
        "RANKS": _power_of_two(ranks),
        "EACH": each,
        "ROUNDS": ROUNDS,
    }


def _scratch(idx: torch.Tensor, programs: int, sizes: dict[str, int]) -> torch.Tensor:
    one = sizes["X"] * sizes["BINS"] + sizes["RANKS"] * sizes["EACH"] + sizes["RANKS"]
    return torch.empty(programs * one, dtype=torch.int32, device=idx.device)


def _bins(experts: int) -> int:
    return max(32, _power_of_two(experts))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _check(topk_idx: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    given = {name: x for name, x in tensors.items() if x is not None}
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int64, torch.int32):
        raise BadArguments(
            f"topk_idx is {topk_idx.dtype} {tuple(topk_idx.shape)}. It holds the experts of each token. Pass int64 or "
            "int32 [T, K]."
        )
    experts = {x.shape[0] if x.dim() else 0 for x in given.values()}
    dims = all(x.dim() == (2 if name == "log2phy" else 1) for name, x in given.items())
    if len(experts) != 1 or not dims or 0 in experts or any(x.dtype != torch.int64 for x in given.values()):
        raise BadArguments(
            f"{', '.join(f'{name} is {x.dtype} {tuple(x.shape)}' for name, x in given.items())}. Each has a row an "
            "expert. Pass int64 log2phy [E, X], logcnt [E] and counter [E]."
        )
    if any(x.device != topk_idx.device for x in given.values()) or not all(
        x.is_contiguous() for name, x in given.items() if name == "counter"
    ):
        raise BadArguments(
            f"topk_idx is on {topk_idx.device}, {', '.join(f'{n} on {x.device}' for n, x in given.items())}. One "
            "kernel reads them all and writes the counter in place. Move them to one device, and make the counter "
            "contiguous."
        )
