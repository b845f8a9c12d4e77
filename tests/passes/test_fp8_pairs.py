"""Declared FP8 kernels: checked on numbers when they are declared, replaced where they are called as checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dscompile.passes.fp8_pairs import Fp8Pair, Fp8PairError, register_fp8_pair
from tests.passes.toy import compile_passes
from tests.zoo import fp8

FP8 = torch.float8_e4m3fn


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As a function that launches a kernel; `item` ends a graph, as what launches one may."""
    assert x.float().abs().sum().item() >= 0
    values, scale = fp8.act_quant(x, block_size)
    return (values, scale) if scale_fmt is None else (values, torch.exp2(scale.log2().ceil()))


def fp8_gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    assert a.float().abs().sum().item() >= 0
    x = a.float() * a_s.repeat_interleave(128, -1)
    return (x @ fp8.dequantized(b, b_s).t()).to(torch.get_default_dtype())


class Linear(nn.Module):
    """A linear layer over a pair of kernels; `how` is what it passes behind the tensors."""

    def __init__(self, quantize=act_quant, multiply=fp8_gemm, N: int = 200, how: tuple = (128,)):  # type: ignore[no-untyped-def]
        super().__init__()
        values, scale = fp8.quantized(torch.randn(N, 256, generator=torch.Generator().manual_seed(0)))
        self.weight, self.scale = nn.Buffer(values), nn.Buffer(scale)
        self.kernels, self.how = (quantize, multiply), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantize, multiply = self.kernels
        values, scale = quantize(x.contiguous(), *self.how)
        return multiply(values, scale, self.weight, self.scale)


@pytest.fixture(scope="module")
def functions() -> Iterator[Fp8Pair]:
    """A pair of Python functions."""
    with register_fp8_pair(act_quant, fp8_gemm, device="cpu") as pair:
        yield pair


@pytest.fixture
def operators() -> Iterator[Fp8Pair]:
    """A pair of custom operators."""
    with register_fp8_pair(fp8.act_quant, fp8.fp8_gemm, device="cpu") as pair:
        yield pair


def check(module: nn.Module, x: torch.Tensor, **settings: bool):  # type: ignore[no-untyped-def]
    """The report of a module that computes as before up to FP8's ties."""
    compiled, reports = compile_passes(module, "eager", **settings)
    with torch.no_grad():
        ours, eager = compiled(x), module(x)
    torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    return reports


@pytest.mark.parametrize("shape", [(5, 256), (2, 3, 256), (1, 256)])
def test_functions_become_one_product(functions: Fp8Pair, shape: tuple[int, ...]) -> None:
    (report,) = check(Linear(), torch.randn(shape))
    assert report.op_counts == {"fp8_linear": 1, "quantize_1x128": 1} and not report.refused, report


def test_operators_become_one_product(operators: Fp8Pair) -> None:
    (report,) = check(Linear(fp8.act_quant, fp8.fp8_gemm), torch.randn(3, 256))
    assert report.op_counts == {"fp8_linear": 1, "quantize_1x128": 1} and "declared" in report.sites[0].form
    operators.remove()
    torch._dynamo.reset()
    (report,) = check(Linear(fp8.act_quant, fp8.fp8_gemm), torch.randn(3, 256))
    assert [site.refusal for site in report.refused] == ["OpaqueKernel"]


def test_rows_that_are_written_later_are_quantised_before(operators: Fp8Pair) -> None:
    class Written(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 0
            values, scale = fp8.act_quant(x, 128)
            x.mul_(3)
            return fp8.fp8_gemm(values, scale, self.weight, self.scale) + x.sum()

    (report,) = check(Written(), torch.randn(3, 256))
    assert report.op_counts["quantize_1x128"] == 1


def test_values_of_another_quantiser_keep_it(operators: Fp8Pair) -> None:
    """Blocks of rows from elsewhere are multiplied as they come, with scales laid out anew."""

    class Other(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            blocks = x.unflatten(-1, (-1, 128))
            return fp8.fp8_gemm(blocks.flatten(-2).to(FP8), blocks.abs().amax(-1), self.weight, self.scale)

    (report,) = check(Other(), torch.randn(2, 3, 256))
    assert report.op_counts == {"fp8_linear": 1}


def test_calls_unlike_those_checked_stay(functions: Fp8Pair) -> None:
    """Scales rounded to powers of two: the product is taken, the quantiser is what the model wrote."""
    module = Linear(how=(128, "ue8m0"))
    reports = check(module, torch.randn(3, 256))
    assert sum((r.op_counts.get("quantize_1x128", 0) for r in reports), 0) == 0
    assert sum((r.op_counts.get("fp8_linear", 0) for r in reports), 0) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, b: (fp8.act_quant(x, b)[0], fp8.act_quant(x, b)[1] * 1.01), "448"),
        (lambda x, b: act_quant(x, b, "ue8m0"), "448"),
        (lambda x, b: ((v := fp8.act_quant(x, b))[0].float().mul(0.95).to(FP8), v[1]), "nearest"),
        (lambda x, b: fp8.act_quant(x, 2 * b if x.shape[-1] % 256 == 0 else b), "quantize"),
    ],
    ids=["scale", "powers_of_two", "values", "blocks"],
)
def test_another_quantiser_is_not_believed(wrong, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Fp8PairError, match=words):
        register_fp8_pair(wrong, fp8.fp8_gemm, device="cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, a_s, b, b_s: fp8.fp8_gemm(a, a_s.flip(-1), b, b_s),
        lambda a, a_s, b, b_s: fp8.fp8_gemm(a, a_s, b, b_s.flip(0)),
        lambda a, a_s, b, b_s: fp8.fp8_gemm(a, a_s, b, b_s) * 1.02,
        lambda a, a_s, b, b_s: fp8.fp8_gemm(a, a_s, b, b_s.mean().expand_as(b_s)),
        lambda a, a_s, b, b_s: fp8.fp8_gemm(a, a_s, b, b_s).flip(0),
        lambda a, a_s, b, b_s: fp8.fp8_gemm(a[..., :128], a_s[..., :1], b[:, :128], b_s[:, :1]),
    ],
    ids=["columns", "rows", "factor", "one_scale", "order", "half"],
)
def test_another_product_is_not_believed(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Fp8PairError, match="multiply"):
        register_fp8_pair(None, wrong, device="cpu")
