"""Routers: every written form becomes `dsinfra::route`; what can't be shown stays, and other top-ks are passed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.passes.test_recognize_experts import only, sites, toy
from tests.passes.toy import compile_passes, randn, same_as_eager
from tests.zoo.experts import ToyExperts

E, D = 8, ToyExperts.D


class Routed(ToyExperts):
    """Eight experts; `route` is what the cases replace. Scores lie far apart, so that no rounding moves a choice."""

    E = 8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.linspace(-0.3, 0.4, 8).roll(3))


Router = Callable[[Routed, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def groups(choice: torch.Tensor, score: str, kept: int, fill: float, spread: str = "expand") -> torch.Tensor:
    """choice_TE with the experts outside the best `kept` of four groups set to `fill`."""
    grouped = choice.view(-1, 4, 2)
    if score == "top2":
        scores = grouped.topk(2, dim=-1)[0].sum(-1)
    else:
        scores = grouped.amax(-1) if score == "amax" else grouped.max(-1).values
    best = torch.topk(scores, kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(scores).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    return choice.masked_fill(~mask.bool(), fill)


def softmax(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).softmax(-1).topk(2)
    return idx, weight


def softmax_renormalised(self, x):  # type: ignore[no-untyped-def]
    weight, idx = torch.topk(F.softmax(self.router(x), dim=-1), 2, dim=-1)
    weight /= weight.sum(dim=-1, keepdim=True)
    return idx, weight * 1.5


def softmax_bias(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).softmax(-1)
    idx = (scores + self.bias.unsqueeze(0)).topk(2, sorted=False)[1]
    return idx, scores.gather(1, idx) * 2.5


def softmax_groups(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).softmax(-1)
    weight, idx = groups(scores, "max", 2, 0.0).topk(2, dim=-1, sorted=False)
    return idx, weight * 16.0


def sigmoid_bias_groups(self, x, fill=-math.inf, score="top2"):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    idx = groups(scores + self.bias, score, 2, fill).topk(2, sorted=False)[1]
    weight = scores.gather(-1, idx)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return idx, weight * 2.5


def softmax_of_chosen(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).topk(2)
    return idx, weight.softmax(1)


FORMS: dict[str, tuple[Router, str]] = {
    "softmax": (softmax, "softmax, top-2 of 8"),
    "softmax_renormalised": (softmax_renormalised, "softmax, top-2 of 8, renormalised, x 1.5"),
    "softmax_bias": (softmax_bias, "softmax + bias, top-2 of 8, x 2.5"),
    "softmax_groups": (softmax_groups, "softmax, top-2 of 8, 2 of 4 groups by max, x 16"),
    "sigmoid_bias_groups": (
        sigmoid_bias_groups,
        "sigmoid + bias, top-2 of 8, 2 of 4 groups by top2, renormalised, x 2.5",
    ),
    "zeroed_groups": (
        lambda self, x: sigmoid_bias_groups(self, x, 0.0),
        "sigmoid + bias, top-2 of 8, 2 of 4 groups by top2_zero, renormalised, x 2.5",
    ),
    "best_of_group": (
        lambda self, x: sigmoid_bias_groups(self, x, score="amax"),
        "sigmoid + bias, top-2 of 8, 2 of 4 groups by max, renormalised, x 2.5",
    ),
    "softmax_of_chosen": (softmax_of_chosen, "softmax_topk, top-2 of 8"),
}


def routed(route: Router) -> Callable[[], torch.nn.Module]:
    return toy(type("Changed", (Routed,), {"route": route}))


def router_of(reports: list) -> Any:
    (site,) = sites(reports, "route")
    return site


@pytest.mark.parametrize("lengths", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, lengths: bool) -> None:
    route, form = FORMS[name]
    calls = [(randn(2, n, D, seed=n),) for n in (7, 11)][: 1 + lengths]
    reports = same_as_eager(routed(route), *calls, lengths=lengths)
    site = router_of(reports)
    assert site.matched, site
    assert reports[0].op_counts == {"experts": 1, "route": 1}
    if lengths:  # a float is an input of a dynamic graph: the scale stays behind the operator
        form = form.split(", x ")[0]
        assert site.form.split(", x ")[0] == form
    else:
        assert site.form == form and site.kernel == "reference"


@pytest.mark.parametrize("name", FORMS)
def test_training(name: str) -> None:
    """Gradients of the router's weight, through what it gives the chosen experts, are eager's."""
    (report,) = same_as_eager(routed(FORMS[name][0]), train=True)
    assert report.op_counts == {"experts": 1, "route": 1}


def choice_without_gradient(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    with torch.no_grad():
        idx = groups(scores + self.bias, "top2", 2, -math.inf).topk(2, sorted=False)[1]
    return idx, scores.gather(-1, idx) * 2.5


def learned_bias(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    idx = (scores + self.router.weight[:, 0]).topk(2).indices
    return idx, scores.gather(-1, idx)


def detached_sum(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).softmax(-1).topk(2)
    return idx, weight / weight.sum(-1, keepdim=True).detach()  # stays behind the operator


@pytest.mark.parametrize("route", [choice_without_gradient, learned_bias, detached_sum], ids=lambda r: r.__name__)
def test_training_whose_choice_has_no_gradient(route: Router) -> None:
    (report,) = same_as_eager(routed(route), train=True)
    assert report.op_counts == {"experts": 1, "route": 1}


def counted_before(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    with torch.no_grad():
        idx = scores.topk(2)[1]
        self.bias.add_(F.one_hot(idx, 8).sum((0, 1)))
    return idx, scores.gather(-1, idx)


def test_training_that_counts_the_choice_first() -> None:
    """The operator stands where the weights are made, and the count in front of them must see the same choice."""
    reports = same_as_eager(routed(counted_before), train=True)
    site = router_of(reports)
    assert not site.matched and site.refusal == "IntermediateUsed"


def detached_scores(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    weight, idx = scores.detach().topk(2)
    return idx, weight


def weights_without_gradient(self, x):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        weight, idx = self.router(x).softmax(-1).topk(2)
    return idx, weight


def test_training_with_logits_changed_behind_the_router() -> None:
    """The operator keeps them for its backward, where eager keeps the softmax."""

    def route(self, x):  # type: ignore[no-untyped-def]
        logits = self.router(x)
        weight, idx = logits.softmax(-1).topk(2)
        logits.zero_()
        return idx, weight

    assert router_of(same_as_eager(routed(route), train=True)).refusal == "MutatedOperand"
    assert router_of(same_as_eager(routed(route))).matched


@pytest.mark.parametrize("route", [detached_scores, weights_without_gradient], ids=lambda r: r.__name__)
def test_training_without_the_gradient(route: Router) -> None:
    """Where the model cuts a gradient off, the operator would let it through."""
    reports = same_as_eager(routed(route), train=True)
    site = router_of(reports)
    assert not site.matched and "no gradient flows" in site.reason
    same_as_eager(routed(route))


def test_three_dimensional_logits() -> None:
    """Logits [B, S, E]: the operator sees them as [T, E], its results are seen as [B, S, K]."""

    class Apart(Routed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, idx = self.router(x).softmax(-1).topk(2)
            y = self.experts(x.reshape(-1, D), idx, weight / weight.sum(-1, keepdim=True))
            return y.view(x.shape)

    (report,) = same_as_eager(toy(Apart), lengths=True)
    assert report.op_counts == {"experts": 1, "route": 1}


def test_logits_and_loads_may_leave() -> None:
    """Logits, scores and the chosen experts are still there for an auxiliary loss or a load counter."""

    class Loads(Routed):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = x.reshape(-1, D)
            logits = self.router(x)
            scores = logits.softmax(-1)
            weight, idx = scores.topk(2)
            load = F.one_hot(idx, E).sum((0, 1))
            return self.experts(x, idx, weight), logits, scores, idx, load

    (report,) = same_as_eager(toy(Loads))
    assert report.op_counts == {"experts": 1, "route": 1, "softmax": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_cast_behind_the_operator(dtype: torch.dtype) -> None:
    def route(self, x):  # type: ignore[no-untyped-def]
        weight, idx = self.router(x).softmax(-1, dtype=torch.float32).topk(2)
        weight /= weight.sum(-1, keepdim=True)
        return idx, weight.to(x.dtype)

    module, x = routed(route)().to(dtype), randn(2, 6, D).to(dtype)
    compiled, reports = compile_passes(module)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=2e-2, atol=2e-2)
    assert router_of(reports).matched and reports[0].op_counts == {"experts": 1, "route": 1}


def test_noise_on_logits_is_kept() -> None:
    """The choice is made from whatever logits there are."""

    def route(self, x):  # type: ignore[no-untyped-def]
        logits = self.router(x)
        return softmax_from(logits + torch.linspace(0, 1, E, dtype=x.dtype).exp().roll(1))

    def softmax_from(logits):  # type: ignore[no-untyped-def]
        weight, idx = logits.softmax(-1).topk(2)
        return idx, weight

    assert router_of(same_as_eager(routed(route))).matched


# ------------------------------------------------------------------ near misses


def _noisy(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).softmax(-1) * torch.linspace(0.9, 1.1, E, dtype=x.dtype)
    weight, idx = scores.topk(2)
    return idx, weight


def _biased_weights(self, x):  # type: ignore[no-untyped-def]
    weight, idx = (self.router(x).sigmoid() + self.bias).topk(2)
    return idx, weight


def _row_bias(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    idx = (scores + scores.detach().roll(1, 0) * 0.5).topk(2)[1]
    return idx, scores.gather(1, idx)


def _smallest(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).softmax(-1).topk(2, largest=False)
    return idx, weight


def _over_tokens(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).softmax(0).topk(2)
    return idx, weight


def _foreign_scores(self, x):  # type: ignore[no-untyped-def]
    logits = self.router(x)
    idx = logits.softmax(-1).topk(2)[1]
    return idx, logits.sigmoid().gather(1, idx)


def _tanh(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).tanh().topk(2)
    return idx, weight


def _no_softmax(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).topk(2)
    return idx, weight.exp()


def _other_groups(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    limited = groups(scores, "top2", 2, -math.inf)
    biased = groups(scores + self.bias, "top2", 2, -math.inf)
    idx = torch.where(torch.isinf(biased), biased, limited).topk(2)[1]
    return idx, scores.gather(1, idx)


def _interleaved_groups(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).softmax(-1)
    best = scores.view(-1, 2, 4).amax(1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter_(1, best, 1)
    mask = mask.unsqueeze(1).expand(-1, 2, 4).reshape(-1, 8)
    weight, idx = scores.masked_fill(~mask.bool(), -math.inf).topk(2)
    return idx, weight


def _worst_groups(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).softmax(-1)
    worst = scores.view(-1, 4, 2).amax(-1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter_(1, worst, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    weight, idx = scores.masked_fill(mask.bool(), -math.inf).topk(2)
    return idx, weight


def _other_mean(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).softmax(-1)
    best = scores.view(-1, 4, 2).mean(-1).topk(2, dim=-1)[1]
    mask = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    weight, idx = scores.masked_fill(~mask.bool(), -math.inf).topk(2)
    return idx, weight


REFUSED: dict[str, tuple[Router, str]] = {
    "scaled_scores": (_noisy, "RouterForm"),
    "biased_weights": (_biased_weights, "RouterForm"),
    "bias_by_token": (_row_bias, "RouterForm"),
    "smallest": (_smallest, "RouterForm"),
    "softmax_over_tokens": (_over_tokens, "RouterForm"),
    "weights_of_other_scores": (_foreign_scores, "RouterForm"),
    "tanh": (_tanh, "RouterForm"),
    "exponential_of_chosen": (_no_softmax, "RouterForm"),
    "groups_of_two_kinds": (_other_groups, "RouterForm"),
    "interleaved_groups": (_interleaved_groups, "RouterForm"),
    "worst_groups": (_worst_groups, "RouterForm"),
    "groups_by_mean": (_other_mean, "RouterForm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses(name: str) -> None:
    route, refusal = REFUSED[name]
    reports = same_as_eager(routed(route))
    site = router_of(reports)
    assert (site.matched, site.refusal) == (False, refusal), site
    assert "test_recognize_router.py:" in site.source
    assert only(reports).matched, "the experts behind it need no proof of their router"


@pytest.mark.parametrize("value", ["unscaled", "values"])
def test_values_in_the_order_of_the_choice_are_not_split(value: str) -> None:
    """A second value in top-k order beside the replaced ones: its order could differ from the operator's."""

    class Twice(Routed):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x.reshape(-1, D)
            scores = self.router(x).sigmoid()
            values, idx = (scores + self.bias).topk(2, sorted=False)
            unscaled = scores.gather(1, idx)
            weight = unscaled / unscaled.sum(-1, keepdim=True)
            return self.experts(x, idx, weight), {"unscaled": unscaled, "values": values}[value]

    reports = same_as_eager(toy(Twice))
    site = router_of(reports)
    if value == "values":
        assert site.refusal == "IntermediateUsed", site
    else:  # the weights before renormalisation are the operator's, the quotient stays
        assert site.matched and "renormalised" not in site.form


@pytest.mark.parametrize("when", ["before", "behind"])
def test_weights_changed_in_place(when: str) -> None:
    class Changed(Routed):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x.reshape(-1, D)
            weight, idx = self.router(x).softmax(-1).topk(2)
            if when == "before":
                weight.mul_(2).add_(0.25)
            y = self.experts(x, idx, weight)
            if when == "behind":
                weight.mul_(2)
                idx.add_(1)
            return y, weight, idx

    same_as_eager(toy(Changed))


def test_other_top_ks_are_passed_over() -> None:
    """A sampler's top-k and an indexer's are neither rewritten nor reported."""

    class Sampler(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values, idx = x.tanh().topk(3)
            return values.softmax(-1), idx, x.softmax(-1)

    (report,) = same_as_eager(Sampler)
    assert report.op_counts == {"softmax": 2} and not report.sites
