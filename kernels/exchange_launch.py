"""Launches the kernels of expert parallelism (cuda/exchange.cu): the program of a spec, its arguments, each kernel.

Every function enqueues on the current stream, without a host synchronisation, and may be captured in a CUDA graph. The
kernels count exchanges on the device, so all ranks must call the same functions in the same order for a slot. Tensors
are given by the caller, nothing is allocated here: a kernel that starts before the one in front of it has ended
(`overlapped`) must not get memory that this one's tensors have just left.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from dscompile.kernels import nvrtc
from dscompile.kernels.exchange import (
    CHANNEL_BYTES,
    FEW_TOKENS,
    HEAD_ROOM,
    MAX_CHUNKS,
    MAX_WARPS,
    Spec,
    refusal,
    return_warps,
    sender_warps,
    slot_layout,
)
from dscompile.kernels.launch import capability
from dscompile.kernels.refusals import BadArguments

__all__ = ["Arrived", "Plan", "Slot", "combine_start", "combine_wait", "dispatch_start", "dispatch_wait", "make_plan"]

_PLAN_THREADS = 1024
_RECEIVE_THREADS = 32 * MAX_WARPS


class _Job(ctypes.Structure):
    """`Job` of cuda/exchange.cuh, field by field."""

    _fields_ = [
        ("base", ctypes.c_void_p * 8),
        ("record", ctypes.c_void_p),
        ("failed", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_uint64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("x_scale", ctypes.c_void_p),
        *(
            (name, ctypes.c_void_p)
            for name in ("topk_idx", "topk_weight", "place", "counts", "source_token", "arrived")
        ),
        *((name, ctypes.c_void_p) for name in ("rows", "scale", "ids", "weights", "extra", "extra_sum", "y")),
        *((name, ctypes.c_int) for name in ("rank", "slot", "tokens", "trap", "chunks", "parts", "frees_stage")),
    ]


@dataclass(frozen=True)
class Slot:
    """A slot of an arena as the kernels see it. bases: its address on each rank, as this rank sees it.

    record: host memory of 8 words that a kernel writes when it gives up; failed: a device word; trap: whether it then
    ends the context, or marks the arena as failed, whose kernels return at once from then on.
    """

    spec: Spec
    rank: int
    number: int
    bases: tuple[int, ...]
    record: torch.Tensor
    failed: torch.Tensor
    timeout_s: float
    trap: bool

    @property
    def device(self) -> torch.device:
        return self.failed.device


@dataclass(frozen=True)
class Plan:
    """Where tokens go: place int32 [T, W], the row of a token among those for a rank or -1; counts int32 [W]."""

    place: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Arrived:
    """What came to a rank, M = W * capacity rows, the s-th token of rank r in row r * capacity + s.

    rows [M, D]: bf16, fp16 or e4m3; scale float32 [D / 128, M_pad] or None. ids int32 [M, K]: local experts, -1
    elsewhere and in unused rows, weights float32 [M, K]: 0 there. source_token int32 [M]: -1 in unused rows. counts
    int32 [W]: rows of each rank. Values of unused rows of `rows` are undefined.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
    source_token: torch.Tensor
    counts: torch.Tensor


# The program


@functools.cache
def _files() -> dict[str, str]:
    folder = Path(__file__).parent / "cuda"
    return {name: (folder / name).read_text() for name in ("exchange.cu", "exchange.cuh", "peers.cuh", "sm90.cuh")}


@functools.cache
def program(spec: Spec) -> tuple[dict[str, str], tuple[str, ...]]:
    """(sources, options) of the kernels of a spec, for `nvrtc.compile_cubin`."""
    layout = slot_layout(spec)
    values = {
        "WORLD": spec.world,
        "CAPACITY": spec.capacity,
        "WIDTH": spec.width,
        "TOP_K": spec.top_k,
        "LOCAL_EXPERTS": spec.local_experts,
        "QUANTIZED": int(spec.quantized),
        "PREQUANTIZED": int(spec.prequantized),
        "BFLOAT16": int(spec.dtype == "bfloat16"),
        "INDEX": "i64" if spec.index == "int64" else "int",
        "FEW_TOKENS": FEW_TOKENS,
        "CHANNEL_BYTES": CHANNEL_BYTES,
        "HEAD_ROOM": HEAD_ROOM,
        "MAX_CHUNKS": MAX_CHUNKS,
        "SENDER_ROOM": spec.sender_bytes,
        "RETURN_ROOM": spec.return_bytes,
        **{f"{name.upper()}_AT": f"{getattr(layout, name)}ll" for name in ("rows", "scales", "meta", "back", "extra")},
    }
    return _files(), tuple(f"--define-macro={name}={value}" for name, value in values.items())


