"""The exchange over shared memory behind the operators, with the emulator in the device's place and a thread a rank."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dscompile.kernels import exchange_launch
from dscompile.kernels.exchange import Spec as Sizes
from dscompile.kernels.exchange import slot_layout
from dscompile.kernels.exchange_launch import Slot
from dscompile.lowering import exchange, select
from dscompile.lowering import exchange_symmetric as symmetric
from dscompile.lowering.block_scales import dequantize_rows
from dscompile.lowering.exchange import ExchangeError, Payload, Spec, chosen
from dscompile.runtime import groups
from tests.kernels import exchange_emulator as emulator
from tests.lowering import exchange_checks as checks

if emulator.why_not():
    pytest.skip(emulator.why_not(), allow_module_level=True)

W, CAPACITY = 2, 7
SIZES = Sizes(W, CAPACITY, checks.D, checks.K, checks.E)
FP8_SIZES = Sizes(W, CAPACITY, 256, checks.K, checks.E, quantized=True, prequantized=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulator.build(SIZES, tmp_path_factory.mktemp("exchange") / "operators")


class Ranks:
    """Two ranks in threads; arenas are emulated, and kernels run once both ranks wait for them."""

    def __init__(self, library: ctypes.CDLL, sizes: Sizes) -> None:
        self.sizes, self.library, self.worlds, self.launched, self.arenas = sizes, library, {}, [], []
        self.met = threading.Barrier(W, action=self._run, timeout=60)
        self.groups = [
            SimpleNamespace(name=f"emulated{rank}", rank=rank, size=W, kept={}, enter=lambda op, spec: None)
            for rank in range(W)
        ]

    def make_arena(self, spec: Spec, wanted: Sizes, device: torch.device) -> Any:
        rank = spec.group.rank
        self.arenas.append((rank, spec.slot, wanted))
        self.met.wait()  # made together
        world = self.worlds.setdefault(spec.slot, emulator.World(self.sizes, self.library))
        self.met.wait()
        assert slot_layout(wanted) == slot_layout(self.sizes)
        slot = Slot(wanted, rank, 0, tuple(world.bases), world.records[rank], world.failed[rank], 1.0, False)
        return SimpleNamespace(slots=(slot,), world=W, rank=rank, check=lambda: None, number=spec.slot)

    def launch(self, slot: Slot, name: str, ctas: int, *, overlapped: bool = False, **fields: Any) -> None:
        world = next(world for world in self.worlds.values() if world.records[slot.rank] is slot.record)
        world.launch(slot.rank, name, ctas=min(ctas, 2), warps=2, overlapped=overlapped, trap=0, **fields)
        self.launched.append((slot.rank, name))
        if name.endswith("wait"):
            self.met.wait()

    def _run(self) -> None:
        for world in self.worlds.values():
            if any(world.lists):
                assert world.run(seed=5) == 0

    def each(self, function: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(W) as threads:
            return list(threads.map(function, range(W)))


@pytest.fixture(scope="module")
def fp8_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulator.build(FP8_SIZES, tmp_path_factory.mktemp("exchange") / "fp8")


@pytest.fixture
def two(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with in_place(Ranks(library, SIZES), monkeypatch) as made:
        yield made


@contextlib.contextmanager
def in_place(made: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(exchange_launch, "_launch", made.launch)
    monkeypatch.setattr(symmetric, "make_arena", made.make_arena)
    monkeypatch.setattr(symmetric, "_ranks_can", lambda spec, device: select.YES)
    monkeypatch.setattr(exchange, "_shares", lambda device: select.YES)
    for group in made.groups:
        monkeypatch.setitem(groups._GROUPS, group.name, group)
    with select.force("exchange", "symmetric"):
        yield made


def inputs(rank: int, count: int) -> list[Tensor]:
    x, idx, weight = checks.tokens(rank, count)
    return [x.bfloat16().requires_grad_(), idx, weight.requires_grad_()]


def off(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().float(), expected.detach().float()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("counts", [(7, 4), (3, 0)], ids=str)
def test_the_layer_and_its_gradients_are_those_of_one_process(two: Ranks, counts: tuple[int, int]) -> None:
    mine = [inputs(rank, count) for rank, count in enumerate(counts)]
    whole = [[w.bfloat16().requires_grad_() for w in checks.weights()] for _ in range(W)]

    def step(rank: int) -> Tensor:
        y = checks.spread(two.groups[rank], CAPACITY, *mine[rank], *whole[rank])
        y.backward(torch.sin(y.detach().float() * 9).bfloat16())
        return y.detach()

    ys = two.each(step)
    joined = [torch.cat(parts).detach() for parts in zip(*mine)]
    alone = [t.float().requires_grad_() if t.is_floating_point() else t for t in joined]
    alone_whole = [w.bfloat16().float().requires_grad_() for w in checks.weights()]
    expected = checks.layer(*alone, *alone_whole)
    expected.backward(torch.sin(torch.cat(ys).float() * 9).bfloat16().float())
    for rank in range(W):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        if counts[rank]:
            assert off(ys[rank], expected[own]) < 0.015
            assert off(mine[rank][0].grad, alone[0].grad[own]) < 0.015
            assert off(mine[rank][2].grad, alone[2].grad[own]) < 0.015
        experts = slice(rank * checks.E // W, (rank + 1) * checks.E // W)
        for one, other in zip(whole[rank], alone_whole):
            assert off(one.grad[experts], other.grad[experts]) < 0.015
    assert sorted(two.arenas) == [(rank, 0, SIZES) for rank in range(W)]  # once, for there and back and backward
    names = [name for rank, name in two.launched if rank == 0]
    assert names.count("combine_wait") == names.count("dispatch_wait") == 2 and "release" not in names


def test_rows_are_bitwise_those_of_the_collective(two: Ranks) -> None:
    """Over the slots that two open exchanges have: each arrives at its own."""
    halves = {}

    def step(rank: int) -> list[tuple[Tensor, ...]]:
        where = two.groups[rank].name, checks.E, CAPACITY
        args = [[t.detach() for t in inputs(rank + 10 * i, 5)] for i in range(2)]
        begun = [checks.OPS.dispatch_start.default(*a, None, *where, i) for i, a in enumerate(args)]
        halves[rank] = args
        return [checks.OPS.dispatch_wait.default(*begun[i], *args[i], None, *where, i) for i in (1, 0)][::-1]

    found = two.each(step)
    for rank in range(W):
        for i in range(2):
            rows, ids, weights, arrived, _ = found[rank][i]
            for source in range(W):
                x, idx, weight = halves[source][i]
                mine = (idx >= rank * 4) & (idx < rank * 4 + 4)
                here = mine.any(1).nonzero().flatten()
                begin = source * CAPACITY
                assert arrived[W * CAPACITY + source] == len(here)
                assert arrived[begin : begin + CAPACITY].tolist() == here.tolist() + [-1] * (CAPACITY - len(here))
                block = slice(begin, begin + len(here))
                assert torch.equal(rows[block], x[here])
                assert torch.equal(ids[block], torch.where(mine, idx - rank * 4, -1)[here].int())
                assert torch.equal(weights[block], torch.where(mine, weight, 0.0)[here])
                assert (ids[begin + len(here) : begin + CAPACITY] == -1).all()
    assert sorted(slot for rank, slot, _ in two.arenas if rank == 0) == [0, 1]


@pytest.mark.parametrize("counts", [(7, 4), (3, 0)], ids=str)
def test_rows_in_fp8_and_results_in_16_bits_share_an_arena(
    fp8_library: ctypes.CDLL, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives are the bits of the collective's reference; what goes back is summed in bfloat16."""
    mine = [checks.tokens(rank, count) for rank, count in enumerate(counts)]
    xs = [torch.randn(count, 256, generator=torch.Generator().manual_seed(count)).bfloat16() for count in counts]

    def step(rank: int) -> tuple[Tensor, ...]:
        where, (_, idx, weight) = (ranks.groups[rank].name, checks.E, CAPACITY, 0), mine[rank]
        q, scale = checks.OPS.quantize_1x128.default(xs[rank])
        plan, inbox = checks.OPS.dispatch_start.default(q, idx, weight, scale, *where)
        came = checks.OPS.dispatch_wait.default(plan, inbox, q, idx, weight, scale, *where)
        rows, ids, _, arrived, row_scale = came
        back = dequantize_rows(rows, row_scale).bfloat16()
        inbox = checks.OPS.combine_start.default(back, None, plan, arrived, *where)
        return *came, plan, checks.OPS.combine_wait.default(inbox, back, None, plan, arrived, *where)[0]

    with in_place(Ranks(fp8_library, FP8_SIZES), monkeypatch) as ranks:
        found = ranks.each(step)
    for rank, (rows, ids, _, arrived, row_scale, plan, y) in enumerate(found):
        for source in range(W):
            here = [t for t in arrived[source * CAPACITY : (source + 1) * CAPACITY].tolist() if t >= 0]
            block = slice(source * CAPACITY, source * CAPACITY + len(here))
            q, scale = checks.OPS.quantize_1x128.default(xs[source])
            assert torch.equal(rows[block].view(torch.uint8), q[here].view(torch.uint8))
            assert torch.equal(row_scale[:, block], scale[:, here]) and (ids[block] >= 0).any(1).all()
        stored = dequantize_rows(*checks.OPS.quantize_1x128.default(xs[rank])).bfloat16().float()
        assert torch.equal(y, (stored * (plan[:-1] >= 0).sum(1, keepdim=True)).bfloat16())
    assert sorted(ranks.arenas) == [(rank, 0, FP8_SIZES) for rank in range(W)]  # one, for there and back


