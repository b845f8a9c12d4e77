"""The exchange kernels themselves, compiled for the CPU, all ranks in one process, against the exchange in PyTorch."""

from __future__ import annotations

import ctypes

import pytest
import torch

from dscompile.kernels.exchange import Spec
from dscompile.kernels.exchange_launch import Arrived, Plan
from tests.kernels import exchange_emulator as emulator
from tests.kernels.exchange_cases import (
    ROUTINGS,
    combine_reference,
    dispatch_reference,
    explain_rows,
    make_inputs,
    plan_reference,
)

if emulator.why_not():
    pytest.skip(emulator.why_not(), allow_module_level=True)

SPECS = {
    "bf16": Spec(3, 40, 136, 3, 6),
    "fp8": Spec(2, 37, 384, 4, 8, quantized=True),
    "fp16": Spec(4, 18, 64, 17, 20, dtype="float16", index="int32"),
}


# Mistakes that the emulator makes when it is told their number, by text of the kernels or by waits that don't wait.
EDITS = {
    "gridDim.x - 1": "(emulator::mistake == 3 ? 0 : gridDim.x - 1)",
    "if (peer < W) bad": "if (peer < W && emulator::mistake != 4) bad",
    "phase ^= 1": "phase ^= emulator::mistake != 5",
    "begin_of(peer, chunk + 1))": "(emulator::mistake == 6 ? counts[peer] : begin_of(peer, chunk + 1)))",
    "exchange - 1)) return": "emulator::mistake == 7 ? 0 : exchange - 1)) return",
    "!= warps - 1) return": "!= (emulator::mistake == 8 ? 0 : warps - 1)) return",
}
MISTAKES = (
    "a buffer is loaded while a store still reads it",
    "flags are raised before the stores are there",
    "the first CTA raises the flags",
    "a CTA doesn't wait for flags",
    "the barrier's phase is forgotten",
    "the first chunk is announced as the last",
    "senders don't wait until their peers have read",
    "the first warp announces a chunk",
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("exchange")
    return {
        name: emulator.build(spec, folder / name, EDITS if name == "bf16" else None) for name, spec in SPECS.items()
    }


class Round:
    """One exchange of a world: dispatch, made-up results of the experts, combine."""

    def __init__(self, world: emulator.World, tokens: list[int], routing: str, number: int) -> None:
        self.world, self.spec = world, world.spec
        spec = self.spec
        self.inputs = [make_inputs(spec, rank, tokens[rank], routing, number) for rank in range(spec.world)]
        self.plans = [emulator.empty_plan(spec, count) for count in tokens]
        self.arrived = [emulator.empty_arrived(spec) for _ in range(spec.world)]
        g = torch.Generator().manual_seed(number)
        dtype = getattr(torch, spec.dtype)
        self.back = [torch.randn(spec.rows, spec.width, generator=g).to(dtype) for _ in range(spec.world)]
        self.extras = [torch.randn(spec.rows, spec.top_k, generator=g) for _ in range(spec.world)]
        self.y = [torch.full((count, spec.width), float("nan"), dtype=dtype) for count in tokens]
        self.extra_sums = [torch.full((count, spec.top_k), float("nan")) for count in tokens]

    def dispatch(self, *, fused: bool, copies: bool, overlapped: bool, again: bool = False) -> None:
        """again: by the plans of the last dispatch, rows alone."""
        for rank, given in enumerate(self.inputs):
            sent = dict(x=given.x, x_stride=given.x.stride(0) * 2, tokens=len(given.x), **vars(self.plans[rank]))
            ids = {} if again else dict(topk_idx=given.topk_idx, topk_weight=given.topk_weight)
            if not fused and not again:
                self.world.launch(
                    rank,
                    "plan",
                    ctas=1,
                    warps=2,
                    tokens=len(given.x),
                    topk_idx=given.topk_idx,
                    **vars(self.plans[rank]),
                )
            name = "dispatch_start_planning" if fused and not again else "dispatch_start"
            self.world.launch(rank, name, overlapped=overlapped and not fused, **sent, **ids)
            arrived = self.arrived[rank]
            fields = dict(source_token=arrived.source_token, arrived=arrived.counts, scale=arrived.scale)
            if not again:
                fields |= dict(ids=arrived.ids, weights=arrived.weights)
            if copies:
                fields["rows"] = arrived.rows
            self.world.launch(rank, "dispatch_wait", ctas=3, overlapped=overlapped, **fields)

    def combine(self, *, chunks: int, parts: int, overlapped: bool, frees: bool = True) -> None:
        for rank, given in enumerate(self.inputs):
            arrived, back = self.arrived[rank], self.back[rank]
            names = dict(source_token=arrived.source_token, arrived=arrived.counts, extra=self.extras[rank])
            self.world.launch(
                rank,
                "combine_start",
                x=back,
                x_stride=back.stride(0) * 2,
                chunks=chunks,
                frees_stage=int(frees),
                **names,
            )
            self.world.launch(
                rank,
                "combine_wait",
                overlapped=overlapped,
                parts=parts,
                tokens=len(given.x),
                place=self.plans[rank].place,
                y=self.y[rank],
                extra_sum=self.extra_sums[rank],
            )

    def problem(self, *, viewed: bool, combined: bool = True) -> str | None:
        """What is wrong after the run, or None."""
        for rank in range(self.spec.world):
            found = self._problem(rank, viewed, combined)
            if found:
                return f"rank {rank}: {found}"
        return None

    def _problem(self, rank: int, viewed: bool, combined: bool) -> str | None:
        plan = plan_reference(self.spec, self.inputs[rank].topk_idx)
        if not torch.equal(self.plans[rank].place, plan.place) or not torch.equal(self.plans[rank].counts, plan.counts):
            return f"plan {self.plans[rank]} instead of {plan}"
        got, want = self.arrived[rank], dispatch_reference(self.spec, self.inputs, rank)
        for name in ("counts", "source_token", "ids", "weights"):
            if not torch.equal(getattr(got, name), getattr(want, name)):
                return f"{name} {getattr(got, name).tolist()} instead of {getattr(want, name).tolist()}"
        rows = self.world.stage(rank) if viewed else got.rows
        found = explain_rows(self.spec, rows, want.rows, want.source_token >= 0, rank)
        if found or (want.scale is not None and not torch.equal(got.scale, want.scale)):
            return found or "scales"
        if not combined:
            return None
        y, extra_sum = combine_reference(self.spec, self.back, self.extras, plan, rank)
        everyone = torch.ones(len(y), dtype=torch.bool)
        found = explain_rows(self.spec, self.y[rank], y, everyone, rank) if len(y) else None
        return found or (None if torch.equal(self.extra_sums[rank], extra_sum) else "extra")


def counts_of(spec: Spec, number: int) -> list[int]:
    """Tokens of each rank: full, none, one, some."""
    return [(spec.capacity, 0, 1, 18)[(rank + number) % 4] for rank in range(spec.world)]


@pytest.mark.parametrize("name", SPECS)
def test_rounds(libraries: dict[str, ctypes.CDLL], name: str) -> None:
    """One slot, round after round: all routings, uneven and empty ranks, every way to launch, orders of events."""
    spec = SPECS[name]
    world = emulator.World(spec, libraries[name])
    for number, routing in enumerate([*ROUTINGS, "uniform", "uniform"]):
        tokens = [spec.capacity] * spec.world if number % 2 else counts_of(spec, number)
        this = Round(world, tokens, routing, number)
        overlapped, copies = number % 3 > 0, number % 2 == 0
        this.dispatch(fused=number % 4 < 2, copies=copies, overlapped=overlapped)
        this.combine(chunks=1 + number % 3, parts=1 + number % 2, overlapped=overlapped)
        assert world.run(seed=number) == 0, f"{routing}: stands still"
        assert not this.problem(viewed=not copies), (
            f"{name}, round {number}, {routing}: {this.problem(viewed=not copies)}"
        )


def test_many_rounds_in_flight(libraries: dict[str, ctypes.CDLL]) -> None:
    """A rank may be rounds ahead in launching; what it sends must wait until its peers have read what came before."""
    spec = SPECS["bf16"]
    for seed in range(2):
        world = emulator.World(spec, libraries["bf16"])
        rounds = [Round(world, counts_of(spec, number), "uniform", number) for number in range(4)]
        for this in rounds:
            this.dispatch(fused=True, copies=True, overlapped=True)
            this.combine(chunks=2, parts=1, overlapped=True)
        assert world.run(seed) == 0
        for number, this in enumerate(rounds):
            assert not this.problem(viewed=False), f"seed {seed}, round {number}: {this.problem(viewed=False)}"


def test_backward_reuses_the_plan(libraries: dict[str, ctypes.CDLL]) -> None:
    """Rows alone by an old plan, after another exchange on the slot; `release` frees a stage that no combine does."""
    spec = SPECS["bf16"]
    world = emulator.World(spec, libraries["bf16"])
    this = Round(world, [40, 18, 1], "uniform", 0)
    this.dispatch(fused=True, copies=False, overlapped=False)
    for rank in range(spec.world):
        world.launch(rank, "release", ctas=1)
    other = Round(world, [18, 40, 0], "uniform", 1)
    other.dispatch(fused=False, copies=True, overlapped=False)
    other.combine(chunks=1, parts=1, overlapped=False)
    for rank, given in enumerate(this.inputs):
        given.x = torch.randn(given.x.shape).to(given.x.dtype) + rank
    this.dispatch(fused=False, copies=True, overlapped=False, again=True)
    this.combine(chunks=3, parts=2, overlapped=True)
    assert world.run(seed=5) == 0
    assert not other.problem(viewed=False) and not this.problem(viewed=False)


def test_quantisation_at_the_ends_of_the_numbers(libraries: dict[str, ctypes.CDLL]) -> None:
    """Bit for bit the formula: zeros of both signs, values far below their scale, blocks tiny, huge and zero."""
    spec = SPECS["fp8"]
    world = emulator.World(spec, libraries["fp8"])
    this = Round(world, [spec.capacity, 4], "all ranks", 0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(spec.capacity, spec.width, generator=g)
    x *= 2.0 ** torch.randint(-30, 2, x.shape, generator=g)
    for row, factor in enumerate((0.0, -0.0, 1e-37, 1e-40, 3e38, 2.0**-126, 448.0, 1e-31)):
        x[row, :256] *= factor
    x[9, ::3] = -0.0
    x[10, 5], x[10, 130] = float("inf"), float("nan")
    this.inputs[0].x = x.bfloat16()
    this.dispatch(fused=True, copies=True, overlapped=False)
    assert world.run(seed=2) == 0
    for rank, got in enumerate(this.arrived):
        want = dispatch_reference(spec, this.inputs, rank)
        used = want.source_token >= 0
        same = (got.rows.view(torch.uint8) == want.rows.view(torch.uint8)) | (want.rows.isnan() & got.rows.isnan())
        assert bool(same[used].all()), (~same & used[:, None]).nonzero()[:5].tolist()
        assert torch.equal(got.scale.nan_to_num(nan=-1), want.scale.nan_to_num(nan=-1))


@pytest.mark.parametrize("operation", ["dispatch_start", "dispatch_wait", "combine_start", "combine_wait"])
def test_a_rank_that_stops_is_named(libraries: dict[str, ctypes.CDLL], operation: str) -> None:
    """Rank 2 does nothing from some point on: the others record who and what, and nothing hangs after that."""
    spec = SPECS["bf16"]
    world = emulator.World(spec, libraries["bf16"])
    rounds = [Round(world, [40, 40, 40], "all ranks", number) for number in range(2)]
    for this in rounds:
        this.dispatch(fused=True, copies=operation != "combine_wait", overlapped=False)
        this.combine(chunks=1, parts=1, overlapped=False)
    last = {"dispatch_wait": 0, "dispatch_start": 1, "combine_wait": 2, "combine_start": 3}[operation]
    world.lists[2] = world.lists[2][:last]
    for entries in world.lists[:2]:
        if operation in ("dispatch_start", "combine_start"):  # reached only if the other waits are left out
            keep = {"dispatch_start": (0, 1, 4), "combine_start": (0, 1, 2, 3, 6)}[operation]
            entries[:] = [entries[i] for i in keep]
        for entry in entries:
            entry.job.contents.timeout_ns = 50_000
    assert world.run(seed=1) == 0
    number = 1 + ["dispatch_start", "dispatch_wait", "combine_start", "combine_wait"].index(operation)
    for rank in range(2):
        assert world.failed[rank].item() == 1
        assert world.records[rank].tolist()[:4] == [number, 2, 3, rank], operation


def test_trap(libraries: dict[str, ctypes.CDLL]) -> None:
    spec = SPECS["bf16"]
    world = emulator.World(spec, libraries["bf16"])
    this = Round(world, [4, 4, 4], "uniform", 0)
    this.dispatch(fused=True, copies=True, overlapped=False)
    world.lists[1] = []
    for entries in world.lists:
        for entry in entries:
            entry.job.contents.timeout_ns, entry.job.contents.trap = 20_000, 1
    assert world.run(seed=1) == 2


@pytest.mark.parametrize("number", range(len(MISTAKES) + 1), ids=("none", *MISTAKES))
def test_planted_mistakes_are_seen(libraries: dict[str, ctypes.CDLL], number: int) -> None:
    spec = SPECS["bf16"]
    for seed in range(8 if number else 2):
        world = emulator.World(spec, libraries["bf16"])
        rounds = [Round(world, counts_of(spec, number), "all ranks", number) for number in range(3)]
        paired = number != 7  # a combine after each dispatch proves by itself that the stage has been read
        for this in rounds:
            this.dispatch(fused=True, copies=True, overlapped=True)
            if paired:
                this.combine(chunks=3, parts=1, overlapped=True)
        wrong = world.run(seed, 300_000, number)
        if wrong or any(this.problem(viewed=False, combined=paired) for this in rounds):
            assert number, f"seed {seed}: wrong without a mistake"
            return
    assert not number, "no seed shows it"


def test_arrived_and_plan_are_what_kernels_fill() -> None:
    assert list(vars(emulator.empty_plan(SPECS["bf16"], 1))) == list(Plan.__dataclass_fields__)
    assert list(vars(emulator.empty_arrived(SPECS["fp8"]))) == list(Arrived.__dataclass_fields__)
