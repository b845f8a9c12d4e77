"""FP8 products as torch and others call them: what becomes `fp8_linear`, and what is refused with which reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.functional import ScalingType

from dscompile.passes import fp8_refusals, recognize_fp8
from dscompile.report import CompileReport
from tests.passes.tools import compiled
from tests.zoo import fp8
from tests.zoo.toy import Form, ToyMLA

ROUNDING = 3e-3  # of a bfloat16 result


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def only(reports: list[CompileReport]) -> CompileReport:
    (report,) = reports
    return report


def refusal(fn: Any, *args: Any) -> Any:
    """The one refused site of a function; the compiled function is not run where the CPU can't run the original."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list) -> Any:
        found.extend(s for s in recognize_fp8.run(gm)[0].sites if not s.matched)
        return lambda *_: (torch.zeros(()),)

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    (site,) = found
    assert ".py:" in site.source and site.reason and site.hint
    return site


# ------------------------------------------------------------------ torch's scaled products

traces_scaled_mm = pytest.mark.skipif(
    not fp8.TRACES_SCALED_MM, reason=f"versions: Dynamo of torch {torch.__version__} takes no F.scaled_mm"
)


@pytest.mark.parametrize("M", [2, 6, 8, 33])
@pytest.mark.parametrize("spelling", [pytest.param("scaled_mm", marks=traces_scaled_mm), "_scaled_mm"])
def test_a_scaled_product_becomes_fp8_linear(spelling: str, M: int) -> None:
    layer = fp8.ScaledLinear(256, 640, spelling)  # 5 column blocks: cuBLAS's layout of their scales is padded to 8
    x = fp8.rows(M, 640)
    y, reports = compiled(layer, *x)
    assert error(y, layer.expected(*x)) < ROUNDING
    report = only(reports)
    assert report.op_counts == {"fp8_linear": 1}
    (site,) = report.sites
    assert (site.kind, site.matched, site.decision) == ("fp8_linear", True, "fp8_linear")
    assert spelling in site.form and site.kernel


