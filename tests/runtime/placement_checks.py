"""What the ranks of a placement test do; each function runs on every rank."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dscompile.lowering.ops.placement  # noqa: F401  (registers the operators)
from bench.eplb_plan import zipf
from dscompile.runtime import eplb, movement
from dscompile.runtime.eplb_search import place_experts
from dscompile.runtime.movement import ExpertSlots, MovementFailed
from dscompile.runtime.placement import Rebalancer, Trigger

L, E, D, K, X, T = 3, 16, 5, 2, 4, 64
STEPS = 29  # one before another expert becomes the most popular
ops = torch.ops.dsinfra


def value(layer: int, expert: Tensor) -> Tensor:
    """What an expert's weights hold: [.., D]."""
    return (1000.0 * layer + expert.unsqueeze(-1) + torch.arange(D) / 8).float()


def build(rank: int, slots: int, seed: int = 0) -> tuple[list[ExpertSlots], Tensor]:
    """(this rank's part of each layer, placement [L,P])."""
    size = dist.get_world_size()
    phy2log = place_experts(zipf(L, E, 1.0, seed), slots, size, starts=2)
    own = phy2log.view(L, size, -1)[:, rank]
    layers = []
    for i in range(L):
        weight = value(i, own[i])
        small = weight.to(torch.float8_e4m3fn)
        maps = torch.empty(E, X, dtype=torch.int64), torch.empty(E, dtype=torch.int64)
        layers.append(ExpertSlots((weight, small), *maps, torch.zeros(E, dtype=torch.int64)))
    return layers, phy2log


def run_layer(layers: list[ExpertSlots], i: int, chosen: Tensor, slots: int) -> Tensor:
    """An expert layer as compiled: counted, placed, then computed with all ranks' slots. -> [T,D]."""
    layer, size = layers[i], dist.get_world_size()
    ops.expert_load(chosen, layer.counter)
    placed = ops.place(chosen, layer.log2phy, layer.logcnt, slots, size, "round_robin")
    parts = [torch.empty_like(layer.weights[0]) for _ in range(size)]
    dist.all_gather(parts, layer.weights[0])
    return torch.cat(parts)[placed].sum(1)


def choices(step: int, rank: int) -> Tensor:
    """Ids by a popularity that turns once around the experts in 240 steps."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    popular = (torch.arange(E) - step * E / 240) % E
    return torch.multinomial((popular + 1.0).pow(-1.0).expand(T, E), K, generator=generator)


def follows_the_load(rank: int, slots: int) -> dict[str, Any]:
    """Before, during and after rebalancing every layer computes what unplaced experts do."""
    layers, phy2log = build(rank, slots)
    pointers = [w.data_ptr() for layer in layers for w in layer.weights]
    trigger = Trigger(below=0.9, above=0.97, interval=8, seconds=1.0)
    rebalancer = Rebalancer(layers, phy2log, dist.group.WORLD, trigger=trigger, window=1, every=4, plan_steps=2)
    mixed = right = 0
    for step in range(STEPS):
        for i in range(L):
            chosen = choices(step, rank)
            right += torch.equal(run_layer(layers, i, chosen, slots), value(i, chosen).sum(1))
        rebalancer.step()
        mixed += rebalancer._move is not None
    rebalancer.close()
    own = rebalancer.phy2log.view(L, dist.get_world_size(), -1)[:, rank]
    for i, layer in enumerate(layers):
        assert torch.equal(layer.weights[0], value(i, own[i]))
        small = value(i, own[i]).to(torch.float8_e4m3fn)
        assert torch.equal(layer.weights[1].view(torch.uint8), small.view(torch.uint8))
    assert pointers == [w.data_ptr() for layer in layers for w in layer.weights], "captured graphs hold them"
    now = torch.cat([choices(STEPS, other) for other in range(4)]).flatten().bincount(minlength=E)
    loads = now.expand(L, E)
    return {
        "right": right,
        "under_way": mixed,
        "placement": rebalancer.phy2log.tolist(),
        "history": [vars(s) for s in rebalancer.history],
        "before": rebalancer.balance(loads, phy2log),
        "after": rebalancer.balance(loads, rebalancer.phy2log),
    }


def fails_on_one_rank(rank: int) -> str:
    """One rank has no memory: every rank is told, and every layer is as it was."""
    layers, phy2log = build(rank, 20)
    rebalancer = _moving(layers, phy2log)
    kept = [w.clone() for layer in layers for w in (layer.weights[0], layer.log2phy, layer.logcnt)]
    allocate = torch.empty_like
    if rank == 1:
        movement.torch.empty_like = _no_memory
    try:
        return _steps_until_failure(rebalancer)
    finally:
        movement.torch.empty_like = allocate
        assert all(map(torch.equal, kept, (w for y in layers for w in (y.weights[0], y.log2phy, y.logcnt))))
        for i in range(L):
            chosen = choices(0, rank)
            assert torch.equal(run_layer(layers, i, chosen, 20), value(i, chosen).sum(1))


def _no_memory(*_: Any, **__: Any) -> Tensor:
    raise torch.OutOfMemoryError("out of memory")


def dies_on_the_way(rank: int) -> str:
    """The last rank ends between staging and commit of its second layer."""
    layers, phy2log = build(rank, 20)
    rebalancer = _moving(layers, phy2log)
    commit, calls = movement.Move.commit, []

    def commit_or_die(move: movement.Move) -> None:
        calls.append(move)
        if rank == 3 and len(calls) == 2:
            os._exit(1)
        commit(move)

    movement.Move.commit = commit_or_die
    message = _steps_until_failure(rebalancer)
    assert len(rebalancer.history) == 1, "one layer had switched"
    own = rebalancer.phy2log.view(L, 4, -1)[:, rank]
    log2phy, logcnt = eplb.maps_of(rebalancer.phy2log, E, X)
    for i, layer in enumerate(layers):
        assert torch.equal(layer.weights[0], value(i, own[i]))
        assert torch.equal(layer.log2phy, log2phy[i]) and torch.equal(layer.logcnt, logcnt[i])
    assert rebalancer.step() is None, "nothing more is moved"
    return message


def _moving(layers: list[ExpertSlots], phy2log: Tensor) -> Rebalancer:
    """One that moves every layer from its second step on."""

    def reversed_(loads: Tensor, old: Tensor, ranks: int) -> Tensor:
        return old.flip(1)

    trigger = Trigger(below=1.0, above=1.0, interval=1)
    trigger.worth = lambda *_: True  # type: ignore[method-assign]
    found = Rebalancer(
        layers, phy2log, dist.group.WORLD, trigger=trigger, every=1, plan_steps=1, plan=reversed_, timeout=2
    )
    for layer in layers:
        layer.counter[0] += 1
    return found


def _steps_until_failure(rebalancer: Rebalancer) -> str:
    try:
        for _ in range(12):
            rebalancer.step()
            time.sleep(0.01)
    except MovementFailed as failed:
        return str(failed)
    finally:
        rebalancer.close()
    return ""
