"""The exchange over memory that ranks of one host share: the kernels of `kernels/cuda/exchange.cu` behind operators.

Takes 16-bit rows, and FP8 rows with their scales, between Hopper cards of one host (`supports` says why not, in words
for a report; every rank comes to the same answer, since what is particular to a rank is compared first). Memory is made
at the first exchange of its sizes and kept with the group: one arena for (experts, capacity, width, dtype, choices) and
each slot, so exchanges that are open at once, which the graph gives different slots, never meet. An arena that sends
rows in FP8 takes bfloat16 results back. What arrives is copied out of the arena, which is free again behind `wait`.

A `start` forks to the communication stream and a `wait` joins it; between them, the compute stream does what the graph
has there. Nothing is read on the host and flags count on the device, so both halves may be captured in a CUDA graph,
once the exchange has run before: making memory needs every rank.

The inbox is a word that stands for the slot. Only the order it gives to operators is used.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dscompile.kernels import exchange as sizes
from dscompile.kernels import nvrtc
from dscompile.kernels.launch import capability
from dscompile.lowering import exchange as lowering
from dscompile.lowering.block_scales import FP8, padded_rows
from dscompile.lowering.exchange import ExchangeError, Inbox, Payload, Spec
from dscompile.lowering.select import YES, Decision, no, size
from dscompile.runtime import exchange as runtime
from dscompile.runtime.symmetric import Arena

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INDEX = {torch.int64: "int64", torch.int32: "int32"}
_INBOX: Inbox = ((1,), torch.int32)


# ------------------------------------------------------------------ what is supported


def supports(spec: Spec, payload: Payload) -> Decision:
    """Whether these ranks can exchange this over shared memory."""
    if payload.dtype not in _NAMES and payload.dtype is not FP8:
        return no(f"its kernels move bfloat16, float16 and float8_e4m3fn, rows are {payload.dtype}")
    found = _routing_refused(payload) or sizes.refusal(_sizes(spec, payload))
    if found:
        return no(found)
    return _ranks_can(spec, payload.device)


def _routing_refused(payload: Payload) -> str:
    if payload.routing and payload.routing[-1][1] is not torch.float32:
        return f"its kernels move float32 weights of choices, these are {payload.routing[-1][1]}"
    if len(payload.routing) == 2 and payload.routing[0][1] not in _INDEX:
        return f"its kernels read int64 and int32 ids, these are {payload.routing[0][1]}"
    return ""


def _ranks_can(spec: Spec, device: torch.device) -> Decision:
    """Host and device of every rank, compared once a group."""
    if spec.group.size == 1:
        return no("one rank has nobody to exchange with")
    group = spec.group
    mine = {"host": socket.gethostname(), "refused": _device_refused(device)}
    everybody = group.everybody("memory that ranks share", mine)
    for rank, its in zip(group.ranks, everybody):
        if its["refused"]:
            return no(f"rank {rank}: {its['refused']}")
        if its["host"] != everybody[0]["host"]:
            return no(f"rank {group.ranks[0]} runs on {everybody[0]['host']}, rank {rank} on {its['host']}")
    return YES


@functools.cache
def _device_refused(device: torch.device) -> str:
    found = capability(device)
    if found != (9, 0):
        return f"its kernels need Hopper, (9, 0), the device has compute capability {found or 'none'}"
    return nvrtc.why_no_nvrtc() or ""


@functools.lru_cache(maxsize=256)
def _spec(world: int, experts: int, capacity: int, payload: Payload) -> sizes.Spec:
    return sizes.Spec(
        world=world,
        capacity=capacity,
        width=payload.width,
        top_k=payload.routing[-1][0] if payload.routing else 1,
        experts=experts,
        dtype=_NAMES.get(payload.dtype, "bfloat16"),
        quantized=payload.dtype is FP8,
        prequantized=payload.dtype is FP8,
        index=_INDEX[payload.routing[0][1]] if len(payload.routing) == 2 else "int64",
    )


def _sizes(spec: Spec, payload: Payload) -> sizes.Spec:
    """What the kernels must be built for. Rows alone name no K: any will do."""
    routing = tuple((size(columns), dtype) for columns, dtype in payload.routing)
    payload = payload._replace(width=size(payload.width), routing=routing, back=False)
    return _spec(spec.group.size, spec.experts, spec.capacity, payload)


# ------------------------------------------------------------------ memory and streams


@dataclass
class Held:
    """A slot and what it does. kept: by direction, from `start` to `wait`, the event behind it and what it reads."""

    exchange: runtime.Exchange
    kept: dict[str, tuple[torch.cuda.Event | None, tuple[Tensor | None, ...]]] = field(default_factory=dict)

    @contextlib.contextmanager
    def begin(self, direction: str, device: torch.device, *reads: Tensor | None) -> Iterator[None]:
        """A block whose kernels run beside what follows it; `reads` are kept until the wait."""
        if device.type != "cuda":
            yield
            self.kept[direction] = None, reads
            return
        stream = _communication(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
            self.kept[direction] = stream.record_event(), reads

    @contextlib.contextmanager
    def finish(self, direction: str, device: torch.device) -> Iterator[None]:
        """A block whose kernels stand behind those of `begin`."""
        found = self.kept.pop(direction, None)
        if found is None:
            raise ExchangeError(
                f"a wait for a {direction} that was not begun on this slot",
                "A slot serves one exchange at a time, whose halves follow one another",
                "Call the start first, once, with the same slot",
            )
        event, _ = found
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
        yield


@functools.cache
def _communication(device: torch.device) -> torch.cuda.Stream:
    """The stream of exchanges of a device, in front of others' kernels where both are ready."""
    return torch.cuda.Stream(device, priority=-1)


