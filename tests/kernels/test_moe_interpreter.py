"""Plan, gather and combine in Triton's interpreter, float16 and float32, ids outside the experts poisoned."""

import pytest
import torch

from dscompile.kernels import moe, moe_launch
from tests.kernels.moe_cases import PATTERNS, combine_arguments, combine_reference, ids, plan_reference

pytestmark = pytest.mark.interpreter

SIZES = [(1, 1, 1), (1, 8, 16), (5, 3, 7)]  # tokens, top_k, experts
CASES = [(size, pattern) for size in SIZES for pattern in PATTERNS]


# The last two read their ids in two steps.
@pytest.mark.parametrize(("size", "pattern"), [*CASES, ((33, 6, 40), "some outside"), ((33, 6, 40), "one expert")])
def test_plan(size: tuple, pattern: str) -> None:
    topk_idx = ids(pattern, *size)
    for got, want in zip(moe.plan(topk_idx, size[2]), plan_reference(topk_idx, size[2])):
        assert torch.equal(got, want)


def test_plan_of_32_bit_ids_and_of_columns_of_a_wider_tensor() -> None:
    topk_idx = ids("some outside", 9, 8, 16, dtype=torch.int32)[:, ::2]
    for got, want in zip(moe.plan(topk_idx, 16), plan_reference(topk_idx, 16)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("pattern", ["some outside", "one expert", "all outside"])
def test_plan_of_many_rows(pattern: str) -> None:
    """4104 rows take the way in three launches: 17 blocks, the last one cut."""
    topk_idx = ids(pattern, 513, 8, 40)
    for got, want in zip(moe.plan(topk_idx, 40), plan_reference(topk_idx, 40)):
        assert torch.equal(got, want)


def test_scan_goes_on_behind_its_first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_launch, "PLAN_BLOCK", 32)
    monkeypatch.setattr(moe_launch, "SCAN_BLOCKS", 128)
    topk_idx = ids("some outside", 4200, 1, 3)  # 132 blocks, of which the scan takes 128 at a time
    for got, want in zip(moe.plan(topk_idx, 3), plan_reference(topk_idx, 3)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("columns", [8, 256, 300])
@pytest.mark.parametrize("pattern", ["distinct", "some outside"])
def test_gathers_agree(pattern: str, columns: int) -> None:
    topk_idx = ids(pattern, 11, 3, 7)
    x = torch.randn(11, columns, dtype=torch.float16)
    want_plan = plan_reference(topk_idx, 7)
    want = x[want_plan[0].long() // 3]
    rows, *got_plan = moe.plan_and_gather(x, topk_idx, 7)
    assert torch.equal(rows, want)
    assert all(torch.equal(got, want) for got, want in zip(got_plan, want_plan))
    order, position, _ = want_plan
    assert torch.equal(moe.gather_rows(x, order, 3), want)
    assert torch.equal(moe.gather_rows(x, order, 3, position), want)


def test_gathers_of_rows_apart_and_of_columns_apart() -> None:
    topk_idx = ids("random", 6, 2, 4)
    wide = torch.randn(6, 600)
    order, position, _ = plan_reference(topk_idx, 4)
    for x in (wide[:, 5:300], wide[:, ::2], torch.randn(300, 6).t()):
        want = x[order.long() // 2]
        assert torch.equal(moe.plan_and_gather(x, topk_idx, 4)[0], want)
        assert torch.equal(moe.gather_rows(x, order, 2), want)
        assert torch.equal(moe.gather_rows(x, order, 2, position), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_combine(pattern: str, dtype: torch.dtype) -> None:
    args = combine_arguments(ids(pattern, 9, 5, 7), 7, 300, dtype)
    y = moe.combine(*args)
    want = combine_reference(*args)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


def test_combine_of_weights_in_16_bits() -> None:
    z, position, weight, *rest = combine_arguments(ids("distinct", 4, 3, 7), 7, 40, torch.float32)
    args = z, position, weight.half(), *rest
    torch.testing.assert_close(moe.combine(*args).double(), combine_reference(*args), rtol=1e-6, atol=1e-6)


def test_combine_with_a_bias_without_weights_in_another_dtype() -> None:
    topk_idx = ids("some outside", 9, 5, 7)
    z, position, weight, *_ = combine_arguments(topk_idx, 7, 40, torch.float16)
    bias = torch.randn(7, 40).half()
    sorted_ids = topk_idx.flatten()[plan_reference(topk_idx, 7)[0].long()]
    held = (sorted_ids >= 0) & (sorted_ids < 7)
    biased = z.clone()
    biased[held] += bias[sorted_ids[held]]
    got = moe.combine(z, position, weight, topk_idx, 7, torch.float32, bias)
    assert got.dtype == torch.float32
    want = combine_reference(biased, position, weight, topk_idx, 7)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    got = moe.combine(biased, position, None, topk_idx, 7, torch.float32)
    want = combine_reference(biased, position, torch.ones(9, 5), topk_idx, 7)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_what_is_empty() -> None:
    none = torch.empty(0, 4, dtype=torch.int64)
    order, position, ends = moe.plan(none, 5)
    assert order.shape == (0,) and position.shape == (0, 4) and ends.tolist() == [0] * 5
    rows, *_, ends = moe.plan_and_gather(torch.empty(0, 16), none, 5)
    assert rows.shape == (0, 16) and ends.tolist() == [0] * 5
    assert moe.gather_rows(torch.empty(0, 16), order, 4, position).shape == (0, 16)
    assert moe.combine(torch.empty(0, 16), position, torch.empty(0, 4), none, 5).shape == (0, 16)
    topk_idx = ids("random", 3, 2, 5)
    rows, *got = moe.plan_and_gather(torch.empty(3, 0), topk_idx, 5)
    assert rows.shape == (6, 0) and all(torch.equal(a, b) for a, b in zip(got, plan_reference(topk_idx, 5)))
