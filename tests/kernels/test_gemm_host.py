"""The host side of the GEMM on the CPU: the plan, and what is refused with which words."""

import pytest
import torch

from dscompile.kernels import gemm, gemm_plan, gemm_torch, launch
from dscompile.kernels.gemm_checks import gluon_refusal, triton_refusal
from dscompile.kernels.gemm_launch import Call
from dscompile.kernels.gemm_plan import IMPLS, SHARED, STORE_WIDTH, GemmPlan, gluon_plan, plan_gemm
from dscompile.kernels.refusals import BadArguments, KernelLimit
from tests.kernels.gemm_cases import FP8, Case, make

BF16 = torch.bfloat16
OURS = ("gluon", "triton")


def planned(m: int, n: int, k: int, groups: int = 1, dtype: torch.dtype = BF16, **changes: object) -> GemmPlan:
    options = dict(layout="ends" if groups > 1 else "dense", swiglu=False, sms=132, available=OURS) | changes
    return plan_gemm(m, n, k, groups, dtype, **options)


def test_wide_tiles_where_they_fill_the_device() -> None:
    assert (planned(24576, 2816, 2048, 64).bm, planned(24576, 2816, 2048, 64).bn) == (128, 256)
    assert planned(256, 512, 2048).bn == 128
    assert planned(4096, 128, 2048).bn == 128


def test_tiles_of_64_rows_for_small_groups() -> None:
    assert planned(2048, 2816, 2048, 64).bm == 64
    assert planned(64 * 65, 2816, 2048, 64).bm == 128


def best(*size: int, dtype: torch.dtype = BF16, **changes: object) -> str:
    return planned(*size, dtype=dtype, available=IMPLS, **changes).impl


def test_few_rows_a_group() -> None:
    assert best(96, 2816, 2048, 64) == "small"
    assert best(64 * 256, 2816, 2048, 64) == "small"
    assert best(128, 7168, 16384, dtype=FP8) == "small"
    assert best(32 * 20, 4096, 2048, 32, dtype=FP8, layout="masked") == "small"


