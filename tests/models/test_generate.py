"""`generate()` with our paged cache: the tokens are those of an uncompiled run. The matrix has static caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from dscompile._entry import ensure_registered
from dscompile.adapters.hf import PagedLatentCache
from dscompile.lowering import select
from dscompile.report import reports
from tests.zoo import hf

NEW_TOKENS = 8


def generate(model: Any, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **settings)


@pytest.fixture
def compile_config(monkeypatch: pytest.MonkeyPatch) -> CompileConfig:
    """What `generate` passes: `mode="reduce-overhead"` and no options, so the fast inner compiler comes by variable."""
    ensure_registered()
    monkeypatch.setenv("DSINFRA_INNER", "aot_eager")
    config = CompileConfig(backend="dsinfra", fullgraph=True)
    config._compile_all_devices = True
    return config


@pytest.mark.skipif(not hf.CACHES_LATENT, reason="versions: transformers 5.15 or newer, which caches latents")
def test_paged_cache(compile_config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled step reads the pages in place: the operator is given the pool and the page table."""
    choose, operands = select.choose, []
    monkeypatch.setattr(select, "choose", lambda name, args: operands.append(args) or choose(name, args))
    model, prompt = hf.build_model("deepseek_v3"), hf.tokens(2, 60)
    expected = generate(model, prompt, cache_implementation="static", disable_compile=True)
    before = len(reports())
    cache = PagedLatentCache(model.config, 128)
    found = generate(model, prompt, past_key_values=cache, compile_config=compile_config)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    (report,) = reports()[before:]
    assert report.op_counts.get("mla_decode") == hf.LAYERS, report
    latent, page_table = operands[0][2], operands[0][6]
    assert latent.shape == (4, 64, hf.MICRO["kv_lora_rank"]) and page_table.shape == (2, 2)
