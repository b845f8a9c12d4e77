"""What one process of a group does with a compiled model whose experts move: outputs, captures, the stall of a step.

Started once a GPU, with RANK, WORLD_SIZE and the address of rank 0 in the environment:

    torchrun --nproc-per-node 2 -m tests.multi_gpu.placement_worker [reduce-overhead]

A DeepSeek-V3 of true head widths serves prompts whose popular tokens drift, under Inductor and NCCL. Printed are the
worst error beside the eager model's own, graphs, captures, and what a step takes while nothing moves and while it does.
The exit status is 0 where outputs are right and nothing was compiled or captured again.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from dscompile import report
from dscompile._entry import ensure_registered
from dscompile.passes.placement import Book
from dscompile.runtime import groups
from dscompile.runtime.expert_slots import PlacedExperts
from dscompile.runtime.expert_store import ExpertStore
from dscompile.runtime.placement import Rebalancer, Trigger
from tests.zoo.case import TRUE_SIZE, Precision, Size
from tests.zoo.hf import TRUE, build_model

LENGTH, WARM, STEPS = 64, 6, 40
OVERRIDES = {"num_hidden_layers": 2, "first_k_dense_replace": 0}


def prompts(step: int, rank: int) -> torch.Tensor:
    """Ids [1,S] by Zipf's law; the most popular ones change every ten steps."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    most = TRUE["vocab_size"] - 3
    popular = (torch.arange(most) + 200 * (step // 10)) % most
    chosen = torch.multinomial((popular + 1.0) ** -1.3, LENGTH, replacement=True, generator=generator)
    return (chosen + 3).view(1, LENGTH).cuda()


def count_captures() -> list[int]:
    """A list that grows with each capture of a CUDA graph in this process."""
    found: list[int] = []
    enter = torch.cuda.graph.__enter__

    def counted(self: Any) -> Any:
        found.append(len(found))
        return enter(self)

    torch.cuda.graph.__enter__ = counted  # type: ignore[method-assign]
    return found


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def main(mode: str | None) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    movers = dist.new_group(list(range(world)))  # moves run beside steps: on a communicator of their own
    ensure_registered()
    captures = count_captures()
    exact = build_model("deepseek_v3", size=Size("true", "cuda", Precision(torch.bfloat16, torch.float32)), **OVERRIDES)
    whole, model = (build_model("deepseek_v3", size=TRUE_SIZE, **OVERRIDES) for _ in range(2))
    group = groups.join(dist.group.WORLD)
    placed = PlacedExperts(ExpertStore(model, group.process_group), spare=2)
    rebalancer = Rebalancer(
        list(placed.layers.values()),
        placed.phy2log,
        movers,
        trigger=Trigger(below=0.97, above=0.99, interval=4, seconds=1.0),
        window=2,
        every=2,
        plan_steps=1,
        timeout=30.0,
    )
    options = {"ep_group": group.process_group, "ep_capacity": LENGTH, "placement": Book.of(placed), "strict": True}
    options |= {"mode": mode} if mode else {}
    call = torch.compile(model, backend="dsinfra", options=options, fullgraph=True, dynamic=False)
    quiet, moving, worst, own, warm = [], [], 0.0, 0.0, 0
    with torch.no_grad():
        for step in range(WARM + STEPS):
            if step == WARM:
                warm = len(captures)
            ids = prompts(step, rank)
            expected = exact(ids, use_cache=False).logits
            own = max(own, relative(whole(ids, use_cache=False).logits, expected))
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            logits = call(ids, use_cache=False).logits.clone()
            switched = rebalancer.step() if step >= WARM else None
            torch.cuda.synchronize()
            spent = (time.perf_counter() - start) * 1e3
            if step >= WARM:
                (moving if switched is not None or rebalancer._move is not None else quiet).append(spent)
            worst = max(worst, relative(logits, expected))
    rebalancer.close()
    stats = torch._dynamo.utils.counters
    told = {
        "mode": mode,
        "moves": [change.moves for change in rebalancer.history],
        "worst": round(worst, 5),
        "eager": round(own, 5),
        "graphs": stats["stats"]["unique_graphs"],
        "captures": (warm, len(captures)),
        "skips": stats["inductor"]["cudagraph_skips"],
        "sites": [s.matched for s in report.reports()[-1].sites if s.kind in ("placement", "expert_parallel")],
    }
    if rank == 0:
        print(f"[rank 0] {told}", flush=True)
        for name, times in (("quiet", quiet), ("moving", moving)):
            if times:
                middle, most = statistics.median(times), max(times)
                print(f"[rank 0] {len(times)} steps {name}: median {middle:.2f} ms, longest {most:.2f} ms", flush=True)
    assert rebalancer.history, "nothing moved: the load was even"
    assert told["sites"] == [True] * 4, told
    assert worst <= 2 * own + 1e-3, (worst, own)
    assert told["graphs"] == 1, "a plan compiled another graph"
    if mode == "reduce-overhead":
        assert told["skips"] == 0 and warm > 0, "the graph was not captured"
    assert len(captures) == warm, "a plan captured another graph"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
