"""How tokens travel between ranks: the protocol of an implementation, their choice, and the one that runs anywhere.

A *plan* [T+1,W] says where each token goes: ``plan[t,w]`` is the place of token t among the rows that this rank sends
to rank w, or -1; the last row counts them. A token goes to a rank once, however many of that rank's experts it chose;
places are counted up in the order of tokens. Each rank has room for ``capacity`` rows from each, so nothing overflows
and every shape is known beforehand. *arrived* [M+W] is the other end: the token of each row on the rank that it is
from, -1 where a row is unused, then the number of rows from each rank.

    dispatch:  rows[s*capacity + plan_s[t,w]] at rank w  =  x[t] of rank s
    combine:   y[t] at rank s  =  sum over w of rows[s*capacity + plan_s[t,w]] at rank w, in float32, w counted up

Both directions begin with ``start``, which returns an *inbox* (the tensor that is being filled, or one that stands for
memory that is), and end with ``wait``. :class:`Exchange` is what an implementation has; `table("exchange")` orders them
by `supports(spec, payload)`, which all ranks must answer alike. ``symmetric`` (`lowering.exchange_symmetric`) is in
front of ``all_to_all``, which packs rows, ids and weights into one padded equal-split `all_to_all_single` a direction,
over whatever collectives the group has (gloo, NCCL). Plans and `arrived` are the same in both. Nothing is read on the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dscompile.lowering.block_scales import FP8, blocks, padded_rows
from dscompile.lowering.errors import OperatorError
from dscompile.lowering.select import YES, Decision, no, table
from dscompile.runtime import groups
from dscompile.runtime.groups import Group


class ExchangeError(OperatorError):
    """More tokens than the capacity, or experts that can't be spread evenly over the ranks."""


@dataclass(frozen=True)
class Spec:
    """What both ends of an exchange know: the group, the experts E of all ranks, rows a rank, and the arena's slot."""

    group: Group
    experts: int
    capacity: int
    slot: int = 0

    @property
    def local(self) -> int:
        """Experts L of one rank: rank w has those from w*L on."""
        return self.experts // self.group.size

    @property
    def rows(self) -> int:
        """Rows that a rank receives, used or not: W * capacity."""
        return self.group.size * self.capacity


class Payload(NamedTuple):
    """What an exchange moves: rows [_,width] of a dtype, and (K, dtype) of what is beside each.

    routing: of ids and weights where tokens find their experts, of weights alone where their gradients come back. Rows
    in FP8 have a float32 scale for 128 columns beside them. back: the direction is that of a combine.
    """

    width: int
    dtype: torch.dtype
    device: torch.device
    routing: tuple[tuple[int, torch.dtype], ...] = ()
    back: bool = False

    @staticmethod
    def of(rows: Tensor, *beside: Tensor | None, back: bool = False) -> Payload:
        routing = tuple((part.shape[1], part.dtype) for part in beside if part is not None)
        return Payload(rows.shape[1], rows.dtype, rows.device, routing, back)

    @property
    def scales(self) -> int:
        """float32 scales beside a row."""
        return blocks(self.width) if self.dtype is FP8 else 0


Inbox = tuple[tuple[int, ...], torch.dtype]


class Arrived(NamedTuple):
    """What a dispatch brought: rows [M,D], ids [M,K] int32, weights [M,K] and `arrived` [M+W] int32.

    Ids are those of this rank's experts, -1 where a choice is another rank's and all over rows that are unused, whose
    `rows` and scales may hold anything. scale: of rows in FP8, float32 [ceil(D/128),ceil4(M)] (`block_scales`).
    """

    rows: Tensor
    ids: Tensor
    weights: Tensor
    arrived: Tensor
    scale: Tensor | None = None


