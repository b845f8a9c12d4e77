"""The 16-bit CUDA kernel on a Hopper GPU: each tile at odd sizes, poisoned edges, graphs, a chain of launches."""

from __future__ import annotations

import pytest
import torch

from dscompile.kernels import gemm, gemm_half_cuda
from dscompile.kernels.gemm_half_cuda import TILES
from dscompile.kernels.gemm_plan import GemmPlan
from tests.kernels.gemm_cases import Case, Problem, make, problems

pytestmark = pytest.mark.gpu

UNEVEN = (0, 1, 63, 64, 65, 0, 127, 129, 5000)
GROUPS = {
    "uneven": Case(UNEVEN, n=328, k=400, tail=77),
    "swiglu": Case(UNEVEN, n=328, k=400, tail=77, swiglu=True),
    "one-step": Case((7, 200, 1, 300), n=512, k=64, tail=3),
    "many": Case(tuple(11 * (i % 23) for i in range(70)), n=264, k=136),
    "nobody": Case((0, 0), n=128, k=128, tail=65),
    "fp16": Case((300, 20), n=1032, k=1000, dtype=torch.float16, swiglu=True),
    "long-k": Case((700,), n=256, k=4480),
}
DENSE = [(1, 8, 64), (64, 64, 72), (257, 264, 400), (1000, 776, 4480), (5000, 1024, 272)]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")


def by(tile: str, p: Problem) -> torch.Tensor:
    if p.bounds is None:
        return gemm_half_cuda.linear(p.x, p.w[0], tile=tile)
    return gemm_half_cuda.grouped(p.x, p.w, p.bounds, swiglu=p.case.swiglu, tile=tile)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("tile", TILES)
def test_groups(tile: str, case: str) -> None:
    """Rows of nobody are NaN and give zeros; no row of one group reaches another's; results repeat bit by bit."""
    p = make(GROUPS[case], "cuda")
    y = by(tile, p)
    assert not problems(y, p)
    assert torch.equal(y, by(tile, p))


@pytest.mark.parametrize("size", DENSE, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_dense(tile: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    p = make(Case((m,), n=n, k=k, layout="dense"), "cuda")
    assert not problems(by(tile, p), p)


def test_by_its_plan_with_rows_of_wider_tensors() -> None:
    """What lies beside the rows of x and w is NaN."""
    p = make(Case((100, 0, 300), n=264, k=200), "cuda")
    wide_x, wide_w = p.x.new_full((400, 512), torch.nan), p.w.new_full((3, 264, 256), torch.nan)
    wide_x[:, 64:264], wide_w[:, :, :200] = p.x, p.w
    y = gemm.grouped(wide_x[:, 64:264], wide_w[:, :, :200], p.bounds, plan=GemmPlan("half_cuda"))
    assert not problems(y, p)


@pytest.mark.parametrize("tile", TILES)
def test_a_cuda_graph_follows_ends_that_change(tile: str) -> None:
    x, w = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((2000, 512), (4, 512, 512)))
    ends = torch.tensor([500, 900, 901, 2000], device="cuda", dtype=torch.int32)
    gemm_half_cuda.grouped(x, w, ends, tile=tile)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [gemm_half_cuda.grouped(x, w, ends, tile=tile) for _ in range(2)]
    for new in ([500, 900, 901, 2000], [0, 0, 1999, 1999], [1, 1000, 1000, 1001]):
        ends.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for y in results:
            for group, (start, end) in enumerate(zip([0, *new], new)):
                want = x[start:end].float() @ w[group].float().T
                torch.testing.assert_close(y[start:end].float(), want, atol=0.1, rtol=8e-3)
            assert (y[new[-1] :] == 0).all()


def test_a_chain_of_launches_waits_for_its_inputs() -> None:
    """Kernels may start before those in front of them end; each must still see their results."""
    x, w = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((4096, 1024), (1024, 1024)))
    expected = gemm_half_cuda.linear(x, w)
    torch.cuda.synchronize()
    for _ in range(20):
        late = torch.zeros_like(x)
        first = gemm_half_cuda.linear(late, w)
        late.copy_(x)
        second = gemm_half_cuda.linear(late, w)
        assert (first == 0).all() and torch.equal(second, expected)
