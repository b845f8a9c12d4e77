"""Compiles models with expert parallelism and micro-batches; what the ranks of `test_microbatch_ranks.py` run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from dscompile.passes import microbatch, pipeline
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import Site
from dscompile.runtime import groups
from tests.zoo.hf import build_model, tokens


class Flat:
    """Costs by arithmetic alone: exchanges take 40 us, whatever they send, and an expert layer some hundred."""

    def us(self, operator: str, operands: list, **work: Any) -> float:
        return 40.0 if "wire" in work else work.get("flops", 0) / 20_000


class Seen:
    """What a compilation did."""

    site: Site
    schedule: dict[str, list[dict]]
    operators: list[str]
    sent: list[tuple[int, int]]  # capacity and slot of each dispatch
    graphs = 0


def compiled(model: Any, group: str, asked: microbatch.Asked, capacity: int | None = None) -> tuple[Callable, Seen]:
    """The model with its experts spread over `group`, in micro-batches as asked; run as it is written."""
    seen = Seen()

    def backend(module: fx.GraphModule, inputs: list) -> Any:
        outcome = pipeline.run(module, inputs, strict=True, ep=(group, capacity), microbatches=asked)
        seen.graphs += 1
        (seen.site,) = next(r for r in outcome.records if r.name == microbatch.NAME).sites
        seen.schedule = module.meta.get(microbatch.SCHEDULE, {})
        seen.operators = [name for n in module.graph.nodes if (name := operator_name(n))]
        begun = [n for n in module.graph.nodes if operator_name(n) == "dispatch_start"]
        seen.sent = [n.args[-2:] for n in begun]
        return module.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False), seen


ALWAYS = microbatch.Asked(Flat(), margin=-math.inf)
ONE_BEHIND_THE_OTHER = microbatch.Asked(Flat(), margin=-math.inf, overlap=False)


def check_model(rank: int, name: str, overrides: dict[str, Any], batches: tuple[int, ...]) -> tuple[str, list, list]:
    """Outputs are eager's, and to the bit those of one micro-batch behind the other; -> decision, orders of both."""
    group = groups.join(dist.group.WORLD)
    model: nn.Module = build_model(name, **overrides)
    ids = tokens(batches[rank], 6, seed=rank + 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        results, orders = [], []
        for asked in (ALWAYS, ONE_BEHIND_THE_OTHER):
            call, seen = compiled(model, group.name, asked, capacity=30)
            results.append(call(ids, use_cache=False).logits)
            assert seen.graphs == 1 and seen.site.matched, seen.site
            orders.append([name for name in seen.operators if name in microbatch.EXCHANGE])
    error = float((results[0] - expected).norm() / expected.norm())
    assert error <= 1e-5, error
    assert torch.equal(*results), "the order changed the bits"
    return seen.site.form, *orders
