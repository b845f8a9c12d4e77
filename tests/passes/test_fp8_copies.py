"""FP8 copies of weights: that they follow their weights, die with them, and may replace them in memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from dscompile.backend import dsinfra
from dscompile.lowering.block_scales import dequantize_rows, quantize_rows
from dscompile.passes import fp8_prepared
from dscompile.passes.fp8_free import WeightFreed
from dscompile.report import CompileReport
from tests.passes.test_quantize_weights import MLP, ROUNDING, Compiled, build, emulated, error, rows
from tests.zoo import fp8

# ------------------------------------------------------------------ copies


def test_copies_follow_their_weights() -> None:
    module, x = build(MLP()), rows(4, 128)
    call = Compiled(module)

    def check() -> None:
        with torch.no_grad():
            assert error(call(x), emulated(module)(x)) < ROUNDING

    check()
    with torch.no_grad():
        module.down.weight.mul_(-3)
    check()
    module.load_state_dict({name: torch.randn_like(value) / 8 for name, value in module.state_dict().items()})
    check()
    module.up.weight.data = torch.randn_like(module.up.weight) / 8
    check()
    module.gate.weight.data.mul_(-2)  # leaves no trace
    fp8_prepared.refresh()
    check()
    assert len(call.reports) == 1


def test_two_graphs_share_one_copy() -> None:
    module = build(MLP())
    call = Compiled(module)
    call(rows(4, 128))
    first = {id(v) for c in fp8_prepared._COPIES[module.down.weight].values() for v in c.values}
    call(rows(2, 4, 128))
    assert len(call.reports) == 2
    assert {id(v) for c in fp8_prepared._COPIES[module.down.weight].values() for v in c.values} == first


def test_layers_compiled_one_by_one_share_a_graph_and_not_a_copy() -> None:
    layers, x = [build(MLP()) for _ in range(3)], rows(4, 128)
    for scale, layer in enumerate(layers, 1):
        with torch.no_grad():
            layer.down.weight.mul_(scale)
    reports: list[CompileReport] = []

    def own(gm, inputs):
        return dsinfra(gm, inputs, options={"inner": "aot_eager", "fp8": "block"}, sink=reports.append)

    torch._dynamo.reset()
    compiled = [torch.compile(layer, backend=own, fullgraph=True) for layer in layers]
    with torch.no_grad():
        for _ in range(2):
            for call, layer in zip(compiled, layers, strict=True):
                assert error(call(x), emulated(layer)(x)) < ROUNDING
    assert len(reports) == 1


def test_a_copy_dies_with_its_weight() -> None:
    module = build(MLP())
    Compiled(module)(rows(4, 128))
    (made,) = fp8_prepared._COPIES[module.down.weight].values()
    value = weakref.ref(made.values[0])
    del module, made
    torch._dynamo.reset()
    gc.collect()
    assert value() is None


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        module = build(MLP())
    call = Compiled(module)
    with torch.inference_mode():
        call(rows(4, 128))
    assert {s.refusal for s in call.report.refused} == {"Unsupported"}
    assert "inference mode" in call.report.refused[0].reason


def test_calls_in_inference_mode_and_outside_share_a_copy() -> None:
    module, x = build(MLP()), rows(4, 128)
    call = Compiled(module)
    with torch.inference_mode():
        inside = call(x).clone()
    with torch.no_grad():
        module.down.weight.mul_(2)
        assert error(call(x), emulated(module)(x)) < ROUNDING
    assert inside.isfinite().all()


def test_a_cached_graph_holds_no_weights() -> None:
    """Inductor's code is served from the cache to a module of other weights, and computes with those."""
    counters, x = torch._dynamo.utils.counters, rows(4, 128)
    with fresh_cache():
        for scale in (1, 2):
            module = build(MLP())
            with torch.no_grad():
                module.down.weight.mul_(scale)
                counters.clear()
                assert error(Compiled(module, options={"inner": "inductor"})(x), emulated(module)(x)) < ROUNDING
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert not counters["aot_autograd"]["autograd_cache_bypass"]


def one_layer() -> tuple[nn.Linear, Compiled]:
    """A layer beside a residual, compiled and called."""

    class Residual(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    module = build(Residual(128, 128, bias=False))
    call = Compiled(module)
    call(rows(4, 128))
    return module, call


def one_layer_is_right(module: nn.Linear, call: Compiled, *shape: int) -> None:
    x = rows(*(shape or (4, 128)))
    with torch.no_grad():
        product = dequantize_rows(*quantize_rows(x.flatten(0, -2).float()))
        product = product @ fp8.dequantized(*fp8.quantized(module.weight.float())).t()
    assert error(call(x), x + product.view_as(x).bfloat16()) < ROUNDING


def test_a_new_storage_at_an_old_address_is_seen() -> None:
    module, call = one_layer()
    addresses = {module.weight.data_ptr()}
    for _ in range(12):
        module.weight.data = torch.empty(0, dtype=torch.bfloat16)
        module.weight.data = torch.randn(128, 128).bfloat16()
        addresses.add(module.weight.data_ptr())
        one_layer_is_right(module, call)
    assert len(addresses) < 13, "the allocator gave no address twice: this test saw nothing"


def test_a_copy_that_could_not_be_made_anew_stays_out_of_date(monkeypatch) -> None:
    module, call = one_layer()
    with torch.no_grad():
        module.weight.mul_(-2)
    with monkeypatch.context() as patch:
        patch.setattr(fp8_prepared, "_make", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            call(rows(4, 128))
    one_layer_is_right(module, call)


def test_a_compilation_sees_writes_through_data() -> None:
    module, call = one_layer()
    with torch.no_grad():
        module.weight.data.copy_(448 * torch.eye(128))  # leaves no trace
    one_layer_is_right(module, call, 2, 4, 128)
    first, second = (report.sites[0].errors["weight"] for report in call.reports)
    assert first > 0 and second == 0, "measured anew, too"
    one_layer_is_right(module, call)


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_of_optimizers_are_seen(settings: dict[str, bool]) -> None:
    module, call = one_layer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3, **settings)
    module.weight.grad = torch.randn_like(module.weight)
    optimizer.step()
    one_layer_is_right(module, call)
    assert len(call.reports) == 1


def test_a_weight_of_another_shape_or_dtype_is_another_copy() -> None:
    class Summed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x).relu().sum(-1, keepdim=True)

    module, x = build(Summed(128, 128, bias=False)), rows(4, 128)
    call = Compiled(module)
    call(x)
    for change in (lambda: module.weight.new_ones(256, 128).div(64), lambda: module.weight.new_ones(128, 128).div(8)):
        module.weight.data = change()
        with torch.no_grad():
            assert error(call(x), module(x)) < 0.05
    assert not any(report.refused for report in call.reports)
    module.half()
    with torch.no_grad():
        assert error(call(x.half()), module(x.half())) < 0.05