def kernel_shape(spec: Spec, name: str) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a CTA of a kernel."""
    if name == "plan":
        return _PLAN_THREADS, HEAD_ROOM
    if name == "release":
        return 64, 0
    if name == "combine_start":
        return 32 * return_warps(spec), HEAD_ROOM + return_warps(spec) * spec.return_bytes
    if name in ("dispatch_start", "dispatch_start_planning"):
        planning = name == "dispatch_start_planning"
        warps = sender_warps(spec, planning=planning)
        return 32 * warps, HEAD_ROOM + planning * FEW_TOKENS * spec.world * 4 + warps * spec.sender_bytes
    return _RECEIVE_THREADS, HEAD_ROOM


@functools.cache
def _kernel(spec: Spec, name: str, device: int) -> nvrtc.Kernel:
    sources, options = program(spec)
    threads, shared = kernel_shape(spec, name)
    return nvrtc.load(sources, options, name, device, threads=threads, cluster=1, shared=shared)


def unsupported(spec: Spec, device: torch.device) -> str | None:
    """Why these kernels can't serve a spec on a device, or None: sizes, another card than Hopper, no NVRTC."""
    if capability(device) != (9, 0):
        found = capability(device) or "none"
        return f"{device} has compute capability {found}. The kernels need Hopper, (9, 0). Use the collective instead."
    return refusal(spec) or nvrtc.why_no_nvrtc()


def prepare(spec: Spec, device: torch.device) -> None:
    """Compile and load every kernel of a spec, so that no rank waits for another one's compiler."""
    for name in ("plan", "dispatch_start", "dispatch_start_planning", "dispatch_wait", "combine_start", "combine_wait"):
        _kernel(spec, name, device.index)
    _kernel(spec, "release", device.index)


# Launching


