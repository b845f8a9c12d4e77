"""`expert_load` and `place`: counts, replicas, sentinels, compiled once while the maps change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dscompile.lowering.ops.placement as placement_ops
from bench.eplb_plan import zipf
from dscompile.kernels import place as kernel
from dscompile.lowering.errors import DtypeMismatch, ShapeMismatch
from dscompile.runtime import eplb
from dscompile.runtime.eplb_search import place_experts

ops = torch.ops.dsinfra
T, K, E, RANKS, SLOTS, X = 24, 3, 16, 4, 24, 4


def ids(seed: int = 0, tokens: int = T, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, E, generator=generator) * zipf(1, E, 1.0)
    return scores.topk(K, dim=1).indices.to(dtype)


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    phy2log = place_experts(zipf(1, E, 1.0, seed).clamp(max=9000), SLOTS, RANKS, starts=2)
    log2phy, logcnt = eplb.maps_of(phy2log, E, X)
    return log2phy[0], logcnt[0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts(dtype: torch.dtype) -> None:
    chosen, counter = ids(dtype=dtype), torch.ones(E, dtype=torch.int64)
    chosen[0, 0], chosen[1, 1], chosen[2, 2] = -1, E, 2 * E
    ops.expert_load(chosen, counter)
    expected = [1 + int((chosen == e).sum()) for e in range(E)]
    assert counter.tolist() == expected and sum(expected) == E + T * K - 3


@pytest.mark.parametrize("policy", placement_ops.POLICIES)
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_each_choice_gets_a_slot_of_its_expert(policy: str, tokens: int) -> None:
    log2phy, logcnt = maps()
    chosen = ids(tokens=tokens)
    placed = ops.place(chosen, log2phy, logcnt, SLOTS, RANKS, policy)
    assert placed.shape == chosen.shape and placed.dtype == chosen.dtype
    for expert, slot in zip(chosen.flatten().tolist(), placed.flatten().tolist()):
        assert slot in log2phy[expert, : logcnt[expert]].tolist()
    assert torch.equal(placed, ops.place(chosen, log2phy, logcnt, SLOTS, RANKS, policy))


def test_round_robin_goes_by_token() -> None:
    log2phy, logcnt = maps()
    chosen = ids()
    expected = [[log2phy[e, t % logcnt[e]].item() for e in row] for t, row in enumerate(chosen.tolist())]
    assert ops.place(chosen, log2phy, logcnt, SLOTS, RANKS, "round_robin").tolist() == expected


@pytest.mark.parametrize("policy", placement_ops.POLICIES)
def test_sentinels_stay_sentinels(policy: str) -> None:
    chosen = ids(dtype=torch.int32)
    chosen[0], chosen[1] = -1, torch.tensor([E, E + 1, 2 * E], dtype=torch.int32)
    placed = ops.place(chosen, *maps(), SLOTS, RANKS, policy)
    assert placed.dtype == torch.int32
    assert placed[0].tolist() == [-1] * K and placed[1].tolist() == [SLOTS] * K
    assert (placed[2:] >= 0).all() and (placed[2:] < SLOTS).all()


def test_water_filling_levels_this_batch() -> None:
    """A batch whose loads are others than those of the plan."""
    log2phy, logcnt = maps()
    worst = []
    for policy in placement_ops.POLICIES:
        fullest = []
        for seed in range(8):
            chosen = (ids(seed, 512) + 3 * seed) % E
            rows = torch.bincount(
                ops.place(chosen, log2phy, logcnt, SLOTS, RANKS, policy).flatten() // (SLOTS // RANKS), minlength=RANKS
            )
            fullest.append((rows.max() / rows.float().mean()).item())
        worst.append(sum(fullest) / len(fullest))
    assert worst[1] < worst[0] - 0.02


def test_one_graph_for_every_plan() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(chosen: Tensor, counter: Tensor, log2phy: Tensor, logcnt: Tensor) -> Tensor:
        ops.expert_load(chosen, counter)
        return ops.place(chosen, log2phy, logcnt, SLOTS, RANKS, "round_robin")

    counter = torch.zeros(E, dtype=torch.int64)
    log2phy, logcnt = maps()
    results = []
    for seed in (0, 1):
        for held, new in zip((log2phy, logcnt), maps(seed)):
            held.copy_(new)
        results.append(step(ids(), counter, log2phy, logcnt))
    assert len(graphs) == 1 and not torch.equal(*results)
    assert counter.sum() == 2 * T * K


@pytest.mark.parametrize("policy", placement_ops.POLICIES)
def test_registrations_agree(policy: str) -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.place.default, (ids(), *maps(), SLOTS, RANKS, policy), test_utils=tests)
    counter = torch.zeros(E, dtype=torch.int64)
    torch.library.opcheck(ops.expert_load.default, (ids(), counter), test_utils=tests)
    torch.library.opcheck(ops.place_counted.default, (ids(), counter, *maps(), SLOTS, RANKS, policy), test_utils=tests)


@pytest.mark.parametrize("policy", placement_ops.POLICIES)
def test_both_at_once(policy: str) -> None:
    counters = torch.zeros(2, E, dtype=torch.int64)
    placed = ops.place_counted(ids(), counters[0], *maps(), SLOTS, RANKS, policy)
    ops.expert_load(ids(), counters[1])
    assert torch.equal(placed, ops.place(ids(), *maps(), SLOTS, RANKS, policy))
    assert torch.equal(*counters) and counters.sum() == 2 * T * K


def test_the_kernels_go_by_the_same_numbers() -> None:
    assert (kernel.POLICIES, kernel.ROUNDS) == (placement_ops.POLICIES, placement_ops.ROUNDS)


WRONG = {
    "rank": (lambda i, a, b: ops.place(i[0], a, b, SLOTS, RANKS, "round_robin"), ShapeMismatch, r"\[T,K\]"),
    "counts": (lambda i, a, b: ops.place(i, a, b[1:], SLOTS, RANKS, "round_robin"), ShapeMismatch, "replicas"),
    "dtype": (lambda i, a, b: ops.place(i, a.int(), b, SLOTS, RANKS, "round_robin"), DtypeMismatch, "int64"),
    "policy": (lambda i, a, b: ops.place(i, a, b, SLOTS, RANKS, "random"), placement_ops.PolicyError, "'random'"),
    "ranks": (lambda i, a, b: ops.place(i, a, b, SLOTS, 5, "round_robin"), placement_ops.PolicyError, "24 slots on 5"),
    "slots": (lambda i, a, b: ops.place(i, a, b, 12, RANKS, "round_robin"), ShapeMismatch, "12 slots for log2phy"),
    "experts": (
        lambda i, a, b: ops.place_counted(i, torch.zeros(E + 1).long(), a, b, SLOTS, RANKS, "round_robin"),
        ShapeMismatch,
        "place_counted: counter",
    ),
    "counter": (lambda i, a, b: ops.expert_load(i, torch.zeros(E)), DtypeMismatch, "counter"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(ids(), *maps())
