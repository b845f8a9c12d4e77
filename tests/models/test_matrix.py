"""The matrix of real models and modes: numbers, sites, graphs and caches of every cell, and explain's text of each row.

On CPUs the models are micro and nothing generates code; with a CUDA device the same cells run at the kernels' widths,
through Inductor. Rows of older transformers and of torchtitan run in processes of their own (`test_old_versions.py`).
"""

from __future__ import annotations

import re

import pytest
import transformers

from dscompile.report import CompileReport, table
from tests import golden
from tests.models import matrix_checks
from tests.models.harness import Outcome, run_case
from tests.zoo import matrix
from tests.zoo.matrix import Cell

EXPLAINED = ("prefill", "static_decode", "dynamic_decode", "train")

CELLS = {cell.case.name: cell for cell in [*matrix.cells(), *matrix.true_cells()]}


_reports: dict[str, list[CompileReport]] = {}  # of the cells that ran in this process


def run(name: str) -> Outcome:
    outcome = run_case(CELLS[name].case, {} if name.endswith("/true") else CELLS[name].options)
    _reports[name] = outcome.reports
    return outcome


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=name, marks=[pytest.mark.gpu] if cell.case.name.endswith("/true") else [])
        for name, cell in CELLS.items()
    ],
)
def test_cell(cell: Cell) -> None:
    matrix_checks.check(cell, run(cell.case.name))


# ------------------------------------------------------------------ golden texts


def steady(text: str) -> str:
    """explain's text without what depends on the card or on the release of the model's library."""
    text = re.sub(r"[\d.,]+ us", "# us", text)
    return re.sub(r"\.py:\d+", ".py:#", text)


ROWS = sorted({cell.row for name, cell in CELLS.items() if not name.endswith("/true")})


@pytest.mark.skipif(
    not transformers.__version__.startswith("5.23"), reason="versions: texts are those of transformers 5.23"
)
@pytest.mark.parametrize("row", ROWS)
def test_golden_explain(row: str) -> None:
    """What a user reads about each model, in the modes that differ."""
    golden.newest_torch_only()
    names = [f"{row}/{mode}" for mode in EXPLAINED if f"{row}/{mode}" in CELLS]
    sections = [f"== {name}\n\n{table(_reports.get(name) or run(name).reports)}" for name in names]
    golden.check(f"explain_{row}", steady("\n\n".join(sections)))
