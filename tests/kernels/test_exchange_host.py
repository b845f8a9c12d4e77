"""The host side of the exchange kernels: sizes, layout, refusals, launch shapes, the handshake and its errors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dscompile.kernels import exchange, exchange_launch
from dscompile.kernels.exchange import LaunchShape, Spec, launch_shape, refusal, slot_layout
from dscompile.kernels.exchange_launch import Plan, Slot
from dscompile.kernels.quantize import padded_rows
from dscompile.kernels.refusals import BadArguments
from dscompile.runtime import symmetric
from dscompile.runtime.groups import RanksDisagree
from dscompile.runtime.symmetric import ExchangeUnsupported

V3 = Spec(4, 4096, 7168, 8, 256)
V3_FP8 = dataclasses.replace(V3, quantized=True)


def test_sizes() -> None:
    assert (V3.local_experts, V3.rows, V3.row_bytes, V3.scale_bytes) == (64, 16384, 14336, 0)
    assert (V3_FP8.row_bytes, V3_FP8.scale_bytes, V3_FP8.blocks) == (7168, 224, 56)
    assert V3.meta_words == 20 and Spec(2, 1, 8, 4, 2).meta_words == 12
    assert Spec(2, 33, 128, 4, 2).scale_rows == padded_rows(66) == 68
    assert V3_FP8.wire_bytes(10) == 10 * (7168 + 224 + 80) and V3_FP8.wire_bytes(10, back=True) == 10 * 14336


@pytest.mark.parametrize("spec", [V3, V3_FP8, Spec(3, 5, 136, 3, 6), Spec(8, 1, 8, 1, 8, dtype="float16")])
def test_parts_of_a_slot_are_apart_and_aligned(spec: Spec) -> None:
    layout = slot_layout(spec)
    parts = {
        "rows": spec.rows * spec.row_bytes,
        "scales": spec.rows * spec.scale_bytes,
        "meta": spec.rows * spec.meta_words * 4,
        "back": spec.rows * spec.input_bytes,
        "extra": spec.rows * spec.top_k * 4,
    }
    at = 2 * exchange.CHANNEL_BYTES
    for name, size in parts.items():
        assert getattr(layout, name) >= at and getattr(layout, name) % 1024 == 0
        at = getattr(layout, name) + size
    assert layout.total >= at and layout.total % 1024 == 0


@pytest.mark.parametrize("spec", [V3, V3_FP8, Spec(2, 64, 2048, 6, 64, quantized=True), Spec(2, 8, 32768, 1, 2)])
def test_shared_memory(spec: Spec) -> None:
    for name in ("plan", "dispatch_start", "dispatch_start_planning", "dispatch_wait", "combine_start", "combine_wait"):
        threads, shared = exchange_launch.kernel_shape(spec, name)
        assert shared <= exchange.SHARED_BYTES and 64 <= threads <= 1024 and threads % 32 == 0


def test_launch_shapes() -> None:
    assert launch_shape(V3, 4096) == LaunchShape(24, 48, chunks=12, parts=1, fused=False)
    assert launch_shape(V3, 4096, sms=64) == LaunchShape(64, 64, chunks=12, parts=1, fused=False)
    assert launch_shape(V3, 128) == LaunchShape(64, 64, chunks=1, parts=8, fused=True)
    assert launch_shape(V3, 0).send > 0 and launch_shape(V3, 1).parts <= V3.width // 256
    assert all(launch_shape(V3, tokens).chunks <= exchange.MAX_CHUNKS for tokens in (1, 256, 257, 10**6))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world": 9}, "flags for 8"),
        ({"experts": 254}, "Each rank holds equally many"),
        ({"dtype": "float32"}, "16-bit tokens"),
        ({"index": "int16"}, "int64 or int32"),
        ({"width": 100}, "multiple of 8"),
        ({"width": 200, "quantized": True}, "multiple of 128"),
        ({"capacity": 0}, "24 bits"),
        ({"top_k": 65}, "64 experts"),
        ({"width": 65536}, "bytes of shared memory"),
    ],
)
def test_refusals(change: dict, said: str) -> None:
    assert refusal(V3) is None and refusal(V3_FP8) is None
    assert said in (refusal(dataclasses.replace(V3, **change)) or "")


def test_another_device_is_refused() -> None:
    assert "Hopper" in (exchange_launch.unsupported(V3, torch.device("cpu")) or "")


# Arguments of a launch: refused before anything is compiled


def cpu_slot(spec: Spec) -> Slot:
    word = torch.zeros(8, dtype=torch.int32)
    return Slot(spec, 0, 0, (0,) * spec.world, word, word, 1.0, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(4, 32, dtype=torch.bfloat16)}, "set up for"),
        ({"x": torch.zeros(4, 64)}, "set up for"),
        ({"x": torch.zeros(9, 64, dtype=torch.bfloat16)}, "at most 8"),
        ({"x": torch.zeros(64, 4, dtype=torch.bfloat16).t()}, "multiples of 16 bytes"),
        ({"topk_idx": torch.zeros(4, 2, dtype=torch.int32)}, "int64"),
        ({"topk_idx": torch.zeros(3, 2, dtype=torch.int64)}, "such ids"),
        ({"topk_weight": None}, "missing"),
        ({"topk_weight": torch.zeros(4, 2, dtype=torch.float64)}, "float32"),
        ({"topk_idx": None, "topk_weight": None, "planning": True}, "no topk_idx"),
    ],
)
def test_wrong_arguments(change: dict, said: str) -> None:
    given = {
        "x": torch.zeros(4, 64, dtype=torch.bfloat16),
        "plan": Plan(torch.zeros(4, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)),
        "topk_idx": torch.zeros(4, 2, dtype=torch.int64),
        "topk_weight": torch.zeros(4, 2),
        **change,
    }
    with pytest.raises(BadArguments, match=said):
        exchange_launch.dispatch_start(cpu_slot(Spec(2, 8, 64, 2, 4)), ctas=1, **given)


def test_wrong_rows_to_send_back() -> None:
    names = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(BadArguments, match=r"\[16, 64\] bfloat16"):
        y = torch.zeros(15, 64, dtype=torch.bfloat16)
        exchange_launch.combine_start(cpu_slot(Spec(2, 8, 64, 2, 4)), y, names, names, ctas=1, chunks=1)


# The handshake


def agree(monkeypatch: pytest.MonkeyPatch, mine: tuple[Spec, ...], **peer: object) -> None:
    """`_agree` of rank 0, whose peer answers like it but for `peer`."""

    def gather(everyone: list, own: dict, group: object) -> None:
        everyone[:] = [own, own | peer]

    monkeypatch.setattr(symmetric, "dist", SimpleNamespace(all_gather_object=gather))
    symmetric._agree(None, 0, 2, mine, None)


def test_ranks_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    agree(monkeypatch, (V3, V3_FP8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capacity": 64}, "slot 0: capacity 4096 and 64"),
        ({"experts": 128}, "slot 0: experts 256 and 128"),
        (None, "1 and 0"),
    ],
)
def test_ranks_that_differ(monkeypatch: pytest.MonkeyPatch, change: dict | None, said: str) -> None:
    theirs = [] if change is None else [dataclasses.asdict(dataclasses.replace(V3, **change))]
    with pytest.raises(RanksDisagree, match=f"rank 1 set up different exchanges: {said}"):
        agree(monkeypatch, (V3,), specs=theirs)


def test_ranks_that_can_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExchangeUnsupported, match="Rank 1: no GPU"):
        agree(monkeypatch, (V3,), refused="no GPU")
    with pytest.raises(ExchangeUnsupported, match="rank 1 on elsewhere"):
        agree(monkeypatch, (V3,), host="elsewhere")
    assert "No spec" in (symmetric._first_refusal((), 2, torch.device("cpu")) or "")
    assert "for 4 ranks" in (symmetric._first_refusal((V3,), 2, torch.device("cpu")) or "")


def test_a_record_becomes_an_error() -> None:
    error = symmetric.lost([2, 3, 1, 0, 5 << 24, 0, (4 << 24) + 7, 0], 2.5, [8, 9, 10, 11])
    assert (error.operator, error.rank) == ("dispatch_wait", 11)
    assert "dispatch_wait: rank 8 waited 2.5 s on slot 1 for rank 11" in str(error)
    assert "exchange 5 with 0 rows, it is at exchange 4 with 7" in str(error)
    error = symmetric.lost([3, 1, 0, 2, -1, 0, 6, 0], 1.0, [0, 1, 2])
    assert "combine_start" in str(error) and f"read exchange {2**32 - 1}, it has read 6" in str(error)
