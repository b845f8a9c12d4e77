"""Experts that return their tokens in layers of products, and one choice a token without a gather."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dscompile.lowering.ops import experts
from tests.passes.test_recognize_experts import Given, only, toy
from tests.passes.toy import randn, same_as_eager
from tests.zoo.experts import Layer, OneChoice, ReturningExperts, ToyExperts

D = ToyExperts.D

RETURNING = {
    "where": (Layer(), "where"),
    "within": (Layer(unsort="index_add"), "within"),
    "bias": (Layer(bias=True), "where"),
    "apart": (Layer(weights="apart", top_k=1), "where"),
    "batched": (Layer(products="batched", weigh="bmm"), "within"),
    "masked": (Layer(), "masked"),
    "masked_batched": (Layer(products="batched", stored="in_out"), "masked"),
}


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", RETURNING)
def test_experts_that_return_their_tokens(form: str, train: bool) -> None:
    layer, how = RETURNING[form]
    make = toy(partial(ReturningExperts, layer, how))  # type: ignore[arg-type]
    site = only(same_as_eager(make, (randn(2, 7, D),), train=train))
    assert site.matched, site
    assert how == "masked" or "later ids return their tokens" in site.form


@pytest.mark.parametrize("how", ["where", "masked"])
def test_no_product_is_made_for_ids_that_return_their_tokens(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator gets the router's ids, of which those past the last expert have no rows in any product."""
    seen = []
    monkeypatch.setattr(experts, "debug_checks", True)
    monkeypatch.setattr(experts, "check_values", lambda op, ids, count: seen.append((ids.clone(), count)))
    make = toy(partial(ReturningExperts, Layer(products="batched"), how))  # type: ignore[arg-type]
    assert only(same_as_eager(make, (randn(2, 7, D),))).matched
    ((ids, count),) = seen
    assert count == ToyExperts.E and bool((ids >= count).any())


class Others(ReturningExperts):
    """The rows that are returned are those of the token before."""

    def returned(self, rows: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().returned(rows.roll(1, 0), z, ids)


class Bound(ReturningExperts):
    """The last expert's rows are returned, too, though it has weights."""

    def returned(self, rows: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids >= self.E - 1).unsqueeze(-1), rows, z)


class Turned(ReturningExperts):
    """Rows of experts are returned, those of none computed."""

    def returned(self, rows: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids < self.E).unsqueeze(-1), rows, z)


class Twice(ReturningExperts):
    """What is returned is scaled."""

    def returned(self, rows: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().returned(rows * 2, z, ids)


REFUSED = {Others: "RowsNotTokens", Bound: "CombineForm", Turned: "CombineForm", Twice: "RoutingWeights"}


@pytest.mark.parametrize("wrong", REFUSED)
def test_near_misses_of_returned_tokens(wrong: type[ReturningExperts]) -> None:
    site = only(same_as_eager(toy(partial(wrong, Layer(products="batched"))), (randn(2, 7, D),)))
    assert not site.matched and site.refusal == REFUSED[wrong], site


def test_a_mask_over_columns_is_none_over_rows() -> None:
    """As many rows as columns: a mask of one dimension zeroes columns."""

    class Columns(Given):
        def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
            return super().mlp(rows, product, ids).masked_fill(ids >= self.E, 0.0)

    idx = torch.arange(D).reshape(-1, 2) % (Columns.E + 1)
    call = (randn(D // 2, D), idx, randn(D // 2, 2, seed=3))
    assert only(same_as_eager(toy(Columns), call)).refusal == "CombineForm"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("products", ["grouped", "batched"])
def test_one_choice_without_a_gather(products: str, scaled: bool, train: bool) -> None:
    form = Layer(top_k=1, products=products)  # type: ignore[arg-type]
    site = only(same_as_eager(toy(partial(OneChoice, form, scaled)), train=train))
    assert site.matched and "top-1" in site.form, site


def test_scaled_rows_of_several_choices_are_no_tokens() -> None:
    class Scaled(ToyExperts):
        def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ids, rows = idx.reshape(-1), x.repeat_interleave(2, 0) * weight.reshape(-1, 1)
            return self.combine(self.mlp(rows, self.by_row(ids), ids), torch.ones_like(weight), None, x)

    assert only(same_as_eager(toy(partial(Scaled, Layer(products="batched"))))).refusal == "RoutingWeights"


class Shared(nn.Module):
    """LongCat's own weights: more entries of the first product's than experts that have a second one."""

    E, Z, W = 4, 2, 20

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, self.E + self.Z, bias=False)
        self.w_gate_up = nn.Parameter(torch.randn(self.E + self.Z, 2 * self.W, D) / 5)
        self.w_down = nn.Parameter(torch.randn(self.E, D, self.W) / 5)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x = x_BSD.reshape(-1, D)
        weight, idx = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for e in range(self.E + self.Z):
            t, k = torch.where(idx == e)
            z = x[t]
            if e < self.E:
                gate, up = F.linear(z, self.w_gate_up[e]).chunk(2, -1)
                z = F.linear(F.silu(gate) * up, self.w_down[e])
            y = y.index_add(0, t, z * weight[t, k, None])
        return y.view(x_BSD.shape)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_loop_over_more_weights_than_products(train: bool) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        site = only(same_as_eager(toy(Shared), (randn(2, 6, D),), train=train))
    assert site.matched and "E 4 and 2 that return their tokens" in site.form, site