def _launch(slot: Slot, name: str, ctas: int, *, overlapped: bool = False, **fields: object) -> None:
    values = {key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
    job = _Job(
        base=(ctypes.c_void_p * 8)(*slot.bases),
        record=slot.record.data_ptr(),
        failed=slot.failed.data_ptr(),
        timeout_ns=int(slot.timeout_s * 1e9),
        rank=slot.rank,
        slot=slot.number,
        trap=int(slot.trap),
        **values,
    )
    with torch.cuda.device(slot.device):
        stream = torch.cuda.current_stream(slot.device).cuda_stream
        _kernel(slot.spec, name, slot.device.index).launch(ctas, stream, (job,), programmatic=overlapped)


def make_plan(slot: Slot, topk_idx: torch.Tensor, plan: Plan) -> None:
    """Fill plan from topk_idx [T, K] of ids of all ranks' experts; others, as -1, name no expert."""
    _check_index(slot.spec, topk_idx)
    _launch(slot, "plan", 1, topk_idx=topk_idx, tokens=len(topk_idx), **vars(plan))


def dispatch_start(
    slot: Slot,
    x: torch.Tensor,
    plan: Plan,
    topk_idx: torch.Tensor | None,
    topk_weight: torch.Tensor | None,
    *,
    ctas: int,
    scale: torch.Tensor | None = None,
    planning: bool = False,
    overlapped: bool = False,
) -> None:
    """Send x [T, D] of the spec's dtype, or e4m3 and its scale [D / 128, T_pad], to the ranks of its experts.

    topk_idx [T, K], topk_weight float32 [T, K]: sent along; both None to send rows alone by a plan that the receivers
    know. planning: the kernel makes the plan, of at most FEW_TOKENS tokens. overlapped: behind `make_plan`, which then
    may still run. Raises BadArguments.
    """
    spec = slot.spec
    _check_rows("x", x, spec, spec.capacity, dtype="float8_e4m3fn" if spec.prequantized else spec.dtype)
    _check_scale(spec, scale, len(x))
    if topk_idx is not None:
        _check_index(spec, topk_idx, len(x))
        if topk_weight is None or topk_weight.dtype != torch.float32 or topk_weight.shape != topk_idx.shape:
            raise BadArguments(
                f"topk_weight is {_told(topk_weight)} for ids {list(topk_idx.shape)}. The kernel sends a float32 "
                "weight beside each id. Pass contiguous float32 [T, K]."
            )
    elif planning:
        raise BadArguments("There is no topk_idx. The kernel plans by the ids. Pass them, or a finished plan.")
    if planning and len(x) > FEW_TOKENS:
        raise BadArguments(f"x is {list(x.shape)}. The kernel plans {FEW_TOKENS} tokens at most. Call make_plan first.")
    name = "dispatch_start_planning" if planning else "dispatch_start"
    rows = dict(x=x, x_stride=x.stride(0) * x.element_size(), x_scale=scale, tokens=len(x))
    fields = dict(rows, topk_idx=topk_idx, topk_weight=topk_weight)
    _launch(slot, name, ctas, overlapped=overlapped, **fields, **vars(plan))


def dispatch_wait(
    slot: Slot, arrived: Arrived, *, ctas: int, copies: bool, unpacks: bool = True, overlapped: bool = False
) -> None:
    """Wait for all ranks' rows and fill `arrived`.

    copies: into arrived.rows, after which the stage is free; otherwise arrived.rows is a view of the stage, which
    `combine_start` frees. unpacks: ids, weights and source_token too, which rows sent alone don't have.
    """
    fields = dict(ids=arrived.ids, weights=arrived.weights) if unpacks else {}
    if copies:
        fields["rows"] = arrived.rows
    if arrived.scale is not None:
        fields["scale"] = arrived.scale
    tokens = dict(source_token=arrived.source_token, arrived=arrived.counts)
    _launch(slot, "dispatch_wait", ctas, overlapped=overlapped, **fields, **tokens)


def combine_start(
    slot: Slot,
    y: torch.Tensor,
    source_token: torch.Tensor,
    counts: torch.Tensor,
    *,
    ctas: int,
    chunks: int,
    extra: torch.Tensor | None = None,
    frees_stage: bool = True,
) -> None:
    """Send rows of y [M, D], laid out as `Arrived.rows`, back to their tokens; extra float32 [M, K] beside them.

    frees_stage: what arrived by dispatch has been read by everything before in the stream.
    """
    _check_rows("y", y, slot.spec, slot.spec.rows, dtype=slot.spec.dtype, exactly=True)
    fields = dict(x=y, x_stride=y.stride(0) * 2, source_token=source_token, arrived=counts, extra=extra)
    _launch(slot, "combine_start", ctas, chunks=chunks, frees_stage=int(frees_stage), **fields)


def combine_wait(
    slot: Slot,
    plan: Plan,
    y: torch.Tensor,
    *,
    ctas: int,
    parts: int,
    extra_sum: torch.Tensor | None = None,
    overlapped: bool = False,
) -> None:
    """y [T, D] = for each token the float32 sum of what its ranks sent back; extra_sum float32 [T, K] likewise.

    overlapped: directly behind `combine_start`, beside which it then runs.
    """
    fields = dict(place=plan.place, tokens=len(y), y=y, extra_sum=extra_sum, parts=parts)
    _launch(slot, "combine_wait", ctas, overlapped=overlapped, **fields)


def release(slot: Slot) -> None:
    """Free the stage after a dispatch whose rows were viewed and that no combine follows."""
    _launch(slot, "release", 1)


# Checks of metadata


def _told(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"


def _check_rows(name: str, rows: torch.Tensor, spec: Spec, most: int, *, dtype: str, exactly: bool = False) -> None:
    wanted = f"[{most if exactly else f'at most {most}'}, {spec.width}] {dtype}"
    fits = rows.dim() == 2 and rows.shape[1] == spec.width and (rows.shape[0] == most or not exactly)
    if not fits or rows.shape[0] > most or rows.dtype != getattr(torch, dtype):
        raise BadArguments(f"{name} is {_told(rows)}. The exchange was set up for {wanted}. Pass such rows.")
    bytes_apart = rows.stride(0) * rows.element_size()
    if rows.numel() and (rows.stride(1) != 1 or bytes_apart % 16 or rows.data_ptr() % 16):
        raise BadArguments(f"{name} is {_told(rows)}. Bulk copies move rows at multiples of 16 bytes. Copy it so.")


def _check_scale(spec: Spec, scale: torch.Tensor | None, tokens: int) -> None:
    if not spec.prequantized and scale is None:
        return
    shape = (spec.blocks, -(-tokens // 4) * 4)
    fits = scale is not None and scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous()
    if not spec.prequantized or not fits:
        wanted = f"a contiguous float32 scale {list(shape)}" if spec.prequantized else "no scale"
        raise BadArguments(
            f"scale is {_told(scale)} for {tokens} tokens. The exchange was set up for {wanted} beside rows. Pass what "
            "quantize_1x128 returns, or set it up for such rows."
        )


def _check_index(spec: Spec, topk_idx: torch.Tensor, tokens: int | None = None) -> None:
    shape = (len(topk_idx) if tokens is None else tokens, spec.top_k)
    if topk_idx.shape != shape or topk_idx.dtype != getattr(torch, spec.index) or not topk_idx.is_contiguous():
        raise BadArguments(
            f"topk_idx is {_told(topk_idx)}. The exchange was set up for {spec.index} [T, {spec.top_k}]. Pass such "
            "ids, contiguous."
        )
    if len(topk_idx) > spec.capacity:
        raise BadArguments(
            f"topk_idx is {_told(topk_idx)}. The exchange has room for {spec.capacity} tokens a rank. Set it up for "
            "more."
        )
