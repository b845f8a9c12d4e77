"""The list scheduler: the model of two streams, orders that hide communication, and what must keep its order."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import fx

from dscompile.passes.overlap import COMM, COMPUTE, apply, order, simulate

lib = torch.library.Library("overlap_test", "DEF")
for _name in ("gemm", "start", "wait"):
    lib.define(f"{_name}(Tensor x, str tag) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(_name, lambda x, tag: x.clone(), "CPU")
    torch.library.register_fake(f"overlap_test::{_name}", lambda x, tag: torch.empty_like(x), lib=lib)
ops = torch.ops.overlap_test
US = {"gemm": 100.0, "start": 60.0, "wait": 1.0}


def cost(node: fx.Node) -> tuple[str, float]:
    name = str(node.target).split(".")[1] if "overlap_test" in str(node.target) else ""
    return COMM if name == "start" else COMPUTE, US.get(name, 0.0)


def chains(count: int, layers: int = 1) -> fx.Graph:
    """`count` independent chains, one after the other, of: attention, dispatch, experts, combine."""
    graph = fx.Graph()
    last = []
    for c in range(count):
        x = graph.placeholder(f"x{c}")
        for layer in range(layers):
            tag = f"{'AB'[c]}{layer}"
            for step in ("attn", "dispatch", "mlp", "combine"):
                if step in ("attn", "mlp"):
                    x = graph.call_function(ops.gemm.default, (x, tag + step))
                else:
                    x = graph.call_function(ops.start.default, (x, tag + step))
                    x = graph.call_function(ops.wait.default, (x, tag + step))
        last.append(x)
    graph.output(tuple(last))
    graph_inputs_first(graph)
    return graph


def graph_inputs_first(graph: fx.Graph) -> None:
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder" and n is not first]:
        first.append(node)


def starts(graph: fx.Graph) -> list[fx.Node]:
    """Of both chains, by turns."""
    found = [n for n in graph.nodes if n.target is ops.start.default]
    half = len(found) // 2
    return [n for pair in zip(found[:half], found[half:], strict=True) for n in pair]


def said(nodes: list[fx.Node]) -> list[str]:
    return [f"{n.args[1]}.{str(n.target).split('.')[1]}" for n in nodes if len(n.args) == 2]


def test_a_chain_alone_hides_nothing() -> None:
    graph = chains(1)
    timeline = simulate(order(graph, cost), cost)
    assert (timeline.total, timeline.hidden) == (2 * 100 + 2 * 60 + 2, 0.0)
    assert timeline.idle == pytest.approx(120 / 322)


def test_two_chains_hide_each_others_communication() -> None:
    graph = chains(2, layers=3)
    before = simulate(graph.nodes, cost)
    nodes = order(graph, cost, comm_order=starts(graph))
    after = simulate(nodes, cost)
    assert before.total == 6 * (2 * 100 + 2 * 60 + 2 * 1)
    assert after.total == 6 * (2 * 100 + 2 * 1) + 60 - 1  # of the last exchange only the other chain's wait is hidden
    assert after.hidden == pytest.approx((11 * 60 + 1) / (12 * 60))
    assert said(nodes)[:7] == [
        *("A0attn.gemm", "A0dispatch.start", "B0attn.gemm", "B0dispatch.start"),
        *("A0dispatch.wait", "A0mlp.gemm", "A0combine.start"),
    ]


def test_every_node_stands_behind_what_it_reads() -> None:
    graph = chains(2, layers=2)
    apply(graph, order(graph, cost, comm_order=starts(graph)))  # lints
    place = {node: i for i, node in enumerate(graph.nodes)}
    assert all(place[n] < place[node] for node in graph.nodes for n in node.all_input_nodes)
    found = [node for node in graph.nodes if node.target is ops.start.default]
    assert found == sorted(found, key=lambda n: place[n]) and [n.args[1][0] for n in found] == ["A", "B"] * 4


def test_the_order_of_communication_is_the_graphs_own_unless_given() -> None:
    graph = chains(2)
    given = [n for n in graph.nodes if n.target is ops.start.default]
    assert [n for n in order(graph, cost) if n.target is ops.start.default] == given
    with pytest.raises(ValueError, match="not one that the graph's data allows"):
        order(graph, cost, comm_order=given[::-1])


def test_kernels_are_slower_while_communication_has_multiprocessors() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    sent = graph.call_function(ops.start.default, (x, "s"))
    y = graph.call_function(ops.gemm.default, (x, "g"))
    graph.output((graph.call_function(ops.wait.default, (sent, "s")), y))
    # 33 of 132: 60 us of communication do 45 us of work, the other 55 us run at full speed.
    assert simulate(graph.nodes, cost, comm_sms=33).total == pytest.approx(60 + 55 + 1)
    with pytest.raises(ValueError, match="comm_sms is 132"):
        simulate(graph.nodes, cost, comm_sms=132)


def test_memory_bounds_how_far_ahead_it_runs() -> None:
    def peak(nodes: list[fx.Node]) -> int:
        left = {n: len(n.users) for n in nodes}
        alive = most = 0
        for n in nodes:
            alive += n.op == "call_function"
            most = max(most, alive)
            for used in n.all_input_nodes:
                left[used] -= 1
                alive -= left[used] == 0 and used.op == "call_function"
        return most

    graph = fx.Graph()
    x = graph.placeholder("x")
    wide = [graph.call_function(ops.gemm.default, (x, f"w{i}")) for i in range(6)]
    narrow = [graph.call_function(ops.gemm.default, (w, "n")) for w in wide]
    total = narrow[0]
    for n in narrow[1:]:
        total = graph.call_function(torch.ops.aten.add.Tensor, (total, n))
    graph.output(total)
    for node in graph.nodes:
        node.meta["val"] = torch.empty(256, device="meta")
    free, bound = order(graph, cost), order(graph, cost, memory=3 * 1024)
    assert peak(bound) <= 4 < peak(free)


def test_writes_and_draws_keep_their_order() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    slow = graph.call_function(ops.gemm.default, (y, "slow"))
    view = graph.call_function(torch.ops.aten.t.default, (x,))
    before = graph.call_function(ops.gemm.default, (view, "reads what was"))
    write = graph.call_function(torch.ops.aten.copy_.default, (x, slow))
    after = graph.call_function(ops.gemm.default, (x, "reads what is"))
    draws = [graph.call_function(torch.ops.aten.bernoulli.default, (n,)) for n in (after, y)]
    graph.output((before, after, *draws))
    place = {node: i for i, node in enumerate(order(graph, cost))}
    assert place[before] < place[write] < place[after] < place[draws[0]] < place[draws[1]]


def test_what_is_no_order_of_the_graph_is_refused() -> None:
    graph = chains(1)
    with pytest.raises(ValueError, match="each must be there once"):
        apply(graph, list(graph.nodes)[:-1])


def test_inductor_keeps_the_order() -> None:
    """What is in Dynamo's graph in our order is generated in our order, under the settings that a schedule asks for."""
    from torch._inductor.utils import run_and_get_code

    from dscompile.lowering import inductor
    from dscompile.passes.microbatch import INDUCTOR

    wanted: list[str] = []

    def backend(module: fx.GraphModule, inputs: list) -> object:
        found = [n for n in module.graph.nodes if n.target is ops.start.default]
        by_turns = list(itertools.chain(*zip(found[:4], found[4:], strict=True)))
        apply(module.graph, order(module.graph, cost, comm_order=by_turns))
        wanted.extend(said([n for n in module.graph.nodes if "overlap_test" in str(n.target)]))
        module.recompile()
        return inductor.compile_graph(module, inputs, None, dict(INDUCTOR), "test")

    def model(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for name, x in (("A", a), ("B", b)):
            for layer in "01":
                for step in ("attn", "mlp"):
                    y = ops.gemm.default(x, name + layer + step)
                    sent = ops.start.default(y, name + layer + step)
                    x = ops.wait.default(sent, name + layer + step)
            results.append(x)
        return tuple(results)

    torch._dynamo.reset()
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with torch.no_grad():
        results, (code,) = run_and_get_code(torch.compile(model, backend=backend, fullgraph=True), a, b)
        torch.testing.assert_close(results, model(a, b))
    calls = re.findall(r"overlap_test\.(\w+)\.default\([^)']*'(\w+)'\)", code)
    generated = [f"{tag}.{name}" for name, tag in calls]
    assert len(wanted) == 24 and generated == wanted
