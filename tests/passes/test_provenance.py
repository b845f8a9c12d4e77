"""What a site says of itself: its node, what was bound to each operand, and which calls the operator replaced."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dscompile.passes.record import Site
from tests.passes.toy import D, S, Toy, compile_passes, randn, stack, toy


def sites(module: Any, *inputs: torch.Tensor) -> list[Site]:
    call, reports = compile_passes(module)
    with torch.no_grad():
        call(*inputs)
    return [site for report in reports for site in report.sites]


def biased() -> Toy:
    layer = Toy(3)
    layer.b = torch.nn.Linear(layer.b.in_features, layer.b.out_features, dtype=torch.float64)
    return layer


def test_operands_are_the_models_own_values() -> None:
    (site,) = sites(Toy(), randn(2, S, D))
    weight = "l_self_modules_b_parameters_weight_: float64[44, 12]"
    assert site.bound["w_uk"] == site.bound["w_uv"] == weight
    assert site.bound["q_nope"] == "q_nope: float64[2, 4, 10, 6]", "not the views that were written for the operator"
    assert site.bound["latent"] == "latent: float64[2, 10, 12]"
    assert site.bound["causal"] == "True" and float(site.bound["scale"]) == pytest.approx(10**-0.5)
    assert "mask" not in site.bound


def test_the_region_is_what_nothing_reads_any_more() -> None:
    (site,) = sites(Toy(), randn(2, S, D))
    assert site.region[-1] == site.node == "o"
    assert {"linear_2", "cat", "cat_1", "v"} <= set(site.region), "up-projection, query and key as a whole, values"
    assert not {"q_nope", "latent", "linear", "linear_1"} & set(site.region), "these are still read"


def test_what_is_read_elsewhere_stays_out_of_the_region() -> None:
    def forward(self: Toy, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        return self.finish(q_nope, q_rope, k_nope, k_rope, v), v

    (site,) = sites(toy(forward=forward)(), randn(2, S, D))
    assert site.matched and not {"linear_2", "v"} & set(site.region) and "cat_1" in site.region


def test_buffers_filled_in_place_belong_to_it() -> None:
    def finish(self: Toy, q_nope, q_rope, k_nope, k_rope, v):  # type: ignore[no-untyped-def]
        k = k_nope.new_empty(*k_nope.shape[:3], 10)
        k[..., :6] = k_nope
        k[..., 6:] = k_rope
        o = self.attend(torch.cat([q_nope, q_rope], -1), k, v)
        return self.o(o.transpose(1, 2).flatten(2))

    (site,) = sites(toy(finish=finish)(), randn(2, S, D))
    assert site.matched and {"k", "setitem", "setitem_1"} <= set(site.region)


def test_a_write_to_an_input_is_never_part_of_it() -> None:
    def forward(self: Toy, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        kept.view(-1)[:1].copy_(v.flatten()[:1])
        return self.finish(q_nope, q_rope, k_nope, k_rope, v)

    (site,) = sites(toy(forward=forward)(), randn(2, S, D), randn(3))
    assert site.matched and not {"copy_", "v", "linear_2"} & set(site.region)


def test_a_body_is_named() -> None:
    changed = toy(forward=lambda self, x: checkpoint(lambda x: Toy.forward(self, x), x, use_reentrant=False))
    (site,) = sites(changed(), randn(2, S, D))
    body, _, name = site.node.partition("/")
    assert body.startswith("wrap_body") and name == site.region[-1]


def test_an_absorbed_site_keeps_what_was_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    from dscompile.passes import absorb

    monkeypatch.setattr(absorb.heuristics, "prefer_absorbed", lambda **sizes: (True, "as the test wants it"))
    (site,) = sites(Toy(), randn(2, S, D))
    assert site.decision.startswith("mla_decode") and site.bound["w_uk"].startswith("l_self_modules_b")
    assert site.node == "o" and set(site.predicted) == {"absorbed", "expanded"}
    assert all(seconds > 0 for seconds in site.predicted.values())


def test_a_refused_site_names_the_node_that_failed() -> None:
    refused = sites(stack(Toy, biased)(), randn(2, S, D))[1]
    assert refused.refusal == "UpProjectionBias" and refused.node == "linear_6"
    assert refused.bound == {} and refused.region == []


def test_the_record_is_json() -> None:
    found = [site.as_dict() for site in sites(stack(Toy, biased)(), randn(2, S, D))]
    assert json.loads(json.dumps(found)) == found
