"""Whole models in FP8: transformers' own FP8 modules, and 16-bit models quantised by request, against float32 twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dscompile.adapters import hf_fp8
from dscompile.report import CompileReport, reports
from tests.models.harness import FAST, compile_module, median_token_error
from tests.zoo import Example, fp8, hf
from tests.zoo.case import Precision

LITE = {"q_lora_rank": None, "topk_method": "greedy"}


@pytest.fixture(autouse=True)
def kernels():
    hf_fp8.install()
    yield
    torch._dynamo.reset()


def outputs(example: Example, call: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = [call(*args, **example.kwargs).logits.float() for args in example.calls]
    return {f"call {i}": logits for i, logits in enumerate(found)}


def compiled(example: Example, **options: Any) -> tuple[dict[str, torch.Tensor], list[CompileReport]]:
    torch._dynamo.reset()
    before = len(reports())
    result = outputs(example, compile_module(example.module, {**FAST, **options}, fullgraph=True))
    return result, reports()[before:]


def check(build: Callable[[nn.Module], Example], model: nn.Module, twin: nn.Module) -> list[CompileReport]:
    """Compiled, the FP8 model is no further off its float32 twin than uncompiled (and a tenth)."""
    expected = outputs(build(twin), twin)
    own = median_token_error(outputs(build(model), model), expected)
    result, found = compiled(build(model))
    assert 0.01 < own < 0.3, "the bar is an FP8 model's own error"
    assert median_token_error(result, expected) < 1.1 * own
    assert not any(report.error for report in found)
    return found


def kinds(report: CompileReport, kind: str) -> tuple[int, int]:
    """(matched, refused) sites of a kind."""
    sites = [site for site in report.sites if site.kind == kind]
    return sum(site.matched for site in sites), sum(not site.matched for site in sites)


@pytest.mark.parametrize("overrides", [{}, {"experts_implementation": "batched_mm"}, {"q_lora_rank": None}], ids=str)
def test_prefill(overrides: dict[str, Any]) -> None:
    implementation = overrides.pop("experts_implementation", None) if overrides else None
    model, twin = fp8.hf_pair(**overrides)
    if implementation:
        model.set_experts_implementation(implementation)
    (report,) = check(hf.prefill, model, twin)
    assert kinds(report, "mla") == (hf.LAYERS, 0)
    assert kinds(report, "fp8_linear") == (sum(type(m).__name__ == "FP8Linear" for m in model.modules()), 0)
    assert kinds(report, "fp8_experts") == (1, 0)
    replaced = [site.module_path for site in report.sites if site.decision.startswith("replaced")]
    assert [path.split(".")[-1] for path in replaced] == ["kv_b_proj"] * hf.LAYERS
    # Down-projections of query and latent read one tensor, gate and up another.
    linears, rows = report.op_counts["fp8_linear"], report.op_counts["quantize_1x128"]
    assert linears - rows == 2 * hf.LAYERS


def test_deepseek_v2_lite() -> None:
    (report,) = check(hf.prefill, *fp8.hf_pair("deepseek_v2", **LITE))
    assert kinds(report, "mla") == (hf.LAYERS, 0)


@pytest.mark.skipif(not hf.CACHES_LATENT, reason="versions: this transformers caches expanded heads")
def test_static_decode_absorbs_the_dequantised_up_projection() -> None:
    (report,) = check(hf.static_decode, *fp8.hf_pair())
    assert report.op_counts["mla_decode"] == hf.LAYERS
    assert "mla" not in report.op_counts


def test_lengths_are_two_graphs() -> None:
    found = check(hf.lengths, *fp8.hf_pair(num_hidden_layers=1))
    assert len(found) == 2
    assert all(kinds(report, "mla") == (1, 0) for report in found)


def test_new_weights_reach_the_absorbed_form() -> None:
    model, twin = fp8.hf_pair(num_hidden_layers=1)
    example = hf.prefill(model)
    call = compile_module(model, fullgraph=True)
    outputs(example, call)
    scale = model.model.layers[0].self_attn.kv_b_proj.weight_scale_inv
    with torch.no_grad():
        scale.mul_(4)
        twin.model.layers[0].self_attn.kv_b_proj.weight.mul_(4)
    expected = outputs(hf.prefill(twin), twin)
    own = median_token_error(outputs(example, model), expected)
    assert median_token_error(outputs(example, call), expected) < 1.1 * own


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [({"block": 64}, "WrongBlocks"), ({"activation_scheme": "static"}, "Dequantized")],
    ids=["blocks of 64", "static"],
)
def test_other_scales_run_and_say_why_they_have_no_kernel(settings: dict[str, Any], refusal: str) -> None:
    model, twin = fp8.hf_pair(num_hidden_layers=1, **settings)
    expected = outputs(hf.prefill(twin), twin)
    result, (report,) = compiled(hf.prefill(model))
    assert median_token_error(result, expected) < 0.05, "weights are dequantised, rows stay in bfloat16"
    assert {site.refusal for site in report.refused if site.kind == "fp8_linear"} == {refusal}
    assert "fp8_linear" not in report.op_counts


def test_scales_stored_as_exponents() -> None:
    model, twin = fp8.hf_pair(num_hidden_layers=1)
    for module in model.modules():
        scale = getattr(module, "weight_scale_inv", None)
        if scale is not None:
            exponents = scale.data.log2().ceil().exp2()
            module.weight_scale_inv = nn.Parameter(exponents.to(torch.float8_e8m0fnu), requires_grad=False)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale_inv"):
            wide = fp8.dequantized(module.weight.data, module.weight_scale_inv.data.float())
            twin.get_submodule(name).weight.data = wide
    (report,) = check(hf.prefill, model, twin)
    assert kinds(report, "mla") == (1, 0) and kinds(report, "fp8_linear")[1] == 0


# ------------------------------------------------------------------ quantised by request


def test_a_16_bit_model_is_quantised_by_request() -> None:
    twin = hf.build_model("deepseek_v3", Precision(), **fp8.MICRO_FP8)
    model = copy.deepcopy(twin).bfloat16()
    expected = outputs(hf.prefill(twin), twin)
    result, (report,) = compiled(hf.prefill(model), fp8="block")
    assert not report.error
    kept = {site.module_path.split(".")[-1] for site in report.refused}
    assert kept == {"kv_b_proj", "gate", "lm_head"}
    assert kinds(report, "fp8_experts") == (1, 0)
    # 8 linear layers of attention, a gated layer and a shared expert of two products each.
    assert report.op_counts["fp8_linear"] == 12 and report.op_counts["mla"] == hf.LAYERS
    # The same weights, quantised as transformers would, run by transformers' modules over the same operators.
    quantised, _ = fp8.hf_pair()
    like = outputs(hf.prefill(quantised), quantised)
    assert median_token_error(result, expected) < 1.25 * median_token_error(like, expected)


def test_freed_weights_of_a_whole_model() -> None:
    twin = hf.build_model("deepseek_v3", Precision(), **fp8.MICRO_FP8)
    model = copy.deepcopy(twin).bfloat16()
    held, _ = compiled(hf.prefill(copy.deepcopy(model)), fp8="block")
    result, (report,) = compiled(hf.prefill(model), fp8="block", fp8_free=True)
    assert median_token_error(result, held) == 0
    freed = [name for name, p in model.named_parameters() if not p.untyped_storage().nbytes()]
    assert len(freed) == 14 + 2, "linear layers, and both weights of the experts"
    assert not any("kv_b_proj" in name or "lm_head" in name or "norm" in name for name in freed)
