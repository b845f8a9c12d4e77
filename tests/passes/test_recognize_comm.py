"""Expert layers that a model spreads over ranks itself: found by the collective around them, and not spread again."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as collectives
from torch import fx, nn

from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord
from dscompile.runtime import groups
from tests import ranks
from tests.passes.test_expert_parallel import passed
from tests.zoo.expert_parallel import SharedToy, rows
from tests.zoo.experts import ToyExperts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a group of this process alone."""
    with ranks.alone(tmp_path_factory.mktemp("group")) as group:
        yield group.group_name


class Eight(ToyExperts):
    E = 8


class Spread(nn.Module):
    """A layer whose experts are one rank's, with the collective of `how` around it."""

    def __init__(self, how: str, group: str):
        super().__init__()
        self.layer, self.how, self.group = Eight(), how, group
        self.last = nn.Linear(Eight.D, Eight.D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1)
        if self.how == "exchanged":
            x = collectives.all_to_all_single(x, None, None, self.group).clone()
        idx, weight = self.layer.route(x)
        y = self.layer.experts(x, idx, weight)
        if self.how == "summed":
            y = collectives.all_reduce(y * 2, "sum", self.group)
        y = self.last(y)
        return collectives.all_reduce(y, "sum", self.group) if self.how == "summed behind a product" else y


def spread(model: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[PassRecord, fx.GraphModule]:
    """The record of expert_parallel on two ranks that exist in name only, and the graph."""
    stub: Any = SimpleNamespace(name="named", size=2, rank=1)
    monkeypatch.setitem(groups._GROUPS, "named", stub)
    return passed(model, x, ("named", 16))


@pytest.mark.parametrize("how", ["exchanged", "summed"])
def test_a_layer_that_is_spread_is_left(how: str, alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record, module = spread(Spread(how, alone), rows(0, 2, 5, torch.float32), monkeypatch)
    (site,) = record.sites
    assert not site.matched and site.refusal == "SpreadAlready"
    assert ("all_reduce" if how == "summed" else "all_to_all_single") in site.reason
    names = [operator_name(node) for node in module.graph.nodes]
    assert names.count("experts") == 1 and "dispatch_start" not in names


class Counted(nn.Module):
    """Rows and the counts by expert arrive sorted; splits are read on the host, as torchtitan's dispatcher does."""

    def __init__(self, group: str):
        super().__init__()
        self.weight, self.group = nn.Parameter(torch.randn(4, 24, 24)), group

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        came = collectives.all_to_all_single(counts, None, None, self.group)
        sizes = came.view(1, -1).sum(1).tolist()
        rows = collectives.all_to_all_single(x.flatten(0, 1), sizes, [x.shape[0] * x.shape[1]], self.group)
        y = torch._grouped_mm(rows.bfloat16(), self.weight.bfloat16(), offs=came.cumsum(0, dtype=torch.int32))
        return collectives.all_to_all_single(y, [x.shape[0] * x.shape[1]], sizes, self.group)


def test_rows_that_arrive_sorted_are_told_too(alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = Counted(alone), torch.tensor([3, 0, 5, 2])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        record, module = spread(lambda x: model(x, counts), rows(0, 2, 5, torch.float32), monkeypatch)
    (site,) = record.sites
    assert not site.matched and site.refusal == "SpreadAlready" and "all_to_all_single" in site.reason
    assert "left to the model" in site.decision
    assert not [name for node in module.graph.nodes if (name := operator_name(node))]


@pytest.mark.parametrize("how", ["whole", "summed behind a product"])
def test_a_collective_of_others_is_none_of_ours(how: str, alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SharedToy() if how == "whole" else Spread(how, alone)
    record, module = spread(model, rows(0, 2, 5, torch.float32), monkeypatch)
    (site,) = record.sites
    assert site.matched
    assert "dispatch_start" in [operator_name(node) for node in module.graph.nodes]
