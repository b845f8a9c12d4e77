"""Memory that the ranks of one host share for exchanges: the arena, its slots, the handshake, what became of a wait.

An arena is one allocation of torch's symmetric memory a rank, cut into slots; each serves one exchange at a time and
has one spec. Which exchange of a graph uses which slot is settled when the graph is compiled, from what lives at the
same time. Before anything is allocated, all ranks compare what they ask for, so a mismatch is an error with names on
every rank, and no hang. Multicast is never used. The only file that knows torch's symmetric memory, which is private to
torch: `empty`, `rendezvous` and `buffer_ptrs` as in 2.11 to 2.13.

A rank that doesn't come in time is found by the kernels of the others, which write a record into host memory:
`Arena.check` turns it into RankLost, and a watching thread logs it, since under `trap` the CUDA context is lost
and the next call of the user's fails with a message that names nobody.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from dscompile.kernels import exchange_launch
from dscompile.kernels.exchange import Spec, slot_layout
from dscompile.kernels.exchange_launch import Slot
from dscompile.runtime.groups import RankLost, RanksDisagree

__all__ = ["Arena", "ExchangeUnsupported", "lost"]

_OPERATORS = {1: "dispatch_start", 2: "dispatch_wait", 3: "combine_start", 4: "combine_wait"}
_FLAG_SHIFT = 24  # of cuda/exchange.cuh
_MARK = 128  # bytes behind the slots, for the word that says that an arena has failed
_log = logging.getLogger(__name__)


class ExchangeUnsupported(ValueError):
    """The kernels can't serve this group, device or spec."""


def lost(record: Sequence[int], timeout_s: float, ranks: Sequence[int]) -> RankLost:
    """The error that a kernel's record tells. ranks: the global ranks of the group."""
    code, peer, slot, rank, *words = record
    wanted, seen = (words[i] & 0xFFFFFFFF | (words[i + 1] & 0xFFFFFFFF) << 32 for i in (0, 2))
    operator = _OPERATORS.get(code, f"operator {code}")
    if code in (2, 4):  # what it waits for is a flag with a number of rows
        rows = (1 << _FLAG_SHIFT) - 1
        told = f"exchange {wanted >> _FLAG_SHIFT} with {wanted & rows} rows"
        told += f", it is at exchange {seen >> _FLAG_SHIFT} with {seen & rows}"
    else:
        told = f"its word that it has read exchange {wanted}, it has read {seen}"
    return RankLost(
        f"{operator}: rank {ranks[rank]} waited {timeout_s:g} s on slot {slot} for rank {ranks[peer]}: {told}. Rank "
        f"{ranks[peer]} died, stalls, or runs other exchanges. Look at its output first, or raise the time limit "
        "(DSINFRA_EP_TIMEOUT, in seconds) if it only works longer between two exchanges.",
        ranks[peer],
        operator,
    )


