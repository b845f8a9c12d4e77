"""The GEMM kernels on a GPU: values beside float64, poisoned rows, repeatability, CUDA graphs whose groups change."""

import pytest
import torch

from dscompile.kernels.gemm_plan import GemmPlan, gluon_plan, triton_plan
from tests.kernels.gemm_cases import FP8, Case, make, problems

pytestmark = pytest.mark.gpu

RAGGED = (0, 1, 63, 64, 65, 0, 127, 129, 5000, 0, 300)
BASE = Case(RAGGED, tail=77)
TILES = {torch.bfloat16: ((128, 256), (128, 128), (64, 256), (64, 128)), FP8: ((128, 256), (128, 128), (64, 128))}
ALL_TILES = [pytest.param(dtype, *tile, id=f"{dtype}-{tile}") for dtype, tiles in TILES.items() for tile in tiles]


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")


def compare(case: Case, plan: GemmPlan | None) -> None:
    p = make(case, "cuda")
    assert not problems(p.run(plan), p)


@pytest.mark.parametrize(("n", "k"), [(256, 512), (328, 192), (8, 128), (520, 80), (2112, 1472)])
@pytest.mark.parametrize(("dtype", "bm", "bn"), ALL_TILES)
def test_groups(dtype: torch.dtype, bm: int, bn: int, n: int, k: int, hopper: None) -> None:
    compare(BASE.with_(dtype=dtype, n=n, k=k), gluon_plan(bm, bn, dtype))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 128), (1000, 520, 1472), (4096, 512, 512), (333, 2112, 7168)])
@pytest.mark.parametrize(("dtype", "bm", "bn"), ALL_TILES)
def test_dense(dtype: torch.dtype, bm: int, bn: int, m: int, n: int, k: int, hopper: None) -> None:
    compare(Case((m,), n=n, k=k, layout="dense", dtype=dtype), gluon_plan(bm, bn, dtype))


@pytest.mark.parametrize("tail", [0, 57])
@pytest.mark.parametrize(("dtype", "bm", "bn"), ALL_TILES)
def test_masked(dtype: torch.dtype, bm: int, bn: int, tail: int, hopper: None) -> None:
    case = Case((0, 1, 64, 65, 200), n=264, k=320, layout="masked", tail=tail, dtype=dtype)
    compare(case, gluon_plan(bm, bn, dtype))


@pytest.mark.parametrize("kn", [False, True], ids=["nk", "kn"])
@pytest.mark.parametrize(("n", "k"), [(128, 256), (200, 192), (1408, 2048)])
@pytest.mark.parametrize(("bm", "bn"), [(128, 256), (64, 256), (128, 128)], ids=str)
def test_swiglu(bm: int, bn: int, n: int, k: int, kn: bool, hopper: None) -> None:
    compare(BASE.with_(n=n, k=k, swiglu=True, kn=kn), gluon_plan(bm, bn, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("bm", "bn"), [(128, 256), (128, 128), (64, 128)], ids=str)
def test_weights_with_contiguous_columns(bm: int, bn: int, dtype: torch.dtype, hopper: None) -> None:
    compare(BASE.with_(n=200, k=200, kn=True, dtype=dtype), gluon_plan(bm, bn, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_long_sums(dtype: torch.dtype, hopper: None) -> None:
    compare(BASE.with_(n=384, k=16384, dtype=dtype), gluon_plan(128, 256, dtype))


@pytest.mark.parametrize("raster", [1, 3, 64])
def test_orders_of_tiles(raster: int, hopper: None) -> None:
    compare(BASE.with_(n=1000, k=64), gluon_plan(128, 128, torch.bfloat16, raster=raster))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8], ids=["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
def test_plain_triton(layout: str, dtype: torch.dtype) -> None:
    if dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"hopper: no FP8 on compute capability {torch.cuda.get_device_capability()}")
    sizes = (500,) if layout == "dense" else RAGGED
    case = BASE.with_(sizes=sizes, layout=layout, dtype=dtype, n=200, k=192, tail=0 if layout == "dense" else 9)
    compare(case, triton_plan(500, 200, dtype, False))


def test_plain_triton_swiglu() -> None:
    compare(BASE.with_(n=200, k=192, swiglu=True), triton_plan(500, 200, torch.bfloat16, True))


@pytest.mark.parametrize("kn", [False, True], ids=["nk", "kn"])
def test_torch(kn: bool, hopper: None) -> None:
    compare(BASE.with_(n=328, k=192, kn=kn), GemmPlan("torch"))
    compare(Case((1000,), n=520, k=1472, layout="dense", kn=kn), GemmPlan("torch"))


def test_torch_with_swiglu(hopper: None) -> None:
    """It rounds once more: before the activation."""
    p = make(BASE.with_(n=200, k=192, swiglu=True), "cuda")
    want = p.run(gluon_plan(128, 256, torch.bfloat16))
    torch.testing.assert_close(p.run(GemmPlan("torch")), want, rtol=2**-6, atol=2**-6 * float(want.float().std()))


@pytest.mark.parametrize("rows", [1, 40, 200, 2000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
def test_whatever_is_planned(layout: str, dtype: torch.dtype, rows: int) -> None:
    sizes = (rows,) if layout == "dense" else (rows, 0, 2 * rows, 1)
    compare(Case(sizes, n=512, k=1024, layout=layout, dtype=dtype), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_rows_behind_a_count_are_left_alone(dtype: torch.dtype, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make(Case((0, 3, 64, 100), layout="masked", dtype=dtype, tail=30), "cuda")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(7.0))
    y = p.run(gluon_plan(128, 128, dtype))
    assert not problems(y, p) and bool((y[p.owner < 0] == 7.0).all())


@pytest.mark.parametrize(("dtype", "bm", "bn"), ALL_TILES)
def test_runs_agree_in_every_bit(dtype: torch.dtype, bm: int, bn: int, hopper: None) -> None:
    p = make(BASE.with_(n=1000, k=1024, dtype=dtype), "cuda")
    plan = gluon_plan(bm, bn, dtype)
    first = p.run(plan)
    for _ in range(20):
        assert torch.equal(p.run(plan), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_a_cuda_graph_follows_groups_that_change(dtype: torch.dtype, hopper: None) -> None:
    p = make(Case((250,) * 4, n=264, k=320, dtype=dtype), "cuda")
    plan = gluon_plan(128, 256, dtype)
    p.run(plan)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = p.run(plan)
    for sizes in ((1000, 0, 0, 0), (0, 1, 64, 935), (130, 130, 130, 130), (0, 0, 0, 0), (250,) * 4):
        counts = torch.tensor(sizes)
        p.bounds.copy_(counts.cumsum(0))
        p.owner = torch.full((1000,), -1, device="cuda")
        p.owner[: sum(sizes)] = torch.arange(4).repeat_interleave(counts).cuda()
        graph.replay()
        torch.cuda.synchronize()
        assert not problems(y, p)
