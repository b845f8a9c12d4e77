"""Micro-batches in one process: which operators keep requests apart, what is split and where, what is left whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dscompile.config import Config
from dscompile.errors import OptionError
from dscompile.passes import microbatch, pipeline
from dscompile.passes.microbatch import Asked
from dscompile.passes.separable import Axis, Mixes, analyse, half, prove
from dscompile.runtime import groups
from tests import ranks
from tests.passes.microbatch_checks import ALWAYS, ONE_BEHIND_THE_OTHER, Flat, compiled
from tests.zoo.expert_parallel import Stack, build, rows
from tests.zoo.hf import build_model, tokens

B, S, D = 4, 3, 8


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a group of this process alone, which exchanges with itself."""
    with ranks.alone(tmp_path_factory.mktemp("group")) as group:
        yield groups.join(group).name


# ------------------------------------------------------------------ the rules

W = torch.linspace(-1, 1, D * D).reshape(D, D)

# What keeps requests apart, and where the result has them.
APART: dict[str, tuple[Callable, Axis]] = {
    "elementwise": (lambda x: x.sin() * x + x.sum(-1, keepdim=True), Axis(0)),
    "a shared operand of all requests": (
        lambda x: x + torch.arange(x.shape[0]).view(-1, 1, 1).expand(-1, S, D),
        Axis(0),
    ),
    "tokens": (lambda x: x.view(-1, D), Axis(0, 1, S)),
    "tokens and back": (lambda x: (x.view(-1, D) @ W).view(-1, S, D), Axis(0)),
    "between other dimensions": (lambda x: x.transpose(0, 1), Axis(1)),
    "behind others in one dimension": (lambda x: x.transpose(0, 1).reshape(-1, D), Axis(0, S, 1)),
    "permuted": (lambda x: x.permute(2, 0, 1), Axis(1)),
    "linear": (lambda x: torch.nn.functional.linear(x, W, W[0]), Axis(0)),
    "batched products": (lambda x: x @ x.transpose(1, 2), Axis(0)),
    "second factor": (lambda x: W @ x.reshape(-1, D).t(), Axis(1, 1, S)),
    "mean of another dimension": (lambda x: x.mean((1, 2)), Axis(0)),
    "softmax": (lambda x: x.softmax(-1), Axis(0)),
    "choices": (lambda x: x.topk(2)[1], Axis(0)),
    "split": (lambda x: torch.cat(x.split(4, -1)[::-1], -1), Axis(0)),
    "stacked": (lambda x: torch.stack((x, x)), Axis(1)),
    "selected": (lambda x: x[:, 0], Axis(0)),
    "gathered": (lambda x: x.gather(2, x.argsort(-1)), Axis(0)),
    "looked up": (lambda x: W[(x[..., 0].abs() * 3).long() % D], Axis(0)),
    "each its own row": (lambda x: x[torch.arange(x.shape[0]).view(-1, 1), torch.arange(S).view(1, -1)], Axis(0)),
    "layer norm": (lambda x: torch.nn.functional.layer_norm(x, (D,)), Axis(0)),
    "attention": (lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3), Axis(0)),
    "one dimension more": (lambda x: x.unsqueeze(0).expand(2, -1, -1, -1), Axis(1)),
}

# What mixes them, and the operator that is named.
TOGETHER: dict[str, tuple[Callable, str]] = {
    "mean": (lambda x: x - x.mean(0), "mean"),
    "sum of all": (lambda x: x / x.sum(), "sum"),
    "cumsum": (lambda x: x.cumsum(0), "cumsum"),
    "softmax": (lambda x: x.softmax(0), "_softmax"),
    "product over requests": (lambda x: x.view(-1, D).t() @ x.view(-1, D), "mm"),
    "the next request": (lambda x: x.roll(1, 0), "roll"),
    "one request": (lambda x: x + x[:1], "slice"),
    "regrouped": (lambda x: x.view(2, -1, D).transpose(0, 1).reshape(-1, 3 * D), "view"),
    "batch norm": (lambda x: torch.nn.functional.batch_norm(x, None, None, training=True), "native_batch_norm"),
    "draws": (lambda x: torch.bernoulli(x.sigmoid()), "bernoulli"),
    "attention between requests": (
        lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 1, -1, D)] * 3),
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
}


