"""The default inner compiler: a few cases all the way through Inductor."""

from __future__ import annotations

import pytest

from tests.models.harness import run_case
from tests.models.test_zoo import check_graphs, check_numbers, check_refusals
from tests.zoo import by_name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["toy/plain", "toy/train", "toy/lengths", "reference/absorbed_prefill", "deepseek_v3/one_query_projection"]
)
def test_case(name: str) -> None:
    case = by_name(name)
    outcome = run_case(case, options={})
    check_numbers(case, outcome)
    check_graphs(case, outcome)
    check_refusals(case, outcome)
