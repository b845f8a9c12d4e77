"""The paged latent cache against transformers' static cache, and what it refuses, with the pool untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, StaticCache

from dscompile._entry import ensure_registered
from dscompile.adapters.hf import (
    CacheDtypeError,
    CapacityError,
    LatentDtypeError,
    LatentShapeError,
    NoLatentError,
    PagedLatentCache,
    PageSizeError,
)
from dscompile.report import reports
from tests.zoo import hf
from tests.zoo.hf import MICRO, build_model, tokens

C, R = MICRO["kv_lora_rank"], MICRO["qk_rope_head_dim"]
CAPACITY = 128

pytestmark = pytest.mark.skipif(not hf.CACHES_LATENT, reason="tier: transformers 5.15 or newer, which caches latents")


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("deepseek_v3")


def scattered(model: Any, **options: Any) -> PagedLatentCache:
    """A cache whose free pages are out of order, so that a page's number says nothing about its place."""
    cache = PagedLatentCache(model.config, CAPACITY, **{"num_pages": 7, **options})
    cache.pages.free = [5, 2, 6, 0, 3, 1, 4][: len(cache.pages.free)]
    return cache


def rows(batch: int = 2, length: int = 3, latent: int = C, rope: int = R, heads: int = 1, **like: Any) -> tuple:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(batch, heads, length, width, generator=generator).to(**like) for width in (latent, rope))


def filled(model: Any) -> PagedLatentCache:
    cache = scattered(model)
    cache.update(*rows(length=70), layer_idx=0)
    return cache


@torch.no_grad()
def logits(model: Any, cache: Any, calls: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(ids, past_key_values=cache, use_cache=True).logits for ids in calls]


