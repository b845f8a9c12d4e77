"""The plain Triton GEMM in Triton's interpreter: float16, float32 and FP8, all layouts, poisoned rows."""

import pytest
import torch

from dscompile.kernels.gemm_plan import GemmPlan
from dscompile.kernels.gemm_torch import zero_behind
from tests.kernels.gemm_cases import FP8, Case, make, problems

pytestmark = pytest.mark.interpreter

RAGGED = (0, 1, 31, 0, 33, 70, 0)
SMALL = Case(RAGGED, n=72, k=100, dtype=torch.float16, tail=5)


def compare(case: Case, bm: int = 32, bn: int = 32, raster: int = 2) -> None:
    p = make(case, "cpu")
    assert not problems(p.run(GemmPlan("triton", bm, bn, 2, raster)), p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, FP8], ids=["fp16", "fp32", "fp8"])
@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    sizes = (45,) if layout == "dense" else RAGGED
    # With FP8: N in two blocks of scales, K in one and a half.
    n, k = (136, 192) if dtype == FP8 else (72, 100)
    tail = 0 if layout == "dense" else 5
    compare(SMALL.with_(sizes=sizes, layout=layout, dtype=dtype, n=n, k=k, tail=tail), bm=32, bn=64)


def test_swiglu() -> None:
    compare(SMALL.with_(swiglu=True, n=40))


def test_weights_with_contiguous_columns() -> None:
    compare(SMALL.with_(kn=True))


@pytest.mark.parametrize("bm", [16, 64])
@pytest.mark.parametrize("raster", [1, 3, 8])
def test_tiles(bm: int, raster: int) -> None:
    compare(SMALL.with_(sizes=(0, 3, 130, 1)), bm=bm, raster=raster)


@pytest.mark.parametrize("dtype", [torch.float16, FP8], ids=["fp16", "fp8"])
def test_every_group_empty(dtype: torch.dtype) -> None:
    p = make(SMALL.with_(sizes=(0, 0, 0), tail=9, dtype=dtype), "cpu")
    y = p.run(GemmPlan("triton", 16, 32, 2, 8))
    assert y.shape == (9, 72) and bool((y == 0).all())


def test_rows_behind_a_count_are_left_alone() -> None:
    p = make(SMALL.with_(layout="masked", sizes=(0, 3, 20)), "cpu")
    taken, empty = [], torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        taken.append(empty(*args, **options).fill_(7.0))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        y = p.run(GemmPlan("triton", 16, 32, 2, 8))
    assert taken and not problems(y, p) and bool((y[p.owner < 0] == 7.0).all())


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_result_types(out_dtype: torch.dtype) -> None:
    case = SMALL.with_(dtype=FP8, k=192, out_dtype=out_dtype)
    p = make(case, "cpu")
    y = p.run(GemmPlan("triton", 32, 64, 2, 8))
    assert y.dtype == out_dtype and not problems(y, p)


@pytest.mark.parametrize("ends", [[3, 9], [0, 0], [5, 20], [2, 31]], ids=str)
def test_zeros_behind_the_last_group(ends: list[int]) -> None:
    y = torch.ones(20, 1100)
    zero_behind(y, torch.tensor(ends, dtype=torch.int32))
    assert torch.equal(y.sum(1), torch.tensor([1100.0] * min(ends[-1], 20) + [0.0] * (20 - min(ends[-1], 20))))


def test_without_a_plan() -> None:
    p = make(SMALL, "cpu")
    assert not problems(p.run(), p)


def test_two_runs_agree_in_every_bit() -> None:
    p = make(SMALL, "cpu")
    plan = GemmPlan("triton", 32, 32, 2, 8)
    assert torch.equal(p.run(plan), p.run(plan))
