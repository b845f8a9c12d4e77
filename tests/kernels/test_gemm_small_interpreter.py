"""The join of parts of K in Triton's interpreter: sums in order, SwiGLU, rows behind the last group."""

import pytest
import torch

from dscompile.kernels.gemm_small_launch import launch_join

pytestmark = pytest.mark.interpreter


def joined(splits: int, tokens: int, columns: int, ends: list[int] | None, swiglu: bool) -> tuple:
    g = torch.Generator().manual_seed(0)
    parts = torch.randn(splits, tokens, columns * (2 if swiglu else 1), generator=g)
    owned = tokens if ends is None else ends[-1]
    parts[:, owned:] = torch.nan  # nobody wrote them
    y = torch.full((tokens, columns), torch.nan, dtype=torch.float16)
    launch_join(parts, y, None if ends is None else torch.tensor(ends, dtype=torch.int32), swiglu)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    if swiglu:
        gate, up = total.chunk(2, -1)
        total = torch.nn.functional.silu(gate) * up
    total[owned:] = 0
    return y, total


@pytest.mark.parametrize("splits", [2, 3, 16])
@pytest.mark.parametrize("columns", [8, 300, 1100])
def test_sums_in_order(columns: int, splits: int) -> None:
    y, total = joined(splits, 3, columns, None, False)
    assert torch.equal(y, total.half())


@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("ends", [[0, 2, 5], [0, 0], [1, 6]], ids=str)
def test_rows_behind_the_last_group_are_zero(ends: list[int], swiglu: bool) -> None:
    y, total = joined(3, 6, 264, ends, swiglu)
    torch.testing.assert_close(y, total.half(), rtol=2e-3, atol=1e-6)
    assert not y[ends[-1] :].any()
