"""When a cell of the matrix is right: its numbers, its sites, its graphs. Used by the tests and by `bench zoo`."""

from __future__ import annotations

import re

import torch

from tests.models import harness
from tests.models.harness import (
    FLOAT32_BAR,
    Outcome,
    captured_without_us,
    continued_error,
    median_token_error,
    relative_errors,
)
from tests.zoo.matrix import Cell

KINDS = ("mla", "experts", "route", "fp8_linear", "fp8_experts", "rotation")
OPERATORS = {
    "mla": ("mla", "mla_decode"),
    "experts": ("experts", "moe_plan"),
    "route": ("route",),
    "fp8_experts": ("fp8_experts",),
}


def check(cell: Cell, outcome: Outcome) -> None:
    """Everything that must hold for a cell.

    Raises:
        AssertionError: something doesn't; the message says what was found.
    """
    check_numbers(cell, outcome)
    # On a GPU transformers writes the experts of decode steps in other forms.
    if harness.BACKEND == "dsinfra" and not cell.case.name.endswith("/true"):
        check_sites(cell, outcome)
    check_graphs(cell, outcome)


def check_numbers(cell: Cell, outcome: Outcome) -> None:
    """In float32 every result is within the bar; in half precision and FP8 none is twice as far off as eager's."""
    if cell.case.precision.working is torch.float32:
        found = relative_errors(outcome.output, outcome.reference)
        off = {name: error for name, error in found.items() if not error <= FLOAT32_BAR}
        assert not off, f"relative errors beyond the bar: {off}"
        return
    ours, eager = errors(cell, outcome)
    assert ours <= 2 * eager, f"{ours:.2e} from float32, eager is {eager:.2e}"
    if cell.case.mode == "generate":
        return
    found, own = (relative_errors(run, outcome.reference) for run in (outcome.output, outcome.eager))
    if cell.case.mode != "train":
        found = {name: error for name, error in found.items() if not name.startswith("call")}
    # A result that eager happens to hit exactly is held to a quarter of eager's worst.
    off = {n: (e, own[n]) for n, e in found.items() if not e <= 2 * max(own[n], max(own.values()) / 4)}
    assert not off, f"further from float32 than twice eager's: {off}"


def errors(cell: Cell, outcome: Outcome) -> tuple[float, float]:
    """(ours, eager's): relative errors against the float32 run, of the median token or the worst gradient."""
    runs = (outcome.output, outcome.eager)
    if cell.case.mode == "generate":
        ours, eager = (continued_error(run, outcome.reference) for run in runs)
    elif cell.case.mode == "train":
        ours, eager = (max(relative_errors(run, outcome.reference).values()) for run in runs)
    else:
        ours, eager = (median_token_error(run, outcome.reference) for run in runs)
    return ours, eager


def check_sites(cell: Cell, outcome: Outcome) -> None:
    """Exactly the expected sites are lowered and refused, each with a source line, and operators are in the graphs."""
    assert not any(report.error for report in outcome.reports), [report.error for report in outcome.reports]
    lowered = {kind: number for kind, number in outcome.lowered.items() if kind in KINDS}
    assert lowered == dict(cell.lowered), f"lowered {lowered}, refused {dict(outcome.refused)}"
    assert dict(outcome.refused) == dict(cell.refused), f"refused {dict(outcome.refused)}"
    for kind, names in OPERATORS.items():
        found = sum(counts.get(name, 0) for counts in outcome.counts for name in names)
        assert found == cell.lowered.get(kind, 0), f"{found} operators of {kind}: {outcome.counts}"
    for site in [site for report in outcome.reports for site in report.sites if not site.matched]:
        assert re.search(r"\.py:\d+", site.source), f"no source line: {site.source!r}"
        assert site.reason, site


def check_graphs(cell: Cell, outcome: Outcome) -> None:
    """No more graphs and no more breaks than without us."""
    assert outcome.graphs >= 1, "nothing was compiled"
    if outcome.graphs > 1 or outcome.breaks:
        found, alone = (outcome.graphs, outcome.breaks), captured_without_us(cell.case)
        assert found[0] <= alone[0] and found[1] <= alone[1], f"(graphs, breaks) {found}, without us {alone}"