def test_many_rows_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch, unless ours were measured to be faster; masked groups, which torch has none of, by ours."""
    assert best(4096, 4096, 4096) == "torch"
    assert best(64 * 500, 4096, 4096, 64, layout="masked") == "gluon"
    for choice in ("torch", "gluon"):
        plan_gemm.cache_clear()
        monkeypatch.setattr(gemm_plan, "LARGE_GROUPS", choice)
        assert best(24576, 2816, 2048, 64) == choice
    plan_gemm.cache_clear()


def test_many_rows_of_fp8() -> None:
    """Tiles of 128 x 256, but where they fill 2.2 waves: others, which fill theirs better."""
    assert best(4096, 7168, 16384, dtype=FP8) == "gluon"
    assert best(4096, 2112, 7168, dtype=FP8) == "cuda"
    assert best(32768, 4096, 7168, 4, dtype=FP8) == "cuda"
    assert planned(32768, 4096, 7168, 4, dtype=FP8).impl == "gluon"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_what_is_left_when_all_others_refuse(dtype: torch.dtype, layout: str, impl: str) -> None:
    assert planned(100, 64, 64, dtype=dtype, layout=layout, available=(impl,)).impl == impl


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("bm", [64, 128])
@pytest.mark.parametrize("bn", [64, 128, 256])
def test_stages_fit_into_shared_memory(bm: int, bn: int, dtype: torch.dtype) -> None:
    plan = gluon_plan(bm, bn, dtype)
    assert plan.stages * 128 * (bm + bn) + 2 * 2 * bm * STORE_WIDTH < SHARED
    assert plan.stages >= 4


@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
def test_no_tile_is_left_without_a_program(layout: str) -> None:
    sizes = (300,) if layout == "dense" else (0, 1, 63, 64, 65, 300, 0)
    p = make(Case(sizes, n=64, k=64, layout=layout, tail=0 if layout == "dense" else 70), "cpu")
    x = p.x.flatten(0, -2)
    capacity = p.x.shape[1] if layout == "masked" else 0
    call = Call(x, p.w, x.new_empty(len(x), 64), p.bounds, None, None, layout, capacity, False)
    for bm in (16, 64, 128):
        behind = 0 if layout != "ends" else -(-70 // bm)
        assert call.tiles_at_most(bm, 3) >= 3 * (sum(-(-size // bm) for size in sizes) + behind)


def arguments(**changes: object) -> dict:
    p = make(Case((3, 0, 5), n=128, k=192, dtype=FP8, tail=1), "cpu")
    given = dict(x=p.x, w=p.w, ends=p.bounds, x_scale=p.x_scale, w_scale=p.w_scale)
    return {name: changes[name](value) if name in changes else value for name, value in given.items()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": lambda x: x[:, :64]}, r"\(9, 64\) and w \(3, 128, 192\).*contracted over the last"),
        ({"w": lambda x: x[0]}, "Pass x with 2 dimensions, w with 3"),
        ({"x": lambda x: x.to(BF16)}, "two operands of one dtype.*Convert"),
        ({"x": lambda x: x.to(torch.int8), "w": lambda x: x.to(torch.int8)}, "int8.*one dtype"),
        ({"x_scale": lambda x: None}, "x_scale is None, w_scale given.*without both"),
        (
            {"x_scale": lambda x: x.T.contiguous()},
            r"x_scale is torch.float32 \(12, 2\).*Pass contiguous float32 \(2, 12\)",
        ),
        ({"x_scale": lambda x: x.T.contiguous().T}, r"strides \(1, 2\).*contiguous"),
        ({"w_scale": lambda x: x.to(BF16)}, r"w_scale is torch.bfloat16.*float32 \(3, 1, 2\)"),
        ({"ends": lambda x: x.long()}, r"ends is torch.int64 \(3,\).*int32 \[3\]"),
        ({"ends": lambda x: x[:2]}, "one 32-bit number a group"),
        ({"ends": lambda x: x.to("meta")}, "on meta"),
        ({"w_scale": lambda x: x.to("meta")}, "x is on cpu, w_scale on meta"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes: dict, words: str) -> None:
    with pytest.raises(BadArguments, match=words):
        gemm.grouped(**arguments(**changes))


def test_bad_arguments_of_the_other_entries() -> None:
    x, w = torch.zeros(4, 64), torch.zeros(2, 8, 64)
    ends = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(BadArguments, match="out_dtype is torch.int8"):
        gemm.linear(x, w[0], out_dtype=torch.int8)
    with pytest.raises(BadArguments, match="Pass as many"):
        gemm.masked(torch.zeros(3, 4, 64), w, ends)
    with pytest.raises(BadArguments, match="gate over up"):
        gemm.grouped(x, w[:, :7], ends, swiglu=True)
    with pytest.raises(BadArguments, match="x_scale is given.*leave the scales out"):
        gemm.linear(x, w[0], x_scale=x)


def test_refusals_on_the_cpu() -> None:
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    x, w = torch.zeros(4, 64), torch.zeros(8, 64)
    with pytest.raises(KernelLimit, match="Only Hopper"):
        gemm.linear(x, w, plan=gluon_plan(128, 128, BF16))
    with pytest.raises(KernelLimit, match="runs on CUDA devices"):
        gemm.linear(x, w, plan=GemmPlan("triton", 16, 16, 2, 8))
    with pytest.raises(KernelLimit, match="gluon: .*triton: "):
        gemm.linear(x, w)


@pytest.fixture
def on_hopper() -> object:
    """As if on Hopper, without compiling: refusals read metadata only."""
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    with launch.offline():
        yield


def test_gluon_takes(on_hopper: object) -> None:
    x, w = torch.zeros(4, 64, dtype=BF16), torch.zeros(2, 8, 64, dtype=BF16)
    assert gluon_refusal(x, w) is None
    assert gluon_refusal(x[:, :40], w[:, :, :40]) is None
    assert gluon_refusal(x, torch.zeros(2, 64, 8, dtype=BF16).transpose(1, 2)) is None
    assert gluon_refusal(x.to(FP8), w.to(FP8)) is None
    assert gluon_refusal(x[:1], w[:1]) is None


def test_gluon_refuses(on_hopper: object) -> None:
    x, w = torch.zeros(4, 68, dtype=BF16), torch.zeros(2, 8, 68, dtype=BF16)
    assert "x (4, 68) has strides (68, 1)" in gluon_refusal(x, w)
    good = torch.zeros(4, 64, dtype=BF16)
    assert "w (2, 8, 64) has strides (544, 68, 1)" in gluon_refusal(good, w[..., :64])
    assert "remainder 8" in gluon_refusal(torch.zeros(8, 72, dtype=BF16)[:, 4:68], torch.zeros(2, 8, 64, dtype=BF16))
    assert "y has 7 columns" in gluon_refusal(good, torch.zeros(2, 7, 64, dtype=BF16))
    assert "y has 12 columns" in gluon_refusal(good, torch.zeros(2, 24, 64, dtype=BF16), swiglu=True)
    assert "at most 16 bits" in gluon_refusal(good.float(), torch.zeros(2, 8, 64))
    assert "at most 16 bits" in gluon_refusal(good, torch.zeros(2, 8, 64, dtype=BF16), out_dtype=torch.float32)
    fp8 = torch.zeros(2, 64, 16, dtype=FP8).transpose(1, 2)
    assert "along K" in gluon_refusal(good.to(FP8), fp8)


def test_torch_refuses_on_the_cpu() -> None:
    x, w = torch.zeros(4, 64, dtype=BF16), torch.zeros(8, 64, dtype=BF16)
    assert "x is on cpu" in gemm_torch.supports(x, w)
    with pytest.raises(KernelLimit, match="products of CUDA devices"):
        gemm.linear(x, w, plan=GemmPlan("torch"))


def test_triton_refuses_fp8_on_old_devices() -> None:
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    with launch.offline((8, 0)):
        assert "(8, 9) or later" in triton_refusal(torch.zeros(4, 16, dtype=FP8))
        assert triton_refusal(torch.zeros(4, 16, dtype=BF16)) is None


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_nothing_to_compute(shape: tuple[int, int], on_hopper: object) -> None:
    """No launch (which the fixture would compile): no row, or a sum over nothing."""
    rows, k = shape
    y = gemm.linear(torch.ones(rows, k, dtype=BF16), torch.ones(16, k, dtype=BF16))
    assert y.shape == (rows, 16) and not y.any()


def test_a_choice_is_made_once_for_calls_alike(on_hopper: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gemm, "_chosen", {})
    monkeypatch.setattr(gemm, "_choose", lambda request, rows: asked.append(rows) or GemmPlan("triton"))
    monkeypatch.setattr(gemm._Request, "run", lambda request, plan: plan.impl)
    x, w = torch.zeros(8, 64, dtype=BF16), torch.zeros(16, 64, dtype=BF16)
    for rows in (8, 8, 4, 8, 4):
        assert gemm.linear(x[:rows], w) == "triton"
    assert asked == [8, 4]
    gemm.linear(x.half(), w.half())
    gemm.linear(x[:, 4:], w[:, 4:].contiguous())  # as aligned as nothing before
    assert asked == [8, 4, 8, 8]


def test_checked_arguments_are_not_checked_again(on_hopper: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "check", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(gemm._Request, "run", lambda request, plan: plan.impl)
    x, w = torch.zeros(8, 64, dtype=BF16), torch.zeros(16, 64, dtype=BF16)
    assert gemm.linear(x, w, plan=gluon_plan(128, 128, BF16), checked=True) == "gluon"
