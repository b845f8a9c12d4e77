"""`dsinfra::experts` is what Hugging Face's expert layers compute, forward and backward, in each of their forms."""

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)

EXPERTS = torch.ops.dsinfra.experts.default

MODELS = {
    "deepseek_v3": dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                        n_routed_experts=8, n_group=1, topk_group=1, first_k_dense_replace=0, num_mtp_layers=0),
    "qwen3_moe": dict(num_experts=8, head_dim=16),
    "gpt_oss": dict(num_local_experts=8, head_dim=16),
}  # fmt: skip


def layer_of(model_type, form, dtype):
    """An expert layer of the model with random weights, in one of transformers' implementations."""
    from transformers import AutoConfig, AutoModel

    base = dict(
        vocab_size=64, hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModel.from_config(
        AutoConfig.for_model(model_type, **base, **MODELS[model_type]), dtype=dtype, experts_implementation=form
    )
    (layer,) = (m for m in model.modules() if type(m).__name__.endswith("Experts"))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / 5)
    return layer


def arguments_of(layer):
    """Weights, biases and settings of the layer, as the operator takes them."""
    if hasattr(layer, "gate_up_proj_bias"):
        weights = layer.gate_up_proj.transpose(1, 2), layer.down_proj.transpose(1, 2)
        biases = layer.gate_up_proj_bias, layer.down_proj_bias
        return (*weights, *biases, "swiglu_oai", True, layer.alpha, layer.limit)
    return layer.gate_up_proj, layer.down_proj, None, None, "silu", False, 1.0, 0.0


def routing(T=11, E=8, K=2):
    g = torch.Generator().manual_seed(2)
    weight, idx = torch.rand(T, E, generator=g).topk(K, -1)
    return torch.randn(T, 32, generator=g), idx, weight


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("model_type", MODELS)
def test_is_the_written_layer(model_type, form):
    layer = layer_of(model_type, form, torch.float32)
    x, idx, weight = routing()
    x.requires_grad_()
    weight.requires_grad_()
    ours, written = EXPERTS(x, idx, weight, *arguments_of(layer)), layer(x, idx, weight)
    torch.testing.assert_close(ours, written, rtol=1e-5, atol=1e-5)
    leaves = [x, weight, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, written))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_is_no_further_from_float64_than_the_written_layer(model_type):
    layer = layer_of(model_type, "grouped_mm", torch.bfloat16)
    x, idx, weight = routing()
    x = x.bfloat16()
    with torch.no_grad():
        ours, written = EXPERTS(x, idx, weight, *arguments_of(layer)), layer(x, idx, weight)
        exact = EXPERTS(
            x.double(), idx, weight, *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments_of(layer))
        )
    assert ours.dtype == written.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= (written.double() - exact).norm()


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=["w-fp32", "w-bf16"])
def test_is_the_written_layer_under_autocast(w_dtype):
    """grouped_mm has no autocast rule: rows take the weights' dtype, and the result is in the rows' own."""
    layer = layer_of("deepseek_v3", "grouped_mm", w_dtype)
    x, idx, weight = routing()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, written = EXPERTS(x, idx, weight, *arguments_of(layer)), layer(x, idx, weight)
    assert ours.dtype == written.dtype == torch.float32
    tolerance = 1e-5 if w_dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, written, rtol=tolerance, atol=tolerance)
