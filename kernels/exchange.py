"""What an exchange of expert parallelism is, in numbers: sizes, the layout of a slot, shared memory, launch shapes.

Pure functions and records, no device. An exchange moves the tokens of W ranks to the ranks that hold their experts
(dispatch) and their results back (combine). A token is sent once to a rank, however many of its experts are there, so
`capacity` tokens a rank fill at most `capacity` rows of each rank's stage: W * capacity rows hold whatever routing
gives, and nothing can overflow. Refuses sizes that the kernels can't move, with a reason (`refusal`).

    Spec             sizes that all ranks must agree on
    slot_layout      where the parts of a slot lie in the arena
    launch_shape     CTAs, warps, chunks and parts for a number of tokens
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

__all__ = ["BLOCK", "FEW_TOKENS", "LaunchShape", "SlotLayout", "Spec", "launch_shape", "refusal", "slot_layout"]

BLOCK = 128  # columns that share a scale
MAX_RANKS = 8
FEW_TOKENS = 256  # up to so many, each CTA plans all of them for itself, without a kernel before
CHANNEL_BYTES = 384  # of cuda/exchange.cuh
HEAD_ROOM = 1280  # of shared memory, before the rows
SHARED_BYTES = 232448  # that a CTA on Hopper may have
MAX_WARPS = 16
MAX_CHUNKS = 16
_ALIGNED = 1024


@dataclass(frozen=True)
class Spec:
    """Sizes of an exchange, the same on every rank.

    world: ranks. capacity: the most tokens a rank has. width: columns of a token. experts: of all ranks together; rank
    r holds experts r * L to (r + 1) * L, L = experts / world. dtype: of tokens and results, "bfloat16" or "float16".
    quantized: whether dispatch sends e4m3 with a scale for 128 columns; prequantized: whether it is given them so, or
    quantises `dtype` itself. index: dtype of the ids, "int64" or "int32".
    """

    world: int
    capacity: int
    width: int
    top_k: int
    experts: int
    dtype: str = "bfloat16"
    quantized: bool = False
    index: str = "int64"
    prequantized: bool = False

    @property
    def local_experts(self) -> int:
        return self.experts // self.world

    @property
    def rows(self) -> int:
        """M, rows of the stage."""
        return self.world * self.capacity

    @property
    def scale_rows(self) -> int:
        """M_pad of the scales, a multiple of 4 as the GEMM reads them."""
        return _up(self.rows, 4)

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns."""
        return math.ceil(self.width / BLOCK)

    @property
    def input_bytes(self) -> int:
        """Of a result, and of a token that isn't given quantised."""
        return self.width * 2

    @property
    def token_bytes(self) -> int:
        """Of a token as dispatch is given it."""
        return self.row_bytes if self.prequantized else self.input_bytes

    @property
    def row_bytes(self) -> int:
        """Of a row of the stage."""
        return self.width if self.quantized else self.input_bytes

    @property
    def scale_bytes(self) -> int:
        """Of a row's scales, padded to what bulk copies move."""
        return _up(self.blocks * 4, 16) if self.quantized else 0

    @property
    def meta_words(self) -> int:
        """32-bit words of a row's meta: K ids, K weights, the token."""
        return _up(2 * self.top_k + 1, 4)

    @property
    def sender_bytes(self) -> int:
        """Shared memory of a warp that sends tokens: the token, the row where the kernel quantises, its scales."""
        row = self.row_bytes if self.quantized and not self.prequantized else 0
        return _up(self.token_bytes + row + self.scale_bytes, 128)

    @property
    def return_bytes(self) -> int:
        """Shared memory of a warp that sends results back."""
        return _up(self.input_bytes, 128)

    def wire_bytes(self, rows: int, *, back: bool = False) -> int:
        """Bytes that so many rows are on the wire, from dispatch or on their way back."""
        return rows * (self.input_bytes if back else self.row_bytes + self.scale_bytes + 4 * self.meta_words)

    def differences(self, other: Spec) -> str:
        """Fields in which two specs differ, with both values; empty where they agree."""
        fields = (field.name for field in dataclasses.fields(self))
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in fields)
        return ", ".join(f"{name} {mine!r} and {theirs!r}" for name, mine, theirs in pairs if mine != theirs)


