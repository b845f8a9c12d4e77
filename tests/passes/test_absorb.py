"""Absorption: the same numbers over the latent itself, where the cost rule asks for it and every mask allows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx

from dscompile.backend import dsinfra
from dscompile.kernels import launch
from dscompile.kernels import mla_decode as kernels
from dscompile.lowering import decode as decode_table
from dscompile.passes import absorb, pipeline
from tests.passes import toy as toys
from tests.passes.toy import (
    C,
    D,
    H,
    N,
    R,
    Toy,
    V,
    only_site,
    randn,
    same_as_eager,
    sdpa,
    toy,
)
from tests.zoo import hf

T = 16


class Decode(Toy):
    """Attends over a cache of T rows; `mask(queries, length)` gives what SDPA is passed."""

    mask: Callable[[int, torch.Tensor], torch.Tensor | None] = staticmethod(lambda queries, length: None)

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__(seed, dtype)
        self.register_buffer("cache", randn(2, T, C + R, seed=seed + 2, dtype=dtype))

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope, *_ = self.parts(x)
        latent, k_rope = self.cache[..., :C], self.cache[..., C:].unsqueeze(1)
        mask = self.mask(x.shape[1], length)
        return self.finish(q_nope, q_rope, self.up(latent)[0], k_rope, self.up(latent)[1], mask)

    def attend(self, q, k, v, mask):  # type: ignore[no-untyped-def]
        return sdpa(q, k, v, attn_mask=mask)


def decode(mask: Callable) -> type[Decode]:
    return type("Changed", (Decode,), {"mask": staticmethod(mask)})


def layers(count: int, mask: Callable, shared: bool) -> Callable[[], torch.nn.Module]:
    """Layers that take one mask, or make one each."""

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = (lambda queries, made: made) if shared else mask
            self.layers = torch.nn.ModuleList(decode(kind)(i) for i in range(count))

        def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
            argument = mask(x.shape[1], length) if shared else length
            for layer in self.layers:
                x = x + layer(x, argument)
            return x

    return Layers


def positions(queries: int, length: torch.Tensor) -> torch.Tensor:
    """Of the queries, as the last ones of `length` tokens: [S, 1]."""
    return (length - queries + torch.arange(queries))[:, None]


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, 0.0, -1e9).double()


def _by_head(n: torch.Tensor) -> torch.Tensor:
    """[H, 1, T]"""
    return (torch.arange(T) * torch.arange(1, H + 1)[:, None, None] + n) % 3 > 0


# What the keys seen depend on -> mask, kind reported, whether the operator keeps it as an operand.
MASKS: dict[str, tuple[Callable[[int, torch.Tensor], torch.Tensor | None], str, bool]] = {
    "full": (lambda S, n: None, "full", False),
    "causal": (lambda S, n: torch.arange(T) <= torch.arange(S)[:, None] + T - S, "", False),
    "length": (lambda S, n: torch.arange(T) <= positions(S, n), "length", False),
    "length_float": (lambda S, n: additive(torch.arange(T) <= positions(S, n)), "length", False),
    "per_request": (lambda S, n: (torch.arange(T) < torch.stack([n, n - 2])[:, None])[:, None, None], "", False),
    "scattered": (lambda S, n: ((torch.arange(T) * n) % 3 > 0)[None, None, None], "operand", True),
    "hidden": (lambda S, n: (torch.arange(T) < n - 100)[None], "", False),
}


@contextmanager
def cost(absorbed: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(absorb.heuristics, "prefer_absorbed", lambda **sizes: (absorbed, "as the test wants it"))
        yield


def calls(queries: int, dtype: torch.dtype = torch.float64) -> list[tuple]:
    return [(randn(2, queries, D, seed=n, dtype=dtype), torch.tensor(n)) for n in (5, 9, T)]


def graph_of(make: Callable[[], Any], *inputs: Any, inner: str = "eager", **options: Any) -> fx.GraphModule:
    """The one rewritten graph of a call."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        compiled = dsinfra(gm, inputs, options={"inner": inner, **options}, sink=lambda report: None)
        graphs.append(gm)
        return compiled

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(make(), backend=backend)(*inputs)
    (graph,) = graphs
    return graph


