"""Quantisation in blocks of 1 x 128 on a GPU: the formula in PyTorch's float32, bit for bit."""

import pytest
import torch

from dscompile.kernels import moe, quantize
from tests.kernels.moe_cases import ids, plan_reference, quantize_reference, rows_to_quantize, silu_mul, steps_apart

pytestmark = pytest.mark.gpu

SHAPES = [(1, 7168), (3, 1), (7, 300), (128, 2048), (1025, 2880), (4096, 7168)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"hopper: compute capability {torch.cuda.get_device_capability()} has no FP8")


def same_bits(got: tuple, want: tuple) -> None:
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(shape: tuple, dtype: torch.dtype) -> None:
    x = rows_to_quantize(*shape, dtype, "cuda")
    same_bits(quantize.quantize_1x128(x), quantize_reference(x))


def test_values_of_every_exponent() -> None:
    x = torch.randint(0, 1 << 16, (4000, 1024), device="cuda").to(torch.int16).view(torch.bfloat16)
    x = torch.where(x.isfinite(), x, 0)  # every row spans the whole range: most quotients are 0
    same_bits(quantize.quantize_1x128(x), quantize_reference(x))
    rows = torch.randn(4000, 1024, device="cuda") * torch.logspace(-44, 38, 4000, device="cuda")[:, None]
    rows = rows.clamp(-3e38, 3e38)
    got, want = quantize.quantize_1x128(rows), quantize_reference(rows)
    same_bits(got, want)
    assert not bool(got[0].float().isnan().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    x = torch.ones(5, 256, device="cuda", dtype=dtype)
    x[0, 1], x[1, 2], x[2, 3], x[3, 200] = torch.nan, torch.inf, -torch.inf, -torch.nan
    q, scale = quantize.quantize_1x128(x)
    want_q, want_scale = quantize_reference(x)
    assert not bool(steps_apart(q, want_q).any())
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(shape: tuple, dtype: torch.dtype) -> None:
    gate_up = torch.randn(shape[0], 2 * shape[1], device="cuda").mul_(3).to(dtype)
    q, scale = quantize.silu_mul_quantize_1x128(gate_up)
    want_q, want_scale = quantize_reference(silu_mul(gate_up))
    torch.testing.assert_close(scale, want_scale, rtol=2e-6, atol=0)
    # The sigmoids differ in their last bits, so that a value at the edge of two steps may fall to either side.
    apart = steps_apart(q, want_q)
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 1e-4


def test_rows_behind_the_last_end_are_not_read() -> None:
    gate_up = torch.randn(1100, 1024, device="cuda", dtype=torch.bfloat16)
    gate_up[1000:] = torch.nan
    ends = torch.tensor([3, 500, 1000], device="cuda", dtype=torch.int32)
    q, scale = quantize.silu_mul_quantize_1x128(gate_up, ends)
    want = quantize.silu_mul_quantize_1x128(gate_up[:1000])
    assert torch.equal(q[:1000].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(scale[:, :1000], want[1])
    assert not bool(q[1000:].float().any()) and bool(scale.isfinite().all())


@pytest.mark.parametrize("columns", [7168, 2880, 100])
@pytest.mark.parametrize("tokens", [1, 3, 128, 1500])
def test_gathers_agree(tokens: int, columns: int) -> None:
    topk_idx = ids("some outside", tokens, 8, 256, "cuda")
    x = rows_to_quantize(tokens, columns, torch.bfloat16, "cuda")
    order, position, ends = plan_reference(topk_idx, 256)
    want = quantize_reference(x[order.long() // 8])
    q, scale, *plan = moe.plan_and_gather_quantize(x, topk_idx, 256)
    assert all(torch.equal(a, b) for a, b in zip(plan, (order, position, ends), strict=True))
    same_bits((q, scale), want)
    same_bits(quantize.gather_quantize_1x128(x, order, 8), want)
    same_bits(quantize.gather_quantize_1x128(x, order, 8, position), want)


def test_a_cuda_graph() -> None:
    x = rows_to_quantize(130, 2048, torch.bfloat16, "cuda")
    quantize.quantize_1x128(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantize.quantize_1x128(x)
    x.mul_(3)
    graph.replay()
    same_bits(got, quantize_reference(x))


def test_launches_are_told_apart_by_alignment_and_dtype() -> None:
    """The second launch of a kind is of the kernel compiled at the first."""
    wide = torch.randn(100, 640, device="cuda")
    for _ in range(2):
        for dtype in DTYPES:
            x = wide.to(dtype)
            for view in (x, x[:, 1:], x[:, :500], x[1:, 8:264], x[::2], x[:, 3:4], x[:, ::2]):
                same_bits(quantize.quantize_1x128(view), quantize_reference(view))
