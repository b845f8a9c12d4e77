"""Rows that were quantised before dispatch travel as they are: the same bits as quantising on the way, and after."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dscompile.kernels import exchange_launch, nvrtc
from dscompile.kernels.exchange import FEW_TOKENS, Spec, refusal, sender_warps, slot_layout
from dscompile.kernels.exchange_launch import Slot
from dscompile.kernels.refusals import BadArguments
from dscompile.runtime.exchange import Exchange
from tests.kernels import exchange_emulator as emulator
from tests.kernels.exchange_cases import dispatch_reference, explain_rows, make_inputs
from tests.kernels.moe_cases import quantize_reference

SPEC = Spec(2, FEW_TOKENS + 9, 384, 2, 4, quantized=True, prequantized=True)
V3 = Spec(4, 4096, 7168, 8, 256, quantized=True, prequantized=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if emulator.why_not():
        pytest.skip(emulator.why_not())
    return emulator.build(SPEC, tmp_path_factory.mktemp("exchange") / "prequantized")


def exchange_of(world: emulator.World, rank: int) -> Exchange:
    slot = Slot(SPEC, rank, 0, tuple(world.bases), world.records[rank], world.failed[rank], 1.0, False)
    rows = world.stage(rank)
    arena: Any = SimpleNamespace(slots=(slot,), world=SPEC.world, check=lambda: None, stage_rows=lambda number: rows)
    return Exchange(arena, 0)


@pytest.mark.parametrize("tokens", [(3, FEW_TOKENS + 9), (0, 65)], ids=str)
def test_bits_are_those_of_quantising_afterwards(
    library: ctypes.CDLL, tokens: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = emulator.World(SPEC, library)

    def launch(slot: Slot, name: str, ctas: int, *, overlapped: bool = False, **fields: Any) -> None:
        world.launch(slot.rank, name, ctas=min(ctas, 2), warps=2, overlapped=overlapped, trap=0, **fields)

    monkeypatch.setattr(exchange_launch, "_launch", launch)
    inputs = [make_inputs(SPEC, rank, count, "some nowhere") for rank, count in enumerate(tokens)]
    arrived, again = [], []
    for rank, given in enumerate(inputs):
        q, scale = quantize_reference(given.x.float())
        exchange, routed = exchange_of(world, rank), (given.topk_idx, given.topk_weight)
        plan, first = exchange.dispatch(q, *routed, copies=True, scale=scale)
        exchange.dispatch_start(q, None, None, plan, scale=scale)  # along the plan, without routing
        arrived.append(first)
        again.append(exchange.dispatch_wait(len(q), copies=True, given=first))
    assert world.run(seed=11) == 0
    for rank in range(SPEC.world):
        want = dispatch_reference(SPEC, inputs, rank)  # rows that arrived, quantised there
        for found in (arrived[rank], again[rank]):
            for name in ("counts", "source_token", "ids", "weights", "scale"):
                assert torch.equal(getattr(found, name), getattr(want, name)), f"rank {rank}: {name}"
            assert not explain_rows(SPEC, found.rows, want.rows, want.source_token >= 0, rank)


def test_what_does_not_fit_is_told() -> None:
    slot: Any = SimpleNamespace(spec=SPEC)
    x, ids = torch.zeros(5, 384), torch.zeros(5, 2, dtype=torch.int64)
    weight, scale = torch.zeros(5, 2), torch.zeros(3, 8)
    with pytest.raises(BadArguments, match="set up for .* float8_e4m3fn"):
        exchange_launch.dispatch_start(slot, x.bfloat16(), None, ids, weight, ctas=1, scale=scale)  # type: ignore
    q = x.to(torch.float8_e4m3fn)
    for wrong in (None, scale[:, :5], scale[:2], scale.double()):
        with pytest.raises(BadArguments, match=r"a contiguous float32 scale \[3, 8\]"):
            exchange_launch.dispatch_start(slot, q, None, ids, weight, ctas=1, scale=wrong)  # type: ignore
    slot.spec = dataclasses.replace(SPEC, quantized=False, prequantized=False)
    with pytest.raises(BadArguments, match="set up for no scale"):
        exchange_launch.dispatch_start(slot, x.bfloat16(), None, ids, weight, ctas=1, scale=scale)  # type: ignore
    assert "doesn't dequantise" in (refusal(dataclasses.replace(SPEC, quantized=False)) or "")


def test_a_slot_is_laid_out_alike_and_more_warps_send() -> None:
    usual = dataclasses.replace(V3, prequantized=False)
    assert slot_layout(V3) == slot_layout(usual)
    assert sender_warps(V3) == 16 > sender_warps(usual)


def test_nothing_is_quantised_on_the_way() -> None:
    if nvrtc.why_no_nvrtc():
        pytest.skip("compile_only: NVRTC is not installed")
    sources, options = exchange_launch.program(V3)
    settings = ("--gpu-architecture=sm_90a", "--std=c++17", *options, "--ptxas-options=-v")
    _, log = nvrtc.compile_with_log(sources, settings)
    assert "warning" not in log.lower(), log
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert set(spilled) == {("0", "0", "0")}, log
    by_kernel = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", log, flags=re.DOTALL))
    assert set(by_kernel) == set(emulator.KERNELS)
    for kernel, registers in by_kernel.items():
        threads, shared = exchange_launch.kernel_shape(V3, kernel)
        assert int(registers) * threads <= 65536 and shared <= 232448, kernel