def refusal(spec: Spec) -> str | None:
    """Why the kernels can't serve an exchange of these sizes and what to change, or None."""
    if not 1 <= spec.world <= MAX_RANKS:
        return f"The group has {spec.world} ranks. A slot has flags for {MAX_RANKS} of one host. Use a smaller group."
    if spec.experts % spec.world or spec.experts < spec.world:
        return (
            f"{spec.experts} experts are to be shared by {spec.world} ranks. Each rank holds equally many. Pad the "
            "experts to a multiple of the group's size."
        )
    if spec.dtype not in ("bfloat16", "float16") or spec.index not in ("int64", "int32"):
        return (
            f"Tokens are {spec.dtype}, ids {spec.index}. The kernels move 16-bit tokens and int64 or int32 ids. "
            "Convert them."
        )
    if spec.prequantized and not spec.quantized:
        return "Tokens are given quantised and sent in 16 bits. Dispatch doesn't dequantise. Set `quantized` too."
    unit = BLOCK if spec.quantized else 8
    if spec.width <= 0 or spec.width % unit:
        return (
            f"Tokens have {spec.width} columns. Bulk copies move 16 bytes, and a scale belongs to {BLOCK} columns. Pad "
            f"the width to a multiple of {unit}."
        )
    if not 0 < spec.capacity < 2**24 or not 0 < spec.top_k <= 64:
        return (
            f"Capacity {spec.capacity}, top {spec.top_k}. A flag counts rows in 24 bits, and a warp writes the meta of "
            "64 experts at the most. Use smaller ones."
        )
    if sender_warps(spec) < 2:
        return (
            f"A token of {spec.width} columns takes {spec.sender_bytes} bytes of shared memory. A CTA has "
            f"{SHARED_BYTES}, for at least two. Send narrower tokens."
        )
    return None


# Layout


@dataclass(frozen=True)
class SlotLayout:
    """Byte offsets in a slot, and its size, a multiple of 1024."""

    rows: int
    scales: int
    meta: int
    back: int
    extra: int
    total: int


@functools.cache
def slot_layout(spec: Spec) -> SlotLayout:
    """Channels first, then the stage (rows, scales, meta), then what comes back (rows, extra)."""
    sizes = {
        "rows": spec.rows * spec.row_bytes,
        "scales": spec.rows * spec.scale_bytes,
        "meta": spec.rows * spec.meta_words * 4,
        "back": spec.rows * spec.input_bytes,
        "extra": spec.rows * spec.top_k * 4,
    }
    at, offsets = _up(2 * CHANNEL_BYTES, _ALIGNED), {}
    for name, size in sizes.items():
        offsets[name] = at
        at = _up(at + size, _ALIGNED)
    return SlotLayout(**offsets, total=at)


# Launch shapes


@dataclass(frozen=True)
class LaunchShape:
    """How the kernels are launched for a number of tokens.

    send, receive: CTAs that send (dispatch_start, combine_start) and that receive (both waits). chunks: after how many
    equal parts of the rows combine_start says how far it is. parts: warps that sum a token together. fused: whether
    dispatch_start plans too.
    """

    send: int
    receive: int
    chunks: int
    parts: int
    fused: bool


def sender_warps(spec: Spec, *, planning: bool = False) -> int:
    """Warps of a CTA of dispatch_start, as many as shared memory holds, 16 at the most."""
    places = FEW_TOKENS * spec.world * 4 if planning else 0
    return min(MAX_WARPS, (SHARED_BYTES - HEAD_ROOM - places) // spec.sender_bytes)


def return_warps(spec: Spec) -> int:
    """Warps of a CTA of combine_start."""
    return min(MAX_WARPS, (SHARED_BYTES - HEAD_ROOM) // spec.return_bytes)


def launch_shape(spec: Spec, tokens: int, *, sms: int | None = None) -> LaunchShape:
    """CTAs and their work for `tokens` tokens a rank, `sms` senders where it is given.

    Many tokens: 24 CTAs keep the wire full, and 48 take up what came last. Few: a CTA for one or two tokens, so that
    none waits for another, and as many warps to a token's sum as there are.
    """
    fused = tokens <= FEW_TOKENS
    send = sms or (max(8, min(64, tokens)) if fused else 24)
    receive = max(send, min(64, tokens) if fused else 48)
    vectors = max(1, spec.width // 8 // 32)  # of which a warp takes one at a time
    parts = max(1, min(vectors, receive * MAX_WARPS // max(tokens, 1)))
    return LaunchShape(send, receive, chunks=1 if fused else 12, parts=parts, fused=fused)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
