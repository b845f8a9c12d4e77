"""`options={"fp8": "block"}`: which weights are quantised, and what it costs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dscompile.backend import dsinfra
from dscompile.errors import OptionError, StrictRefusal
from dscompile.lowering.block_scales import dequantize_rows, quantize_rows
from dscompile.passes import quantize_weights
from dscompile.report import CompileReport
from tests.zoo import fp8


class MLP(nn.Module):
    """A gated layer between a residual and its sum: three linear layers, of which two read the same rows."""

    def __init__(self, D: int = 128, width: int = 256, bias: bool = False):
        super().__init__()
        self.gate, self.up = (nn.Linear(D, width, bias=bias) for _ in range(2))
        self.down = nn.Linear(width, D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Compiled:
    """A module compiled with the option, and the reports of its graphs."""

    def __init__(self, module: nn.Module, *, options: dict[str, Any] | None = None, **settings: Any):
        self.reports: list[CompileReport] = []
        chosen = {"inner": "aot_eager", "fp8": "block", "strict": False, **(options or {})}

        def backend(gm: torch.fx.GraphModule, inputs: list) -> Any:
            return dsinfra(gm, inputs, options=chosen, sink=self.reports.append)

        torch._dynamo.reset()
        self.call = torch.compile(module, backend=backend, fullgraph=True, **settings)

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.call(*args)

    @property
    def report(self) -> CompileReport:
        (report,) = self.reports
        return report

    def refusals(self) -> dict[str, str]:
        return {site.module_path: site.refusal for site in self.report.refused}


def build(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.bfloat16().eval()


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


class Emulated(nn.Linear):
    """The product as the format defines it, in float32: rows and weight rounded to FP8, and multiplied back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        y = dequantize_rows(*quantize_rows(flat)) @ fp8.dequantized(*fp8.quantized(self.weight.float())).t()
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class EmulatedMLP(MLP):
    """silu(gate) * up of bfloat16 products, quantised without another rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.gate(x).float()) * self.up(x).float()
        return x + self.down(hidden).to(x.dtype)


def emulated(module: nn.Module) -> nn.Module:
    """The module with such linear layers, over the same weights."""
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        if type(layer) in (nn.Linear, MLP):
            layer.__class__ = Emulated if type(layer) is nn.Linear else EmulatedMLP
    return twin


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


ROUNDING = 6e-3  # bfloat16 results of layers whose float32 sums run in another order


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("shape", [(128, 128), (200, 330), (3, 256, 144)], ids=str)
def test_a_weight_is_stored_as_the_format_says(shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape)
    values, scale = quantize_weights.quantize_weight(weight)
    expected = fp8.quantized(weight)
    assert torch.equal(values.float(), expected[0].float())
    torch.testing.assert_close(scale, expected[1])


def test_a_weight_of_zeros_stays_zero() -> None:
    values, scale = quantize_weights.quantize_weight(torch.zeros(128, 256))
    assert (values.float() == 0).all() and scale.isfinite().all()


def test_errors_are_those_of_the_stored_weight() -> None:
    weight = torch.randn(256, 256)
    exact = torch.ones(128, 128)
    of_weight, of_output = quantize_weights.errors(weight, *quantize_weights.quantize_weight(weight))
    stored = fp8.dequantized(*quantize_weights.quantize_weight(weight))
    assert of_weight == pytest.approx(error(stored, weight), rel=1e-4)
    assert of_weight < of_output < 2 * of_weight
    assert quantize_weights.errors(exact, *quantize_weights.quantize_weight(exact))[0] == 0


# ------------------------------------------------------------------ what is rewritten


@pytest.mark.parametrize("count", [1, 3])
def test_linear_layers_are_quantised_and_agree_with_eager(count: int) -> None:
    module, x = build(nn.Sequential(*(MLP() for _ in range(count)))), rows(2, 5, 128)
    call = Compiled(module)
    with torch.no_grad():
        assert error(call(x), emulated(module)(x)) < ROUNDING * count
        # No further off than the layers' own errors together.
        assert error(call(x), module(x)) < sum(site.errors["output"] for site in call.report.sites)
    # Gate and up are one product, whose result is quantised as the activation is computed.
    operators = {"fp8_linear": 2, "quantize_1x128": 1, "silu_mul_quantize_1x128": 1}
    assert call.report.op_counts == {name: number * count for name, number in operators.items()}
    assert len(call.report.matched) == 3 * count and not call.report.refused


def test_each_site_says_what_it_costs() -> None:
    call = Compiled(build(MLP()))
    call(rows(4, 128))
    for site in call.report.sites:
        assert site.kind == "fp8_linear" and site.kernel
        assert 0.01 < site.errors["weight"] < 0.05 and 0.01 < site.errors["output"] < 0.08
    assert "weight 2." in str(call.report) and site.as_dict()["errors"] == site.errors


def test_bias_and_single_rows_of_tokens() -> None:
    module, x = build(MLP(bias=True)), rows(1, 128)
    with torch.no_grad():
        assert error(Compiled(module)(x), emulated(module)(x)) < ROUNDING


class Biased(MLP):
    """Not the gated layer that is joined: gate has a bias, or the hidden rows are read twice, or x is halved for up."""

    def __init__(self, change: str):
        super().__init__()
        self.change = change
        if change == "bias":
            self.gate = nn.Linear(128, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x), self.up(x / 2 if self.change == "input" else x)
        hidden = F.gelu(gate) * up if self.change == "gelu" else F.silu(gate) * up
        y = x + self.down(hidden)
        return y + hidden.sum(-1, keepdim=True) if self.change == "read twice" else y


@pytest.mark.parametrize("change", ["bias", "read twice", "input", "gelu"])
def test_other_gated_layers_are_quantised_one_by_one(change: str) -> None:
    module, x = build(Biased(change)), rows(4, 128)
    call = Compiled(module)
    with torch.no_grad():
        assert error(call(x), emulated(module)(x)) < ROUNDING
    assert call.report.op_counts["fp8_linear"] == 3
    assert "silu_mul_quantize_1x128" not in call.report.op_counts


def test_a_narrow_gated_layer_has_no_joined_weight() -> None:
    module, x = build(MLP(width=144)), rows(4, 128)  # blocks of the joined weight would hold rows of both
    call = Compiled(module)
    with torch.no_grad():
        assert error(call(x), module(x)) < sum(site.errors["output"] for site in call.report.sites)
    assert call.report.op_counts["fp8_linear"] == 3


def test_dynamic_lengths_are_one_graph() -> None:
    module = build(MLP())
    call = Compiled(module, dynamic=True)
    for length in (5, 8, 31, 64):
        x = rows(2, length, 128)
        with torch.no_grad():
            assert error(call(x), emulated(module)(x)) < ROUNDING
    assert call.report.op_counts["fp8_linear"] == 2


def test_the_pass_is_dumped(tmp_path: Path) -> None:
    Compiled(build(MLP()), options={"dump": str(tmp_path)})(rows(4, 128))
    (graph,) = tmp_path.iterdir()
    (difference,) = graph.glob("*quantize_weights.diff")
    assert "dsinfra.fp8_linear.default" in difference.read_text()


def test_without_the_option_nothing_changes() -> None:
    call = Compiled(build(MLP()), options={"fp8": None})
    call(rows(4, 128))
    assert call.report.op_counts == {} and call.report.sites == []


def test_rows_that_are_written_in_between_are_quantised_again() -> None:
    class Written(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 1
            gate = self.gate(h)
            h.mul_(2)
            return x + self.down(F.silu(gate) * self.up(h))

    module, x = build(Written()), rows(4, 128)
    call = Compiled(module)
    with torch.no_grad():
        assert error(call(x), emulated(module)(x)) < ROUNDING
    assert call.report.op_counts == {"fp8_linear": 3, "quantize_1x128": 3}


class Routed(nn.Module):
    """A router over 128 experts beside a layer whose result leaves the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.router, self.head = MLP(), nn.Linear(128, 128, bias=False), nn.Linear(128, 512, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.mlp(x)
        scores = self.router(x).float().softmax(-1)
        return self.head(x[..., -1:, :]).float(), torch.topk(scores, 2, -1)[1]


def test_routers_and_heads_are_kept() -> None:
    call = Compiled(build(Routed()))
    call(rows(2, 4, 128))
    assert call.refusals() == {"router": "KeptPrecise", "head": "KeptPrecise"}
    assert [s.reason.split(":")[0] for s in call.report.refused] == ["a router", "the head"]
    assert call.report.op_counts["fp8_linear"] == 2


def test_the_head_is_quantised_when_asked() -> None:
    call = Compiled(build(Routed()), options={"fp8_head": True})
    call(rows(2, 4, 128))
    assert call.refusals() == {"router": "KeptPrecise"}


def test_what_is_kept_by_design_is_no_fault_under_strict() -> None:
    call = Compiled(build(Routed()), options={"strict": True})
    call(rows(2, 4, 128))
    assert call.report.op_counts["fp8_linear"] == 2


def test_a_layer_between_the_parts_of_a_gated_one_shares_its_rows() -> None:
    class Parallel(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(128, 128, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up, other = self.gate(x), self.up(x), self.other(x)
            return x + self.down(F.silu(gate) * up) + other

    module, x = build(Parallel()), rows(4, 128)
    call = Compiled(module, options={"strict": True})
    with torch.no_grad():
        assert error(call(x), module(x)) < sum(site.errors["output"] for site in call.report.sites)
    assert call.report.op_counts == {"quantize_1x128": 1, "fp8_linear": 3, "silu_mul_quantize_1x128": 1}


@torch.library.custom_op("dsinfra_test_names::linear", mutates_args=())
def foreign_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return 3 * (x @ w)


@foreign_linear.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.custom_op("dsinfra_test_names::silu", mutates_args=())
def foreign_silu(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


@foreign_silu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_functions_of_others_are_not_known_by_their_names() -> None:
    class Named(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.ops.dsinfra_test_names.silu(self.gate(x)) * self.up(x)
            return x + torch.ops.dsinfra_test_names.linear(h, self.down.weight.t())

    module, x = build(Named()), rows(4, 128)
    call = Compiled(module)
    with torch.no_grad():
        assert error(call(x), emulated(module)(x)) < 0.05
    assert call.report.op_counts == {"quantize_1x128": 1, "fp8_linear": 2}


def test_a_layer_called_by_keywords_is_kept() -> None:
    class Keywords(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.linear(input=x, weight=self.weight)

    module, x = build(Keywords(128, 128)), rows(4, 128)
    call = Compiled(module)
    with torch.no_grad():
        torch.testing.assert_close(call(x), module(x))
    assert "keywords" in call.report.refused[0].reason and not call.report.error


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_gradients_within_a_graph_are_kept(transform: str) -> None:
    module, x = build(MLP()).requires_grad_(False), rows(4, 128)

    def run(x: torch.Tensor) -> torch.Tensor:
        if transform == "jvp":
            return torch.func.jvp(module, (x,), (x,))[1]
        return torch.func.grad(lambda x: module(x).float().square().sum())(x)

    call = Compiled(run)
    assert error(call(x), run(x)) < ROUNDING
    assert [site.refusal for site in call.report.refused] == ["GradientWeights"]


def test_the_default_dtype_does_not_matter() -> None:
    module = build(MLP())
    torch.set_default_dtype(torch.bfloat16)
    try:
        call = Compiled(module)
        call(rows(4, 128))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(call.report.matched) == 3 and not call.report.refused


@pytest.mark.parametrize(("D", "width"), [(64, 256), (128, 200)], ids=["small", "odd"])
def test_small_and_odd_weights_are_kept(D: int, width: int) -> None:
    module, x = build(MLP(D, width)), rows(4, D)
    call = Compiled(module)
    with torch.no_grad():
        torch.testing.assert_close(call(x), module(x))
    assert set(call.refusals().values()) == {"KeptPrecise"} and call.report.op_counts == {}


def test_float32_weights_are_kept() -> None:
    module = build(MLP()).float()
    call = Compiled(module)
    call(rows(4, 128).float())
    assert set(call.refusals().values()) == {"KeptPrecise"}


def test_an_argument_of_the_call_is_no_weight() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x + F.linear(x, weight)

    call = Compiled(Own())
    call(rows(4, 128), rows(128, 128))
    (site,) = call.report.refused
    assert site.refusal == "Unsupported" and "argument of the call" in site.reason


def test_training_is_refused() -> None:
    module, reports = build(MLP()), []

    def backend(gm, inputs):
        return dsinfra(gm, inputs, options={"inner": "aot_eager", "fp8": "block"}, sink=reports.append)

    torch._dynamo.reset()
    torch.compile(module, backend=backend)(rows(4, 128)).float().sum().backward()
    ((site,),) = (report.sites for report in reports)
    assert site.refusal == "GradientWeights" and "no_grad" in site.hint
    assert all(p.grad is not None for p in module.parameters())


def test_training_under_strict_raises() -> None:
    call = Compiled(build(MLP()), options={"strict": True})
    with pytest.raises(Exception, match="GradientWeights") as raised:
        call.call(rows(4, 128))
    assert isinstance(raised.value.__cause__ or raised.value, StrictRefusal) or "StrictRefusal" in str(raised.value)


@pytest.mark.parametrize("options", [{"fp8": "tensor"}, {"fp8": True}, {"fp8_head": "yes"}, {"fp8_free": 1}])
def test_wrong_values_name_the_allowed_ones(options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="allowed are block|must be True or False") as raised:
        Compiled(build(MLP()), options=options)(rows(4, 128))
    assert OptionError.__name__ in f"{type(raised.value)} {raised.value.__cause__!r} {raised.value}"
