"""Micro models of the installed transformers: the real modelling code with dimensions that fit a unit test.

Weights are random and equal for equal arguments. Router weights are drawn wide, so that few tokens sit near a tie
between two experts, where a last-bit difference upstream would send a token elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from tests.zoo.case import MICRO_SIZE, Example, Precision, Size

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Since 5.15 the caches of the MLA models hold the latent; before, the expanded keys and values of every head.
CACHES_LATENT = VERSION >= (5, 15)

LAYERS = 2

MICRO: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS,
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
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Widths that the kernels take: a latent of 512, heads of 128 + 64.
TRUE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}

# What each model type adds to the base.
TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_mtp_layers": 0},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v32": {"num_mtp_layers": 0, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 4},
    "minicpm3": {},
    "kimi_linear": {
        "q_lora_rank": None,
        "num_local_experts": 8,
        "linear_num_heads": 4,
        "linear_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "longcat_flash": {
        "num_layers": LAYERS,
        "ffn_hidden_size": 256,
        "expert_ffn_hidden_size": 64,
        "moe_topk": 2,
        "zero_expert_num": 4,
        "head_dim": 16,
    },
    "qwen3_moe": {"num_experts": 8, "num_key_value_heads": 2, "head_dim": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "num_key_value_heads": 2, "head_dim": 32},
    "gpt_oss": {"num_local_experts": 8, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": None},
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 32},
}

# What they add to the widths of `TRUE` instead.
TRUE_TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"index_topk": 64, "index_head_dim": 128, "index_n_heads": 16},
    "kimi_linear": {
        "num_local_experts": 16,
        "linear_num_heads": 16,
        "linear_head_dim": 64,
        "num_hidden_layers": 5,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"] * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    },
    "longcat_flash": {"ffn_hidden_size": 2048, "expert_ffn_hidden_size": 256, "moe_topk": 4, "head_dim": 64},
    "qwen3_moe": {"num_experts": 16, "num_key_value_heads": 4, "head_dim": 128},
    "gpt_oss": {"num_local_experts": 16, "num_key_value_heads": 4, "head_dim": 64},
}

DENSE = ("minicpm3",)
# With `first_k_dense_replace` layers without experts.
DENSE_FIRST = ("deepseek_v3", "deepseek_v2", "deepseek_v32", "glm4_moe")


def build_model(
    model_type: str,
    precision: Precision | None = None,
    *,
    attention: str = "sdpa",
    experts: str | None = None,
    size: Size = MICRO_SIZE,
    **overrides: Any,
) -> nn.Module:
    """A model in evaluation mode, from the base, the model type's additions and `overrides` of the configuration.

    `experts` is the implementation of the expert layers by transformers' name; None is its default.
    """
    config = AutoConfig.for_model(model_type, **{**base(model_type, size), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = {} if experts is None else {"experts_implementation": experts}
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32, **chosen)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("gate.weight", "router.weight")):
                nn.init.normal_(tensor, std=0.5)
            elif name.endswith("e_score_correction_bias"):
                nn.init.normal_(tensor, std=0.1)
            elif tensor.dim() >= 2 and isinstance(tensor, nn.Parameter):
                nn.init.normal_(tensor, std=0.08)
    return (precision or Precision()).settle(model).eval().to(size.device)


def base(model_type: str, size: Size = MICRO_SIZE) -> dict[str, Any]:
    """The configuration of a model type at a size, before a case's own overrides."""
    found = {**MICRO, **TYPES[model_type]}
    return found if size.name == "micro" else {**found, **TRUE, **TRUE_TYPES.get(model_type, {})}


def expert_layers(model_type: str, **overrides: Any) -> int:
    """How many layers of a model are expert layers."""
    sizes = {**MICRO, **TYPES[model_type], **overrides}
    if model_type in DENSE:
        return 0
    return sizes["num_hidden_layers"] - (sizes["first_k_dense_replace"] if model_type in DENSE_FIRST else 0)


def tokens(batch: int, length: int, seed: int = 0, vocabulary: int = MICRO["vocab_size"]) -> torch.Tensor:
    """Token ids [batch, length] that are neither padding nor a beginning or end."""
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def _ids(model: nn.Module, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return tokens(batch, length, seed).to(next(model.parameters()).device)


def prefill(model: nn.Module, batch: int = 2, length: int = 12) -> Example:
    return Example(model, (_ids(model, batch, length),), {"use_cache": False})


def lengths(model: nn.Module) -> Example:
    """Four prompts of different lengths."""
    first, *rest = [(_ids(model, 2, length, seed=length),) for length in (12, 17, 31, 24)]
    return Example(model, first, {"use_cache": False}, tuple(rest))


def padded(model: nn.Module, compare_padding: bool = True) -> Example:
    """Two requests, the first padded on the left: queries of the padding see no key at all.

    What such a query gives depends on the attention: zero from SDPA, the mean of all values from transformers' own
    attention, whose mask is a large negative number. Nothing reads it.
    """
    ids = _ids(model, 2, 12)
    keep = torch.ones_like(ids)
    ids[0, :4], keep[0, :4] = MICRO["pad_token_id"], 0
    kwargs = {"attention_mask": keep, "use_cache": False}
    return Example(model, (ids,), kwargs, keep=None if compare_padding else keep.bool())


def packed(model: nn.Module) -> Example:
    """Two sequences in one row: positions that start again are transformers' sign of a boundary."""
    ids = _ids(model, 1, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None].to(ids.device)
    return Example(model, (ids,), {"position_ids": positions, "use_cache": False})


def returning_attentions(model: nn.Module) -> Example:
    """Attention weights are asked for. Transformers' hooks for them go in at a first, uncompiled call."""
    example = prefill(model)
    kwargs = {**example.kwargs, "output_attentions": True}
    with torch.no_grad():
        model(*example.args, **kwargs)
    return example._replace(kwargs=kwargs)


def decode(model: nn.Module, cache: Any, steps: int, batch: int = 2, prompt: int = 10) -> Example:
    """`steps` single-token calls over a cache that the uncompiled model filled with a prompt."""
    with torch.no_grad():
        model(_ids(model, batch, prompt), past_key_values=cache, use_cache=True)
    first, *rest = [(_ids(model, batch, 1, seed=step),) for step in range(1, steps + 1)]
    return Example(model, first, {"past_key_values": cache, "use_cache": True}, tuple(rest))


def static_decode(model: nn.Module, steps: int = 8, capacity: int = 32) -> Example:
    return decode(model, StaticCache(config=model.config, max_cache_len=capacity), steps)


def dynamic_decode(model: nn.Module, steps: int = 5) -> Example:
    return decode(model, DynamicCache(config=model.config), steps)


def train(model: nn.Module, checkpointing: bool = False) -> Example:
    """One step's loss on two sequences; with `checkpointing`, layers are recomputed in the backward."""
    model.train()
    if checkpointing:
        # Renamed between the supported versions; the old name warns in the new ones.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    ids = _ids(model, 2, 12)
    return Example(model, (ids,), {"labels": ids, "use_cache": False})


def generate(model: nn.Module, new_tokens: int = 8) -> Example:
    """Greedy continuations of two prompts over a static cache, all of one length."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return Example(model, (_ids(model, 2, 10),), {**settings, "cache_implementation": "static"})
