"""Counters and replicas of placed experts in Triton's interpreter: the references' bits, in one launch and in four."""

import pytest
import torch

from dscompile.kernels import place
from dscompile.kernels.refusals import BadArguments, KernelLimit
from tests.kernels.place_cases import CASES, Case, problems

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_robin_gives_the_bits_of_the_reference(case: Case) -> None:
    for tokens, dtype in ((1, torch.int64), (45, torch.int32)):
        assert not problems(case, "round_robin", case.ids(tokens, dtype))


@pytest.mark.parametrize("case", [CASES[1], *CASES[3:5]], ids=str)  # two programs fill alike
def test_water_filling_gives_the_bits_of_the_reference(case: Case) -> None:
    assert not problems(case, "water_filling", case.ids(100 // case.top_k, torch.int64))


def test_many_rows_are_levelled_in_four_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[1]
    monkeypatch.setattr(place, "FEW_ROWS", 64)
    assert not problems(case, "water_filling", case.ids(67, torch.int32))


@pytest.mark.parametrize("policy", place.POLICIES)
def test_no_tokens_and_ids_with_strides(policy: str) -> None:
    case = CASES[4]
    assert not problems(case, policy, case.ids(0, torch.int64))
    assert not problems(case, policy, case.ids(12, torch.int64).t().contiguous().t())
    assert not problems(case, policy, torch.full((9, 2), -1))


def test_what_is_refused() -> None:
    case = CASES[1]
    ids, maps = case.ids(3, torch.int64), case.maps()
    with pytest.raises(BadArguments, match="Use one of these, and a multiple"):
        place.place(ids, *maps, case.slots + 1, case.ranks, "round_robin")
    with pytest.raises(BadArguments, match="Pass int64 log2phy"):
        place.place(ids, *maps, case.slots, case.ranks, "round_robin", torch.zeros(case.experts))
    with pytest.raises(BadArguments, match="Pass int64 or int32"):
        place.load(ids.float(), torch.zeros(case.experts, dtype=torch.int64))
    with pytest.raises(BadArguments, match="make the counter contiguous"):
        place.load(ids, torch.zeros(2 * case.experts, dtype=torch.int64)[::2])
    wide = maps[0].expand(-1, -1).repeat(1, 8)
    with pytest.raises(KernelLimit, match="Use round_robin, or the operator's reference"):
        place.place(ids, wide, maps[1], case.slots, case.ranks, "water_filling")
