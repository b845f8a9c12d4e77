"""Plan, gather and combine on a GPU at the sizes of real models, ids outside the experts poisoned."""

import pytest
import torch

from dscompile.kernels import moe
from tests.kernels.moe_cases import PATTERNS, combine_arguments, combine_reference, ids, plan_reference

pytestmark = pytest.mark.gpu

# tokens, top_k, experts: one launch up to 2048 rows, three above
SIZES = [
    (1, 1, 1),
    (1, 8, 256),
    (128, 8, 256),
    (256, 8, 512),
    (257, 8, 512),
    (513, 8, 256),
    (65, 6, 160),
    (4096, 8, 256),
    (9, 32, 512),
]


def compare_plans(got: tuple, want: tuple) -> None:
    for name, a, b in zip(("order", "position", "ends"), got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_plan(size: tuple, pattern: str) -> None:
    topk_idx = ids(pattern, *size, "cuda")
    compare_plans(moe.plan(topk_idx, size[2]), plan_reference(topk_idx, size[2]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_plan_of_two_million_rows(dtype: torch.dtype) -> None:
    topk_idx = ids("some outside", 1 << 18, 8, 256, "cuda", dtype)
    compare_plans(moe.plan(topk_idx, 256), plan_reference(topk_idx, 256))


@pytest.mark.parametrize("columns", [7168, 2880, 100, 7])
@pytest.mark.parametrize("tokens", [1, 3, 128, 512, 513])
def test_gathers_agree(tokens: int, columns: int) -> None:
    topk_idx = ids("some outside", tokens, 8, 256, "cuda")
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    plan = plan_reference(topk_idx, 256)
    want = x[plan[0].long() // 8]
    rows, *got = moe.plan_and_gather(x, topk_idx, 256)
    compare_plans(tuple(got), plan)
    assert torch.equal(rows, want)
    assert torch.equal(moe.gather_rows(x, plan[0], 8), want)
    assert torch.equal(moe.gather_rows(x, plan[0], 8, plan[1]), want)


# One rounding to the dtype, and the float32 sum's own.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("columns", [7168, 2880, 7])
@pytest.mark.parametrize(("pattern", "tokens"), [("some outside", 1), ("distinct", 128), ("some outside", 1000)])
def test_combine(pattern: str, tokens: int, columns: int, dtype: torch.dtype, rtol: float) -> None:
    args = combine_arguments(ids(pattern, tokens, 8, 256, "cuda"), 256, columns, dtype)
    y = moe.combine(*args)
    torch.testing.assert_close(y.double(), combine_reference(*args), rtol=1.01 * rtol, atol=3e-6)
    assert torch.equal(y, moe.combine(*args))


def test_rows_past_two_to_the_31_elements() -> None:
    topk_idx = ids("distinct", 40000, 8, 16, "cuda")
    x = torch.randn(40000, 7168, device="cuda", dtype=torch.bfloat16)
    rows, order, position, _ = moe.plan_and_gather(x, topk_idx, 16)
    some = torch.tensor([0, 1, 299_999, 319_999], device="cuda")
    assert torch.equal(rows[some], x[order[some].long() // 8])
    y = moe.combine(rows, position, torch.full((40000, 8), 0.125, device="cuda"), topk_idx, 16)
    assert torch.equal(y, x)


def test_a_cuda_graph_follows_ids_that_change() -> None:
    topk_idx = ids("random", 64, 8, 256, "cuda")
    x = torch.randn(64, 7168, device="cuda", dtype=torch.bfloat16)
    weight = torch.full((64, 8), 0.125, device="cuda")

    def layer() -> tuple:
        rows, order, position, ends = moe.plan_and_gather(x, topk_idx, 256)
        return order, position, ends, moe.combine(rows, position, weight, topk_idx, 256)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *plan, y = layer()
    for pattern in PATTERNS:
        topk_idx.copy_(ids(pattern, 64, 8, 256, "cuda"))
        graph.replay()
        compare_plans(tuple(plan), plan_reference(topk_idx, 256))
        share = ((topk_idx >= 0) & (topk_idx < 256)).float().mean(1, keepdim=True)
        assert torch.equal(y, (share * x.float()).bfloat16())