def test_a_wait_needs_its_start(two: Ranks) -> None:
    def step(rank: int) -> str:
        x, idx, weight = (t.detach() for t in inputs(rank, 3))
        plan = torch.zeros(4, W, dtype=torch.int32)
        inbox = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ExchangeError, match="a wait for a dispatch that was not begun"):
            checks.OPS.dispatch_wait.default(plan, inbox, x, idx, weight, None, two.groups[rank].name, 8, CAPACITY, 0)
        return "told"

    assert two.each(step) == ["told"] * W


CUDA = torch.device("cuda", 0)
HOPPER = {"host": "here", "refused": ""}
ROUTED = ((3, torch.int64), (3, torch.float32))


@pytest.mark.parametrize(
    ("payload", "others", "reason"),
    [
        (Payload(16, torch.bfloat16, CUDA, ROUTED), HOPPER, ""),
        (Payload(16, torch.float16, CUDA), HOPPER, ""),
        (Payload(256, torch.float8_e4m3fn, CUDA, ROUTED), HOPPER, ""),
        (Payload(200, torch.float8_e4m3fn, CUDA, ROUTED), HOPPER, "multiple of 128"),
        (Payload(16, torch.float32, CUDA, ROUTED), HOPPER, "rows are torch.float32"),
        (Payload(20, torch.bfloat16, CUDA, ROUTED), HOPPER, "multiple of 8"),
        (Payload(16, torch.bfloat16, CUDA, ((3, torch.int16), ROUTED[1])), HOPPER, "these are torch.int16"),
        (Payload(16, torch.bfloat16, CUDA, (ROUTED[0], (3, torch.float64))), HOPPER, "these are torch.float64"),
        (Payload(16, torch.bfloat16, torch.device("cpu"), ROUTED), HOPPER, "tensors are on cpu"),
        (Payload(16, torch.bfloat16, CUDA, ROUTED), {"host": "there", "refused": ""}, "rank 4 runs on here, rank 5"),
        (Payload(16, torch.bfloat16, CUDA, ROUTED), {"host": "here", "refused": "too old"}, "rank 5: too old"),
    ],
)
def test_what_is_refused_goes_over_the_collective(
    payload: Payload, others: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "_device_refused", lambda device: "")
    group: Any = SimpleNamespace(size=2, rank=0, ranks=[4, 5], everybody=lambda topic, mine: [HOPPER, others])
    name, why_not = chosen(Spec(group, 8, 7), payload)
    assert name == ("all_to_all" if reason else "symmetric")
    assert reason in why_not and bool(why_not) == bool(reason)