def calls_of(graph: fx.GraphModule, *names: str) -> list[fx.Node]:
    """Live calls of operators, by the overload's name."""
    live = pipeline._live(graph.graph)
    return [n for n in graph.graph.nodes if n in live and n.op == "call_function" and str(n.target) in names]


DECODE = "dsinfra.mla_decode.default"


@pytest.mark.parametrize(
    ("queries", "absorbed"), [(1, False), (1, True), (3, True)], ids=["1-expanded", "1-absorbed", "3-absorbed"]
)
@pytest.mark.parametrize("name", MASKS)
def test_both_forms_equal_eager(name: str, queries: int, absorbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, kind, _ = MASKS[name]
    with cost(absorbed, monkeypatch):
        reports = same_as_eager(decode(mask), *calls(queries))
    (report,) = reports
    site = only_site(reports)
    if name == "causal":
        kind = "full" if queries == 1 else "causal"
    if kind == "length" and queries > 1:
        kind = "operand"
    assert site.mask.startswith(kind)
    refused = name == "length_float" and queries > 1  # an additive operand
    assert report.op_counts == {"mla_decode" if absorbed and not refused else "mla": 1}
    assert site.decision.startswith("mla_decode: as the test wants it" if absorbed and not refused else "mla: ")


@pytest.mark.parametrize("name", ["full", "causal", "length", "scattered"])
def test_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cost(True, monkeypatch):
        same_as_eager(
            lambda: decode(MASKS[name][0])(dtype=torch.float32), *calls(1, torch.float32), rtol=1e-5, inner="aot_eager"
        )


@pytest.mark.parametrize("name", MASKS)
def test_operands_of_the_operator(name: str) -> None:
    """q [B,S,H,.], the cache in place, seqlens int32 [B], and a mask only where it could not be counted."""
    mask, _, kept = MASKS[name]
    (node,) = calls_of(graph_of(decode(mask), *calls(1)[0]), DECODE)
    q, q_rope, latent, k_rope, seqlens, operand, table, _, causal = node.args
    shapes = [tuple(n.meta["example_value"].shape) for n in (q, q_rope, latent, k_rope, seqlens)]
    assert shapes == [(2, 1, H, C), (2, 1, H, R), (2, T, C), (2, T, R), (2,)]
    assert latent.meta["example_value"].stride() == (T * (C + R), C + R, 1), "read where it lies"
    assert seqlens.meta["example_value"].dtype is torch.int32
    assert (operand is not None) == kept and table is None and not causal


def test_a_causal_chunk_is_a_flag() -> None:
    (node,) = calls_of(graph_of(decode(MASKS["causal"][0]), *calls(3)[0]), DECODE)
    assert node.args[5] is None and node.args[8] is True


# ------------------------------------------------------------------ when it is not done


def test_decode_is_absorbed_and_a_prompt_is_not() -> None:
    (report,) = same_as_eager(Decode, calls(1)[0])
    assert only_site([report]).decision.startswith("mla_decode: absorbed")
    (report,) = same_as_eager(Toy, (randn(2, 64, D),))
    assert only_site([report]).decision.startswith("mla: expanded") and report.op_counts == {"mla": 1}


def test_the_decision_names_both_costs() -> None:
    decision = only_site(same_as_eager(Decode, calls(1)[0])).decision
    assert "absorbed against" in decision and "S 1, T 16, H 4" in decision


def test_training_stays_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    with cost(True, monkeypatch):
        (report,) = same_as_eager(Toy, train=True)
    assert "training" in only_site([report]).decision and report.op_counts == {"mla": 1}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda S, n: torch.linspace(-1, 0, T, dtype=torch.float64)[None], "additive mask"),
        (lambda S, n: _by_head(n)[None], "differs between heads"),
    ],
    ids=["additive", "per_head"],
)
def test_masks_that_stay_expanded(mask: Callable, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cost(True, monkeypatch):
        (report,) = same_as_eager(decode(mask), *calls(1))
    assert report.op_counts == {"mla": 1}
    decision = only_site([report]).decision
    assert decision.startswith("mla: expanded") and reason in decision


def test_a_mask_of_three_dimensions_belongs_to_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as heads: [H, 1, T] is no [B, 1, T]."""

    class Four(Decode):
        mask = staticmethod(lambda queries, n: _by_head(n))

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", randn(H, T, C + R))

    with cost(True, monkeypatch):
        same_as_eager(Four, (randn(H, 1, D), torch.tensor(5)))


# ------------------------------------------------------------------ lengths are counted once


@pytest.mark.parametrize("shared", [True, False], ids=["one_mask", "three_masks"])
def test_a_mask_is_counted_once(shared: bool) -> None:
    graph = graph_of(layers(3, MASKS["length"][0], shared), *calls(1)[0])
    assert len(calls_of(graph, DECODE)) == 3
    assert len(calls_of(graph, "aten.sum.dim_IntList")) == (1 if shared else 3)
    lengths = {node.args[4] for node in calls_of(graph, DECODE)}
    assert len(lengths) == (1 if shared else 3)


@pytest.mark.parametrize("name", ["length", "scattered", "full"])
def test_layers_that_share_a_mask(name: str) -> None:
    (report,) = same_as_eager(layers(3, MASKS[name][0], True), *calls(1))
    assert report.op_counts == {"mla_decode": 3}


@pytest.mark.parametrize("change", ["narrower", "hole"])
def test_a_mask_changed_between_two_attentions(change: str) -> None:
    def forward(self, x, length):  # type: ignore[no-untyped-def]
        mask = (torch.arange(T) < length)[None, None, None]
        y = Decode.forward(self, x, mask)
        mask[..., 4 if change == "narrower" else 1 :][..., : T if change == "narrower" else 1] = False
        return y, Decode.forward(self, x, mask)

    changed = type("Changed", (Decode,), {"mask": staticmethod(lambda S, made: made), "forward": forward})
    same_as_eager(changed, *calls(1))


def test_one_mask_for_attentions_of_different_batches() -> None:
    def forward(self, x, length):  # type: ignore[no-untyped-def]
        mask = (torch.arange(T) < length)[None, None, None]
        y = Decode.forward(self, x, mask)
        q_nope, q_rope, *_ = self.parts(x[:1])
        k_nope, v = self.up(self.cache[:1, :, :C])
        return y, self.finish(q_nope, q_rope, k_nope, self.cache[:1, None, :, C:], v, mask)

    changed = type("Changed", (Decode,), {"mask": staticmethod(lambda S, made: made), "forward": forward})
    same_as_eager(changed, *calls(1))


# ------------------------------------------------------------------ widths


@pytest.mark.parametrize(("rank", "rope"), [(320, 32), (1024, 64), (20, 0)], ids=str)
def test_widths_that_no_fast_kernel_has(rank: int, rope: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the model to the kernel: recognised, absorbed, right, and the operands are ones that plain Triton takes."""
    for module in (toys, sys.modules[__name__]):
        monkeypatch.setattr(module, "C", rank)
        monkeypatch.setattr(module, "R", rope)
    make = decode(MASKS["length"][0])
    with cost(True, monkeypatch):
        (report,) = same_as_eager(make, calls(1)[1])
        (node,) = calls_of(graph_of(lambda: make(dtype=torch.bfloat16), *calls(1, torch.bfloat16)[0]), DECODE)
    assert report.op_counts == {"mla_decode": 1}
    operands = [n.meta["example_value"] for n in node.args[:4]]
    assert [x.shape[-1] for x in operands] == [rank, rope, rank, rope]
    if launch.has_triton() and not launch.interpreting():
        with launch.offline():
            concrete = [decode_table._concrete(x) for x in operands]
            assert kernels.triton_refusal(*concrete) is None
            assert "(512, 64)" in str(kernels.gluon_refusal(*concrete))


# ------------------------------------------------------------------ independence of the batch


@pytest.mark.parametrize("form", ["absorbed", "own", "paged_float8"])
@pytest.mark.parametrize("asked", [False, True])
def test_the_operator_is_told_to_be_batch_invariant(form: str, asked: bool) -> None:
    """And the form is chosen by the sizes of one request, so that it doesn't depend on the batch either."""
    make = {"absorbed": Decode, "own": type("Own", (Decode,), {"forward": _own}), "paged_float8": Packed}[form]
    inputs = LENGTHS[1] if form == "paged_float8" else calls(1)[0]
    graph = graph_of(make, *inputs, batch_invariant=asked)
    (node,) = calls_of(graph, DECODE)
    assert (len(node.args) > 10 and node.args[10] is True) == asked
    reports = same_as_eager(make, inputs, options={"batch_invariant": asked}, inner="aot_eager")
    assert reports[0].op_counts == {"mla_decode": 1}
    if form != "own":
        assert ("(B 1, " in only_site(reports).decision) == asked


# ------------------------------------------------------------------ pages


class Paged(Toy):
    """A pool of 6 pages [P, 64, 1, C + R], two of them for each request."""

    def __init__(self, table_dtype: torch.dtype = torch.int32):
        super().__init__()
        self.register_buffer("pool", randn(6, 64, 1, C + R))
        self.register_buffer("table", torch.tensor([[3, 0], [5, 1]], dtype=table_dtype))

    def gather(self) -> torch.Tensor:
        """[B, T, C + R]"""
        return self.pool[self.table].flatten(1, 2)[..., 0, :]

    def one(self, x: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope, *_ = self.parts(x)
        k_nope, v = self.up(rows[..., :C])
        return self.finish(q_nope, q_rope, k_nope, rows[:, None, :, C:], v, mask)

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.one(x, self.gather(), (torch.arange(128) < length)[None, None, None])

    def attend(self, q, k, v, mask):  # type: ignore[no-untyped-def]
        return sdpa(q, k, v, attn_mask=mask)


LENGTHS = [(randn(2, 1, D, seed=n), torch.tensor(n)) for n in (1, 64, 70, 128)]


def test_pages_are_read_in_place() -> None:
    (report,) = same_as_eager(Paged, *LENGTHS)
    assert report.op_counts == {"mla_decode": 1}
    graph = graph_of(Paged, *LENGTHS[0])
    (node,) = calls_of(graph, DECODE)
    latent, k_rope, table = (node.args[i].meta["example_value"] for i in (2, 3, 6))
    assert latent.shape == (6, 64, C) and k_rope.shape == (6, 64, R) and table.shape == (2, 2)
    live = pipeline._live(graph.graph)
    gathers = [n for n in graph.graph.nodes if n.op == "call_function" and "table" in str(n.args[1:])]
    gathers = [n for n in gathers if n is not node]
    assert gathers and not live & set(gathers)


def _over_cut(self, x, length):  # type: ignore[no-untyped-def]
    return self.one(x, self.gather(), (torch.arange(125) < length)[None])


@pytest.mark.parametrize("case", ["int64_table", "shifted", "cut", "reordered"])
def test_pages_that_the_kernel_cannot_read(case: str) -> None:
    def gather(self):  # type: ignore[no-untyped-def]
        rows = Paged.gather(self)
        if case == "shifted":
            return torch.cat([rows[:, 1:], rows[:, :1]], 1)
        if case == "reordered":
            return rows.view(2, 64, 2, C + R).transpose(1, 2).flatten(1, 2)
        return rows[:, 3:] if case == "cut" else rows

    changed = type("Changed", (Paged,), {"gather": gather})
    if case == "cut":
        changed = type("Cut", (changed,), {"forward": _over_cut})
    dtype = torch.int64 if case == "int64_table" else torch.int32
    same_as_eager(lambda: changed(dtype), *LENGTHS[1:])


def test_an_abandoned_absorption_leaves_nothing_behind() -> None:
    """The first attention can't be absorbed, the second shares its mask and can."""

    class Both(Paged):
        def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
            mask = (torch.arange(128) < length)[None, None, None]
            return self.one(x + self.one(x, self.gather(), mask), self.pool.view(-1, 128, C + R)[:2], mask)

    (report,) = same_as_eager(lambda: Both(torch.int64), *LENGTHS)
    assert report.sites[1].decision.startswith("mla_decode")


def test_pool_written_between_gather_and_attention() -> None:
    def forward(self, x, length):  # type: ignore[no-untyped-def]
        rows = self.gather()
        self.pool.mul_(2)
        return self.one(x, rows, (torch.arange(128) < length)[None, None, None])

    same_as_eager(type("Changed", (Paged,), {"forward": forward}), *LENGTHS[:2])


@pytest.mark.skipif(not hf.CACHES_LATENT, reason="versions: transformers 5.15 or newer, which caches latents")
def test_the_paged_cache_of_the_adapters() -> None:
    from dscompile.adapters.hf import PagedLatentCache

    model = hf.build_model("deepseek_v3", num_hidden_layers=1)
    cache = PagedLatentCache(model.config, 128)
    with torch.no_grad():
        model(hf.tokens(2, 10), past_key_values=cache)
    graph = graph_of(lambda: lambda ids: model(ids, past_key_values=cache).logits, hf.tokens(2, 1))
    (node,) = calls_of(graph, DECODE)
    table = node.args[6]
    assert table is not None and table.meta["example_value"].shape == (2, 2)
    assert node.args[9:] == (None, False, True), "one length for all requests is proved, and nothing is weighed"
    assert node.args[2].meta["example_value"].shape == (4, 64, hf.MICRO["kv_lora_rank"])
    gathered = [n for n in pipeline._live(graph.graph) if n.op == "call_function" and table in n.all_input_nodes]
    shapes = [tuple(n.meta["example_value"].shape) for n in gathered if hasattr(n.meta.get("example_value"), "shape")]
    assert not any(shape[:3] == (2, 2, 64) for shape in shapes), "no live gather of whole pages"


class Packed(Paged):
    """Pools of float8 rows, W latents and R rope columns in `kept`, two pages for each request."""

    W = 256

    def __init__(self, kept: torch.dtype = torch.float64, used: int = W):
        super().__init__()
        self.kept, self.used = kept, used
        self.b = torch.nn.Linear(used, H * (N + V), bias=False, dtype=torch.float64)
        self.b.weight.data = randn(H * (N + V), used, seed=3) / 8
        self.pool = torch.zeros(6, 64, 1, self.W + 8 + kept.itemsize * R, dtype=torch.uint8)
        self.other = self.pool.clone()
        for seed, pool in enumerate((self.pool, self.other)):
            rows = randn(6 * 64, self.W + R, seed=seed, dtype=kept).split([self.W, R], -1)
            torch.ops.dsinfra.mla_append_fp8(pool, *rows, torch.arange(6 * 64))

    def read(self, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.dsinfra.mla_read_fp8(pool, self.table, self.W, R, self.kept)

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.of(x, length, *self.read(self.pool))

    def of(self, x: torch.Tensor, length: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2).split([N, R], -1)
        k_nope, v = self.up(latent[..., : self.used].to(x.dtype))
        mask = (torch.arange(128) < length)[None, None, None]
        return self.finish(q_nope, q_rope, k_nope, k_rope[:, None].to(x.dtype), v, mask)


def _write_first(self, x, length):  # type: ignore[no-untyped-def]
    rows = self.read(self.pool)
    self.pool.zero_()
    return self.of(x, length, *rows)


def _two_pools(self, x, length):  # type: ignore[no-untyped-def]
    return self.of(x, length, self.read(self.pool)[0], self.read(self.other)[1])


def _moved(self, x, length):  # type: ignore[no-untyped-def]
    return self.of(x, length, *(rows.roll(1, 1) for rows in self.read(self.pool)))


PACKED: dict[str, tuple[Callable, dict, str]] = {
    "in_place": (Packed.forward, {}, "pages read in place"),
    "written": (_write_first, {}, "copied because the pool or its table is written"),
    "two_pools": (_two_pools, {}, "copied because latent and rope key are in different pools"),
    "part": (Packed.forward, {"used": 8}, "copied because the attention reads parts of rows of 256 float8 and 4"),
    "wider": (Packed.forward, {"kept": torch.float32}, "rope columns are torch.float32 and the attention is in"),
    "moved": (_moved, {}, ""),
}


@pytest.mark.parametrize("case", PACKED)
def test_float8_pages(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in place, or copied for a reason that the report names; the numbers are those of the copy."""
    forward, settings, words = PACKED[case]
    made = type("Changed", (Packed,), {"forward": forward})
    with cost(True, monkeypatch):
        reports = same_as_eager(lambda: made(**settings), *LENGTHS[1:3], inner="aot_eager")
        (node,) = calls_of(graph_of(lambda: made(**settings), *LENGTHS[0]), DECODE)
    decision, inside = only_site(reports).decision, case == "in_place"
    assert words in decision and ("pages" in decision) == bool(words)
    assert ("mla_read_fp8" in reports[0].op_counts) == (not inside)
    shapes = [tuple(n.meta["example_value"].shape) for n in (*node.args[2:4], *node.args[9:10])]
    copied = [(2, 128, settings.get("used", Packed.W)), (2, 128, R)]
    assert shapes == ([(6, 64, Packed.W), (6, 64, R), (6, 64, 2)] if inside else copied)


# ------------------------------------------------------------------ the model's own absorbed form


def _own(self, x, length, change=lambda cache: None):  # type: ignore[no-untyped-def]
    q_nope, q_rope, *_ = self.parts(x)
    w = self.b.weight.view(H, -1, C)
    q = torch.einsum("bhsn,hnc->bshc", q_nope, w[:, :N])
    scores = torch.einsum("bshc,btc->bsht", q, self.cache[..., :C])
    scores = (scores + torch.einsum("bhsr,btr->bsht", q_rope, self.cache[..., C:])) * 0.3
    p = torch.softmax(scores, -1)
    change(self.cache)
    o = torch.einsum("bsht,btc->bshc", p, self.cache[..., :C])
    return torch.einsum("bshc,hvc->bshv", o, w[:, N:])


@pytest.mark.parametrize("queries", [1, 3])
def test_own_absorbed_form(queries: int) -> None:
    changed = type("Changed", (Decode,), {"forward": _own})
    (report,) = same_as_eager(changed, calls(queries)[0])
    assert report.op_counts == {"mla_decode": 1}
    assert only_site([report]).decision == "mla_decode: the model's own absorbed form"


@pytest.mark.parametrize(
    "change",
    [lambda c: c.mul_(2), lambda c: c[:, 4].mul_(2), lambda c: c.split([C, R], -1)[0].mul_(2)],
    ids=["whole", "row", "part"],
)
def test_own_absorbed_form_over_a_cache_that_changes(change: Callable) -> None:
    changed = type("Changed", (Decode,), {"forward": lambda self, x, n: _own(self, x, n, change)})
    same_as_eager(changed, calls(1)[0])


def test_own_absorbed_form_is_not_trained() -> None:
    changed = type("Changed", (Decode,), {"forward": lambda self, x: _own(self, x, None)})
    site = only_site(same_as_eager(changed, (randn(2, 3, D),), train=True))
    assert site.refusal == "Unsupported" and "no backward" in site.reason


def test_expanded_and_absorbed_layers_in_one_graph() -> None:
    """A prompt's attention and a decoding one: each gets its own decision."""
    prompt = toy()

    class Both(Decode):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = prompt()

        def forward(self, x: torch.Tensor, y: torch.Tensor, length: torch.Tensor) -> tuple:
            return self.prompt(x), super().forward(y, length)

    (report,) = same_as_eager(Both, (randn(2, 64, D), *calls(1)[0]))
    assert report.op_counts == {"mla": 1, "mla_decode": 1}
