"""The planner: EPLB's results bit for bit, placements that balance better, and what can't be planned."""

from __future__ import annotations

import math
import random
import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.eplb_plan import TABLE, Row, zipf
from dscompile.runtime import eplb, eplb_search
from dscompile.runtime.eplb import PlacementError, balancedness, gpu_loads, lower_bound, rebalance_experts
from dscompile.runtime.eplb_moves import align, choose, frontier, moved
from dscompile.runtime.eplb_search import has_pair, place_experts
from tests.runtime import eplb_oracle

README = torch.tensor(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
README_RESULT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


# ------------------------------------------------------------------ EPLB's own results


def test_the_published_example() -> None:
    phy2log, log2phy, logcnt = rebalance_experts(README, 16, 4, 2, 8)
    assert phy2log.tolist() == README_RESULT
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    assert log2phy.shape == (2, 12, 5)


def _cases() -> list[tuple[Tensor, int, int, int, int]]:
    """1,000 of them: hierarchical and global, with ties, zeros, one slot a GPU and one group a node."""
    draw, found = random.Random(0), []
    for seed in range(1000):
        nodes = draw.choice([1, 1, 2, 3])
        gpus = nodes * draw.choice([1, 2, 3])
        groups = draw.choice([1, nodes, 2 * nodes, 3])
        experts = groups * draw.choice([1, 2, 3]) * draw.choice([1, nodes])
        slots = -(-experts // gpus) * gpus + gpus * draw.choice([0, 0, 1, 3])
        generator = torch.Generator().manual_seed(seed)
        size = (draw.choice([1, 1, 1, 2]), experts)
        kind = draw.choice(["ties", "counts", "floats", "skewed"])
        if kind == "ties":
            weight = torch.randint(0, 4, size, generator=generator)
        elif kind == "counts":
            weight = torch.randint(0, 1 << 20, size, generator=generator)
        else:
            weight = torch.rand(size, generator=generator) ** (1 if kind == "floats" else 8)
        found.append((weight, slots, groups, nodes, gpus))
    return found


def test_as_an_independent_reading_of_the_description() -> None:
    hierarchical = 0
    for weight, *sizes in _cases():
        expected = eplb_oracle.rebalanced(weight, *sizes)
        found = [t.tolist() for t in rebalance_experts(weight, *sizes)]
        assert found == list(expected), (weight.tolist(), sizes)
        hierarchical += sizes[2] > 1 and sizes[1] % sizes[2] == 0
    assert hierarchical > 200


@pytest.mark.parametrize("sizes", [(288, 8, 4, 32), (288, 1, 1, 32), (288, 8, 3, 144)], ids=str)
def test_planning_takes_milliseconds(sizes: tuple[int, int, int, int]) -> None:
    """58 layers x 256 experts in less than 50 ms of one core's time, which no load on the machine lengthens."""
    weight = zipf(58, 256, 1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(3):
            start = time.thread_time()
            rebalance_experts(weight, *sizes)
            seconds.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 0.05


# ------------------------------------------------------------------ better placements


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_where_greedy_placements_are_weak(row: Row) -> None:
    """Layers where EPLB puts an expert on a GPU twice are compared too, where a pair helps it only in strict nodes."""
    weight = zipf(3, 256, row.exponent, seed=1)
    theirs, ours = row.theirs(weight), row.ours(weight, starts=3)
    check_placement(ours, row.gpus, 256)
    assert not has_pair(ours, row.gpus).any()
    before, after = (balancedness(gpu_loads(weight, p, row.gpus)) for p in (theirs, ours))
    free = ~has_pair(theirs, row.gpus) if row.locality == "strict" else torch.ones(3, dtype=torch.bool)
    assert (after[free] >= before[free] * (1 - 1e-4)).all()  # the search ends within 1e-4 of the bound
    assert after.mean() >= row.at_least


def check_placement(phy2log: Tensor, gpus: int, experts: int) -> None:
    """Each slot holds an expert, and each expert has a slot; the maps say the same."""
    L, P = phy2log.shape
    assert P % gpus == 0 and phy2log.dtype == torch.int64
    log2phy, logcnt = eplb.maps_of(phy2log, experts)
    assert (logcnt >= 1).all() and (logcnt.sum(1) == P).all()
    for layer in range(L):
        for expert in range(experts):
            slots = log2phy[layer, expert]
            own = slots[slots >= 0]
            assert len(own) == logcnt[layer, expert] == len(own.unique())
            assert (phy2log[layer, own] == expert).all()


SMALL = [(6, 8, 4), (8, 8, 2), (8, 12, 4), (6, 9, 3), (7, 10, 5), (5, 8, 2), (9, 12, 4)]


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_within_a_hundredth_of_the_best_there_is(sizes: tuple[int, int, int]) -> None:
    E, P, G = sizes
    weight = torch.rand(4, E, generator=torch.Generator().manual_seed(E * P)).double() ** 2 + 0.01
    best = torch.tensor([eplb_oracle.best_peak(row.tolist(), P, G) for row in weight], dtype=torch.float64)
    peak = gpu_loads(weight, place_experts(weight, P, G), G).amax(1)
    assert (peak >= best * (1 - 1e-6)).all(), "the best is the best"
    assert (peak <= best * 1.01).all()
    assert (lower_bound(weight, P, G) <= best * (1 + 1e-9)).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int, int, int, str]:
    """(loads, slots, GPUs, groups, nodes, locality) for which a placement exists."""
    nodes = draw(st.sampled_from([1, 1, 2]))
    gpus, groups = nodes * draw(st.integers(1, 3)), nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 5))
    least = -(-experts // gpus)
    size = draw(st.integers(least, max(least, experts // nodes)))
    locality = draw(st.sampled_from(eplb_search.LOCALITY))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return torch.tensor([loads]), size * gpus, gpus, groups, nodes, locality


@settings(max_examples=60, deadline=None)
@given(problems())
def test_placements_are_placements(problem: tuple[Tensor, int, int, int, int, str]) -> None:
    weight, slots, gpus, groups, nodes, locality = problem
    experts = weight.shape[1]
    theirs, log2phy, logcnt = rebalance_experts(weight, slots, groups, nodes, gpus)
    check_placement(theirs, gpus, experts)
    assert (logcnt == (log2phy >= 0).sum(2)).all()
    ours = place_experts(weight, slots, gpus, groups, nodes, locality=locality, starts=3)
    check_placement(ours, gpus, experts)
    assert not has_pair(ours, gpus).any()
    peak = gpu_loads(weight, ours, gpus).amax(1)
    assert (peak >= lower_bound(weight, slots, gpus) * (1 - 1e-6)).all()
    if not has_pair(theirs, gpus).any():
        assert (peak <= gpu_loads(weight, theirs, gpus).amax(1) * (1 + 2e-4) + 1e-9).all()
    if nodes > 1 and locality != "none":
        node_of_slot = torch.arange(slots) // (slots // nodes)
        there = torch.zeros(groups, nodes, experts // groups)
        for slot, expert in enumerate(ours[0].tolist()):
            there[expert * groups // experts, node_of_slot[slot], expert % (experts // groups)] = 1
        whole = there.bool().all(2)  # [groups, nodes]: the node has every expert of the group
        assert whole.any(1).all(), "a group is whole in some node"
        if locality == "strict":
            assert (there.sum(2).bool().sum(1) == 1).all(), "and in no other"


def test_doubled_replicas_are_the_only_ones_refused() -> None:
    place_experts(torch.ones(1, 3), 6, 2)
    with pytest.raises(PlacementError, match="Use 6 replicas or fewer"):
        place_experts(torch.ones(1, 3), 8, 2)


# ------------------------------------------------------------------ the least movement


@cache
def drifted(gpus: int, spare: int) -> tuple[Tensor, Tensor]:
    """(loads now, a placement for the loads before)."""
    before = zipf(2, 64, 1.0)
    now = before * (1 + 0.6 * torch.rand(before.shape, generator=torch.Generator().manual_seed(3)))
    return now, place_experts(before, 64 + spare, gpus, starts=2)


@pytest.mark.parametrize(("gpus", "spare"), [(4, 0), (8, 8)])
def test_frontier(gpus: int, spare: int) -> None:
    weight, old = drifted(gpus, spare)
    theirs = rebalance_experts(weight, old.shape[1], 1, 1, gpus)[0]
    for layer, options in enumerate(frontier(weight, old, gpus, starts=2)):
        assert options[0].moves == 0 and torch.equal(options[0].phy2log, old[layer])
        assert all(a.moves < b.moves and a.balance < b.balance for a, b in zip(options, options[1:]))
        for option in options:
            check_placement(option.phy2log[None], gpus, 64)
            assert int(moved(old[layer], option.phy2log, gpus).sum()) == option.moves
            found = balancedness(gpu_loads(weight[layer][None], option.phy2log[None], gpus)).item()
            assert math.isclose(found, option.balance)
            stays = ~moved(old[layer], option.phy2log, gpus)
            assert (old[layer] == option.phy2log)[stays].all(), "what stays on its GPU stays in its slot"
        chosen = choose(options, least=0.98)
        assert chosen.balance >= 0.98 * options[-1].balance
        assert chosen.moves < moved(old[layer], theirs[layer], gpus).sum() / 4
        assert choose(options, most_moves=0) is options[0]


def test_align_only_renames() -> None:
    old, new = (rebalance_experts(zipf(5, 64, 1.0, seed), 72, 8, 2, 8)[0] for seed in (0, 1))
    aligned = align(old, new, 8, 2)
    gpus = [sorted(sorted(gpu) for gpu in p[0].view(8, -1).tolist()) for p in (new, aligned)]
    assert gpus[0] == gpus[1]
    assert (moved(old, aligned, 8).sum(1) <= moved(old, new, 8).sum(1)).all()
    alone = place_experts(zipf(5, 64, 1.0), 72, 8, 8, 2, starts=2)
    assert torch.equal(align(alone, alone[:, torch.arange(72).flip(0)], 8, 2), alone)


# ------------------------------------------------------------------ what can't be planned

NAN = float("nan")
WRONG = {
    "nan": (torch.tensor([[1.0, NAN]]), (2, 1, 1, 1), "expert 1 in layer 0 is nan"),
    "infinite": (torch.tensor([[1.0, math.inf]]), (2, 1, 1, 1), "are infinite"),
    "negative": (torch.tensor([[1.0, -2.0]]), (2, 1, 1, 1), "expert 1 in layer 0 is -2.0, and 1 of 2 are negative"),
    "overflow": (torch.tensor([[3e38, 3e38]]), (2, 1, 1, 1), "Scale them down"),
    "one layer": (torch.ones(4), (4, 1, 1, 1), r"Give a tensor \[layers, experts\]"),
    "too many experts": (torch.ones(1, 8), (4, 1, 1, 1), "4 replicas for 8 experts"),
    "more GPUs than slots": (torch.ones(1, 4), (4, 1, 1, 8), "Use 4 GPUs at most, or num_replicas of 8"),
    "uneven slots": (torch.ones(1, 4), (5, 1, 1, 2), "Use num_replicas of 4 or 6, or another num_gpus"),
    "uneven nodes": (torch.ones(1, 6), (6, 1, 2, 3), "num_gpus 3 isn't divisible by num_nodes 2"),
    "uneven groups": (torch.ones(1, 6), (6, 4, 1, 2), "experts 6 isn't divisible by num_groups 4"),
    "no GPU": (torch.ones(1, 6), (6, 1, 1, 0), "num_gpus is 0"),
    "a float": (torch.ones(1, 6), (6.0, 1, 1, 2), "num_replicas is 6.0"),
}


@pytest.mark.parametrize(("weight", "sizes", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_say_what_to_change(weight: Tensor, sizes: tuple, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        rebalance_experts(weight, *sizes)
    slots, groups, nodes, gpus = sizes
    with pytest.raises(PlacementError, match=message):
        place_experts(weight, slots, gpus, groups, nodes)


def test_errors_of_maps_and_old_placements() -> None:
    with pytest.raises(PlacementError, match="expert 2 of layer 0 has no slot"):
        eplb.maps_of(torch.tensor([[0, 1, 1, 0]]), 3)
    with pytest.raises(PlacementError, match="expert 0 of layer 0 has more slots than 2"):
        eplb.maps_of(torch.tensor([[0, 0, 0, 1]]), 2, width=2)
    with pytest.raises(PlacementError, match="experts 0 to 4"):
        frontier(torch.ones(1, 4), torch.tensor([[0, 1, 2, 4]]), 2)
    with pytest.raises(PlacementError, match="locality is 'rack'"):
        place_experts(torch.ones(1, 4), 4, 2, locality="rack")
