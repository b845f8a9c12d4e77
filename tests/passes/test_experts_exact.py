"""Expert layers and routers one argument away from the written forms: rewritten to the same numbers, or left as is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.test_experts_loop import Loop
from tests.passes.test_recognize_experts import only, toy
from tests.passes.test_recognize_router import routed, router_of
from tests.passes.toy import randn, same_as_eager
from tests.zoo.experts import LEFT_ALONE, Layer, ToyExperts

D = ToyExperts.D


class Given(ToyExperts):
    def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.experts(x, idx, weight)


def given(idx: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """x_TD, ids and weights of `Given`."""
    return randn(len(idx), D), torch.tensor(idx), randn(len(idx), len(idx[0]), seed=3)


# ------------------------------------------------------------------ ids


@pytest.mark.parametrize("bias", [False, True])
def test_ids_below_zero_index_from_the_end(bias: bool) -> None:
    layer = Layer(products="batched", bias=bias)
    assert only(same_as_eager(toy(partial(Given, layer)), given([[0, -1], [4, 2], [-1, -2], [3, 0]]))).matched


def test_a_clamp_raises_ids_below_zero() -> None:
    class Clamped(Given):
        def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return self.experts(x, idx.clamp(max=4).clamp(0, 4), weight)

    assert only(same_as_eager(toy(Clamped), given([[0, -1], [4, 2], [-1, -2], [3, 0]]))).matched


def test_bins_of_one_expert() -> None:
    """Both edges 0: `histc` takes those of the ids."""

    class One(Given):
        E = 1

    reports = same_as_eager(toy(partial(One, Layer(top_k=1))), given([[0], [1], [0], [1]]))
    assert only(reports).refusal == "GroupEnds"


def test_ids_sorted_by_others() -> None:
    class Others(Given):
        def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return self.experts(x, idx, weight)

        def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
            order = torch.argsort(idx_TK.flip(0).reshape(-1))
            return torch.searchsorted(idx_TK.reshape(-1)[order], torch.arange(self.E), right=True).int()

    assert only(same_as_eager(toy(Others), given([[0, 1], [4, 2], [1, 3], [3, 0]]))).refusal == "GroupEnds"


# ------------------------------------------------------------------ experts


class RepeatedInFront(ToyExperts):
    """M == D: an index repeated over rows has the shape of one repeated over columns."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        z = z * weight_TK.reshape(-1)[perm].unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, (perm // 2).expand(D, D), z)


class SummedOverNothing(ToyExperts):
    def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
        counts = torch.histc(ids_M.double(), bins=self.E, min=0, max=self.E - 1)
        return counts.unsqueeze(0).cumsum(0, dtype=torch.int32).squeeze(0)


class OtherBits(ToyExperts):
    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        h = (F.silu(gate) * up).to(torch.bfloat16)
        return h.view(torch.float16).to(gate.dtype)


class Quantised(ToyExperts):
    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (F.silu(gate) * up).to(torch.float8_e4m3fn).to(gate.dtype)


@pytest.mark.parametrize("make", [RepeatedInFront, SummedOverNothing, OtherBits, Quantised])
def test_near_misses(make: type[ToyExperts]) -> None:
    reports = same_as_eager(toy(make), (randn(2, 6, D),))
    assert not any(s.matched for r in reports for s in r.sites if s.kind == "experts")


def test_split_without_gradient() -> None:
    class Split(ToyExperts):
        def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
            both = product(rows, self.w_gate_up)
            with torch.no_grad():
                gate, up = both.chunk(2, -1)
            return product(F.silu(gate) * up, self.w_down)

    assert "gradient" in only(same_as_eager(toy(Split), train=True, inner=LEFT_ALONE)).reason


# ------------------------------------------------------------------ loops


def _weights_of_all(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        scale = (weight * (idx == e)).sum(-1, keepdim=True)
    return y + expert(x) * scale


def _weights_of_chosen(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    t, k = torch.where(idx == e)
    with torch.no_grad():
        scale = weight[t, k]
    return y.index_add(0, t, expert(x[t]) * scale[:, None])


def _partial_sum(self, y, x, weight, idx, e, expert):  # type: ignore[no-untyped-def]
    z = expert(x) * (weight * (idx == e)).sum(-1, keepdim=True)
    with torch.set_grad_enabled(e != 1 and torch.is_grad_enabled()):
        return y + z


@pytest.mark.parametrize("term", [_weights_of_all, _weights_of_chosen, _partial_sum])
def test_loop_without_gradient(term: Callable[..., Any]) -> None:
    changed = type("Changed", (Loop,), {"term": term})
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        site = only(same_as_eager(toy(partial(changed, "all", None)), (randn(2, 6, D),), train=True))
    assert not site.matched and "gradient" in site.reason


def test_loop_summed_wider_than_its_tokens() -> None:
    class Wide(Loop):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, idx = self.router(x).softmax(-1).topk(2)
            y, weight = torch.zeros_like(x, dtype=torch.float64), weight.double()
            for e, expert in enumerate(self.experts):
                y = y + expert(x).double() * (weight * (idx == e)).sum(-1, keepdim=True)
            return y

    def make() -> nn.Module:
        return toy(partial(Wide, "all", None))().float()

    assert only(same_as_eager(make, (randn(6, D).float(),), rtol=1e-6)).refusal == "NarrowedPrecision"


# ------------------------------------------------------------------ routers


def _two_worst(self, x):  # type: ignore[no-untyped-def]
    scores = self.router(x).sigmoid()
    of_group = scores.view(-1, 2, 4).topk(2, dim=-1, largest=False)[0].sum(-1)
    mask = torch.zeros_like(of_group).scatter_(1, of_group.topk(1, dim=-1)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 2, 4).reshape(-1, 8)
    weight, idx = scores.masked_fill(~mask.bool(), -math.inf).topk(2)
    return idx, weight


def _scaled_eps(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).softmax(-1).topk(2)
    return idx, weight / torch.add(weight.sum(-1, keepdim=True), 0.5, alpha=2)


def _whole_sum(self, x):  # type: ignore[no-untyped-def]
    weight, idx = self.router(x).sigmoid().topk(2)
    return idx, weight / (weight.sum(-1, keepdim=True, dtype=torch.int64) + 0.5)


@pytest.mark.parametrize("route", [_two_worst, _scaled_eps, _whole_sum])
def test_routers(route: Callable[..., Any]) -> None:
    site = router_of(same_as_eager(routed(route)))
    assert not site.matched or "renormalised" not in site.form and "groups" not in site.form


class Widened(nn.Module):
    """float32 logits, of which a part is computed in float64."""

    def __init__(self, where: str):
        super().__init__()
        self.where, self.router = where, nn.Linear(D, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, where = self.router(x), self.where
        if where == "softmax":
            weight, idx = logits.topk(2)
            return weight.softmax(-1, dtype=torch.float64), idx
        logits = logits.double() if where == "logits" else logits
        scores = logits.softmax(-1).double() if where == "scores" else logits.softmax(-1)
        weight, idx = scores.topk(2)
        return weight / weight.sum(-1, keepdim=True, dtype=torch.float64), idx


@pytest.mark.parametrize("where", ["logits", "scores", "sum", "softmax"])
def test_routers_in_float64(where: str) -> None:
    (report,) = same_as_eager(lambda: toy(partial(Widened, where))().float(), (randn(12, D).float(),))
    assert "route" not in report.op_counts
