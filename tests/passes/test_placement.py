"""Placed expert layers: counters, maps and physical slots in the graph; plans change while one graph stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dscompile import report as reports
from dscompile._entry import ensure_registered
from dscompile.config import Config
from dscompile.errors import OptionError
from dscompile.lowering import inductor
from dscompile.passes import placement, recognize_experts, recognize_mla
from dscompile.passes.experts_values import sizes_of
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.placement import Book
from dscompile.passes.record import PassRecord
from dscompile.passes.shadow import trace
from dscompile.runtime.eplb import maps_of
from dscompile.runtime.movement import ExpertSlots
from tests.passes.test_recognize_experts import toy
from tests.passes.toy import randn, stack
from tests.zoo.experts import Layer, ToyExperts

D, E, X = ToyExperts.D, ToyExperts.E, 3
ensure_registered()
PLANS = ([0, 1, 2, 3, 4, 0, 0], [4, 3, 2, 1, 0, 3, 4])


def slots(layer: ToyExperts, plan: list[int]) -> ExpertSlots:
    own = torch.tensor(plan)
    gate_up = torch.cat((layer.w_gate, layer.w_up), 1) if hasattr(layer, "w_gate") else layer.w_gate_up
    weights = gate_up.detach()[own].contiguous(), layer.w_down.detach()[own].contiguous()
    log2phy, logcnt = maps_of(own.unsqueeze(0), E, X)
    return ExpertSlots(weights, log2phy[0], logcnt[0], torch.zeros(E, dtype=torch.int64))


def write_plan(held: ExpertSlots, new: ExpertSlots) -> None:
    """As a move does: in place."""
    for old, value in zip((*held.weights, held.log2phy, held.logcnt), (*new.weights, new.log2phy, new.logcnt)):
        old.copy_(value)


Inner = Callable[[fx.GraphModule, Any], Callable]
INNER: dict[str, Inner] = {
    "eager": lambda gm, inputs: gm.forward,
    "aot_eager": inductor.compile_eager,
    "inductor": lambda gm, inputs: inductor.compile_graph(gm, inputs, None, {}, "test of placement"),
}


def compiled(module: nn.Module, book: Book, inner: Inner = INNER["eager"]) -> tuple[Callable, list[PassRecord], list]:
    """Through recognition and placement alone; the records, and the rewritten graphs."""
    torch._dynamo.reset()
    records: list[PassRecord] = []
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable:
        shadow = trace(gm, inputs)
        training = recognize_mla.is_training(list(inputs))
        _, written, _ = recognize_experts.run(shadow, sizes_of(shadow.graph), training, Prepared(gm, inputs))
        records.append(placement.run(written, book, gm, training))
        graphs.append(gm)
        lifted, inputs, bind = placement.lift(gm, inputs)
        return bind(inner(lifted, inputs))

    return torch.compile(module, backend=backend), records, graphs


def calls(graph: fx.GraphModule) -> list[str]:
    """Our operators, in order."""
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    return [t.split(".")[1] for t in targets if t.startswith("dsinfra.")]


def counted(layer: ToyExperts, x: Tensor) -> list[int]:
    idx, _ = layer.route(x.reshape(-1, D))
    return torch.bincount(idx.flatten(), minlength=E).tolist()


@pytest.mark.parametrize(("inner", "lengths"), [("eager", False), ("aot_eager", True), ("inductor", True)])
def test_plans_change_and_the_graph_stays(inner: str, lengths: bool) -> None:
    layer = toy()()
    held = slots(layer, PLANS[0])
    call, records, graphs = compiled(layer, Book({"": held}), INNER[inner])
    expected_load = torch.zeros(E, dtype=torch.int64)
    with torch.no_grad():
        for seed, plan in enumerate((*PLANS, PLANS[0])):
            write_plan(held, slots(layer, plan))
            x = randn(2, 7 + 4 * seed * lengths, D, seed=seed)
            if lengths:
                torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(call(x), layer(x), rtol=1e-9, atol=1e-11)
            expected_load += torch.tensor(counted(layer, x))
    assert len(graphs) == 1, "one graph serves every plan"
    assert calls(graphs[0]) == ["place_counted", "experts"]
    assert held.counter.tolist() == expected_load.tolist()
    (site,) = records[0].sites
    assert site.matched and site.decision == "5 experts in 7 slots of 1 rank, 2 of them spare"


def test_the_option() -> None:
    """As a user asks for it, with values that are prepared from weights behind it (gate and up are apart)."""
    torch._dynamo.reset()
    model = stack(*[toy(lambda: ToyExperts(Layer(weights="apart")), seed=i) for i in range(2)])()
    held = {f"layers.{i}": slots(layer, PLANS[0]) for i, layer in enumerate(model.layers)}
    options = {"placement": Book(held), "inner": "aot_eager", "strict": True}
    call = torch.compile(model, backend="dsinfra", options=options, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed, plan in enumerate(PLANS):
            for layer, own in zip(model.layers, held.values(), strict=True):
                write_plan(own, slots(layer, plan))
            x = randn(1, 6, D, seed=seed)
            torch.testing.assert_close(call(x), model(x), rtol=1e-9, atol=1e-11)
    assert [own.counter.sum().item() for own in held.values()] == [2 * 6 * 2] * 2
    sites = [site for site in reports.last().sites if site.kind == "placement"]
    assert [site.module_path for site in sites] == list(held) and all(site.matched for site in sites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": {}}, "is a dict; it must be a passes.placement.Book"),
        ({"placement": Book({}), "verify": True}, "options\\['verify'\\] is True and placement is given"),
        ({"placement": Book({}), "enable": False}, "options\\['enable'\\] is False and placement is given"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Config.of(None, options)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_occurrences(number: int) -> None:
    make = stack(*[toy(seed=i) for i in range(number)]) if number else nn.Identity
    model = make()
    held = {f"layers.{i}": slots(model.layers[i], PLANS[i % 2]) for i in range(number)}
    x = randn(1, 5, D)
    call, records, graphs = compiled(model, Book(held))
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-9, atol=1e-11)
    assert sum(record.matched for record in records) == number
    assert [name for g in graphs for name in calls(g)] == ["place_counted", "experts"] * number


def test_the_graph_really_reads_the_slots() -> None:
    """A near miss: equal weights in all slots would hide a wrong map. Here a slot's change is seen by its tokens."""
    layer, x = toy()(), randn(1, 6, D)
    held = slots(layer, PLANS[0])
    call, *_ = compiled(layer, Book({"": held}))
    with torch.no_grad():
        before = call(x)
        held.weights[1][5].zero_()  # the second replica of expert 0
        changed = (call(x) != before).any(-1)[0]
        idx, _ = layer.route(x[0])
        assert changed.tolist() == [
            bool((idx[t] == 0).any()) and t % 3 == held.log2phy[0].tolist().index(5) for t in range(6)
        ]


