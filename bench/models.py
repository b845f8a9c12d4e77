"""The models that whole-model benchmarks run: DeepSeek shapes with random weights, and micro ones for a dry run.

`v2lite` is DeepSeek-V2-Lite as published (27 layers, 15.7 B parameters). `v3x3` has DeepSeek-V3's widths and heads in 3
layers, 1 dense and 2 with 64 experts: what fits one card; `v3layer` is one of the latter. `micro`, `microlayer` and
`micro61` have tiny layers, 2, 1 and 61 of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SHARED = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}

_MICRO = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 32768,
}

_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 32000,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 32768,
    **_SHARED,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "v2lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "max_position_embeddings": 32768,
        **_SHARED,
    },
    "v3x3": {**_V3, "num_hidden_layers": 3, "first_k_dense_replace": 1},
    "v3layer": {**_V3, "num_hidden_layers": 1, "first_k_dense_replace": 0},
    "micro": _MICRO,
    "microlayer": {**_MICRO, "num_hidden_layers": 1, "first_k_dense_replace": 0},
    "micro61": {**_MICRO, "num_hidden_layers": 61},
}


def build(name: str, device: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A model in evaluation mode with matrices drawn from N(0, 0.02), made on the device; `layers` cuts it short.

    Raises:
        KeyError: no model of that name; lists the known ones.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in CONFIGS:
        raise KeyError(f"no benchmark model {name!r}; known: {', '.join(CONFIGS)}")
    settings = dict(CONFIGS[name])
    settings["num_hidden_layers"] = min(layers or settings["num_hidden_layers"], settings["num_hidden_layers"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.02)
    return model.eval().to(device)


def filled_static_cache(model: nn.Module, batch: int, capacity: int, length: int) -> Any:
    """A static cache whose first `length` tokens are random latents, as if a prompt had run."""
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=capacity)
    weight = model.lm_head.weight
    for index, layer in enumerate(cache.layers):
        torch.manual_seed(index)
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        latent, rope = (torch.empty(batch, 1, 0, w, dtype=weight.dtype, device=weight.device) for w in widths)
        layer.lazy_initialization(latent, rope)
        # Drawn in one dtype whatever the model's, so that a wider copy of the model sees equal values.
        for tensor in (layer.keys, layer.values):
            rows = torch.randn(batch, 1, length, tensor.shape[-1], device=weight.device, dtype=torch.bfloat16)
            tensor[:, :, :length] = rows * 0.1 if tensor is layer.values else rows
    set_length(cache, length)
    return cache


def set_length(cache: Any, length: int) -> None:
    """Let the cache hold `length` tokens, in place: addresses are part of a recorded CUDA graph."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def token_ids(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random token ids [batch, length] on the model's device."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, length), device=device, generator=generator)
