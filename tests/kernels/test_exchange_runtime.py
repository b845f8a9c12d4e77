"""`runtime.exchange` and the launches below it, with the emulator in the device's place: what is passed and when."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dscompile.kernels import exchange_launch
from dscompile.kernels.exchange import FEW_TOKENS, Spec, slot_layout
from dscompile.kernels.exchange_launch import Arrived, Slot
from dscompile.runtime.exchange import Exchange
from tests.kernels import exchange_emulator as emulator
from tests.kernels.exchange_cases import combine_reference, dispatch_reference, explain_rows, make_inputs

if emulator.why_not():
    pytest.skip(emulator.why_not(), allow_module_level=True)

SPEC = Spec(2, FEW_TOKENS + 9, 128, 2, 4, quantized=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulator.build(SPEC, tmp_path_factory.mktemp("exchange") / "runtime")


@pytest.fixture
def world(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> emulator.World:
    """What is launched on a slot joins the list of its rank, with few CTAs and warps."""
    made = emulator.World(SPEC, library)

    def launch(slot: Slot, name: str, ctas: int, *, overlapped: bool = False, **fields: Any) -> None:
        made.launch(slot.rank, name, ctas=min(ctas, 2), warps=2, overlapped=overlapped, trap=int(slot.trap), **fields)

    monkeypatch.setattr(exchange_launch, "_launch", launch)
    return made


def exchange_of(world: emulator.World, rank: int) -> Exchange:
    """On an arena that is the emulated world's."""
    slot = Slot(SPEC, rank, 0, tuple(world.bases), world.records[rank], world.failed[rank], 1.0, False)
    layout, memory = slot_layout(SPEC), world.memory[rank]
    begin = world.bases[rank] - memory.data_ptr() + layout.rows
    rows = memory[begin : begin + SPEC.rows * SPEC.row_bytes].view(torch.float8_e4m3fn).view(SPEC.rows, SPEC.width)
    arena: Any = SimpleNamespace(slots=(slot,), world=SPEC.world, check=lambda: None, stage_rows=lambda number: rows)
    return Exchange(arena, 0)


def check(arrived: Arrived, want: Arrived, rank: int) -> None:
    for name in ("counts", "source_token", "ids", "weights", "scale"):
        assert torch.equal(getattr(arrived, name), getattr(want, name)), f"rank {rank}: {name}"
    assert not explain_rows(SPEC, arrived.rows, want.rows, want.source_token >= 0, rank)


@pytest.mark.parametrize("tokens", [(3, FEW_TOKENS + 9)], ids=str)
@pytest.mark.parametrize("together", [True, False], ids=["overlapped", "one by one"])
def test_there_and_back_and_backward(world: emulator.World, tokens: tuple[int, int], together: bool) -> None:
    inputs = [make_inputs(SPEC, rank, count, "uniform") for rank, count in enumerate(tokens)]
    exchanges = [exchange_of(world, rank) for rank in range(SPEC.world)]
    back = [torch.randn(SPEC.rows, SPEC.width).bfloat16() for _ in tokens]
    extras = [torch.randn(SPEC.rows, SPEC.top_k) for _ in tokens]
    there, again, sums = [], [], []
    for rank, (exchange, given) in enumerate(zip(exchanges, inputs)):
        arguments = given.x, given.topk_idx, given.topk_weight
        if together:
            plan, arrived = exchange.dispatch(*arguments, copies=True)
            sums.append(exchange.combine(back[rank], arrived, plan, extra=extras[rank]))
            _, repeated = exchange.dispatch(given.x, None, None, copies=True, plan=plan, given=arrived)
        else:
            plan = exchange.dispatch_start(*arguments)
            arrived = exchange.dispatch_wait(len(given.x), copies=True)
            exchange.combine_start(back[rank], arrived, len(given.x), extra=extras[rank])
            sums.append(exchange.combine_wait(plan, extra=True))
            exchange.dispatch_start(given.x, None, None, plan)
            repeated = exchange.dispatch_wait(len(given.x), copies=False, given=arrived)
            exchange.release()
        there.append((plan, arrived))
        again.append(repeated)
    assert world.run(seed=3) == 0
    for rank, (plan, arrived) in enumerate(there):
        want = dispatch_reference(SPEC, inputs, rank)
        check(arrived, want, rank)
        check(again[rank], want, rank)
        y, extra_sum = combine_reference(SPEC, back, extras, plan, rank)
        assert torch.equal(sums[rank][0], y) and torch.equal(sums[rank][1], extra_sum)