def test_equals_a_static_cache(model: Any) -> None:
    """A prompt, a chunk across the edge of a page, single steps: logits and cached rows are those of StaticCache."""
    calls = [tokens(2, 60), tokens(2, 5, seed=1), *(tokens(2, 1, seed=s) for s in range(2, 6))]
    paged, static = scattered(model), StaticCache(config=model.config, max_cache_len=CAPACITY)
    for ours, theirs in zip(logits(model, paged, calls), logits(model, static, calls), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    written = int(paged.get_seq_length())
    assert written == 69
    pages = paged.layers[1].pool[paged.layers[1].page_table].flatten(1, 3)
    assert torch.equal(pages.view(2, CAPACITY, C + R)[:, :written, :C], static.layers[1].keys[:, 0, :written])
    assert torch.equal(pages.view(2, CAPACITY, C + R)[:, :written, C:], static.layers[1].values[:, 0, :written])


def test_pages_belong_to_one_request(model: Any) -> None:
    cache = filled(model)
    table = cache.layers[0].page_table
    assert table.dtype is torch.int32 and table.shape == (2, 2) and table.unique().numel() == 4
    assert all(layer.page_table is table for layer in cache.layers if layer.is_initialized)
    unowned = [page for page in range(7) if page not in table.flatten().tolist()]
    assert not cache.layers[0].pool[unowned].any()


def test_generate_gives_the_tokens_of_a_static_cache(model: Any) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False}
    prompt = tokens(2, 60)
    ours = model.generate(prompt, past_key_values=scattered(model), disable_compile=True, **settings)
    theirs = model.generate(prompt, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(ours, theirs)


def test_eight_steps_are_one_graph(model: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    calls = [tokens(2, 1, seed=s) for s in range(8)]
    caches = scattered(model), scattered(model)
    for cache in caches:
        logits(model, cache, [tokens(2, 60)])
    expected = logits(model, caches[0], calls)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(logits(compiled, caches[1], calls), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert int(caches[1].get_seq_length()) == 68


def test_reset_forgets_and_keeps_addresses(model: Any) -> None:
    cache = scattered(model)
    first = logits(model, cache, [tokens(2, 20)])
    addresses = [(layer.pool.data_ptr(), layer.page_table.data_ptr()) for layer in cache.layers]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(logits(model, cache, [tokens(2, 20)])[0], first[0])
    assert addresses == [(layer.pool.data_ptr(), layer.page_table.data_ptr()) for layer in cache.layers]


def test_reorder_copies_between_requests(model: Any) -> None:
    cache = filled(model)
    before = cache.layers[0].pool[cache.layers[0].page_table].clone()
    table = cache.layers[0].page_table.clone()
    cache.layers[0].reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].page_table, table)
    assert torch.equal(cache.layers[0].pool[table], before[[1, 1]])


def test_set_length_rolls_back(model: Any) -> None:
    calls = [tokens(2, 20), tokens(2, 1, seed=1)]
    cache = scattered(model)
    expected = logits(model, cache, calls)[1]
    cache.set_length(20)
    assert torch.equal(logits(model, cache, calls[1:])[0], expected)


def test_more_pages_for_running_requests(model: Any) -> None:
    cache = filled(model)
    before = cache.layers[0].pool.clone()
    cache.allocate(2, 150)
    assert cache.get_max_length() == 192
    assert cache.get_mask_sizes(1, 0) == (192, 0)
    assert torch.equal(cache.layers[0].pool, before)
    cache.update(*rows(length=80), layer_idx=0)
    assert int(cache.get_seq_length()) == 150


def test_release_lets_the_batch_change(model: Any) -> None:
    cache = filled(model)
    cache.release()
    latent, _ = cache.update(*rows(batch=3, length=4), layer_idx=0)
    assert latent.shape == (3, 1, CAPACITY, C)
    assert len(cache.pages.free) == 1


def test_early_initialization_takes_the_widths_of_the_configuration(model: Any) -> None:
    cache = PagedLatentCache(model.config, CAPACITY)
    cache.early_initialization(2, num_heads=4, head_dim=48, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.layers[1].pool.shape == (4, 64, 1, C + R)
    assert cache.layers[1].pool.dtype is torch.bfloat16
    assert cache.batch_size == 2 and cache.is_compileable


BAD_UPDATES = {
    "expanded_heads": (rows(heads=4), NoLatentError, "keys and values of each head"),
    "wrong_latent_width": (rows(latent=C + 8), LatentShapeError, f"widths {C} and {R}"),
    "wrong_rope_width": (rows(rope=R // 2), LatentShapeError, f"widths {C} and {R}"),
    "wrong_batch": (rows(batch=3), LatentShapeError, "2 requests"),
    "lengths_disagree": ((rows(length=3)[0], rows(length=4)[1]), LatentShapeError, "each new token"),
    "wrong_dtype": (rows(dtype=torch.bfloat16), LatentDtypeError, "pool of torch.float32"),
    "mixed_dtypes": ((rows()[0], rows(dtype=torch.float16)[1]), LatentDtypeError, "torch.float16"),
    "beyond_capacity": (rows(length=59), CapacityError, "59 tokens were given where 70 of 128 are taken"),
}


@pytest.mark.parametrize(("given", "error", "words"), BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_bad_update_writes_nothing(model: Any, given: tuple, error: type, words: str) -> None:
    cache = filled(model)
    pool, table = cache.layers[0].pool.clone(), copy.deepcopy(cache.pages.owned)
    with pytest.raises(error, match=words):
        cache.update(*given, layer_idx=0)
    assert torch.equal(cache.layers[0].pool, pool)
    assert cache.pages.owned == table and int(cache.get_seq_length()) == 70


def test_exactly_full_is_allowed(model: Any) -> None:
    cache = filled(model)
    cache.update(*rows(length=58), layer_idx=0)
    assert int(cache.get_seq_length()) == CAPACITY


@pytest.mark.parametrize("first_call", ["integers", "expanded_heads"])
def test_bad_first_call_allocates_nothing(model: Any, first_call: str) -> None:
    cache = scattered(model)
    given = rows(dtype=torch.int32) if first_call == "integers" else rows(heads=4)
    with pytest.raises((LatentDtypeError, NoLatentError)):
        cache.update(*given, layer_idx=0)
    assert cache.pages.owned == [] and not cache.layers[0].is_initialized


def test_a_compiled_step_past_the_capacity_writes_nothing(model: Any) -> None:
    """The page look-up, which precedes the write, is out of bounds."""
    torch._dynamo.reset()
    layer = filled(model).layers[0]
    layer.set_length(CAPACITY)
    pool = layer.pool.clone()
    step = torch.compile(layer.update, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match="out of bounds"):
        step(*rows(length=1))
    assert torch.equal(layer.pool, pool)


def test_too_few_pages(model: Any) -> None:
    cache = scattered(model, num_pages=3)
    with pytest.raises(CapacityError, match="4 more pages are needed for 2 requests of 2 pages, 3 of 3 are free"):
        cache.update(*rows(), layer_idx=0)
    assert cache.pages.owned == [] and len(cache.pages.free) == 3


def test_bad_allocations(model: Any) -> None:
    cache = filled(model)
    with pytest.raises(CapacityError, match="batch of 3"):
        cache.allocate(3, 64)
    with pytest.raises(CapacityError, match="4 more pages are needed"):
        cache.allocate(2, 256)
    with pytest.raises(CapacityError, match="a length of 129"):
        cache.set_length(129)
    with pytest.raises(NoLatentError, match="offloading"):
        cache.layers[0].offload()
    assert len(cache.pages.free) == 3 and int(cache.get_seq_length()) == 70


def test_bad_constructions(model: Any) -> None:
    with pytest.raises(PageSizeError, match="page_size=16"):
        PagedLatentCache(model.config, CAPACITY, page_size=16)
    with pytest.raises(CapacityError, match="max_cache_len=0"):
        PagedLatentCache(model.config, 0)
    with pytest.raises(NoLatentError, match="llama with kv_lora_rank=None"):
        PagedLatentCache(AutoConfig.for_model("llama"), CAPACITY)


def test_a_first_call_inside_a_graph_says_what_to_do(model: Any) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call early_initialization first"):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(tokens(2, 4), past_key_values=scattered(model), use_cache=True)


def test_an_initialized_cache_takes_a_compiled_prompt(model: Any) -> None:
    torch._dynamo.reset()
    cache = scattered(model)
    cache.early_initialization(2, num_heads=1, head_dim=C, dtype=torch.float32, device=torch.device("cpu"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = logits(model, scattered(model), [tokens(2, 20)])[0]
    torch.testing.assert_close(logits(compiled, cache, [tokens(2, 20)])[0], expected, rtol=1e-5, atol=1e-5)


def test_float8_rows(model: Any) -> None:
    """What comes back is within a float8 step of what was given, rope is untouched, and scattered pages hold it."""
    cache = scattered(model, dtype="fp8")
    latent, rope = rows(length=70)
    got, got_rope = cache.update(latent, rope, layer_idx=0)
    assert got.shape == (2, 1, CAPACITY, C) and torch.equal(got_rope[:, :, :70], rope)
    assert ((got[:, :, :70] - latent).norm() / latent.norm()) < 0.04
    again, _ = cache.update(*rows(length=3), layer_idx=0)
    assert torch.equal(again[:, :, :70], got[:, :, :70]) and int(cache.get_seq_length()) == 73
    assert cache.layers[0].pool.dtype is torch.uint8 and cache.layers[0].pool.shape[-1] == C + 4 + 4 * R


def test_generate_with_float8_rows(model: Any) -> None:
    settings = {"max_new_tokens": 4, "do_sample": False}
    got = [model.generate(tokens(2, 9), past_key_values=scattered(model, dtype="fp8"), **settings) for _ in range(2)]
    assert torch.equal(*got) and got[0].shape == (2, 13)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiled_model_reads_float8_rows_in_place(model: Any, device: str) -> None:
    """Greedy tokens and logits are those of the uncompiled model, which reads a dequantised copy; none is made here."""
    ensure_registered()
    torch._dynamo.reset()
    model = copy.deepcopy(model).to(device)
    caches, before = [scattered(model, dtype="fp8") for _ in range(2)], len(reports())
    for cache in caches:
        logits(model, cache, [tokens(2, 60).to(device)])
    inner = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(model, backend="dsinfra", fullgraph=True, options={"inner": inner})
    step = [tokens(2, 1).to(device)] * 2
    for _ in range(6):  # across the edge of a page
        expected, found = (logits(run, cache, [ids])[0] for run, cache, ids in zip((model, compiled), caches, step))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        step = [x[:, -1:].argmax(-1) for x in (expected, found)]
        assert torch.equal(*step)
    (report,) = reports()[before:]
    assert report.op_counts.get("mla_decode") == hf.LAYERS and "mla_read_fp8" not in report.op_counts
    found = {(site.decision.rpartition(", ")[2], site.kernel) for site in report.sites if site.kind == "mla"}
    assert found == {("pages read in place", "reference" if device == "cpu" else "triton")}


def test_other_dtypes_are_refused(model: Any) -> None:
    with pytest.raises(CacheDtypeError, match='dtype=.int4.*or give "fp8"'):
        PagedLatentCache(model.config, CAPACITY, dtype="int4")
