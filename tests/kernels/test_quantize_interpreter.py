"""Quantisation in blocks of 1 x 128 in Triton's interpreter, bit for bit.

The interpreter's cast to FP8 is wrong where it rounds up to the next power of two, and for NaN. So q is compared for
values that need no rounding, the scales for any; the GPU's tests compare q for any.
"""

import pytest
import torch

from dscompile.kernels import moe, quantize
from tests.kernels.moe_cases import (
    FP8,
    ids,
    plan_reference,
    quantize_reference,
    representable_rows,
    rows_to_quantize,
    silu_mul,
    steps_apart,
)

pytestmark = pytest.mark.interpreter

SHAPES = [(1, 128), (1, 1), (5, 100), (7, 300), (34, 256), (1030, 136)]


def check(got: tuple, want: tuple, scale_only: bool = False) -> None:
    (q, scale), (want_q, want_scale) = got, want
    assert q.dtype == FP8 and q.is_contiguous() and scale.is_contiguous()
    assert q.shape == want_q.shape and scale.shape == want_scale.shape
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    assert scale_only or not bool(steps_apart(q, want_q).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(shape: tuple, dtype: torch.dtype) -> None:
    x = representable_rows(*shape, dtype)
    check(quantize.quantize_1x128(x), quantize_reference(x))
    x = rows_to_quantize(*shape, dtype, "cpu")
    check(quantize.quantize_1x128(x), quantize_reference(x), scale_only=True)


def test_blocks_of_zeros_and_of_the_smallest_values() -> None:
    x = torch.zeros(3, 256)
    x[1, 3], x[2, 200] = 1e-45, 1e-38
    q, scale = quantize.quantize_1x128(x)
    assert not bool(q.float().isnan().any()) and bool((q[0].float() == 0).all())
    check((q, scale), quantize_reference(x), scale_only=True)


def test_nan_and_infinity() -> None:
    x = torch.ones(4, 256)
    x[0, 1], x[1, 2], x[2, 3], x[3, 200] = torch.nan, torch.inf, -torch.inf, -torch.nan
    check(quantize.quantize_1x128(x), quantize_reference(x), scale_only=True)


def gate_and_up(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """silu(64) is 64 in float32: the product of both is representable."""
    up = representable_rows(rows, columns, dtype)
    return torch.cat([torch.full_like(up, 64), up], 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(shape: tuple) -> None:
    gate_up = gate_and_up(*shape, torch.float16)
    check(quantize.silu_mul_quantize_1x128(gate_up), quantize_reference(silu_mul(gate_up)))


def test_silu_of_any_gate() -> None:
    gate_up = torch.randn(9, 600) * 4
    scale = quantize.silu_mul_quantize_1x128(gate_up)[1]
    torch.testing.assert_close(scale, quantize_reference(silu_mul(gate_up))[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("last", [0, 3, 6, 9])
def test_rows_behind_the_last_end_are_not_read(last: int) -> None:
    gate_up = gate_and_up(6, 200, torch.float32)
    gate_up[last:] = torch.nan
    got = quantize.silu_mul_quantize_1x128(gate_up, torch.tensor([0, last], dtype=torch.int32))
    h = silu_mul(gate_up)
    h[last:] = 0
    check(got, quantize_reference(h))


@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(1, 1, 128), (3, 3, 200), (9, 8, 384), (35, 2, 64)])
def test_gathers_agree(tokens: int, top_k: int, columns: int) -> None:
    topk_idx = ids("some outside", tokens, top_k, 7)
    x = rows_to_quantize(tokens, columns, torch.float16, "cpu")
    order, position, ends = plan_reference(topk_idx, 7)
    want = quantize.quantize_1x128(x[order.long() // top_k])
    q, scale, *got_plan = moe.plan_and_gather_quantize(x, topk_idx, 7)
    assert all(torch.equal(got, want) for got, want in zip(got_plan, (order, position, ends)))
    by_order = quantize.gather_quantize_1x128(x, order, top_k)
    by_position = quantize.gather_quantize_1x128(x, order, top_k, position)
    for got in ((q, scale), by_order, by_position):
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


def test_rows_apart_and_columns_apart() -> None:
    x = representable_rows(6, 290, torch.float32)
    wide = torch.zeros(6, 600)
    wide[:, 5:295] = x
    spread = torch.zeros(6, 580)
    spread[:, ::2] = x
    for view in (wide[:, 5:295], spread[:, ::2], x.t().contiguous().t()):
        check(quantize.quantize_1x128(view), quantize_reference(x))


def test_what_is_empty() -> None:
    q, scale = quantize.quantize_1x128(torch.empty(0, 256))
    assert q.shape == (0, 256) and scale.shape == (2, 0)
    q, scale = quantize.quantize_1x128(torch.empty(5, 0))
    assert q.shape == (5, 0) and scale.shape == (0, 8)
    assert quantize.silu_mul_quantize_1x128(torch.empty(0, 256))[0].shape == (0, 128)
    none = torch.empty(0, 4, dtype=torch.int64)
    q, scale, *_, ends = moe.plan_and_gather_quantize(torch.empty(0, 256), none, 5)
    assert q.shape == (0, 256) and scale.shape == (2, 0) and ends.tolist() == [0] * 5