REFUSED = {
    "unknown": (lambda: (toy()(), {"other": slots(toy()(), PLANS[0])}), "NotPlaced", "there are other"),
    "bias": (
        lambda: ((layer := toy(lambda: ToyExperts(Layer(bias=True)))()), {"": slots(layer, PLANS[0])}),
        "PlacedBias",
        "biases",
    ),
    "dtype": (lambda: (toy()(), {"": slots(toy()().float(), PLANS[0])}), "NotPlaced", "torch.float32"),
}


@pytest.mark.parametrize(("make", "refusal", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(make: Callable, refusal: str, reason: str) -> None:
    layer, held = make()
    call, records, graphs = compiled(layer, Book(held))
    with torch.no_grad():
        torch.testing.assert_close(call(randn(1, 5, D)), layer(randn(1, 5, D)), rtol=1e-9, atol=1e-11)
    (site,) = records[0].sites
    assert not site.matched and site.refusal == refusal and reason in site.reason
    assert calls(graphs[0]) == ["experts"]


def test_a_layer_in_pieces_is_told() -> None:
    layer = toy(partial(ToyExperts, Layer(weights="apart")))()
    call, records, _ = compiled(layer, Book({"": slots(toy()(), PLANS[0])}), INNER["aot_eager"])
    call(randn(1, 5, D)).sum().backward()
    assert [site.refusal for site in records[0].sites] == ["SeparateGateUp"]


def test_training_is_refused() -> None:
    layer = toy()()
    call, records, _ = compiled(layer, Book({"": slots(layer, PLANS[0])}), INNER["aot_eager"])
    call(randn(1, 5, D)).sum().backward()
    assert [site.refusal for site in records[0].sites] == ["PlacedTraining"]
