"""What the ranks of `test_placement_gloo.py` run: a whole model whose experts move while it serves a drifting load."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile import report
from dscompile._entry import ensure_registered
from dscompile.passes.placement import Book
from dscompile.runtime import eplb, groups, movement
from dscompile.runtime.expert_slots import PlacedExperts
from dscompile.runtime.expert_store import ExpertStore
from dscompile.runtime.movement import MovementFailed
from dscompile.runtime.placement import Rebalancer, Trigger
from tests.zoo.hf import MICRO, build_model

STEPS, BATCH, LENGTH = 11, 2, 12
OVERRIDES = {"num_hidden_layers": 1, "first_k_dense_replace": 0}


def prompts(step: int, rank: int) -> Tensor:
    """Ids [B,S] by Zipf's law, the most popular ones others every few steps."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    popular = (torch.arange(MICRO["vocab_size"] - 3) + 60 * (step // 5)) % (MICRO["vocab_size"] - 3)
    chosen = torch.multinomial((popular + 1.0) ** -1.5, BATCH * LENGTH, replacement=True, generator=generator)
    return chosen.view(BATCH, LENGTH) + 3


def serves_and_moves(rank: int) -> dict[str, Any]:
    """Outputs before, during and after rebalancing beside the unplaced model's; then the last rank dies in a move."""
    ensure_registered()
    group = groups.join("world")
    whole, model = (build_model("deepseek_v3", **OVERRIDES) for _ in range(2))
    store = ExpertStore(model, group.process_group)
    placed = PlacedExperts(store, spare=1)
    slots = {name: [w.data_ptr() for w in layer.weights] for name, layer in placed.layers.items()}
    trigger = Trigger(below=0.97, above=0.99, interval=2, seconds=1.0)
    settings = {"trigger": trigger, "window": 2, "every": 2, "plan_steps": 1, "timeout": 10.0}
    rebalancer = Rebalancer(list(placed.layers.values()), placed.phy2log, group.process_group, **settings)
    options = {"inner": "aot_eager", "ep_group": group.process_group, "ep_capacity": BATCH * LENGTH, "strict": True}
    call = torch.compile(
        model, backend="dsinfra", options={**options, "placement": Book.of(placed)}, fullgraph=True, dynamic=False
    )
    worst, under_way, phases = 0.0, 0, set()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(STEPS):
            ids = prompts(step, rank)
            expected = whole(ids, use_cache=False).logits
            error = (call(ids, use_cache=False).logits - expected).norm() / expected.norm()
            worst = max(worst, error.item())
            phases.add("during" if rebalancer._move is not None else "after" if rebalancer.history else "before")
            rebalancer.step()
            under_way += rebalancer._move is not None
        uncompiled = model(ids, use_cache=False).logits
        worst = max(worst, ((uncompiled - expected).norm() / expected.norm()).item())
    kept = store.state_dict()
    kinds = ("placement", "expert_parallel")
    found = {
        "worst": worst,
        "phases": phases,
        "moves": [change.moves for change in rebalancer.history],
        "under_way": under_way,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "placement": rebalancer.phy2log.tolist(),
        "sites": [(s.kind, s.matched) for s in report.reports()[-1].sites if s.kind in kinds],
        "ops": report.reports()[-1].op_counts,
        "state": all(torch.equal(kept[name], value) for name, value in whole.state_dict().items()),
        "addresses": slots == {n: [w.data_ptr() for w in y.weights] for n, y in placed.layers.items()},
    }
    return found | {"death": _dies_in_a_move(rank, rebalancer, whole, list(placed.layers))}


def _dies_in_a_move(rank: int, rebalancer: Rebalancer, whole: torch.nn.Module, names: list[str]) -> str:
    """The last rank ends between staging and commit; the others' slots and maps are those in force before."""
    while rebalancer._planning is not None or rebalancer._move is not None or rebalancer._todo:
        rebalancer.step()
    rebalancer._todo.append((0, rebalancer.phy2log[0].roll(1), torch.zeros(8)))
    commit = movement.Move.commit

    def commit_or_die(move: movement.Move) -> None:
        if rank == 3:
            os._exit(1)
        commit(move)

    movement.Move.commit = commit_or_die
    message = ""
    try:
        for _ in range(3):
            rebalancer.step()
    except MovementFailed as failed:
        message = str(failed)
    rebalancer.close()
    own = rebalancer.phy2log.view(len(names), dist.get_world_size(), -1)[:, rank]
    log2phy, logcnt = eplb.maps_of(rebalancer.phy2log, 8, rebalancer.layers[0].log2phy.shape[1])
    for i, (name, layer) in enumerate(zip(names, rebalancer.layers, strict=True)):
        module = whole.get_submodule(name)
        for weight, full in zip(layer.weights, (module.gate_up_proj, module.down_proj), strict=True):
            assert torch.equal(weight, full[own[i]]), name
        assert torch.equal(layer.log2phy, log2phy[i]) and torch.equal(layer.logcnt, logcnt[i]), name
    return message