def held(spec: Spec, payload: Payload) -> Held:
    """The slot that serves an exchange, the same one for both of its halves; makes its memory at the first.

    Raises RankLost where a rank was lost in it, RanksDisagree where ranks ask for different sizes.
    """
    wanted = _sizes(spec, payload)
    slots: list[Held] = spec.group.kept.setdefault(("symmetric", spec.slot), [])
    for found in slots:
        if _serves(found.exchange.slot.spec, wanted, payload):
            found.exchange.arena.check()
            return found
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ExchangeError(
            f"the first exchange of {spec.capacity} tokens of {payload.width} {payload.dtype} is being captured",
            "Its memory is made by all ranks together, which a CUDA graph can't hold",
            "Run the model once before it is captured, as torch.compile's own CUDA graphs do",
        )
    slots.append(Held(runtime.Exchange(make_arena(spec, wanted, payload.device), 0)))
    return slots[-1]


def _serves(made: sizes.Spec, wanted: sizes.Spec, payload: Payload) -> bool:
    """Rows alone may use what has any K, weights what has theirs, and ids what has their dtype too; what goes back is
    in 16 bits in any case."""
    same = (made.experts, made.capacity, made.width, made.dtype) == (
        wanted.experts,
        wanted.capacity,
        wanted.width,
        wanted.dtype,
    )
    return (
        same
        and (payload.back or made.prequantized == wanted.prequantized)
        and (not payload.routing or made.top_k == wanted.top_k)
        and (len(payload.routing) < 2 or made.index == wanted.index)
    )


def make_arena(spec: Spec, wanted: sizes.Spec, device: torch.device) -> Arena:
    """In a thread of its own, whose allocations are in no pool of a CUDA graph that this one is warming up for."""

    def made() -> Arena:
        torch.cuda.set_device(device)
        return Arena(spec.group.process_group, [wanted], device=device, timeout_s=spec.group.timeout)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def _movable(rows: Tensor) -> Tensor:
    """Rows whose columns lie together, at multiples of 16 bytes: as given, or a copy."""
    fine = rows.stride(1) == 1 and rows.stride(0) * rows.itemsize % 16 == 0 and rows.data_ptr() % 16 == 0
    return rows if fine or not rows.numel() else rows.clone(memory_format=torch.contiguous_format)


