"""The pass that spreads expert layers: what it writes, where it puts it, what it refuses; in one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx

from dscompile.backend import dsinfra
from dscompile.config import Config
from dscompile.errors import OptionError
from dscompile.lowering.exchange import ExchangeError
from dscompile.passes import graph_copy, pipeline
from dscompile.passes.ep_slots import assign
from dscompile.passes.graph import called
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord
from dscompile.runtime import groups
from tests import ranks
from tests.passes.test_recognize_experts import toy
from tests.passes.toy import randn
from tests.zoo.expert_parallel import build, rows
from tests.zoo.experts import Layer, ToyExperts

PAIRS = ["dispatch_start", "dispatch_wait", "experts", "combine_start", "combine_wait"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone, which exchanges with itself."""
    with ranks.alone(tmp_path_factory.mktemp("group")) as group:
        yield group


@pytest.fixture
def one_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process rank `rank` of a group of `size` that exists in name only: graphs are looked at, not run."""

    def join(size: int, rank: int = 1) -> str:
        monkeypatch.setitem(groups._GROUPS, "named", SimpleNamespace(name="named", size=size, rank=rank))
        return "named"

    return join


def passed(
    model: Any, x: torch.Tensor, ep: tuple[str, int | None], training: bool = False
) -> tuple[PassRecord, fx.GraphModule]:
    """The record of the pass, and the graph behind all of them."""
    found: list[tuple[pipeline.Outcome, fx.GraphModule]] = []

    def backend(module: fx.GraphModule, inputs: list) -> Any:
        copied = graph_copy.copied(module)[0]
        found.append((pipeline.run(copied, inputs, ep=ep), copied))
        return module.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend=backend, fullgraph=True)(x)
    ((outcome, module),) = found
    assert outcome.error is None, outcome.error
    return next(r for r in outcome.records if r.name == "expert_parallel"), module


def operators(module: fx.GraphModule) -> list[str]:
    """Names of our operators, in the order of the graph, routers left out."""
    return [name for node in module.graph.nodes if (name := operator_name(node)) and name != "route"]


@pytest.mark.parametrize("layers", [1, 3])
def test_equal_to_eager_with_all_gradients(alone: dist.ProcessGroup, layers: int) -> None:
    model, x, reports = build(layers), rows(0, 2, 5).requires_grad_(), []

    def backend(gm: fx.GraphModule, inputs: list) -> Any:
        return dsinfra(gm, inputs, options={"inner": "aot_eager", "ep_group": alone}, sink=reports.append)

    torch._dynamo.reset()
    results = []
    for call in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    (report,) = reports
    assert {name: report.op_counts.get(name) for name in PAIRS} == dict.fromkeys(PAIRS, layers)
    assert "grouped_mm" not in report.op_counts
    sites = [site for site in report.sites if site.kind == "expert_parallel"]
    assert [site.module_path for site in sites] == [f"layers.{i}" for i in range(layers)]
    assert "capacity 10" in sites[0].decision  # the graph's own number of tokens


def test_a_model_without_experts_is_left_alone(one_of: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Softmax(-1))
    record, module = passed(model, torch.randn(3, 24), (one_of(2), 8))
    assert not record.sites and not operators(module)


def test_the_wait_stands_behind_the_shared_expert(one_of: Any) -> None:
    record, module = passed(build(), rows(0, 2, 5), (one_of(2), 16))
    assert operators(module) == PAIRS
    names = [operator_name(node) or called(node) for node in module.graph.nodes]
    between = names[names.index("dispatch_start") : names.index("dispatch_wait")]
    assert between.count("linear") == 2 and between.count("relu") == 1
    assert names[names.index("combine_wait") + 1 :].count("linear") == 0
    (site,) = record.sites
    assert site.decision.startswith("4 of 8 experts on each of 2 ranks, capacity 16, slices of whole weights")


def test_local_weights_are_this_ranks_slices(one_of: Any) -> None:
    _, module = passed(build(), rows(0, 2, 5), (one_of(4, rank=3), 16))
    experts = next(node for node in module.graph.nodes if operator_name(node) == "experts")
    for weight in experts.args[3:5]:
        assert weight.target is torch.ops.aten.slice.Tensor and weight.args[1:] == (0, 6, 8)
        assert weight.meta["example_value"].shape[0] == 2
    assert experts.args[0].meta["example_value"].shape == (4 * 16, 24)


def test_layers_in_a_row_share_a_slot(one_of: Any) -> None:
    record, module = passed(build(3), rows(0, 2, 5), (one_of(2), 16))
    exchanges = [node for node in module.graph.nodes if operator_name(node).endswith(("_start", "_wait"))]
    assert len(exchanges) == 12 and {node.args[-1] for node in exchanges} == {0}
    assert record.note == "rank 1 of 2, 1 slot"


def test_exchanges_that_are_open_at_once_get_slots_of_their_own() -> None:
    graph = fx.Graph()
    starts = [graph.call_function(torch.add, (i, i, 0)) for i in range(2)]
    waits = [graph.call_function(torch.sub, (start, 0)) for start in starts]
    late = graph.call_function(torch.add, (9, 9, 0))
    last = graph.call_function(torch.sub, (late, 0))
    found = list(zip([*starts, late], [*waits, last], strict=True))
    assert assign(found) == 2
    assert [[node.args[-1] for node in nodes] for nodes in found] == [[0, 0], [1, 1], [0, 0]]


REFUSED = {
    "UnevenExperts": (build(), 3, "8 experts can't be spread evenly over 3 ranks"),
    "UnorderedExchanges": (build(2, beside=True), 2, "doesn't depend on the expert layer before it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_left_whole(one_of: Any, name: str) -> None:
    model, size, reason = REFUSED[name]
    record, module = passed(model, rows(0, 2, 5), (one_of(size), 16))
    site = record.sites[-1]
    assert not site.matched and site.refusal == name and reason in site.reason and site.hint
    assert operators(module).count("experts") == len(model.layers)
    assert operators(module).count("dispatch_start") == sum(site.matched for site in record.sites)


def test_a_layer_in_pieces_is_told(one_of: Any) -> None:
    """Gate and up apart, in training: there is no operator to spread, and the report says so."""
    model = toy(partial(ToyExperts, Layer(weights="apart")))()
    record, module = passed(model, randn(1, 5, ToyExperts.D), (one_of(2), 16), training=True)
    (site,) = record.sites
    assert not site.matched and site.refusal == "SeparateGateUp" and site.hint
    assert "moe_combine" in operators(module) and "dispatch_start" not in operators(module)


@pytest.mark.parametrize(
    ("capacity", "found"), [(9, "has 10 tokens and options['ep_capacity'] is 9"), (None, "no capacity was given")]
)
def test_what_other_ranks_would_wait_for_is_an_error(one_of: Any, capacity: int | None, found: str) -> None:
    x = rows(0, 2, 5) if capacity else rows(0, 0, 5)
    with pytest.raises(Exception, match=r"has \d+ tokens") as raised:
        passed(build(), x, (one_of(2), capacity))
    assert found in str(raised.value)
    assert ExchangeError.__name__ in str(raised.value)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"ep_group": "nobody"}, "is no group"),
        ({"ep_group": 3}, "is no group"),
        ({"ep_capacity": 4}, "ep_group is None"),
        ({"ep_group": "world", "ep_capacity": 0}, "must be a number of tokens, 1 or more"),
        ({"ep_group": "world", "verify": True}, "every rank to check the same"),
        ({"ep_group": "world", "enable": False}, "without analysis"),
    ],
)
def test_options(alone: dist.ProcessGroup, options: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        Config.of(None, options)


def test_a_group_by_any_of_its_names(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    for group in (alone, "world", alone.group_name, mesh["ep"]):
        assert groups.get(Config.of(None, {"ep_group": group}).ep_group).size == 1
    with pytest.raises(OptionError, match="2 dimensions .* Give one, as in mesh"):
        Config.of(None, {"ep_group": mesh})
    monkeypatch.setenv("DSINFRA_EP_GROUP", "world")
    monkeypatch.setenv("DSINFRA_EP_CAPACITY", "32")
    assert Config.of().ep_capacity == 32 and Config.of().ep_group == alone.group_name
