"""Loops over experts, over chosen tokens or all, each expert a slice of one weight or with parameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.test_recognize_experts import only, toy
from tests.passes.toy import randn, same_as_eager

D, W, E, K = 24, 20, 4, 2


@pytest.fixture(autouse=True)
def rows_of_an_expert() -> Iterator[None]:
    """How many rows an expert has is known at run time: Dynamo captures it with this setting or `fullgraph=True`."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


class Own(nn.Module):
    """An expert with parameters of its own."""

    def __init__(self, bias: bool = False, fused: bool = False):
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(D, 2 * W, bias)
        else:
            self.gate, self.up = nn.Linear(D, W, bias), nn.Linear(D, W, bias)
        self.down = nn.Linear(W, D, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Slice(nn.Module):
    """An expert that is a slice of weights which all share."""

    def __init__(self, layer: nn.Module, e: int):
        super().__init__()
        self.layer, self.e = [layer], e

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self.layer
        gate, up = F.linear(x, layer.w_gate_up[self.e]).chunk(2, -1)
        return (F.silu(gate) * up) @ layer.w_down[self.e]


class Loop(nn.Module):
    """`forward(x_BSD) -> y_BSD`; `term` is what the cases replace."""

    def __init__(self, over: str = "chosen", make: Callable[[], nn.Module] | None = Own):
        super().__init__()
        self.over, self.router = over, nn.Linear(D, E, bias=False)
        if make is None:
            self.w_gate_up = nn.Parameter(torch.randn(E, 2 * W, D) / 5)
            self.w_down = nn.Parameter(torch.randn(E, W, D) / 5)
            self.experts = nn.ModuleList(Slice(self, e) for e in range(E))
        else:
            self.experts = nn.ModuleList(make() for _ in range(E))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x = x_BSD.reshape(-1, D)
        weight, idx = self.router(x).softmax(-1).topk(K)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = self.term(y, x, weight, idx, e, expert)
        return y.view(x_BSD.shape)

    def term(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
        if self.over == "all":
            return y + expert(x) * (weight * (idx == e)).sum(-1, keepdim=True)
        if self.over == "all_in_place":
            y += (weight * (idx == e).to(weight.dtype)).sum(-1).unsqueeze(-1) * expert(x)
            return y
        t, k = torch.where(idx == e)
        return y.index_add_(0, t, expert(x[t]) * weight[t, k, None])


MAKE: dict[str, Callable[[], nn.Module] | None] = {
    "own": Own,
    "own_bias": partial(Own, True),
    "own_fused": partial(Own, False, True),
    "slices": None,
}
OVER = ("chosen", "all", "all_in_place")


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
@pytest.mark.parametrize("over", OVER)
def test_inference(over: str, make: Callable[[], nn.Module] | None) -> None:
    (report,) = same_as_eager(toy(partial(Loop, over, make)), (randn(2, 6, D),))
    assert report.op_counts == {"experts": 1, "route": 1}, report
    assert only([report]).form.startswith("loop over experts")
    assert ("stacked once" in only([report]).decision) == (make is not None)


class Sigmoid(Loop):
    """Routed without a softmax, so that nothing but the loop itself asks for an analysis."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x = x_BSD.reshape(-1, D)
        weight, idx = self.router(x).sigmoid().topk(K)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = self.term(y, x, weight, idx, e, expert)
        return y.view(x_BSD.shape)


def test_a_loop_in_a_graph_without_softmax() -> None:
    found = same_as_eager(toy(partial(Sigmoid, "all", None)), (randn(2, 3, D),))
    assert {s.kind for r in found for s in r.sites if s.matched} == {"experts", "route"}


@pytest.mark.parametrize("over", OVER)
def test_training_of_slices(over: str) -> None:
    (report,) = same_as_eager(toy(partial(Loop, over, None)), (randn(2, 6, D),), train=True)
    assert report.op_counts.get("experts") == 1


@pytest.mark.parametrize("over", OVER)
def test_training_of_own_parameters_is_refused(over: str) -> None:
    site = only(same_as_eager(toy(partial(Loop, over)), (randn(2, 6, D),), train=True))
    assert site.refusal == "ExpertsApart" and "one parameter" in site.hint


@pytest.mark.parametrize("over", ["chosen", "all"])
def test_lengths(over: str) -> None:
    calls = [(randn(2, n, D, seed=n),) for n in (6, 9)]
    reports = same_as_eager(toy(partial(Loop, over, None)), *calls, lengths=True)
    assert len(reports) == 1 and only(reports).matched


class Zero(nn.Module):
    """An expert that returns its tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class WithZeros(Loop):
    """The last two of six experts return their tokens, as LongCat's do."""

    def __init__(self, over: str, first: bool = False):
        super().__init__(over)
        self.router = nn.Linear(D, E + 2, bias=False)
        zeros, own = [Zero(), Zero()], list(self.experts)
        self.experts = nn.ModuleList(zeros + own if first else own + zeros)


@pytest.mark.parametrize("over", OVER)
def test_experts_that_return_their_tokens(over: str) -> None:
    reports = same_as_eager(toy(partial(WithZeros, over)), (randn(2, 6, D),))
    assert "E 4 and 2 that return their tokens" in only(reports).form
    assert reports[0].op_counts == {"experts": 1, "route": 1}
    assert only(same_as_eager(toy(partial(WithZeros, over, True)))).refusal == "ExpertActivation"


# ------------------------------------------------------------------ near misses


def _skips_one(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return y if e == 1 else Loop.term(self, y, x, weight, idx, e, expert)


def _one_twice(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    y = Loop.term(self, y, x, weight, idx, e, expert)
    return Loop.term(self, y, x, weight, idx, 2, expert) if e == 3 else y


def _other_weights(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return Loop.term(self, y, x, weight * 2 if e == 2 else weight, idx, e, expert)


def _other_tokens(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return Loop.term(self, y, x.roll(1, 0) if e == 2 else x, weight, idx, e, expert)


def _other_activation(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    network = (lambda r: expert.down(F.gelu(expert.gate(r)) * expert.up(r))) if e == 1 else expert
    return Loop.term(self, y, x, weight, idx, e, network)


def _partial_sum_used(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    y = Loop.term(self, y, x, weight, idx, e, expert)
    return y * 1.5 if e == 1 else y


def _starts_at_tokens(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return Loop.term(self, x.clone() if e == 0 else y, x, weight, idx, e, expert)


def _unweighted(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return y + expert(x) * (idx == e).sum(-1, keepdim=True)


def _best_choice(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return y + expert(x) * (weight * (idx == e)).amax(-1, keepdim=True).sqrt()


def _wrong_rows(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    t, k = torch.where(idx == e)
    return y.index_add_(0, t, expert(x[k]) * weight[t, k, None])


def _first_weight(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    t, k = torch.where(idx == e)
    return y.index_add_(0, t, expert(x[t]) * weight[t, k * 0, None])


def _halved(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    t, k = torch.where(idx == e)
    return y.index_add_(0, t, expert(x[t]) * weight[t, k, None], alpha=0.5)


def _no_product_last(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    return Loop.term(self, y, x, weight, idx, e, lambda r: expert(r).tanh())


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "skips_one": (_skips_one, "RowsNotTokens"),
    "one_twice": (_one_twice, "CombineForm|RowsNotTokens|RoutingWeights"),
    "other_weights": (_other_weights, "RoutingWeights"),
    "other_tokens": (_other_tokens, "ExpertActivation"),
    "other_activation": (_other_activation, "ExpertActivation"),
    "partial_sum_used": (_partial_sum_used, "CombineForm"),
    "starts_at_tokens": (_starts_at_tokens, "CombineForm"),
    "unweighted": (_unweighted, "RoutingWeights"),
    "best_choice": (_best_choice, "RoutingWeights"),
    "wrong_rows": (_wrong_rows, "RowsNotTokens"),
    "first_weight": (_first_weight, "RoutingWeights"),
    "halved": (_halved, "CombineForm"),
    "no_product_last": (_no_product_last, "ExpertActivation"),
}


@pytest.mark.parametrize("over", ["chosen", "all"])
@pytest.mark.parametrize("name", REFUSED)
def test_near_misses(name: str, over: str) -> None:
    term, refusal = REFUSED[name]
    site = only(same_as_eager(toy(partial(type("Changed", (Loop,), {"term": term}), over)), (randn(2, 6, D),)))
    assert not site.matched and site.refusal in refusal.split("|"), site