def _arrived(arrived: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """The token of each row [M], and the number of rows from each rank [W]."""
    return arrived[: spec.rows], arrived[spec.rows :]


# ------------------------------------------------------------------ the implementation


class Symmetric:
    """`lowering.exchange.Exchange` on slots of arenas."""

    def inbox(self, payload: Payload, spec: Spec) -> Inbox:
        return _INBOX

    def dispatch_start(
        self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        slot = held(spec, Payload.of(x, topk_idx, topk_weight))
        sent = _movable(x), topk_idx.contiguous(), topk_weight.contiguous()
        scale = None if scale is None else scale.contiguous()
        plan = x.new_empty(x.shape[0] + 1, spec.group.size, dtype=torch.int32)
        with slot.begin("dispatch", x.device, *sent, scale, plan):
            slot.exchange.send(*sent, runtime.plan_of(plan), finished=False, scale=scale)
        return plan, _inbox(x)

    def dispatch_wait(
        self, inbox: Tensor, x: Tensor, topk_idx: Tensor, topk_weight: Tensor, scale: Tensor | None, spec: Spec
    ) -> lowering.Arrived:
        slot, M, K = held(spec, Payload.of(x, topk_idx, topk_weight)), spec.rows, topk_idx.shape[1]
        rows, ids = x.new_empty(M, x.shape[1]), x.new_empty(M, K, dtype=torch.int32)
        weights, arrived = topk_weight.new_empty(M, K), x.new_empty(M + spec.group.size, dtype=torch.int32)
        scales = None if scale is None else scale.new_empty(scale.shape[0], padded_rows(M))
        into = runtime.Arrived(rows, scales, ids, weights, *_arrived(arrived, spec))
        with slot.finish("dispatch", x.device):
            slot.exchange.receive(into, x.shape[0], copies=True, unpacks=True, overlapped=False)
        return lowering.Arrived(rows, ids, weights, arrived, scales)

    def redispatch_start(self, x: Tensor, plan: Tensor, spec: Spec) -> Tensor:
        slot, sent, plan = held(spec, Payload.of(x)), _movable(x), plan.contiguous()
        with slot.begin("dispatch", x.device, sent, plan):
            slot.exchange.send(sent, None, None, runtime.plan_of(plan), finished=True)
        return _inbox(x)

    def redispatch_wait(self, inbox: Tensor, x: Tensor, plan: Tensor, arrived: Tensor, spec: Spec) -> Tensor:
        slot, rows = held(spec, Payload.of(x)), x.new_empty(spec.rows, x.shape[1])
        source_token, _ = _arrived(arrived, spec)
        counts = arrived.new_empty(spec.group.size)  # `arrived` has them, and operators write nothing they are given
        unused = rows.new_empty(0)
        into = runtime.Arrived(rows, None, unused, unused, source_token, counts)
        with slot.finish("dispatch", x.device):
            slot.exchange.receive(into, x.shape[0], copies=True, unpacks=False, overlapped=False)
        return rows

    def combine_start(
        self, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec
    ) -> Tensor:
        slot = held(spec, Payload.of(rows, row_weights, back=True))
        sent, extra = _movable(rows), None if row_weights is None else row_weights.contiguous()
        tokens, came = plan.shape[0] - 1, arrived.contiguous()
        with slot.begin("combine", rows.device, sent, extra, came):
            slot.exchange.send_back(sent, *_arrived(came, spec), tokens, extra=extra, frees_stage=False)
        return _inbox(rows)

    def combine_wait(
        self, inbox: Tensor, rows: Tensor, row_weights: Tensor | None, plan: Tensor, arrived: Tensor, spec: Spec
    ) -> tuple[Tensor, Tensor | None]:
        slot, made, T = held(spec, Payload.of(rows, row_weights, back=True)), plan.contiguous(), plan.shape[0] - 1
        y = rows.new_empty(T, rows.shape[1])
        weights = None if row_weights is None else row_weights.new_empty(T, row_weights.shape[1])
        with slot.finish("combine", rows.device):
            slot.exchange.sum(runtime.plan_of(made), y, weights, overlapped=False)
        return y, weights


def _inbox(like: Tensor) -> Tensor:
    shape, dtype = _INBOX
    return like.new_empty(shape, dtype=dtype)


SYMMETRIC = Symmetric()
