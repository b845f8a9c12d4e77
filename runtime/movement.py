"""Weights of one layer's experts from rank to rank, so that the layer has a whole placement at every moment.

    stage    every rank sets memory aside and agrees to begin; senders' slots are read, receivers fill the memory
    commit   every rank agrees that it has all it needs; then each copies it into its slots and switches its maps

Until the second agreement nothing that a step reads is written: whatever fails, the old placement stays. Slots and maps
are written in place on the stream of the compiled step, between two steps, so that captured graphs stay right;
the transfers run on a stream of their own beside steps. All ranks commit in the same call.

Shape suffixes: P slots of all ranks, n slots of this rank, E experts, X most replicas of an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile.runtime import eplb


class MovementFailed(RuntimeError):
    """Weights could not be moved; the placement in force before is still."""


class Slots(Protocol):
    """What a rank holds of one layer: contiguous tensors that compiled code reads, and the maps that it looks slots up
    in, each written in place here and never replaced."""

    weights: Sequence[Tensor]  # each [n, ..], the rank's slots
    log2phy: Tensor  # [E,X] int64
    logcnt: Tensor  # [E] int64
    counter: Tensor  # [E] int64, what `place_counted` adds to


@dataclass
class ExpertSlots:
    """`Slots` of plain tensors."""

    weights: Sequence[Tensor]
    log2phy: Tensor
    logcnt: Tensor
    counter: Tensor


@dataclass(frozen=True)
class Transfer:
    """An expert's way from a slot of the old placement to one of the new."""

    source: int
    target: int


def transfers(old: Sequence[int], new: Sequence[int], ranks: int) -> list[Transfer]:
    """What each slot of ``new`` needs, alike on all ranks: from the own rank where it has the expert, and otherwise
    from the rank, of those that have it, that sends least."""
    n = len(old) // ranks
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, []).append(slot)
    sent = [0] * ranks
    found = []
    for target, expert in enumerate(new):
        if old[target] == expert:
            continue
        own = [slot for slot in holders[expert] if slot // n == target // n]
        source = own[0] if own else min(holders[expert], key=lambda slot: sent[slot // n])
        sent[source // n] += not own
        found.append(Transfer(source, target))
    return found


class Move:
    """One layer on its way from ``old`` [P] to ``new`` [P]; made, staged and committed by all ranks alike.

    Args:
        group: of the ranks, rank r holding slots r*n to (r+1)*n; None: this process alone.
        timeout: the longest wait for other ranks, in seconds.
    """

    def __init__(self, layer: Slots, old: Tensor, new: Tensor, group: dist.ProcessGroup | None, timeout: float = 300.0):
        self.layer, self.new, self.group, self.timeout = layer, new, group, timedelta(seconds=timeout)
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.device = layer.counter.device
        self.n = len(old) // self.size
        self._transfers = transfers(old.tolist(), new.tolist(), self.size)
        self._staged: dict[int, list[Tensor]] = {}  # by own slot: its weights to be
        self._works: list[dist.Work] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def moved_bytes(self) -> int:
        """What this rank receives from others."""
        one = sum(w[0].numel() * w.element_size() for w in self.layer.weights)
        mine = (t for t in self._transfers if t.target // self.n == self.rank)
        return one * sum(t.source // self.n != self.rank for t in mine)

    def stage(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begins the transfers. Raises MovementFailed if a rank has no memory for them, or is lost."""
        self._stream = stream
        fault = None
        try:
            for t in self._transfers:
                if t.target // self.n == self.rank:
                    slot = t.target % self.n
                    self._staged[slot] = [torch.empty_like(w[slot]) for w in self.layer.weights]
        except RuntimeError as error:  # out of memory
            fault = error
        self._agree(fault, "set memory aside")
        try:
            with self._side():
                self._begin()
        except Exception as error:  # peers find out at commit: their transfers don't arrive
            self.drop()
            raise self._failed(error, "send and receive") from error

    def _begin(self) -> None:
        operations = []
        for t in self._transfers:
            to, come = t.target // self.n == self.rank, t.source // self.n == self.rank
            for i, weight in enumerate(self.layer.weights):
                if to and come:
                    self._staged[t.target % self.n][i].copy_(weight[t.source % self.n])
                elif to:
                    there = _bytes(self._staged[t.target % self.n][i])
                    operations.append(dist.P2POp(dist.irecv, there, group=self.group, group_peer=t.source // self.n))
                elif come:
                    here = _bytes(weight[t.source % self.n])
                    operations.append(dist.P2POp(dist.isend, here, group=self.group, group_peer=t.target // self.n))
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def commit(self) -> None:
        """Waits for the transfers and switches. Raises MovementFailed, and then nothing was switched anywhere."""
        fault = None
        try:
            with self._side():
                for work in self._works:
                    work.wait(self.timeout)
            width = self.layer.log2phy.shape[1]
            log2phy, logcnt = eplb.maps_of(self.new.unsqueeze(0), self.layer.log2phy.shape[0], width)
            maps = log2phy[0].to(self.device), logcnt[0].to(self.device)
        except Exception as error:
            fault = error
        self._agree(fault, "receive its weights")
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for slot, staged in self._staged.items():
            for weight, value in zip(self.layer.weights, staged):
                weight[slot].copy_(value)
        self.layer.log2phy.copy_(maps[0])
        self.layer.logcnt.copy_(maps[1])
        self.drop()

    def drop(self) -> None:
        """Gives the memory back."""
        self._staged.clear()
        self._works.clear()

    def _side(self) -> contextlib.AbstractContextManager:
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _agree(self, fault: Exception | None, what: str) -> None:
        """Raises on every rank if it can't go on at one."""
        ready = torch.tensor([int(fault is None)], device=self.device)
        try:
            if self.group is not None:
                agreed = dist.all_reduce(ready, dist.ReduceOp.MIN, group=self.group, async_op=True)
                agreed.wait(self.timeout)
            everyone = bool(ready.item())
        except Exception as error:
            self.drop()
            raise self._failed(fault or error, what) from error
        if not everyone:
            self.drop()
            raise self._failed(fault, what) from fault

    def _failed(self, fault: Exception | None, what: str) -> MovementFailed:
        who = "another rank" if fault is None else f"rank {self.rank}"
        why = "" if fault is None else f" ({str(fault).splitlines()[0][:160] if str(fault) else type(fault).__name__})"
        return MovementFailed(
            f"{who} of {self.size} could not {what}{why} for {len(self._transfers)} experts that change places. A "
            "layer switches only when every rank has all weights, so the old placement stays in force. Look at that "
            "rank's output; try again with fewer moves if memory was short."
        )


def _bytes(tensor: Tensor) -> Tensor:
    """Any dtype as bytes: not every backend sends FP8."""
    return tensor.view(-1).view(torch.uint8)