def traced(function: Callable, x: torch.Tensor) -> tuple[fx.Graph, dict[fx.Node, Axis]]:
    """The functional graph of a function of requests, and where its input has them."""
    pure = torch.func.functionalize(function, remove="mutations")
    with torch.no_grad():
        graph = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(x).graph
    return graph, {next(n for n in graph.nodes if n.op == "placeholder"): Axis(0)}


@pytest.mark.parametrize("name", APART)
def test_half_of_the_requests_give_half_of_the_result(name: str) -> None:
    function, axis = APART[name]
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))
    graph, seeds = traced(function, x)
    assert prove(graph, seeds, B).states[graph.output_node().args[0]] == axis
    whole = function(x)
    parts = whole.unflatten(axis.dim, (axis.before, B, axis.after)).chunk(2, axis.dim + 1)
    for i, part in enumerate(parts):
        if name == "a shared operand of all requests":
            part = part - (i * B // 2)  # the operand counts requests
        torch.testing.assert_close(function(x[i * B // 2 :][: B // 2]), part.reshape(half(whole.shape, axis)))


@pytest.mark.parametrize("name", TOGETHER)
def test_what_mixes_requests_is_named(name: str) -> None:
    function, operator = TOGETHER[name]
    with pytest.raises(Mixes, match=operator):
        prove(*traced(function, torch.randn(B, S, D)), B)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_every_operator_of_a_model_keeps_requests_apart(alone: str, name: str) -> None:
    found: list[tuple[fx.GraphModule, list]] = []

    def backend(module: fx.GraphModule, inputs: list) -> Any:
        pipeline.run(module, inputs, strict=True, ep=(alone, None))
        found.append((microbatch.functional(module, inputs), inputs))
        return module.forward

    torch._dynamo.reset()
    model, ids = build_model(name, num_hidden_layers=1, first_k_dense_replace=0), tokens(4, 6)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(ids, use_cache=False)
    ((module, _),) = found
    (seed,) = (n for n in module.graph.nodes if n.op == "placeholder" and n.meta["val"].shape == (4, 6))
    proof = prove(module.graph, {seed: Axis(0)}, 4)
    (logits,) = module.graph.output_node().args[0]
    assert logits.meta["val"].shape == (4, 6, 512) and proof.states[logits] == Axis(0)
    assert analyse(module.graph, {}, 4).states[logits] is None


# ------------------------------------------------------------------ the pass, on toys


class Centred(Stack):
    """Experts over tokens of which the mean over all was taken away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean((0, 1)))


def centred() -> nn.Module:
    model = Centred(1).double()
    model.load_state_dict(build(1).state_dict())
    return model


def test_tokens_of_one_request_are_split_too(alone: str) -> None:
    model, x = build(2), rows(0, 1, 4)
    results, orders = [], []
    with torch.no_grad():
        for asked in (ALWAYS, ONE_BEHIND_THE_OTHER):
            call, seen = compiled(model, alone, asked)
            results.append(call(x))
            orders.append(seen.operators)
            assert seen.graphs == 1 and seen.site.form.startswith("4 tokens along dimension 1")
        torch.testing.assert_close(results[0], model(x), rtol=1e-11, atol=1e-11)
    assert torch.equal(*results) and orders[0] != orders[1]


def test_without_a_predicted_gain_the_graph_stays(alone: str) -> None:
    class Free(Flat):
        def us(self, operator: str, operands: list, **work: Any) -> float:
            return 0.5 if "wire" in work else 10.0  # kernels that don't get shorter

    model, x = build(2), rows(0, 2, 5)
    with torch.no_grad():
        call, seen = compiled(model, alone, Asked(Free()))
        torch.testing.assert_close(call(x), model(x), rtol=1e-11, atol=1e-11)
    assert seen.operators.count("dispatch_start") == 2
    assert seen.site.matched and seen.site.decision.startswith("all requests at once: ")
    assert seen.site.predicted["two micro-batches"] > seen.site.predicted["whole"]


def test_a_gain_is_predicted_where_exchanges_are_long(alone: str) -> None:
    class Long(Flat):
        def us(self, operator: str, operands: list, **work: Any) -> float:
            shape = operands[0][0] if operands else ()
            return math.prod(shape) * (1.0 if "wire" in work else 0.5)

    model, x = build(3), rows(0, 2, 5)
    call, seen = compiled(model, alone, Asked(Long()), capacity=24)
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-11, atol=1e-11)
    assert seen.site.form.startswith("2 requests along dimension 0 of the inputs")
    assert "of communication hidden" in seen.site.decision
    assert {name: seen.operators.count(name) for name in microbatch.EXCHANGE} == dict.fromkeys(microbatch.EXCHANGE, 6)
    assert seen.sent == [(12, 0), (12, 1)] * 3  # room and slots of their own; by turns, which is the same on every rank
    spans = seen.schedule["two micro-batches"]
    assert {s["row"] for s in spans} == {"compute", "comm"} and all(s["end_us"] >= s["start_us"] for s in spans)


def test_what_mixes_is_left_whole_with_the_line(alone: str) -> None:
    model, x = centred(), rows(0, 2, 5)
    with torch.no_grad():
        call, seen = compiled(model, alone, ALWAYS)
        torch.testing.assert_close(call(x), model(x), rtol=1e-11, atol=1e-11)
    site = seen.site
    assert not site.matched and site.refusal == "Mixes" and "reduces dimension 0, which counts requests" in site.reason
    assert site.source.startswith("passes/test_microbatch.py:") and seen.operators.count("dispatch_start") == 1


def test_training_is_left_whole(alone: str) -> None:
    call, seen = compiled(build(1), alone, ALWAYS)
    call(rows(0, 2, 5)).sum().backward()
    assert not seen.site.matched and seen.site.refusal == "InTraining"


def test_a_model_without_exchanges_has_nothing_to_hide() -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2))
    assert microbatch.run(graph, [], ALWAYS, training=False) is None


@pytest.mark.parametrize(
    ("x", "dynamic", "said"),
    [
        (rows(0, 3, 5), False, "the inputs have 3 along dimension 0"),
        (rows(0, 1, 5), False, "the inputs have 1 along dimension 0 of 'arg0_1'; 5 along dimension 1"),
        (rows(0, 2, 5), True, "the graph has symbolic sizes"),
    ],
)
def test_what_other_ranks_would_wait_for_is_an_error(alone: str, x: torch.Tensor, dynamic: bool, said: str) -> None:
    def backend(module: fx.GraphModule, inputs: list) -> Any:
        pipeline.run(module, inputs, ep=(alone, 32), microbatches=ALWAYS)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="ExchangeError") as raised:
        torch.compile(build(1), backend=backend, dynamic=dynamic)(x)
    assert said in str(raised.value) and "on every rank" in str(raised.value)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"microbatches": 2}, "ep_group is None"),
        ({"microbatches": 3, "ep_group": "world"}, "it must be 2, or None"),
        ({"microbatches": True, "ep_group": "world"}, "it must be 2, or None"),
        ({"microbatches": 2, "ep_group": "world", "reorder_for_locality": True}, "would move the start of an exchange"),
        ({"microbatches": 2, "enable": False}, "Leave one of the two out"),
    ],
)
def test_options_that_are_none(alone: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Config.of(None, options)


def test_options(alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.of(None, {"ep_group": "world"}).split() is None
    monkeypatch.setenv("DSINFRA_MICROBATCHES", "2")
    config = Config.of(None, {"ep_group": "world", "max_autotune": False})
    assert config.inductor == {"max_autotune": False, **microbatch.INDUCTOR}
    asked = config.split()
    assert asked.comm_sms == 24 and asked.overlap and asked.margin > 0
