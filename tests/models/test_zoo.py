"""Every zoo case by hand: right numbers, the expected sites, nothing else, and no more graphs than needed.

The cells of the matrix have tests of their own, in `test_matrix.py`.
"""

from __future__ import annotations

import re

import pytest

from tests.models import harness
from tests.models.harness import FLOAT32_BAR, Outcome, attention_ops, refusal_text, relative_errors, run_case
from tests.zoo import CASES, ZooCase


def check_numbers(case: ZooCase, outcome: Outcome) -> None:
    """A compiled float32 run agrees with the reference; under autocast, it is no further off than twice eager."""
    if case.random:
        return
    errors = relative_errors(outcome.output, outcome.reference)
    if case.autocast is None:
        bars = dict.fromkeys(errors, FLOAT32_BAR)
    else:
        typical = relative_errors(outcome.eager, outcome.reference)
        largest = max(typical.values())
        bars = {name: 2 * max(own, 0.25 * largest) for name, own in typical.items()}
    off = {name: error for name, error in errors.items() if not error <= bars[name]}
    assert not off, f"relative errors beyond the bar: {off}"


def check_graphs(case: ZooCase, outcome: Outcome) -> None:
    """Sites, operators and leftovers of each graph are those expected."""
    assert 1 <= outcome.graphs <= case.graphs
    assert len(outcome.sites) == outcome.graphs, "one report for each graph"
    if case.sites is None:
        return
    for sites, counts in zip(outcome.sites, outcome.counts, strict=True):
        assert sum(site.matched for site in sites) == case.sites, [refusal_text(s) for s in sites if not s.matched]
        assert attention_ops(counts) == case.sites
        if case.refusal is None:
            assert counts.get("scaled_dot_product_attention", 0) == 0
            assert counts.get("softmax", 0) == case.router_softmaxes


def check_layers(case: ZooCase, outcome: Outcome) -> None:
    """Expert layers and routers are lowered, or refused as expected, and no product by expert is left of the former."""
    for layers, counts in zip(outcome.layers, outcome.counts, strict=True):
        refused = [refusal_text(site) for site in layers if not site.matched]
        assert (counts.get("experts", 0), counts.get("route", 0)) == (case.experts, case.routers), (counts, refused)
        assert [site.kind for site in layers if site.matched].count("experts") == case.experts
        if case.refusal is None:
            assert not refused and not counts.get("grouped_mm", 0), refused


def check_refusals(case: ZooCase, outcome: Outcome) -> None:
    """The expected refusal is reported with its reason and a source line; an expected match is not refused."""
    refused = [*outcome.refusals, *(site for layers in outcome.layers for site in layers if not site.matched)]
    texts = [refusal_text(site) for site in refused]
    if case.refusal is None:
        assert case.sites is None or not texts, texts
        return
    assert any(re.search(case.refusal, text) for text in texts), f"no {case.refusal} among {texts}"
    for site in refused:
        assert re.search(r"\.py:\d+", site.source), f"no source line: {site.source!r}"


@pytest.mark.parametrize("case", [c for c in CASES.values() if "matrix" not in c.tags], ids=lambda case: case.name)
def test_case(case: ZooCase) -> None:
    outcome = run_case(case)
    check_numbers(case, outcome)
    if harness.BACKEND == "dsinfra":
        check_graphs(case, outcome)
        check_layers(case, outcome)
        check_refusals(case, outcome)
    else:
        assert 1 <= outcome.graphs <= case.graphs
