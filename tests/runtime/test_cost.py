"""Costs: the roofline, in numbers and in symbols, and the table that goes before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy

from dscompile.runtime.cost import H100, Rates, Table, TableError, Work, at, key

ROUND = Rates("round", gemm=1e12, attention=0.5e12, bandwidth=1e9, link=1e8, launch=2.0, latency=7.0)


@pytest.mark.parametrize(
    ("work", "us"),
    [
        (Work(), 2.0),
        (Work(flops=10**9), 2.0 + 1000.0),
        (Work(flops=10**9, attention=True), 2.0 + 2000.0),
        (Work(flops=10**9, bytes=5 * 10**6), 2.0 + 5000.0),
        (Work(wire=10**6), 7.0 + 10_000.0),
    ],
    ids=["launch", "arithmetic", "attention", "traffic", "wire"],
)
def test_a_kernel_costs_the_larger_of_its_arithmetic_and_its_traffic(work: Work, us: float) -> None:
    assert work.us(ROUND) == us


def test_symbolic_amounts_give_a_formula() -> None:
    T, D = sympy.symbols("T D", positive=True, integer=True)
    cost = Work(flops=2 * T * D**2, bytes=2 * D**2 + 4 * T * D).us(H100)
    for tokens in (1, 4096):
        expected = Work(flops=2 * tokens * 7168**2, bytes=2 * 7168**2 + 4 * tokens * 7168).us(H100)
        assert at(cost, {T: tokens, D: 7168}) == pytest.approx(expected)
    with pytest.raises(ValueError, match="depends on T, which has no size"):
        at(cost, {D: 7168})


def test_what_was_measured_goes_first(tmp_path: Path) -> None:
    operands = [((4, 8), "bfloat16"), ((8, 16), "bfloat16")]
    Table(H100, {key("mm", operands): 12.5}).save(tmp_path / "costs.json")
    table = Table.load(tmp_path / "costs.json")
    assert table.us("mm", operands, flops=10**12) == 12.5
    assert table.us("mm", operands[::-1], flops=798 * 10**6) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "no readable table"),
        ("[1]", "write it with save"),
        ('{"card": "H100", "us": {"mm": -1}}', "write it with save"),
        ('{"card": "A100", "us": {}}', "measured on 'A100' and costs of 'H100' are wanted"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(TableError, match=said):
        Table.load(file)
