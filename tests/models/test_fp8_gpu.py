"""Whole models in FP8 on a GPU: kernels for references, CUDA graphs over prepared weights, memory given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dscompile.adapters import hf_fp8
from dscompile.report import CompileReport, reports
from tests.models.harness import compile_module, median_token_error
from tests.zoo import fp8, hf
from tests.zoo.case import Precision

pytestmark = pytest.mark.gpu

# Shapes that the kernels take: a latent of 512, heads of 128 + 64, and whole FP8 blocks.
TRUE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 16,
}


@pytest.fixture(autouse=True)
def kernels():
    hf_fp8.install()
    yield
    torch._dynamo.reset()


def logits(call: Any, ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"logits": call(ids, **kwargs).logits.float().clone()}


def pair(**overrides: Any) -> tuple[nn.Module, nn.Module]:
    model, twin = fp8.hf_pair(**{**TRUE, **overrides})
    return model.cuda(), twin.cuda()


def compiled(module: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return compile_module(module, options, fullgraph=True)


def last() -> CompileReport:
    return reports()[-1]


@pytest.mark.parametrize("tokens", [12, 300])
def test_prefill_runs_our_kernels(tokens: int) -> None:
    model, twin = pair()
    ids = hf.tokens(2, tokens).cuda()
    expected, own = logits(twin, ids, use_cache=False), logits(model, ids, use_cache=False)
    call = compiled(model)
    result = logits(call, ids, use_cache=False)
    assert median_token_error(result, expected) < 1.1 * median_token_error(own, expected)
    assert not last().error and not last().refused
    kernels = {site.kernel for site in last().sites if site.kind.startswith("fp8") and site.kernel}
    assert "reference" not in kernels, kernels


def test_decode_in_cuda_graphs() -> None:
    """Each step reads the prepared weights at their addresses; a step after a change of weights reads the new ones."""
    from transformers import StaticCache

    model, twin = pair()
    prompt, steps = hf.tokens(2, 10).cuda(), [hf.tokens(2, 1, seed=s).cuda() for s in range(1, 9)]
    caches = [StaticCache(m.config, max_cache_len=64) for m in (model, twin)]
    for m, cache in zip((model, twin), caches, strict=True):
        logits(m, prompt, past_key_values=cache, use_cache=True)
    call = compiled(model, mode="reduce-overhead")
    errors = []
    for number, ids in enumerate(steps):
        if number == 5:
            with torch.no_grad():
                for m in (model, twin):
                    attention = m.model.layers[0].self_attn
                    getattr(attention.kv_b_proj, "weight_scale_inv", attention.kv_b_proj.weight).mul_(0.5)
        torch.compiler.cudagraph_mark_step_begin()
        result = logits(call, ids, past_key_values=caches[0], use_cache=True)
        errors.append(median_token_error(result, logits(twin, ids, past_key_values=caches[1], use_cache=True)))
    assert max(errors) < 0.3 and max(errors[5:]) < 2 * max(errors[:5]), errors
    assert last().op_counts["mla_decode"] == hf.LAYERS


def test_a_16_bit_model_by_request_in_cuda_graphs_with_its_memory_given_back() -> None:
    twin = hf.build_model("deepseek_v3", Precision(), **{**fp8.MICRO_FP8, **TRUE}).cuda()
    model = copy.deepcopy(twin).bfloat16()
    ids = hf.tokens(2, 12).cuda()
    expected, bf16 = logits(twin, ids, use_cache=False), logits(model, ids, use_cache=False)
    held = torch.cuda.memory_allocated()
    call = compiled(model, mode="reduce-overhead", fp8="block", fp8_free=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        result = logits(call, ids, use_cache=False)
    error = median_token_error(result, expected)
    assert median_token_error(bf16, expected) < error < 0.3
    assert not last().error and last().op_counts["fp8_linear"] == 12
    freed = [p for p in model.parameters() if not p.untyped_storage().nbytes()]
    assert len(freed) == 16
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < held, "FP8 copies are half of what was given back"


def test_users_triton_kernels_are_refused() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def widen(w_ptr, y_ptr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(w_ptr + at).to(tl.float32))

    values = torch.randn(128, 128, device="cuda").to(torch.float8_e4m3fn)

    def run(w: torch.Tensor) -> torch.Tensor:
        y = torch.empty(w.shape, device=w.device)
        widen[(w.numel() // 128,)](w, y, BLOCK=128)
        return y.softmax(-1)

    torch._dynamo.reset()
    y = compile_module(run, {"inner": "inductor"}, fullgraph=True)(values)  # type: ignore[arg-type]
    torch.testing.assert_close(y, values.float().softmax(-1))
    assert [site.refusal for site in last().refused if site.kind == "fp8_linear"] == ["OpaqueKernel"]