def test_arguments_of_the_first_call_are_let_go() -> None:
    x = rows(4, 128)
    seen, call = weakref.ref(x), Compiled(build(MLP()))
    call(x)
    del x
    gc.collect()
    assert seen() is None and call.report.matched


def test_a_weight_that_the_graph_writes_is_kept() -> None:
    class Growing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.detach().mul_(2)
            return x + super().forward(x)

    module, x = build(Growing(128, 128, bias=False)), rows(4, 128)
    twin, call = copy.deepcopy(module), Compiled(module)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(call(x), twin(x))
    assert "written by the graph" in call.report.refused[0].reason


# ------------------------------------------------------------------ freed weights


def test_freed_weights_leave_the_compiled_module() -> None:
    module, x = build(MLP()), rows(4, 128)
    with torch.no_grad():
        expected, longer = emulated(module)(x), emulated(module)(rows(9, 128))
    call = Compiled(module, options={"fp8_free": True})
    assert error(call(x), expected) < ROUNDING
    assert all(p.untyped_storage().nbytes() == 0 for p in module.parameters())
    assert error(call(x), expected) < ROUNDING
    assert error(call(rows(9, 128)), longer) < ROUNDING, "a new graph finds the copies"
    assert len(call.reports) == 2
    assert "given back" in call.reports[0].records[-1].note


def test_freed_weights_raise_what_happened() -> None:
    module, x = build(MLP()), rows(4, 128)
    call = Compiled(module, options={"fp8_free": True})
    call(x)
    with pytest.raises(WeightFreed, match=r"`weight` \[256, 128\] of a Linear.*fp8_free"):
        module(x)
    with pytest.raises(WeightFreed, match="saved"):
        module.state_dict()


@pytest.mark.parametrize("way", ["load_state_dict", "data"])
def test_a_freed_weight_that_is_given_anew_counts_again(way: str) -> None:
    module, x = build(MLP()), rows(4, 128)
    new = {name: torch.randn(p.shape).bfloat16() / 8 for name, p in module.named_parameters()}
    call = Compiled(module, options={"fp8_free": True})
    call(x)
    if way == "load_state_dict":
        module.load_state_dict(new)
    else:
        for name, parameter in module.named_parameters():
            parameter.data = new[name]
    with torch.no_grad():
        assert error(call(x), emulated(module)(x)) < ROUNDING


def test_a_graph_that_needs_a_freed_weight_is_not_compiled() -> None:
    module, x = build(MLP()), rows(4, 128)
    Compiled(module, options={"fp8_free": True})(x)
    with pytest.raises(Exception, match="WeightFreed.*no FP8 copy"):
        Compiled(module, options={"fp8": None})(x)


def test_weights_that_are_read_elsewhere_are_not_freed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.mlp = nn.Embedding(256, 128), MLP()
            self.out = nn.Linear(128, 256, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.mlp(self.embedding(ids)))

    module = build(Tied())
    call = Compiled(module, options={"fp8_free": True, "fp8_head": True})
    ids = torch.arange(8)
    with torch.no_grad():
        expected = emulated(module)(ids)
    assert error(call(ids), expected) < ROUNDING
    assert module.embedding.weight.untyped_storage().nbytes() > 0
    assert module.mlp.down.weight.untyped_storage().nbytes() == 0


def test_freed_weights_are_neither_copied_nor_pickled() -> None:
    module, x = build(MLP()), rows(4, 128)
    new = {name: torch.randn(p.shape).bfloat16() for name, p in module.named_parameters()}
    call = Compiled(module, options={"fp8_free": True})
    call(x)
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(WeightFreed, match="fp8_free"):
            act(module)
    module.load_state_dict(new)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(p, new[name]) for name, p in twin.named_parameters())
        with torch.no_grad():
            assert error(twin(x), module(x)) == 0


def test_values_of_a_wrong_shape_do_not_bring_memory_back() -> None:
    module, x = build(MLP()), rows(4, 128)
    call = Compiled(module, options={"fp8_free": True})
    expected = call(x)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({"down.weight": torch.ones(3, 3)}, strict=False)
    assert torch.equal(call(x), expected)


@pytest.mark.parametrize("layer", ["gate", "up"])
def test_a_joined_copy_is_not_made_from_half_of_its_weights(layer: str) -> None:
    module, x = build(MLP()), rows(4, 128)
    call = Compiled(module, options={"fp8_free": True})
    call(x)
    module.load_state_dict({f"{layer}.weight": torch.randn(256, 128)}, strict=False)
    with pytest.raises(RuntimeError, match="share a copy"):
        call(x)
