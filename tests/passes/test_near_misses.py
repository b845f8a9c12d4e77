"""How far each proof came: facts in order, the form that was tried, and what is no site but worth a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from dscompile import explain
from dscompile.report import CompileReport, table
from tests.passes.toy import D, S, Toy, compile_passes, randn, stack, toy
from tests.zoo import by_name, fp8
from tests.zoo.experts import Layer, ToyExperts


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def report_of(module: Any, *inputs: Any) -> CompileReport:
    call, reports = compile_passes(module)
    call(*inputs)
    (report,) = reports
    return report


def zoo(name: str) -> CompileReport:
    example = by_name(name).example()
    return report_of(example.module, *example.calls[0])


SDPA = "attention by scaled_dot_product_attention"
WRITTEN_OUT = "attention written out around a softmax"
GROUPED = "an expert layer of products grouped by expert"

# closest form, the last fact that held, how many held, and the refusal.
REFUSED: dict[str, tuple[str, str, int, str]] = {
    "near_miss/softcap": (
        WRITTEN_OUT, "the softmax is multiplied with values, and nothing else reads it", 1, "NotBilinear",
    ),
    "near_miss/returned_weights": (WRITTEN_OUT, "", 0, "ProbabilitiesUsed"),
    "near_miss/sliding_window": (SDPA, "scores are scale * q.k + mask, without dropout", 1, "SlidingWindow"),
    "near_miss/up_projection_bias": (SDPA, "there are as many key heads as query heads", 3, "UpProjectionBias"),
    "near_miss/two_latents": (SDPA, "values are an up-projection of one latent", 4, "DifferentLatents"),
    "near_miss/per_head_rope_key": (
        SDPA, "keys are an up-projection of the same latent, behind or before shared columns", 5, "PerHeadRopeKey",
    ),
    "near_miss/capacity": (GROUPED, "", 0, "GroupEnds"),
    "near_miss/mean_of_experts": (GROUPED, "results are back in the order of the tokens", 6, "CombineForm"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_site_says_how_far_it_came(name: str) -> None:
    closest, last, count, refusal = REFUSED[name]
    report = zoo(name)
    (site,) = report.refused
    assert (site.closest, site.refusal, len(site.proved)) == (closest, refusal, count), site.proved
    assert (site.proved[-1] if site.proved else "") == last
    held = {0: "", 1: "; one fact held, the last: "}.get(count, f"; {count} facts held, the last: ")
    assert f"      closest  {closest}{held}{last}\n" in str(report)


MATCHED: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], dict[str, list[str]]]] = {
    "attention": (
        lambda: (Toy(), randn(2, S, D)),
        {
            "mla": [
                "scores are",
                "the mask is causal",
                "as many key heads",
                "values are",
                "keys are",
                "the other columns",
            ]
        },
    ),
    "experts": (
        lambda: (ToyExperts(Layer()).double(), randn(2, S, 24)),
        {
            "experts": ["second product", "silu", "gate and up", "tokens", "routing weight", "order", "summed"],
            "route": ["largest by softmax", "begin as the chosen scores"],
        },
    ),
}


@pytest.mark.parametrize("name", MATCHED)
def test_a_match_carries_its_proof_in_order(name: str) -> None:
    make, expected = MATCHED[name]
    module, x = make()
    report = report_of(module, x)
    for kind, facts in expected.items():
        (site,) = [s for s in report.sites if s.kind == kind]
        assert site.matched and site.closest
        shown = iter(site.proved)
        assert all(any(fact in proved for proved in shown) for fact in facts), site.proved
        assert "every operand can be read, unchanged" in site.proved[-1]
    assert "closest" not in str(report), "of a match the table shows its form"


def test_a_replayed_proof_has_the_same_facts() -> None:
    first, second = report_of(stack(Toy, lambda: Toy(1))(), randn(2, S, D)).sites
    assert first.proved == second.proved and len(first.proved) == 7


def test_symbolic_sizes_say_each_fact_once() -> None:
    x = randn(2, S, D)
    torch._dynamo.mark_dynamic(x, 1)
    (site,) = report_of(Toy(), x).sites
    assert len(site.proved) == len(set(site.proved)) == 7


def test_an_fp8_product_carries_its_proof() -> None:
    (site,) = report_of(fp8.ScaledLinear(256, 256), *fp8.rows(32, 256)).sites
    assert site.matched and site.closest == "a product of rows scaled by 1 x 128 and a weight by 128 x 128"
    shown = ["both operands are e4m3", "the result is rounded once"]
    shown += ["the recipe says blocks"] if fp8.TRACES_SCALED_MM else []
    assert all(any(p.startswith(fact) for p in site.proved) for fact in shown)


# ------------------------------------------------------------------ no sites


class Ranked(nn.Module):
    """A classifier that returns its two best classes; `scores` makes what they are chosen from."""

    def __init__(self, scores: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.head, self.scores = nn.Linear(D, 6, dtype=torch.float64), scores

    def forward(self, x: torch.Tensor) -> Any:
        value, index = self.scores(self.head(x)).topk(2)
        return value.log(), index, self.head(x).softmax(-1)


def test_a_topk_over_a_softmax_in_another_form_is_a_near_miss() -> None:
    report = report_of(Ranked(lambda y: y.softmax(-1) ** 2), randn(3, D))
    assert report.sites == []
    (near,) = report.near_misses
    assert (near.kind, near.refusal) == ("route", "RouterForm") and near.closest.startswith("a router")
    lines = str(report).splitlines()
    assert lines[1] == "  no attention, expert layer or FP8 layer found"
    assert lines[2].startswith("  near miss at passes/test_near_misses.py:") and "a router: scores, a top-k" in lines[2]
    assert lines[2].endswith("(RouterForm)") and "aten.pow" in lines[2]
    record = json.loads(json.dumps(report.as_dict()))
    assert [len(p["near_misses"]) for p in record["passes"] if p["name"] == "recognize_router"] == [1]


def test_others_stand_in_the_record_alone() -> None:
    """A sampler's top-k, and a classifier's softmax."""
    report = report_of(Ranked(lambda y: y.square()), randn(3, D))
    assert report.sites == [] == report.near_misses
    passed = {(s.kind, s.refusal) for r in report.records for s in r.passed_over}
    assert passed == {("route", "RouterForm"), ("mla", "NotAttention")}
    assert len(str(report).splitlines()) == 2


def test_equal_near_misses_share_a_line() -> None:
    report = report_of(Ranked(lambda y: y.softmax(-1) ** 2), randn(3, D))
    near = next(r for r in report.records if r.near_misses)
    near.near_misses *= 3
    assert sum("near miss (3 x) at" in line for line in table([report]).splitlines()) == 1


def test_strict_and_the_summary_count_sites_alone() -> None:
    from dscompile.backend import dsinfra

    torch._dynamo.reset()
    module = Ranked(lambda y: y.softmax(-1) ** 2)
    options = {"inner": "eager", "strict": True}
    torch.compile(module, backend=lambda gm, i: dsinfra(gm, i, options=options))(randn(3, D))


def test_trails_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any fact being kept, the same sites are lowered and refused for the same reasons."""
    from dscompile.passes.trail import Trail

    def attend(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True).tanh()

    model = stack(Toy, toy(attend=attend), lambda: Toy(2))()

    def decided() -> list[tuple]:
        torch._dynamo.reset()
        sites = explain(model, randn(2, S, D)).sites
        return [(s.matched, s.form, s.mask, s.refusal, s.reason, s.decision) for s in sites]

    before = decided()
    monkeypatch.setattr(Trail, "holds", lambda self, *facts: None)
    assert decided() == before