@pytest.mark.parametrize("count", [0, 3])
def test_occurrences(count: int) -> None:
    layers = [fp8.ScaledLinear(128, 256) for _ in range(count)]

    def run(x: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        return x + sum(layer(*rows).float() for layer in layers)

    rows, x = fp8.rows(4, 256), torch.randn(4, 128)
    y, reports = compiled(run, x, *rows)
    assert only(reports).op_counts == ({"fp8_linear": count} if count else {})
    expected = x + sum(layer.expected(*rows) for layer in layers)
    assert error(y, expected) < ROUNDING


def test_dynamic_lengths_are_one_graph() -> None:
    layer, reports = fp8.ScaledLinear(256, 256, "_scaled_mm"), []
    torch._dynamo.reset()

    def backend(gm, inputs):
        from dscompile.backend import dsinfra

        return dsinfra(gm, inputs, options={"inner": "aot_eager"}, sink=reports.append)

    call = torch.compile(layer, backend=backend, fullgraph=True)
    for M in (5, 8, 31, 64):
        values, scale = fp8.rows(M, 256)
        torch._dynamo.mark_dynamic(values, 0)
        torch._dynamo.mark_dynamic(scale, 0)
        assert error(call(values, scale), layer.expected(values, scale)) < ROUNDING
    assert only(reports).op_counts == {"fp8_linear": 1}


def test_a_bias_goes_along() -> None:
    layer, bias, rows = fp8.ScaledLinear(256, 128), torch.randn(256).bfloat16(), fp8.rows(4, 128)

    def run(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            values,
            layer.weight.t(),
            scale_a=scale,
            scale_b=layer.scale[:, : layer.blocks].t(),
            bias=bias,
            out_dtype=torch.bfloat16,
        )

    y, reports = compiled(run, *rows)
    assert only(reports).op_counts == {"fp8_linear": 1}
    assert error(y, layer.expected(*rows) + bias.float()) < ROUNDING


def _product(recipes: tuple, a: torch.Tensor, b: torch.Tensor, **settings: Any) -> Any:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.scaled_mm(x, w.t(), a, recipes[0], b, recipes[1], **settings)

    return run


def _near_misses() -> dict[str, tuple]:
    """name -> (function of (x, w), dtype of x, refusal)."""
    one, kind = torch.ones(()), ScalingType
    rows, blocks = torch.ones(2, 16).t(), torch.ones(2, 4).t()  # of x [16, 256] and w [256, 256]
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    tensor, block = (kind.TensorWise, kind.TensorWise), (kind.BlockWise1x128, kind.BlockWise128x128)
    by_row = (kind.RowWise, kind.RowWise)

    def fp8_result(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=rows, scale_b=blocks[:2])

    def one_scale(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return {
        "tensor": (_product(tensor, one, one), e4m3, "PerTensorScale"),
        "row": (_product(by_row, torch.ones(16, 1), torch.ones(256, 1).t()), e4m3, "WrongBlocks"),
        "rows_both": (_product((kind.BlockWise1x128,) * 2, rows, torch.ones(2, 256).t()), e4m3, "WrongBlocks"),
        "e5m2": (_product(block, rows, blocks), e5m2, "WrongFormat"),
        "fp8_result": (fp8_result, e4m3, "WrongFormat"),
        "one_scale": (one_scale, e4m3, "PerTensorScale"),
    }


WRITTEN_WITH_SCALED_MM = ("tensor", "row", "rows_both", "e5m2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[traces_scaled_mm] if n in WRITTEN_WITH_SCALED_MM else []) for n in _near_misses()],
)
def test_other_products_are_refused(name: str) -> None:
    run, dtype, expected = _near_misses()[name]
    x, w = torch.randn(16, 256).to(dtype), torch.randn(256, 256).to(torch.float8_e4m3fn)
    assert refusal(run, x, w).refusal == expected


# ------------------------------------------------------------------ reads that no operator makes


@pytest.mark.parametrize(
    ("block", "expected", "words"),
    [(64, "WrongBlocks", "64 x 64"), (None, "PerTensorScale", "whole"), (128, "Dequantized", "dequantised")],
)
def test_dequantised_weights_are_refused_and_run(block: int | None, expected: str, words: str) -> None:
    layer, x = fp8.DequantizedLinear(256, 256, block), torch.randn(4, 256)
    site = refusal(layer, x)
    assert site.refusal == expected and words in site.reason
    y, reports = compiled(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert only(reports).op_counts == {}


def test_kernels_of_others_prove_nothing_by_their_name() -> None:
    layer, x = fp8.KernelLinear(256, 256), torch.randn(4, 256)
    site = refusal(layer, x)
    assert site.refusal == "OpaqueKernel" and "fp8_gemm" in site.reason
    y, reports = compiled(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert only(reports).op_counts == {}


def test_a_triton_kernel_in_the_graph_is_refused() -> None:
    """As Dynamo writes a user's kernel on a machine with a GPU: a higher-order operator over a table of kernels."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    graph = fx.Graph()
    weight = graph.placeholder("weight")
    with torch._subclasses.FakeTensorMode():
        weight.meta["example_value"] = torch.empty(256, 256, dtype=torch.float8_e4m3fn)
    graph.call_function(triton_kernel_wrapper_mutation, (), {"kernel_idx": 0, "kwargs": {"b_ptr": weight}})
    graph.output(())
    record, found = recognize_fp8.run(fx.GraphModule(nn.Module(), graph))
    assert not found
    (site,) = record.sites
    assert site.refusal == "OpaqueKernel" and "Triton" in site.reason


def test_views_and_sizes_of_fp8_tensors_are_no_reads() -> None:
    layer = fp8.ScaledLinear(256, 256)

    def run(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return layer(values.view(-1, 256)[: values.shape[0]].contiguous(), scale)

    assert [s.matched for s in only(compiled(run, *fp8.rows(8, 256))[1]).sites] == [True]


def test_every_refusal_is_covered() -> None:
    """`KeptPrecise` and `GradientWeights` are raised where weights are quantised by request."""
    classes = {c.__name__ for c in vars(fp8_refusals).values() if isinstance(c, type)} - {"Refusal"}
    near_misses = {expected for *_, expected in _near_misses().values()}
    assert classes == {*near_misses, "Dequantized", "OpaqueKernel", "KeptPrecise", "GradientWeights"}


# ------------------------------------------------------------------ rows that several products read


class TwoProducts(nn.Module):
    """Two FP8 layers over one input, which `write` may change in between."""

    def __init__(self, write: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (Fp8UpProjection(torch.randn(256, 128)) for _ in range(2))
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 1
        first = self.first(h)
        if self.write:
            h.mul_(2)
        return first.softmax(-1) + self.second(h)  # a softmax, so that the graph is analysed


@torch.no_grad()
@pytest.mark.parametrize("write", [False, True])
def test_rows_are_quantised_once_unless_written(write: bool) -> None:
    layer, x = TwoProducts(write), torch.randn(2, 5, 128)
    y, reports = compiled(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert only(reports).op_counts["quantize_1x128"] == (2 if write else 1)
    assert only(reports).op_counts["fp8_linear"] == 2


# ------------------------------------------------------------------ MLA over an FP8 up-projection


class Fp8UpProjection(nn.Module):
    """`kv_b` of a toy MLA over the operators, as the kernels put in transformers' place call them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, rows: slice = slice(None)):
        super().__init__()
        values, scale = fp8.quantized(weight)
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias, self.rows = bias, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = torch.ops.dsinfra.quantize_1x128(x.reshape(-1, x.shape[-1]))
        weight = self.values[self.rows]
        y = torch.ops.dsinfra.fp8_linear(q, scale, weight, self.scale[: weight.shape[0]], self.bias, x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])


class Fp8MLA(ToyMLA):
    """Toy MLA whose dimensions are whole FP8 blocks; `wide` turns its up-projection into the dequantised one."""

    D, L, C, N, R, V = 64, 48, 128, 16, 8, 16

    def quantise(self, **settings: Any) -> ToyMLA:
        weight = self.kv_b.weight.detach()
        twin = type(self)(self.form)
        twin.load_state_dict(self.state_dict())
        self.kv_b = Fp8UpProjection(weight, **settings)
        twin.kv_b.weight.data = fp8.dequantized(self.kv_b.values, self.kv_b.scale)
        return twin.eval()


def _toy(**settings: Any) -> tuple[Fp8MLA, ToyMLA, torch.Tensor]:
    torch.manual_seed(0)
    layer = Fp8MLA(Form(heads=4)).eval()
    return layer, layer.quantise(**settings), torch.randn(2, 10, 64)


@torch.no_grad()
def test_mla_looks_through_the_fp8_up_projection() -> None:
    layer, twin, x = _toy()
    y, reports = compiled(layer, x)
    report = only(reports)
    assert report.op_counts["mla"] == 1
    mla, product = report.sites
    assert mla.kind == "mla" and mla.matched
    assert product.kind == "fp8_linear" and product.decision.startswith("replaced")
    # The activations of the up-projection are no longer rounded to FP8: equal to the twin, unlike the module itself.
    assert error(y, twin(x)) < 1e-5 < error(layer(x), twin(x))


@torch.no_grad()
def test_the_dequantised_weight_follows_the_fp8_one() -> None:
    layer, twin, x = _toy()
    reports: list[CompileReport] = []

    def backend(gm, inputs):
        from dscompile.backend import dsinfra

        return dsinfra(gm, inputs, options={"inner": "aot_eager"}, sink=reports.append)

    torch._dynamo.reset()
    call = torch.compile(layer, backend=backend, fullgraph=True)
    assert error(call(x), twin(x)) < 1e-5
    layer.kv_b.scale.mul_(0.5)
    twin.kv_b.weight.mul_(0.5)
    assert error(call(x), twin(x)) < 1e-5
    layer.kv_b.values.copy_(fp8.quantized(torch.randn(128, 128))[0])
    twin.kv_b.weight.copy_(fp8.dequantized(layer.kv_b.values, layer.kv_b.scale))
    assert error(call(x), twin(x)) < 1e-5
    assert len(reports) == 1


@torch.no_grad()
def test_an_fp8_up_projection_with_a_bias_is_refused() -> None:
    layer, _, x = _toy(bias=torch.randn(128))
    y, reports = compiled(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert [s.refusal for s in only(reports).sites if s.kind == "mla"] == ["UpProjectionBias"]


@torch.no_grad()
def test_a_part_of_an_fp8_weight_is_refused() -> None:
    layer, _, x = _toy()
    values, scale = fp8.quantized(torch.randn(256, 128))
    layer.kv_b.values, layer.kv_b.scale = (nn.Parameter(t, requires_grad=False) for t in (values, scale))
    layer.kv_b.rows = slice(0, 128)
    layer.kv_b.forward = lambda x: _sliced(layer.kv_b, x)
    y, reports = compiled(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert [s.refusal for s in only(reports).sites if s.kind == "mla"] == ["RowsDisagree"]


def _sliced(layer: Fp8UpProjection, x: torch.Tensor) -> torch.Tensor:
    q, scale = torch.ops.dsinfra.quantize_1x128(x.reshape(-1, x.shape[-1]))
    y = torch.ops.dsinfra.fp8_linear(q, scale, layer.values[:128], layer.scale[:1], None, x.dtype)
    return y.reshape(*x.shape[:-1], 128)


@torch.no_grad()
def test_a_latent_overwritten_after_its_quantisation_is_refused() -> None:
    layer, _, x = _toy()

    def up_project(latent: torch.Tensor) -> torch.Tensor:
        own = layer.kv_b
        rows = latent.reshape(-1, 128).clone()
        q, scale = torch.ops.dsinfra.quantize_1x128(rows)
        rows.zero_()
        y = torch.ops.dsinfra.fp8_linear(q, scale, own.values, own.scale, None, x.dtype)
        return y.reshape(*latent.shape[:-1], 128)

    layer.kv_b.forward = up_project
    y, reports = compiled(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert [s.matched for s in only(reports).sites if s.kind == "mla"] == [False]