class Exchange(Protocol):
    """An implementation. T tokens, D width, K choices, W ranks, M = W*capacity rows; W in the order of the group.

    A `wait` is given what its `start` was, for shapes and to keep its memory until here.
    """

    def inbox(self, payload: Payload, spec: Spec) -> Inbox:
        """Shape and dtype of what a `start` returns. Called at trace time too: it reads nothing else."""

    def dispatch_start(
        self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        """Begin to send x [T,D], ids [T,K], those outside [0,E) of nobody, and weights [T,K]; T <= capacity. -> plan,
        inbox. scale: of x in FP8, float32 [ceil(D/128),ceil4(T)]."""

    def dispatch_wait(
        self, inbox: Tensor, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec
    ) -> Arrived:
        """Wait for every rank's rows."""

    def redispatch_start(self, x: Tensor, plan: Tensor, spec: Spec) -> Tensor:
        """Begin to send rows alone along a plan. -> inbox"""

    def redispatch_wait(self, inbox: Tensor, x: Tensor, plan: Tensor, arrived: Tensor, spec: Spec) -> Tensor:
        """-> rows [M,D]. `arrived` is what the dispatch that made the plan brought."""

    def combine_start(
        self, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec
    ) -> Tensor:
        """Begin to send rows [M,D], and weights [M,K] if given, back to where they came from. -> inbox"""

    def combine_wait(
        self, inbox: Tensor, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec
    ) -> tuple[Tensor, Tensor | None]:
        """-> y [T,D] in the dtype of rows, and the sum of weights [T,K] alike. Rows that the plan doesn't name are
        never read: they may be NaN."""


def choose(spec: Spec, payload: Payload) -> Exchange:
    """The implementation for what is moved."""
    return table("exchange").choose((spec, payload))[0].run(spec, payload)


def chosen(spec: Spec, payload: Payload) -> tuple[str, str]:
    """(name of the implementation, why not the one in front of it), for reports."""
    implementation, skipped = table("exchange").choose((spec, payload))
    return implementation.name, "; ".join(f"not {name}: {reason}" for name, reason in skipped)


def place_tokens(topk_idx: Tensor, spec: Spec) -> Tensor:
    """A plan [T+1,W] int32 in plain PyTorch, on any device."""
    W = spec.group.size
    valid = (topk_idx >= 0) & (topk_idx < spec.experts)
    owner_TK = torch.where(valid, topk_idx // spec.local, W)
    ranks = torch.arange(W, device=topk_idx.device)
    needed_TW = (owner_TK.unsqueeze(-1) == ranks).any(1)
    place = torch.where(needed_TW, needed_TW.cumsum(0) - 1, -1)
    return torch.cat((place, needed_TW.sum(0, keepdim=True))).to(torch.int32)


def sources(plan: Tensor, spec: Spec) -> Tensor:
    """[M] int64: the token of each row that is sent, T where there is none."""
    place, W = plan[:-1], plan.shape[1]
    T = place.shape[0]
    base = torch.arange(W, device=plan.device) * spec.capacity
    row_TW = torch.where(place >= 0, place + base, spec.rows)
    token_TW = torch.arange(T, device=plan.device).unsqueeze(1).expand(T, W)
    found = torch.full((spec.rows + 1,), T, dtype=torch.int64, device=plan.device)
    return found.scatter_(0, row_TW.flatten(), token_TW.flatten())[:-1]  # the last one: tokens that aren't sent


def local_ids(topk_idx: Tensor, source: Tensor, spec: Spec) -> Tensor:
    """[M,K] int32: the chosen experts of each sent row, counted from the receiving rank's first; -1: not there."""
    first = torch.arange(spec.group.size, device=source.device).repeat_interleave(spec.capacity) * spec.local
    ids = _with_row(topk_idx, -1).index_select(0, source)
    ids = ids - first.to(ids.dtype).unsqueeze(1)
    return torch.where((ids >= 0) & (ids < spec.local), ids, -1).to(torch.int32)


def _with_row(x: Tensor, value: float) -> Tensor:
    """`x` and one more row, of `value`."""
    return torch.cat((x, x.new_full((1, *x.shape[1:]), value)))


# ------------------------------------------------------------------ over any collectives


class AllToAll:
    """Padded equal splits over `all_to_all_single`: one collective a direction."""

    def inbox(self, payload: Payload, spec: Spec) -> Inbox:
        parts = [(payload.width, payload.dtype), *payload.routing]
        if len(payload.routing) == 2:  # of a dispatch
            parts = _dispatched(payload)
        return (spec.rows, sum(columns * kind.itemsize for columns, kind in parts)), torch.uint8

    def dispatch_start(
        self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        plan = place_tokens(topk_idx, spec)
        source = sources(plan, spec)
        ids = local_ids(topk_idx, source, spec)
        weight = _with_row(topk_weight, 0.0).index_select(0, source)
        token = torch.where(source < x.shape[0], source, -1).to(torch.int32)
        moved = x if scale is None else x.view(torch.uint8)
        parts = [_with_row(moved, 0).index_select(0, source), ids, torch.where(ids >= 0, weight, 0.0)]
        if scale is not None:
            parts.append(_with_row(scale[:, : x.shape[0]].t(), 0.0).index_select(0, source))
        return plan, _send(_packed([*parts, token.unsqueeze(1)]), spec)

    def dispatch_wait(
        self, inbox: Tensor, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec
    ) -> Arrived:
        _receive(inbox, spec)
        rows, ids, weights, *scales, token = _unpacked(inbox, _dispatched(Payload.of(x, topk_idx, topk_weight)))
        counts = (token.view(spec.group.size, spec.capacity) >= 0).sum(1, dtype=torch.int32)
        arrived = torch.cat((token.flatten(), counts))
        if scale is None:
            return Arrived(rows, ids, weights, arrived)
        padding = padded_rows(spec.rows) - spec.rows
        return Arrived(rows, ids, weights, arrived, F.pad(scales[0], (0, 0, 0, padding)).t().contiguous())

    def redispatch_start(self, x: Tensor, plan: Tensor, spec: Spec) -> Tensor:
        return _send(_packed([_with_row(x, 0.0).index_select(0, sources(plan, spec))]), spec)

    def redispatch_wait(self, inbox: Tensor, x: Tensor, plan: Tensor, arrived: Tensor, spec: Spec) -> Tensor:
        _receive(inbox, spec)
        return _unpacked(inbox, [(x.shape[1], x.dtype)])[0]

    def combine_start(
        self, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec
    ) -> Tensor:
        return _send(_packed([rows] if row_weights is None else [rows, row_weights]), spec)

    def combine_wait(
        self, inbox: Tensor, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec
    ) -> tuple[Tensor, Tensor | None]:
        _receive(inbox, spec)
        sent = [rows] if row_weights is None else [rows, row_weights]
        sums = [_summed(part, plan, spec) for part in _unpacked(inbox, [(s.shape[1], s.dtype) for s in sent])]
        return sums[0], sums[1] if row_weights is not None else None


def _dispatched(payload: Payload) -> list[tuple[int, torch.dtype]]:
    """(columns, dtype) of the parts of a row: itself, the receiver's ids, weights, scales if it is FP8, the token."""
    (K, _), weights = payload.routing
    scales = [(payload.scales, torch.float32)] if payload.scales else []
    return [(payload.width, payload.dtype), (K, torch.int32), weights, *scales, (1, torch.int32)]


def _packed(parts: list[Tensor]) -> Tensor:
    """[M, bytes] of several [M, _]."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def _unpacked(inbox: Tensor, parts: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Copies of the parts [M, _]: what an operator returns may not be a view of what it was given."""
    sizes = [columns * dtype.itemsize for columns, dtype in parts]
    pieces = inbox.split(sizes, 1)
    return [
        piece.clone(memory_format=torch.contiguous_format).view(dtype)
        for piece, (_, dtype) in zip(pieces, parts, strict=True)
    ]


def _summed(back: Tensor, plan: Tensor, spec: Spec) -> Tensor:
    """[T,_]: the sum over ranks of the rows [M,_] that came back, in float32, one rank after the other."""
    wide = torch.float64 if back.dtype is torch.float64 else torch.float32
    place_TW = plan[:-1]
    y = back.new_zeros(place_TW.shape[0], back.shape[1], dtype=wide)
    for w, block in enumerate(back.split(spec.capacity)):
        place = place_TW[:, w]
        row = block.index_select(0, place.clamp(min=0)).to(wide)
        y = y + torch.where((place >= 0).unsqueeze(1), row, 0.0)
    return y.to(back.dtype)


# Collectives that were begun: address of the inbox -> the collective and what it reads. An inbox lives until its wait.
_PENDING: dict[int, tuple[Any, Tensor]] = {}


def _send(outgoing: Tensor, spec: Spec) -> Tensor:
    """Begins one padded exchange of [M, bytes]; -> the inbox."""
    if spec.group.size == 1:
        return outgoing
    inbox = torch.empty_like(outgoing)
    try:
        work = dist.all_to_all_single(inbox, outgoing, group=spec.group.process_group, async_op=True)
    except RuntimeError as error:
        raise spec.group.lost(spec.group.last, error) from None
    _PENDING[inbox.data_ptr()] = work, outgoing
    return inbox


def _receive(inbox: Tensor, spec: Spec) -> None:
    """Waits until the inbox is full: on a CUDA device its stream does, elsewhere the host, up to the timeout."""
    group = spec.group
    if group.size == 1:
        return
    pending = _PENDING.pop(inbox.data_ptr(), None)
    if pending is None:
        raise ExchangeError(
            f"an inbox {list(inbox.shape)} of the group {group.name!r} that no start returned",
            "Only the tensor itself is being filled: a copy of it may hold anything",
            "Pass on what dispatch_start, redispatch_start or combine_start returned, once",
        )
    try:
        if inbox.is_cuda:
            pending[0].wait()
        else:
            pending[0].wait(timedelta(seconds=group.timeout))
    except RuntimeError as error:
        raise group.lost(group.last, error) from None


_ALL_TO_ALL = AllToAll()


def _anywhere(spec: Spec, payload: Payload) -> Decision:
    return YES


def _shares(device: torch.device) -> Decision:
    return YES if device.type == "cuda" else no(f"ranks share memory of CUDA devices, tensors are on {device.type}")


def _over_shared_memory(spec: Spec, payload: Payload) -> Decision:
    """`symmetric` imports kernels: it is asked where they can run."""
    shares = _shares(payload.device)
    return _symmetric().supports(spec, payload) if shares else shares


def _symmetric() -> Any:
    from dscompile.lowering import exchange_symmetric

    return exchange_symmetric


table("exchange").register("symmetric", _over_shared_memory, lambda spec, payload: _symmetric().SYMMETRIC)
table("exchange").register("all_to_all", _anywhere, lambda spec, payload: _ALL_TO_ALL)


def group_named(name: str) -> Group:
    """The group of that name; raises GroupError if none was joined."""
    return groups.get(name)


def spec_of(group: str, num_experts: int, capacity: int, slot: int) -> Spec:
    """The spec of an operator's arguments; raises ExchangeError where experts don't fit the ranks."""
    found = Spec(groups.get(group), num_experts, capacity, slot)
    if num_experts < 1 or num_experts % found.group.size:
        raise ExchangeError(
            f"{num_experts} experts over {found.group.size} ranks",
            "Each rank holds equally many experts",
            "Use a group whose size divides the number of experts",
        )
    if capacity < 1:
        raise ExchangeError(f"a capacity of {capacity}", "It is the most tokens of a rank", "Give at least 1")
    return found
