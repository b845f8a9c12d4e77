"""The pass that quantises tokens before they are sent to FP8 experts: what it writes, shares and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.passes import fp8_dispatch, graph_copy
from dscompile.passes.quantize_weights import quantize_weight
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord
from dscompile.runtime import groups
from tests import ranks

OPS = torch.ops.dsinfra
T, D, F, E, K = 6, 256, 128, 4, 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a group of this process alone."""
    with ranks.alone(tmp_path_factory.mktemp("group")) as group:
        yield groups.join(group).name


class Spread(nn.Module):
    """`layers` expert layers over a group, of which `variant` names what is around the last."""

    def __init__(self, group: str, variant: str = "", layers: int = 1):
        super().__init__()
        self.where, self.variant, self.layers = (group, E, T, 0), variant, layers
        g = torch.Generator().manual_seed(0)
        weights = (torch.randn(E, 2 * F, D, generator=g) / 16, torch.randn(E, D, F, generator=g) / 11)
        for name, tensor in zip("abcd", [part for w in weights for part in quantize_weight(w)]):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, idx: Tensor, weight: Tensor) -> Any:
        beside, x = None, x + 0
        for _ in range(self.layers):
            x, beside = self.layer(x, idx, weight)
        return x, beside

    def layer(self, x: Tensor, idx: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        plan, inbox = OPS.dispatch_start(x, idx, weight, None, *self.where)
        beside = None
        if self.variant.startswith("shared"):
            if self.variant == "shared, written before":
                x.mul_(2)
            beside = OPS.quantize_1x128(x.view(2, -1, D).reshape(-1, D))[0].float()
        rows, ids, weights, arrived, _ = OPS.dispatch_wait(plan, inbox, x, idx, weight, None, *self.where)
        z = OPS.fp8_experts(rows, ids, weights, self.a, self.b, self.c, self.d, "silu")
        if self.variant == "rows are read twice":
            beside = torch.where((ids >= 0).any(1, keepdim=True), rows, 0).sum()
        back = OPS.combine_start(z, None, plan, arrived, *self.where)
        return OPS.combine_wait(back, z, None, plan, arrived, *self.where)[0], beside


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    idx = torch.rand(T, E, generator=g).topk(K).indices
    return [torch.randn(T, D, generator=g).bfloat16(), idx, torch.rand(T, K, generator=g)]


def passed(model: nn.Module, training: bool = False) -> tuple[PassRecord, list[str]]:
    """The record, and the names of our operators that have readers; the graph computes what the model does."""
    found: list[Any] = []

    def backend(module: fx.GraphModule, _: list) -> Any:
        copied = graph_copy.copied(module)[0]
        found.extend([fp8_dispatch.run(copied, training), copied])
        return copied.forward

    torch._dynamo.reset()
    with torch.no_grad():
        results = torch.compile(model, backend=backend, fullgraph=True)(*inputs())
        expected = model(*inputs())
    for actual, wanted in zip(results, expected, strict=True):
        assert wanted is None or torch.equal(actual, wanted)
    record, module = found
    return record, [operator_name(n) for n in module.graph.nodes if operator_name(n) and n.users]


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_rows_are_quantised_once_before_they_are_sent(alone: str, layers: int) -> None:
    record, names = passed(Spread(alone, layers=layers))
    assert [site.matched for site in record.sites] == [True] * layers
    said = f"rows travel in FP8, {D + 8} bytes each instead of {2 * D}"
    assert [site.decision for site in record.sites] == [said] * layers
    pairs = ["dispatch_start", "dispatch_wait", "fp8_experts", "combine_start", "combine_wait"]
    assert names == ["quantize_1x128", *pairs] * layers


@pytest.mark.parametrize(("variant", "count"), [("shared", 1), ("shared, written before", 2)])
def test_a_later_reader_of_the_same_values_shares_the_quantisation(alone: str, variant: str, count: int) -> None:
    record, names = passed(Spread(alone, variant))
    (site,) = record.sites
    assert site.matched and ("for 1 other reader too" in site.decision) == (count == 1)
    assert names.count("quantize_1x128") == count


@pytest.mark.parametrize(
    ("variant", "training", "refusal", "reason"),
    [
        ("rows are read twice", False, "Unsupported", "the rows that arrive are read by"),
        ("", True, "GradientWeights", "the graph is differentiated"),
    ],
)
def test_refused_and_left_in_16_bits(alone: str, variant: str, training: bool, refusal: str, reason: str) -> None:
    record, names = passed(Spread(alone, variant), training)
    (site,) = record.sites
    assert not site.matched and site.refusal == refusal and reason in site.reason
    assert "quantize_1x128" not in names