class Arena:
    """Slots of shared memory of a group, one for each spec of `specs`, the same list on every rank.

    device: of this rank, the current one by default. timeout_s: how long kernels wait for a rank. trap: whether a
    kernel that gives up ends the CUDA context, as it should where results must not be used by mistake; without, the
    arena is marked as failed, its kernels do nothing any more and `check` raises.

    All ranks must make arenas in the same order; this call waits for them. Raises ExchangeUnsupported,
    RanksDisagree.
    """

    def __init__(
        self,
        group: Any,
        specs: Sequence[Spec],
        *,
        device: torch.device | None = None,
        timeout_s: float = 60.0,
        trap: bool = True,
    ) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
        self.specs, self.timeout_s = tuple(specs), timeout_s
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group)
        _agree(group, self.rank, self.world, self.specs, _first_refusal(self.specs, self.world, self.device))
        sizes = [slot_layout(spec).total for spec in self.specs]
        self.offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        self.memory, self.handle = _share(group, sum(sizes) + _MARK, self.device)
        bases = [int(pointer) for pointer in self.handle.buffer_ptrs]
        for spec, offset in zip(self.specs, self.offsets):
            self.memory[offset : offset + slot_layout(spec).rows].zero_()  # channels: no exchange so far
        self.record = torch.zeros(8, dtype=torch.int32, pin_memory=True)
        failed = self.memory[sum(sizes) :].view(torch.int32)[:1].zero_()
        self.slots = tuple(
            Slot(spec, self.rank, number, tuple(b + offset for b in bases), self.record, failed, timeout_s, trap)
            for number, (spec, offset) in enumerate(zip(self.specs, self.offsets))
        )
        for spec in set(self.specs):
            exchange_launch.prepare(spec, self.device)
        torch.cuda.synchronize(self.device)
        dist.barrier(group)  # every rank's channels are zero before a peer writes there
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="exchange watch").start()

    def stage_rows(self, number: int) -> torch.Tensor:
        """View of the rows [M, D] of a slot's stage: bf16, fp16 or e4m3."""
        spec, begin = self.specs[number], self.offsets[number] + slot_layout(self.specs[number]).rows
        dtype = torch.float8_e4m3fn if spec.quantized else getattr(torch, spec.dtype)
        return self.memory[begin : begin + spec.rows * spec.row_bytes].view(dtype).view(spec.rows, spec.width)

    def problem(self) -> RankLost | None:
        """What a kernel of this rank has recorded; reads host memory alone."""
        record = self.record.tolist()
        return lost(record, self.timeout_s, self.ranks) if record[0] else None

    def check(self) -> None:
        """Raise RankLost where a kernel has given up. No synchronisation: it may be one that still runs."""
        found = self.problem()
        if found is not None:
            raise found


def _first_refusal(specs: tuple[Spec, ...], world: int, device: torch.device) -> str | None:
    for spec in specs:
        if spec.world != world:
            return f"A spec is for {spec.world} ranks, the group has {world}. Make the spec from the group."
        found = exchange_launch.unsupported(spec, device)
        if found:
            return found
    return None if specs else "No spec is given. An arena has a slot for each. Give at least one."


def _agree(group: Any, rank: int, world: int, specs: tuple[Spec, ...], refused: str | None) -> None:
    """Compare with all ranks; raises on every rank if one refuses or differs."""
    mine = {"refused": refused, "host": socket.gethostname(), "specs": [dataclasses.asdict(spec) for spec in specs]}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine, group=group)
    for peer, theirs in enumerate(everyone):
        if theirs["refused"]:
            raise ExchangeUnsupported(f"Rank {peer}: {theirs['refused']}")
        if theirs["host"] != mine["host"]:
            raise ExchangeUnsupported(
                f"Rank {rank} runs on {mine['host']}, rank {peer} on {theirs['host']}. Peers' memory can be reached on "
                "one host alone. Use a group within a host, or the collective."
            )
        found = mismatch(specs, [Spec(**spec) for spec in theirs["specs"]])
        if found:
            raise RanksDisagree(
                f"Rank {rank} and rank {peer} set up different exchanges: {found}. Every rank writes into the others' "
                "memory by its own sizes. Give all ranks the same model, capacity and options."
            )


def mismatch(mine: Sequence[Spec], theirs: Sequence[Spec]) -> str:
    """Where two ranks' lists of specs differ; empty where they agree."""
    if len(mine) != len(theirs):
        return f"{len(mine)} and {len(theirs)} slots"
    pairs = enumerate(zip(mine, theirs))
    return "; ".join(f"slot {number}: {found}" for number, (a, b) in pairs if (found := a.differences(b)))


def _share(group: Any, size: int, device: torch.device) -> tuple[torch.Tensor, Any]:
    """uint8 [size] of symmetric memory, and the handle that keeps the peers' parts mapped and knows their addresses."""
    import torch.distributed._symmetric_memory as symmetric

    memory = symmetric.empty(size, dtype=torch.uint8, device=device)
    return memory, symmetric.rendezvous(memory, group)


def _watch(reference: weakref.ref[Arena], every_s: float = 0.5) -> None:
    """Log the record of an arena once there is one; ends with the arena."""
    while (arena := reference()) is not None:
        found = arena.problem()
        if found is not None:
            _log.error("%s", found)
            return
        del arena
        time.sleep(every_s)
