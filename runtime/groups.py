"""Groups of ranks that exchange tokens: found by name inside a graph, agreed on at the first call, watched while it
runs.

An operator of a graph holds the name of its group, since nothing else fits in a graph; :func:`join` is what gives the
name its meaning in this process. Two things are settled between ranks over the group's key-value store, never by a
collective, so that they also work where ranks have stopped calling the same things:

*Agreement*: before its first exchange of a kind, each rank publishes what it will send (capacity, width, dtype,
experts) and compares it with everybody's: :class:`RanksDisagree` names the ranks and the values. *Watch*: a thread
publishes twice a second how many exchanges the rank has entered and which was the last. When an exchange fails or takes
too long, the counts tell a rank that is gone (its count stopped) from one that stalls (it is behind): :class:`RankLost`
names rank and operator, the same ones on every rank, since the first to find out says so.

``DSINFRA_EP_TIMEOUT`` is the longest wait in seconds (300). On CUDA no call waits for the device, so a lost rank is
found by NCCL's own watchdog, or here at the next call.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Hashable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEAT = 0.5  # seconds between two heartbeats
_SILENT = 6  # heartbeats missed by a rank that is gone
_PREFIX = "dsinfra/ep"


class RanksDisagree(RuntimeError):
    """Ranks of a group are about to exchange rows of different sizes, types or experts."""


class RankLost(RuntimeError):
    """A rank died, or didn't come to an exchange within the timeout.

    rank: its global rank, None where that can't be told. operator: the half of an exchange that waited for it.
    """

    def __init__(self, message: str, rank: int | None = None, operator: str = ""):
        super().__init__(message)
        self.rank, self.operator = rank, operator


class GroupError(ValueError):
    """What was given as a group is none, or names none."""


class Group:
    """One process group that exchanges tokens, as this process sees it.

    Attributes:
        name: what operators in graphs call it.
        process_group: for collectives.
        rank, size: of this process in the group, and the number W of ranks.
        ranks: the W global ranks, by which errors name them.
        timeout: the longest wait for a rank, in seconds.
        kept: what an implementation of the exchange holds for as long as the group lives, by a key of its own.
    """

    def __init__(self, process_group: dist.ProcessGroup, timeout: float):
        self.process_group, self.timeout = process_group, timeout
        self.name = process_group.group_name
        self.rank, self.size = process_group.rank(), process_group.size()
        self.ranks = dist.get_process_group_ranks(process_group)
        self.entered = 0  # exchanges
        self.last = ""  # the operator of the last one
        self.kept: dict[Hashable, Any] = {}
        self._agreed: dict[tuple, None] = {}
        self._told: dict[str, list[Any]] = {}
        self._store = dist.PrefixStore(_PREFIX, process_group.get_group_store())
        self._watch: Watch | None = None

    def enter(self, op: str, spec: dict[str, Any]) -> None:
        """Counts one exchange; before the first of its kind, makes sure that every rank means the same by it.

        Raises:
            RanksDisagree: another rank's ``spec`` differs.
            RankLost: a rank is known to be lost, or didn't publish its own in time.
        """
        if self.size == 1:
            return
        if self._watch is None:
            self._watch = Watch(self)
        elif self._watch.fault:
            raise RankLost(*self._watch.fault)
        self.entered += 1
        self.last = op
        key = tuple(spec.items())
        if key not in self._agreed:
            self._agree(op, spec, len(self._agreed))
            self._agreed[key] = None

    def _agree(self, op: str, spec: dict[str, Any], number: int) -> None:
        every = self._gather(op, f"spec/{number}", spec)
        different = [name for name in spec if any(other[name] != spec[name] for other in every)]
        if different:
            name = different[0]
            found = ", ".join(f"rank {self.ranks[i]} has {other[name]}" for i, other in enumerate(every))
            raise RanksDisagree(
                f"{op}: {name} differs within the group {self.name!r}: {found}. Ranks exchange blocks of one size, "
                f"whose rows each must read alike. {_CHANGE.get(name, 'Give every rank the same model')}."
            )

    def everybody(self, topic: str, mine: Any) -> list[Any]:
        """What each rank said about a topic, in their order; waits for all of them the first time.

        Every rank must ask, and says the same at each call. ``mine`` is anything that JSON can hold. Raises RankLost.
        """
        if topic not in self._told:
            self._told[topic] = self._gather(topic, f"told/{topic}", mine)
        return self._told[topic]

    def _gather(self, op: str, name: str, mine: Any) -> list[Any]:
        self._store.set(f"{name}/{self.rank}", json.dumps(mine))
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout))
        except Exception as error:
            raise self.lost(op, error) from None
        return [json.loads(self._store.get(key)) for key in keys]

    def lost(self, op: str, error: BaseException) -> RankLost:
        """The error to raise where an exchange failed or took too long; finds out whose fault it is."""
        watch = self._watch or Watch(self)
        return RankLost(*watch.blame(op, error))

    def close(self) -> None:
        """Ends the watch, and lets go of what was kept."""
        self.kept.clear()
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


_CHANGE = {
    "capacity": "Give all ranks the same options['ep_capacity'], the most tokens that any of them ever has",
    "dtype": "Load the model in one dtype, and run it under the same autocast, on every rank",
}


Fault = tuple[str, int | None, str]  # the arguments of RankLost


class Watch:
    """Publishes a rank's progress, and reads everybody's when something is wrong."""

    def __init__(self, group: Group):
        self.group = group
        self.fault: Fault | None = None
        self._store = dist.PrefixStore(
            _PREFIX, group.process_group.get_group_store().clone()
        )  # a connection of its own
        self._lock = threading.Lock()  # over that connection: the thread's and a failing call's
        self._stopped = threading.Event()
        self._beat = 0
        self._publish()
        threading.Thread(target=self._run, name=f"dsinfra watch of {group.name}", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                self._publish()
                with self._lock:
                    if self._store.check(["fault"]):
                        self.fault = _read(self._store.get("fault"))
            except Exception:  # the process that holds the store has ended: so will the next exchange, with an error
                return

    def _publish(self) -> None:
        self._beat += 1
        progress = {"beat": self._beat, "entered": self.group.entered, "op": self.group.last}
        with self._lock:
            self._store.set(f"beat/{self.group.rank}", json.dumps(progress))

    def _progress(self) -> list[dict[str, Any]]:
        found = []
        with self._lock:
            for rank in range(self.group.size):
                key = f"beat/{rank}"
                known = self._store.check([key])
                found.append(json.loads(self._store.get(key)) if known else {"beat": 0, "entered": 0, "op": ""})
        return found

    def blame(self, op: str, error: BaseException) -> Fault:
        """What happened, naming one rank: as the first rank that found out says, if another was faster."""
        try:
            before = self._progress()
            deadline = time.monotonic() + _SILENT * BEAT
            after = before
            while time.monotonic() < deadline and not self.fault:
                time.sleep(BEAT)
                after = self._progress()
                if all(b["beat"] > a["beat"] for a, b in zip(before, after)):
                    break
            if not self.fault:
                verdict = self._verdict(op, before, after, error)
                with self._lock:
                    self.fault = _read(self._store.compare_set("fault", "", json.dumps(verdict)))
            return self.fault
        except Exception as unreachable:
            said = (
                f"{op}: the exchange failed ({_line(error)}) and the group's store can't be reached "
                f"({_line(unreachable)}): the process that holds it, usually rank {self.group.ranks[0]}, has ended. "
                "Look at that rank's output first."
            )
            return said, None, op

    def _verdict(self, op: str, before: list[dict], after: list[dict], error: BaseException) -> Fault:
        ranks, own = self.group.ranks, self.group.rank
        gone = [i for i, (a, b) in enumerate(zip(before, after)) if i != own and b["beat"] <= a["beat"]]
        cause = f"rank {ranks[own]} saw: {_line(error)}"
        if gone:
            culprit = min(gone, key=lambda i: after[i]["entered"])
            what = "has died"
            seen = after[culprit]
            last = (
                f"at its last sign of life it had entered {seen['entered']} exchanges, the last {seen['op'] or 'none'}"
            )
        else:
            culprit = min(range(len(after)), key=lambda i: after[i]["entered"])
            if after[culprit]["entered"] >= self.group.entered:
                number = self.group.entered
                return f"{op}: exchange number {number} failed, and every rank is alive and in it ({cause}).", None, op
            what = f"is alive but stalls: it didn't come within {self.group.timeout:g} s"
            last = f"it has entered {after[culprit]['entered']} exchanges, the last {after[culprit]['op'] or 'none'}"
        said = (
            f"{op}: exchange number {self.group.entered} of the group {self.group.name!r} failed because rank "
            f"{ranks[culprit]} {what} ({last}; {cause}). Look at that rank's output first. Every rank must call "
            "the compiled model equally often, with the same layers spread (dscompile.explain tells); "
            "DSINFRA_EP_TIMEOUT is the longest wait in seconds."
        )
        return said, ranks[culprit], op


def _read(fault: bytes) -> Fault:
    said, rank, op = json.loads(fault)
    return said, rank, op


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:160]


_GROUPS: dict[str, Group] = {}


def join(group: Any, timeout: float | None = None) -> Group:
    """Makes a group known by its name, and returns it; the same object for the same group.

    Args:
        group: a ``ProcessGroup``, a ``DeviceMesh`` of one dimension (``mesh["ep"]``), ``"world"``, or the name of a
            group that was joined before.
        timeout: the longest wait for a rank in seconds; None: ``DSINFRA_EP_TIMEOUT``, or 300.

    Raises:
        GroupError: it is none of these, this process isn't in it, or torch.distributed isn't initialised.
    """
    if isinstance(group, str) and group in _GROUPS:
        return _GROUPS[group]
    process_group = _process_group(group)
    known = _GROUPS.get(process_group.group_name)
    if known is not None and known.process_group is process_group:
        return known
    if timeout is None:
        timeout = float(os.environ.get("DSINFRA_EP_TIMEOUT", "300"))
    if known is not None:
        known.close()  # of a group that was destroyed: a new one has its name
    _GROUPS[process_group.group_name] = Group(process_group, timeout)
    return _GROUPS[process_group.group_name]


def get(name: str) -> Group:
    """The group of that name; raises GroupError if none was joined."""
    try:
        return _GROUPS[name]
    except KeyError:
        raise GroupError(
            f"no group is named {name!r}; joined were {sorted(_GROUPS)}. A compiled graph finds its group by name. "
            "Call dscompile.runtime.groups.join(group) first, or compile with options={'ep_group': group}."
        ) from None


def _process_group(group: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise GroupError(
            f"{group!r} was given as a group and torch.distributed is not initialised: ranks can't find each other. "
            "Call torch.distributed.init_process_group first."
        )
    if group == "world":
        group = dist.group.WORLD
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh
        if group.ndim != 1:
            raise GroupError(
                f"the mesh has {group.ndim} dimensions {group.mesh_dim_names}: experts are spread over one of them. "
                "Give one, as in mesh['ep']."
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise GroupError(
            f"{group!r} is no group: it must be a ProcessGroup this process is in, a DeviceMesh of one dimension, "
            f"'world', or the name of a group that was joined ({sorted(_GROUPS)})."
        )
    return group
