"""torchtitan's own deepseek_v3 debugmodel, two of its layers, where torchtitan can be imported.

Its attention is the higher-order operator flex_attention with a mask of documents. That has no backward on CPUs, so a
step of training there takes the library's other attention, scaled_dot_product_attention.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from tests.zoo.case import MICRO_SIZE, Example, Precision, Size

AVAILABLE = importlib.util.find_spec("torchtitan") is not None
VOCABULARY, LENGTH = 512, 32


def build(precision: Precision, attention: str = "flex", size: Size = MICRO_SIZE) -> nn.Module:
    """A dense layer and one of 8 experts, width 256, 16 heads with a latent of 512; `attention` is "flex" or "sdpa"."""
    import torchtitan.models.deepseek_v3 as titan
    from torch.nn.attention.flex_attention import flex_attention
    from torchtitan.models.common import attention as kinds

    config = titan._debugmodel("flex", "standard")
    config.layers = config.layers[:2]
    config.vocab_size = config.tok_embeddings.num_embeddings = config.lm_head.out_features = VOCABULARY
    for layer in config.layers:
        layer.attention.rope.max_seq_len = 256
        if attention == "sdpa":
            layer.attention.inner_attention = kinds.ScaledDotProductAttention.Config()
    if size.device == "cpu":
        # The library compiles it for itself, also in an uncompiled model; here the plain formula is the reference.
        kinds.FlexAttention._compiled_flex_attn = flex_attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.build()
        model.init_states()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.5 if "gate" in name else 0.08)
    return precision.settle(model).eval().to(size.device)


def example(model: Any, documents: tuple[int, ...] = (LENGTH,), train: bool = False) -> Example:
    """Two rows of tokens, each made of documents of these lengths: positions begin again at 0 in each."""
    device = model.tok_embeddings.weight.device
    positions = torch.cat([torch.arange(n) for n in documents]).expand(2, -1).contiguous().to(device)
    ids = torch.randint(VOCABULARY, positions.shape, generator=torch.Generator().manual_seed(0)).to(device)
    flex = type(model.layers["0"].attention.inner_attention).__name__ == "FlexAttention"
    masks = {"attention_masks": model.get_attention_masks(positions)} if flex else {}
    return Example(model.train(train), (ids,), {"positions": positions, **masks})
