"""The host side of plan, gather, combine, quantise and route on the CPU: what is refused with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dscompile.kernels import launch, moe, moe_launch, quantize
from dscompile.kernels.activation import gated_activation
from dscompile.kernels.overlap import _kind
from dscompile.kernels.refusals import BadArguments, KernelLimit
from dscompile.kernels.route import refusal as route_refusal
from dscompile.kernels.route import route

ROOT = Path(__file__).parents[2]

IDS = torch.zeros(3, 2, dtype=torch.int64)
X = torch.zeros(3, 256)
ORDER = torch.zeros(6, dtype=torch.int32)
POSITION = torch.zeros(3, 2, dtype=torch.int32)
Z, WEIGHT = torch.zeros(6, 256), torch.zeros(3, 2)
LOGITS = torch.zeros(3, 12)
ENDS = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: moe.plan(IDS[0], 4), r"int64 \(2,\).*int32 \[T, K\]"),
        (lambda: moe.plan(IDS.float(), 4), "float32.*Pass int64"),
        (lambda: moe.plan(IDS, 0), "experts is 0"),
        (lambda: moe.plan(IDS, 4097), "Use 1 to 4096"),
        (lambda: moe.plan_and_gather(X[:2], IDS, 4), r"x is \(2, 256\).*Row t of both"),
        (lambda: moe.plan_and_gather(X.to("meta"), IDS, 4), "on one device"),
        (lambda: moe.gather_rows(X[0], ORDER, 2), r"Pass \[T, D\]"),
        (lambda: moe.gather_rows(X, ORDER.long(), 2), r"order is torch.int64.*contiguous int32 \[6\]"),
        (lambda: moe.gather_rows(X, ORDER, 3), r"int32 \[9\]"),
        (lambda: moe.gather_rows(X, ORDER, 2, POSITION.t()), r"position.*int32 \[3, 2\]"),
        (lambda: moe.combine(Z[:5], POSITION, WEIGHT, IDS, 4), r"z is \(5, 256\).*Pass z \[T \* K, D\]"),
        (lambda: moe.combine(Z, POSITION, WEIGHT[:2], IDS, 4), r"topk_weight is \(2, 2\)"),
        (lambda: moe.combine(Z, POSITION.long(), WEIGHT, IDS, 4), "int64.*contiguous int32"),
        (lambda: moe.combine(Z, POSITION, WEIGHT.to("meta"), IDS, 4), "Move them to one device"),
        (lambda: moe.combine(Z, POSITION, WEIGHT, IDS, 4, None, Z), r"bias is \(6, 256\).*Pass \[4, 256\]"),
        (lambda: gated_activation(X[:, 1:]), r"gate_up is \(3, 255\).*Pass \[M, 2F\]"),
        (lambda: gated_activation(X, activation="relu"), "'relu'.*'silu', 'gelu'"),
        (lambda: gated_activation(X, ENDS.long()), r"ends is torch.int64.*contiguous int32 \[E\]"),
        (lambda: gated_activation(X, None, X), "no ends.*Pass ends"),
        (lambda: gated_activation(X, ENDS, X), r"bias is \(3, 256\).*4 experts.*\[E, 256\]"),
        (lambda: route(LOGITS[0], None, 2, "softmax"), r"Pass \[T, E\]"),
        (lambda: route(LOGITS, None, 13, "softmax"), "13 of 12 experts.*Use 1 to 12"),
        (lambda: route(LOGITS, None, 0, "softmax"), "top_k is 0"),
        (lambda: route(LOGITS, LOGITS, 2, "softmax"), r"bias is \(3, 12\).*Pass \[12\]"),
        (lambda: route(LOGITS, None, 2, "tanh"), "'tanh'.*'softmax', 'sigmoid', 'softmax_topk'"),
        (lambda: route(LOGITS, None, 2, "softmax", 3, 2, "top3"), "'top3'.*'max', 'top2'"),
        (lambda: route(LOGITS, None, 2, "softmax", 5, 2), "2 of 5 groups of 12 experts"),
        (lambda: route(LOGITS, None, 2, "softmax", 3, 4), "4 of 3 groups"),
        (lambda: route(LOGITS, None, 2, "softmax", 12, 4, "top2"), "no second to add"),
    ],
)
def test_bad_arguments(call: object, words: str) -> None:
    with pytest.raises(BadArguments, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize.quantize_1x128(X[0]), r"x is \(256,\).*Pass \[M, K\]"),
        (lambda: quantize.silu_mul_quantize_1x128(X[:, 1:]), r"gate_up is \(3, 255\).*Pass \[M, 2F\]"),
        (lambda: quantize.silu_mul_quantize_1x128(X, ENDS.long()), r"ends is torch.int64.*Pass contiguous int32 \[G\]"),
        (lambda: quantize.silu_mul_quantize_1x128(X, ENDS[:0]), r"\(0,\)"),
        (lambda: quantize.gather_quantize_1x128(X, ORDER, 3), r"int32 \[9\]"),
        (lambda: quantize.gather_quantize_1x128(X, ORDER, 2, POSITION.t()), "position"),
    ],
)
def test_bad_arguments_of_quantisation(call: object, words: str) -> None:
    with pytest.raises(BadArguments, match=words):
        call()


@pytest.fixture
def hopper() -> object:
    """As if on Hopper, without compiling: refusals read metadata only."""
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    with launch.offline():
        yield


def test_refusals_on_the_cpu() -> None:
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    calls = (
        lambda: moe.plan(IDS, 4),
        lambda: moe.plan_and_gather(X, IDS, 4),
        lambda: moe.plan_and_gather_quantize(X, IDS, 4),
        lambda: moe.gather_rows(X, ORDER, 2),
        lambda: moe.combine(Z, POSITION, WEIGHT, IDS, 4),
        lambda: quantize.quantize_1x128(X),
        lambda: gated_activation(X),
        lambda: route(LOGITS, None, 2, "softmax"),
    )
    for call in calls:
        with pytest.raises(KernelLimit, match="runs on CUDA devices"):
            call()


def test_refusals_on_hopper(hopper: object) -> None:
    assert quantize.refusal(X) is None and quantize.refusal(X.bfloat16()) is None
    assert "float64" in quantize.refusal(X.double())
    assert route_refusal(LOGITS, 2) is None
    assert "at most 32 of 512" in route_refusal(torch.zeros(3, 513), 2)
    assert "at most 32 of 512" in route_refusal(torch.zeros(3, 64), 33)
    with pytest.raises(KernelLimit, match="topk_weight is torch.float64"):
        moe.combine(Z, POSITION, WEIGHT.double(), IDS, 4)
    with pytest.raises(KernelLimit, match="y is torch.int32"):
        moe.combine(Z, POSITION, WEIGHT, IDS, 4, torch.int32)
    with pytest.raises(KernelLimit, match="bias is torch.float64"):
        route(LOGITS, torch.zeros(12, dtype=torch.float64), 2, "softmax")


def test_fp8_needs_a_gpu_that_has_it() -> None:
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    with launch.offline((8, 0)):
        assert "(8, 9)" in quantize.refusal(X)


@pytest.mark.parametrize(("rows", "padded"), [(0, 0), (1, 4), (4, 4), (5, 8)])
def test_padded_rows(rows: int, padded: int) -> None:
    assert quantize.padded_rows(rows) == padded


def test_few_rows_make_narrow_programs_and_many_wide_ones() -> None:
    assert moe_launch.plan_chunk(8, 7168) == (256, 1)
    assert moe_launch.plan_chunk(256, 7168) == (1024, 4)
    assert moe_launch.plan_chunk(4096, 7168) == (2048, 8)
    assert moe_launch.plan_chunk(4096, 300) == (512, 2)
    assert moe_launch.plan_chunk(8, 7) == (128, 1)  # a block of the quantisation at least
    assert moe_launch.combine_chunk(32, 7168) == (1024, 4) and moe_launch.combine_chunk(33, 7168) == (1024, 2)
    assert moe_launch.row_chunk(7168) == (1024, 4) and moe_launch.row_chunk(7) == (256, 1)
    assert quantize.tile_of(64) == (4, 1) and quantize.tile_of(65) == (16, 4)


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("bounds", [1, 8, 32])
def test_comparisons_of_the_plan_fill_the_warps_and_fit_the_registers(bounds: int, warps: int) -> None:
    assert moe_launch.plan_slots(32 * warps, bounds, warps) == 32 * warps
    many = moe_launch.plan_slots(4096, bounds, warps)
    assert many >= 32 * warps and many * bounds <= 1024 * warps


def test_launches_are_told_apart_as_triton_specialises() -> None:
    """Values of one kind may share a compiled kernel, so kinds must be no coarser than Triton's own."""
    x = torch.zeros(64, dtype=torch.bfloat16)
    assert _kind(x) == _kind(x[8:]) != _kind(x[1:])  # 16 bytes further, and 2
    assert _kind(x) != _kind(x.half()) != _kind(x.float())
    assert len({_kind(value) for value in (1, 2, 16, 1 << 31, (1 << 31) + 1)}) == 5
    assert _kind(3) == _kind(5) and _kind(32) == _kind(4096) and _kind(0) == _kind(16)
    assert _kind(None) != _kind(1.0) == _kind(2.0)
    if launch.has_gluon():
        from dscompile.kernels.gemm_launch import _tensor_map

        square = torch.zeros(64, 64, dtype=torch.bfloat16)
        found = _kind(_tensor_map(square, (64, 32)))
        assert found == _kind(_tensor_map(square[:8], (64, 32))) != _kind(_tensor_map(square, (32, 32)))
        assert found != _kind(_tensor_map(square.half(), (64, 32)))


def test_without_triton_everything_imports_and_says_so() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from dscompile.kernels import moe, quantize, route\n"
        "assert 'not installed' in quantize.refusal(torch.zeros(1, 1))\n"
        "assert 'not installed' in route.refusal(torch.zeros(1, 1), 1)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
