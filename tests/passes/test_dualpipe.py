"""A stage's graphs: what is F, I and W, that parts and wholes give the same bits, and orders that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from dscompile.passes import overlap
from dscompile.passes.dualpipe import OrderError, Split, alternate, split, unit_cost, weave
from dscompile.passes.dualpipe_joint import joint_graph


class Block(nn.Module):
    """Two linear layers with a norm, whose call of the backward gives both gradients, and a frozen weight."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) * self.scale


def captured(module: nn.Module, x: Tensor) -> tuple[Split, list[Tensor], int]:
    """The split, the graph's inputs, and which of them is x."""
    found: list = []

    def backend(graph: fx.GraphModule, inputs: list) -> Callable:
        joint = joint_graph(graph, inputs)

        def call(*args: Tensor) -> tuple[Tensor]:
            at = next(i for i, arg in enumerate(args) if arg is x)
            found.extend((split(joint, at), list(args), at))
            return (x,)

        return call

    torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(x)
    return tuple(found)


@pytest.fixture(scope="module")
def block() -> tuple[Split, list[Tensor], int, nn.Module]:
    torch.manual_seed(0)
    module, x = Block().double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    return *captured(module, x), module


def test_parts_are_the_whole_and_the_whole_is_autograd(block) -> None:
    found, args, at, module = block
    dy = torch.randn(3, 6, dtype=torch.float64)
    y, *saved = found.forward(*args)
    dx, *dws = found.backward(*saved, dy)
    expected = module(args[at])
    wanted = torch.autograd.grad(expected, [args[at], *(args[i] for i in found.weights)], dy)
    for got, want in zip((y, dx, *dws), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.infer(*args)[0], y)

    first, *handed = found.input(*saved, dy)
    held = [(*saved, dy)[i] if given else handed[i] for given, i in found.held]
    assert torch.equal(first, dx)
    assert all(torch.equal(a, b) for a, b in zip(found.weight(*held), dws, strict=True))


def test_products_for_weights_are_in_w(block) -> None:
    found, args, _, module = block
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {id(args[i]) for i in found.weights} == {id(p) for p in trained}
    assert _count(found.input, "mm") == _count(found.weight, "mm") == 2
    assert _count(found.forward, "addmm") == 2 and _count(found.forward, "mm") == 0
    assert [n.meta["part"] for n in _calls(found.backward)] == sorted(n.meta["part"] for n in _calls(found.backward))


def test_token_ids_have_no_gradient_and_all_is_w() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 2]])
    found, args, _ = captured(nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 6)), ids)
    y, *saved = found.forward(*args)
    dx, *handed = found.input(*saved, torch.ones_like(y))
    assert dx is None and not handed and found.sizes()["I"] == 0
    assert len(found.weights) == 3


@pytest.mark.parametrize(
    "order",
    [None, alternate, overlap.order, lambda graph, cost: list(graph.nodes)],
    ids=["none", "alternate", "list scheduler", "as is"],
)
def test_a_woven_graph_gives_the_same_bits(block, order) -> None:
    found, args, _, _ = block
    dy = torch.randn(3, 6, dtype=torch.float64)
    y, *saved = found.forward(*args)
    expected = (y, *saved, *found.backward(*saved, dy))
    woven = weave(found.forward, found.backward, order)
    for got, want in zip(woven(*args, *saved, dy), expected, strict=True):
        assert torch.equal(got, want)
    assert len(_calls(woven)) == len(_calls(found.forward)) + len(_calls(found.backward))


def test_the_default_order_alternates_and_ends_with_w(block) -> None:
    found, *_ = block
    parts = [node.meta["part"] for node in _calls(weave(found.forward, found.backward))]
    assert "W" in parts[-2:] and "F" in parts[-3:]
    last_input = max(i for i, part in enumerate(parts) if part == "I")
    assert 0 < parts[:last_input].count("F") < parts.count("F")


def test_a_scheduler_is_given_costs(block) -> None:
    found, *_ = block
    seen = []

    def order(graph: fx.Graph, cost) -> list[fx.Node]:
        seen.extend(cost(node) for node in graph.nodes if node.op == "call_function")
        return list(graph.nodes)

    weave(found.forward, found.backward, order, lambda node: ("comm" if "mm" in node.name else "compute", 2.0))
    assert seen.count(("comm", 2.0)) == 6
    graph = fx.Graph()
    collective = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (graph.placeholder("x"),))
    assert unit_cost(collective) == ("comm", 1.0)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (lambda graph, cost: list(graph.nodes)[::-1], "comes before"),
        (lambda graph, cost: [n for n in graph.nodes if "mm" not in n.name], "is missing"),
        (lambda graph, cost: [*graph.nodes, *graph.nodes], "is missing, twice"),
    ],
    ids=["reversed", "missing", "twice"],
)
def test_orders_that_are_none(block, order, said: str) -> None:
    found, *_ = block
    with pytest.raises(OrderError, match=said):
        weave(found.forward, found.backward, order)


class Counts(nn.Module):
    """Counts its calls in a buffer: by an assignment, which Dynamo returns, or in place."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return x * 2


@pytest.mark.parametrize(("in_place", "said"), [(True, "pure function"), (False, "a stage of 2 outputs")])
def test_a_stage_that_writes_has_no_joint_graph(in_place: bool, said: str) -> None:
    with pytest.raises(Exception, match=f"NoJointGraph: .*{said}"):
        captured(Counts(in_place), torch.ones(2, requires_grad=True))


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def _count(module: fx.GraphModule, name: str) -> int:
    return sum(str(node.target).split(".")[1] == name for node in _calls(module) if "." in str(node.target))
