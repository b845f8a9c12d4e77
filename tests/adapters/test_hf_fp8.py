"""transformers' FP8 modules over our operators: what is put in place, when, and that it is taken back."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers.integrations import finegrained_fp8 as theirs

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.adapters import hf_fp8
from tests.models.harness import compile_module
from tests.zoo import fp8, hf


@pytest.fixture(autouse=True)
def clean():
    """Nothing of ours stands before or after a test."""
    hf_fp8.uninstall()
    yield
    hf_fp8.uninstall()
    hf_fp8._enabled = True
    torch._dynamo.reset()


def names(module: torch.nn.Module) -> list[str]:
    """What one graph of the module calls."""
    found: list[str] = []

    def backend(gm, inputs):
        found.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(hf.tokens(2, 12), use_cache=False)
    return found


def test_what_stands_in_transformers_and_comes_back() -> None:
    loader, table = theirs.load_finegrained_fp8_kernel, dict(theirs.ALL_FP8_EXPERTS_FUNCTIONS)
    assert hf_fp8.install()
    assert theirs.load_finegrained_fp8_kernel().matmul is hf_fp8.matmul
    assert theirs.ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"] is not table["grouped_mm"]
    assert hf_fp8.install(), "a second time changes nothing"
    hf_fp8.uninstall()
    assert theirs.load_finegrained_fp8_kernel is loader
    assert dict(theirs.ALL_FP8_EXPERTS_FUNCTIONS) == table


def test_uninstall_gives_back_functions_that_a_user_registered() -> None:
    functions, own = theirs.ALL_FP8_EXPERTS_FUNCTIONS, lambda *_: None
    functions["batched_mm"] = own
    try:
        hf_fp8.install()
        hf_fp8.uninstall()
        assert functions["batched_mm"] is own
    finally:
        del functions["batched_mm"]


def test_functions_that_a_user_registered_are_kept() -> None:
    functions, own = theirs.ALL_FP8_EXPERTS_FUNCTIONS, lambda *_: None
    functions["batched_mm"] = own
    try:
        assert hf_fp8.install()
        assert functions["batched_mm"] is own
        functions["grouped_mm"] = own  # in the place of ours
        hf_fp8.uninstall()
        assert functions["batched_mm"] is own and functions["grouped_mm"] is own
    finally:
        functions._local_mapping.clear()


def test_a_loader_of_the_user_is_kept(monkeypatch) -> None:
    def own() -> None: ...

    monkeypatch.setattr(theirs, "load_finegrained_fp8_kernel", own)
    assert not hf_fp8.install()
    assert theirs.load_finegrained_fp8_kernel is own and not hf_fp8._replaced


def test_a_fault_halfway_takes_back_what_stands(monkeypatch) -> None:
    loader = theirs.load_finegrained_fp8_kernel
    hf_fp8._enabled = True
    monkeypatch.setattr(hf_fp8, "_experts_forward", lambda *_: 1 / 0)
    assert compile_module(torch.nn.Linear(4, 4))(torch.randn(2, 4)).shape == (2, 4)
    assert theirs.load_finegrained_fp8_kernel is loader and not hf_fp8._replaced


def test_kernels_that_transformers_can_load_are_not_replaced(monkeypatch) -> None:
    loader = theirs.load_finegrained_fp8_kernel
    monkeypatch.setattr(theirs, "is_kernels_available", lambda: True)
    assert not hf_fp8.install()
    assert theirs.load_finegrained_fp8_kernel is loader
    monkeypatch.setattr(theirs, "is_deepgemm_loadable", lambda: True, raising=False)
    assert hf_fp8.install(replace=True)
    assert not theirs.is_deepgemm_loadable(), "asked first by every linear layer"
    assert theirs.load_finegrained_fp8_kernel().matmul is hf_fp8.matmul
    hf_fp8.uninstall()  # before monkeypatch takes back what this returns
    assert theirs.is_deepgemm_loadable()


def test_an_unknown_seam_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(theirs, "FineGrainedFP8", object)
    assert "fields" in hf_fp8.unsupported(theirs)
    assert not hf_fp8.install()


def test_a_fault_of_ours_stops_no_compilation(monkeypatch) -> None:
    hf_fp8._enabled = True
    monkeypatch.setattr(hf_fp8, "unsupported", lambda module: 1 / 0)
    assert compile_module(torch.nn.Linear(4, 4))(torch.randn(2, 4)).shape == (2, 4)
    assert not hf_fp8._replaced


def test_the_backend_puts_it_in_place_before_the_first_trace() -> None:
    model, _ = fp8.hf_pair(num_hidden_layers=1)
    with torch.no_grad():
        with pytest.raises(ImportError):
            model(hf.tokens(1, 4), use_cache=False)
        hf_fp8._enabled = True  # as in a process that never took it back
        compile_module(model, fullgraph=True)(hf.tokens(1, 4), use_cache=False)


def test_nothing_is_imported_for_a_model_of_another_library(monkeypatch) -> None:
    hf_fp8._enabled = True
    monkeypatch.delitem(sys.modules, hf_fp8.MODULE)
    compile_module(torch.nn.Linear(4, 4))(torch.randn(2, 4))
    assert hf_fp8.MODULE not in sys.modules and not hf_fp8._replaced


def test_a_model_is_one_graph_of_our_operators() -> None:
    hf_fp8.install()
    model, _ = fp8.hf_pair()
    called = names(model)
    linears = sum(type(m).__name__ == "FP8Linear" for m in model.modules())
    assert called.count("dsinfra.fp8_linear") == linears == 16
    assert called.count("dsinfra.quantize_1x128") == linears
    assert called.count("dsinfra.fp8_experts") == 1
    assert not any("load_finegrained" in name for name in called)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_agree_with_the_float32_twin(implementation: str) -> None:
    hf_fp8.install()
    model, twin = fp8.hf_pair()
    model.set_experts_implementation(implementation)
    experts, wide = model.model.layers[1].mlp.experts, twin.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 256, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(24)])
    weights = torch.rand(24, 2, generator=generator)
    with torch.no_grad():
        expected = wide(x.float(), ids, weights)
        error = (experts(x, ids, weights).float() - expected).norm() / expected.norm()
    assert error < 0.05, "two products with rows rounded to 3 bits of mantissa"


def test_experts_that_are_no_plain_swiglu_keep_their_own_forward() -> None:
    hf_fp8.install()
    model, _ = fp8.hf_pair()
    model.model.layers[1].mlp.experts.limit = 7.0
    called = names(model)
    assert "dsinfra.fp8_experts" not in called
    assert called.count("dsinfra.fp8_grouped_linear") == 2


def test_batched_products_are_grouped_by_expert_and_sentinels_are_zero() -> None:
    values, scale = fp8.quantized(torch.randn(4, 128, 256, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([3, 0, 4, 1, 3, 0, 2, 4, 1])  # 4: no expert
    y = hf_fp8.batched_matmul(x, values, scale, block_size=[128, 128], expert_ids=ids)
    wide = torch.cat([fp8.dequantized(values, scale), torch.zeros(1, 128, 256)])
    expected = torch.einsum("mk,mnk->mn", x, wide[ids])
    assert (y[ids == 4] == 0).all()
    assert (y - expected).norm() / expected.norm() < 0.04


@pytest.mark.parametrize(
    ("block", "static"), [([64, 64], False), (None, False), ([128, 128], True)], ids=["64", "tensor", "static"]
)
def test_scales_without_a_kernel_are_dequantised(block: list[int] | None, static: bool) -> None:
    weight = torch.randn(256, 384)
    values, scale = fp8.quantized(weight, block[0] if block else 384)
    scale = scale if block else scale.reshape(())
    activation = torch.tensor(0.02) if static else None
    x = torch.randn(2, 5, 384)
    y = hf_fp8.matmul(x, values, scale, block, torch.float32, activation_scale=activation)
    expected = x @ (fp8.dequantized(values, scale, block[0]) if block else values.float() * scale).t()
    torch.testing.assert_close(y, expected)


def test_scales_stored_as_exponents_are_used_as_they_are() -> None:
    values, scale = fp8.quantized(torch.randn(256, 128))
    exponents = scale.log2().ceil().exp2()
    stored = exponents.to(torch.float8_e8m0fnu)
    x = torch.randn(3, 128)
    wide = hf_fp8.matmul(x, values, exponents, [128, 128], torch.float32)
    torch.testing.assert_close(hf_fp8.matmul(x, values, stored, [128, 128], torch.float32), wide)


def test_packed_fp4_weights_raise_what_to_change() -> None:
    with pytest.raises(NotImplementedError, match="int8 can't be dequantised here.*dequantised"):
        hf_fp8.matmul(torch.randn(2, 128), torch.zeros(128, 64, dtype=torch.int8), torch.ones(128, 4))


def test_adapters_train_on_top_of_frozen_fp8_layers() -> None:
    values, scale = fp8.quantized(torch.randn(256, 128))
    x = torch.randn(3, 128, requires_grad=True)
    scale = torch.nn.Parameter(scale)  # transformers' scales require grad, and get none
    hf_fp8.matmul(x, torch.nn.Parameter(values), scale, [128, 128], torch.float32).sum().backward()
    weight = fp8.dequantized(values, scale.detach()).double()
    bound = len(weight) * torch.finfo(torch.float32).eps * weight.abs().sum(0)  # of a float32 sum in any order
    assert ((x.grad.double() - weight.sum(0)).abs() <= bound).all()
    assert scale.grad is None
