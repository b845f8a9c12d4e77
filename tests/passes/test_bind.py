"""Binding: a value is read where it still holds what the model used, in its dtype, and the result looks as before.

Values are overwritten between their use and the attention, through every kind of alias: each case must be refused or
still give eager's result. Then layouts that later views rely on, bodies of higher-order operators, and mixed dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.passes.toy import (
    C,
    D,
    H,
    N,
    R,
    S,
    Toy,
    V,
    compile_passes,
    only_site,
    randn,
    same_as_eager,
    sdpa,
    stack,
    toy,
)

T = 16


class Cached(Toy):
    """Reads a cache of T rows [latent | rotated key]; `l` and `r` are the two parts as buffers of the same storage."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", randn(2, T, C + R, seed=2))
        self.register_buffer("l", self.cache[..., :C])
        self.register_buffer("r", self.cache[..., C:])

    def attend(self, q, k, v, mask=None):  # type: ignore[no-untyped-def]
        return sdpa(q, k, v, attn_mask=mask)

    def over(self, x, latent, k_rope, update=lambda: None, mask=None):  # type: ignore[no-untyped-def]
        """Attention of x's queries over latent_BTC and k_rope_BTR; `update` runs when keys and values are made."""
        q_nope, q_rope, *_ = self.parts(x)
        k_nope, v = self.up(latent)
        k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, H, -1, -1)], -1)
        update()
        return self.attend(torch.cat([q_nope, q_rope], -1), k, v, mask)


def cached(forward: Callable) -> type[Cached]:
    return type("Changed", (Cached,), {"forward": forward})


# ------------------------------------------------------------------ keys, values and queries changed in place

ATTEND: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "key": lambda q, k, v: k.mul_(2),
    "key_position": lambda q, k, v: k[:, :, 3].zero_(),
    "key_columns": lambda q, k, v: k[..., :2].mul_(2),
    "key_of_one_head": lambda q, k, v: k[:, 1].mul_(2),
    "key_through_transpose": lambda q, k, v: k.transpose(1, 2).mul_(2),
    "key_through_a_flat_view": lambda q, k, v: k.view(-1)[7:].mul_(2),
    "key_by_index": lambda q, k, v: k.index_copy_(2, torch.tensor([4]), k[:, :, 5:6]),
    "key_by_index_put": lambda q, k, v: k.__setitem__((slice(None), slice(None), torch.tensor([4])), k[:, :, :1] * 2),
    "key_by_copy": lambda q, k, v: k.copy_(k.flip(1)),
    "value": lambda q, k, v: v.add_(1),
    "query": lambda q, k, v: q.mul_(2),
    "query_position": lambda q, k, v: q[:, :, 4].mul_(2),
}


@pytest.mark.parametrize("name", ATTEND)
def test_operand_changed_in_place(name: str) -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        ATTEND[name](q, k, v)
        return sdpa(q, k, v, is_causal=True)

    assert len(same_as_eager(toy(attend=attend))[0].sites) == 1


def test_operand_changed_in_place_while_training() -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        k[:, :, 3] = 0
        q.mul_(2)
        return sdpa(q, k, v, is_causal=True)

    same_as_eager(toy(attend=attend), train=True)


@pytest.mark.parametrize("position", [3, 5, 8])
@pytest.mark.parametrize("part", ["nope", "rope"])
def test_every_position_of_a_filled_buffer_is_proved(part: str, position: int) -> None:
    """A key built in a buffer, with one position's part written again: no position may be taken for granted."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        k = x.new_empty(2, H, S, N + R)
        k[..., :N], k[..., N:] = k_nope, k_rope
        if part == "nope":
            k[:, :, position, :N] = k_nope[:, :, position - 1]
        else:
            k[:, :, position, N:] = k_rope[:, :, position - 1] * 2
        return sdpa(torch.cat([q_nope, q_rope], -1), k, v, is_causal=True)

    same_as_eager(toy(forward=forward))


def test_every_request_of_a_filled_buffer_is_proved() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        k = x.new_empty(len(x), H, S, N + R)
        k[..., :N], k[..., N:] = k_nope, k_rope
        k[7] = k[6].clone()
        return sdpa(torch.cat([q_nope, q_rope], -1), k, v, is_causal=True)

    same_as_eager(toy(forward=forward), (randn(16, S, D),))


# ------------------------------------------------------------------ latent, rope key and weights changed in place


def _halves(self, x, change):  # type: ignore[no-untyped-def]
    """The toy with `change(both, latent, k_rope)` behind the up-projection and in front of the attention."""
    q_nope, q_rope, *_ = self.parts(x)
    both = self.a(x)
    latent, k_rope = both.split([C, R], -1)
    k_nope, v = self.up(latent)
    k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, H, -1, -1)], -1)
    change(both, latent, k_rope)
    return sdpa(torch.cat([q_nope, q_rope], -1), k, v, is_causal=True)


LATENTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "whole": lambda both, latent, k_rope: both.mul_(2),
    "latent_part": lambda both, latent, k_rope: latent.mul_(2),
    "rope_part": lambda both, latent, k_rope: k_rope.mul_(2),
    "latent_slice": lambda both, latent, k_rope: both[..., :C].mul_(2),
    "rope_slice": lambda both, latent, k_rope: both[..., C:].mul_(2),
    "tensor_split": lambda both, latent, k_rope: both.tensor_split([C], -1)[0].mul_(2),
    "unbind": lambda both, latent, k_rope: both.unbind(1)[4].mul_(2),
    "detached": lambda both, latent, k_rope: both.detach().mul_(2),
    "out_variant": lambda both, latent, k_rope: torch.mul(both, 2, out=both),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latent_changed_behind_the_up_projection(name: str) -> None:
    same_as_eager(toy(forward=lambda self, x: _halves(self, x, LATENTS[name])))


UP: dict[str, Callable] = {
    "bias_added": lambda self, latent: self.b(latent).add_(torch.arange(H * (N + V))),
    "view_changed": lambda self, latent: (kv := self.b(latent), kv.view(-1)[5:].add_(1))[0],
    "weight_scaled_before": lambda self, latent: F.linear(latent, (w := self.b.weight * 1, w[3:].add_(1))[0]),
    "weight_copy_before": lambda self, latent: F.linear(latent, (w := self.b.weight.clone(), w[3:].add_(1))[0]),
    "weight_copy_after": lambda self, latent: (F.linear(latent, w := self.b.weight.clone()), w[3:].add_(1))[0],
    "weight_view_after": lambda self, latent: (F.linear(latent, w := self.b.weight * 1), w.view(H, -1, C)[1].add_(1))[
        0
    ],
    "latent_copy_before": lambda self, latent: self.b((c := latent.clone(), c[:, 4].mul_(2))[0]),
    "latent_copy_after": lambda self, latent: (self.b(c := latent.clone()), c[:, 4].mul_(2))[0],
}


@pytest.mark.parametrize("name", UP)
def test_up_projection_changed(name: str) -> None:
    def up(self, latent):  # type: ignore[no-untyped-def]
        return UP[name](self, latent).view(2, S, H, N + V).transpose(1, 2).split([N, V], -1)

    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        return self.finish(q_nope, q_rope, k_nope, k_rope, v)

    same_as_eager(toy(up=up, forward=forward))


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_weight_updated_in_the_graph(when: str) -> None:
    class Updated(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", self.b.weight.detach().clone())

        def forward(self, x):  # type: ignore[no-untyped-def]
            q_nope, q_rope, latent, k_rope = self.parts(x)
            if when == "before":
                self.w.add_(1)
            kv = F.linear(latent, self.w).view(2, S, H, N + V).transpose(1, 2)
            if when == "between":
                self.w.add_(1)
            y = self.finish(q_nope, q_rope, kv[..., :N], k_rope, kv[..., N:])
            if when == "after":
                self.w.add_(1)
            return y

    same_as_eager(Updated, (randn(2, S, D),), (randn(2, S, D),))


def test_keys_and_values_of_two_versions_of_one_weight() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        w = self.b.weight.clone()
        k_nope = F.linear(latent, w).view(2, S, H, N + V)[..., :N].transpose(1, 2)
        w.mul_(2)
        v = F.linear(latent, w).view(2, S, H, N + V)[..., N:].transpose(1, 2)
        return self.finish(q_nope, q_rope, k_nope, k_rope, v)

    same_as_eager(toy(forward=forward))


@pytest.mark.parametrize("copied", [False, True], ids=["buffer", "copy"])
def test_values_of_a_latent_that_changed_behind_the_softmax(copied: bool) -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        cache = self.cache.clone() if copied else self.cache
        q_nope, q_rope, *_ = self.parts(x)
        w = self.b.weight.view(H, N + V, C)
        k_nope = torch.einsum("btc,hnc->bhtn", cache[..., :C], w[:, :N])
        k = torch.cat([k_nope, cache[:, None, :, C:].expand(-1, H, -1, -1)], -1)
        p = torch.softmax(torch.cat([q_nope, q_rope], -1) @ k.transpose(2, 3), -1)
        cache[..., :C].mul_(2)
        return p @ torch.einsum("btc,hvc->bhtv", cache[..., :C], w[:, N:])

    same_as_eager(cached(forward), (randn(2, 3, D),))


# ------------------------------------------------------------------ caches


def _new(self, x):  # type: ignore[no-untyped-def]
    """This step's row of the cache."""
    _, _, latent, k_rope = self.parts(x)
    return latent, k_rope.squeeze(1)


POSITION = torch.tensor([7])

CACHES: dict[str, Callable] = {
    "whole": lambda self, new: self.cache.index_copy_(1, POSITION, torch.cat(new, -1)),
    "slices": lambda self, new: (self.cache[..., :C].index_copy_(1, POSITION, new[0]),
                                 self.cache[..., C:].index_copy_(1, POSITION, new[1])),
    "setitem": lambda self, new: (self.cache[:, 7:8, :C].copy_(new[0]), self.cache[:, 7:8, C:].copy_(new[1])),
    "split": lambda self, new: [p.index_copy_(1, POSITION, n) for p, n in zip(self.cache.split([C, R], -1), new)],
    "scaled": lambda self, new: self.cache.mul_(2),
    "rope_alone": lambda self, new: self.cache.split([C, R], -1)[1].index_copy_(1, POSITION, new[1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("when", "read"), [("before", "slices"), ("after", "slices"), ("after", "split"), ("after", "buffers")]
)
@pytest.mark.parametrize("write", CACHES)
def test_cache_updated(write: str, when: str, read: str) -> None:
    """Keys are made of the cache before or after the step's row is written; the attention runs last. `buffers` are
    views of the cache that the graph gets as inputs of their own."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        new = _new(self, x)
        parts = {
            "slices": lambda: (self.cache[..., :C], self.cache[..., C:]),
            "split": lambda: self.cache.split([C, R], -1),
            "buffers": lambda: (self.l, self.r),
        }[read]
        if when == "before":
            CACHES[write](self, new)
            return self.over(x, *parts())
        return self.over(x, *parts(), update=lambda: CACHES[write](self, new))

    (report,) = same_as_eager(cached(forward), (randn(2, 1, D),))
    if when == "before" and write in ("whole", "slices", "setitem"):
        assert only_site([report]).matched, only_site([report])


def test_cache_update_between_latent_and_rope_key() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, *_ = self.parts(x)
        k_nope, v = self.up(self.cache[..., :C])
        self.cache.index_copy_(1, POSITION, torch.cat(_new(self, x), -1))
        k = torch.cat([k_nope, self.cache[:, None, :, C:].expand(-1, H, -1, -1)], -1)
        return sdpa(torch.cat([q_nope, q_rope], -1), k, v)

    same_as_eager(cached(forward), (randn(2, 1, D),))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_cache_over_several_steps(inner: str) -> None:
    def forward(self, x, position):  # type: ignore[no-untyped-def]
        self.cache.index_copy_(1, position, torch.cat(_new(self, x), -1))
        mask = (torch.arange(T) <= position[:, None])[:, None, None]
        return self.over(x, self.cache[..., :C], self.cache[..., C:], mask=mask)

    calls = [(randn(2, 1, D, seed=i), torch.tensor([i])) for i in range(3)]
    (report,) = same_as_eager(cached(forward), *calls, inner=inner)
    assert report.op_counts == {"mla_decode": 1}


@pytest.mark.parametrize("how", ["slice", "whole", "length"])
def test_mask_changed_in_place(how: str) -> None:
    def forward(self, x, length):  # type: ignore[no-untyped-def]
        if how == "length":
            length = length.clone()
        mask = (torch.arange(T) < length)[None, None, None]
        if how == "slice":
            mask[..., 3] = False
        elif how == "whole":
            mask.logical_not_()
        else:
            length.add_(3)
        return self.over(x, self.cache[..., :C], self.cache[..., C:], mask=mask)

    same_as_eager(cached(forward), (randn(2, 1, D), torch.tensor(9)))


def test_mask_changed_between_softmax_and_product() -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        mask = (torch.arange(S) * 7 % 5 == 0).clone()
        p = torch.softmax((q @ k.transpose(2, 3)).masked_fill(mask, -math.inf), -1)
        mask.fill_(False)
        return p @ v

    same_as_eager(toy(attend=attend))


# ------------------------------------------------------------------ the result

READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "flat": lambda o: o.view(-1),
    "heads_joined": lambda o: o.transpose(1, 2).view(len(o), o.shape[2], -1),
    "part_of_split": lambda o: o.split([1, 1])[1].view(-1),
    "doubled": lambda o: (o * 2).view(-1),
    "as_strided": lambda o: o.as_strided((4,), (1,), 3) * 1,
    "returned": lambda o: o,
    "changed": lambda o: (o.transpose(1, 2)[..., 1].mul_(3), o * 1)[1],
    "changed_flat": lambda o: (o.reshape(-1).mul_(3), o * 1)[1],
}


@pytest.mark.parametrize("form", ["sdpa", "einsum"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", READERS)
def test_result_read_by_its_layout(name: str, length: int, form: str) -> None:
    """What a reader makes of strides, views and aliases is what it makes of eager's result, absorbed or not."""

    def attend(self, q, k, v, mask=None):  # type: ignore[no-untyped-def]
        if form == "sdpa":
            return READERS[name](sdpa(q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        p = torch.softmax(torch.einsum("bshd,bthd->bsht", q, k), -1)
        return READERS[name](torch.einsum("bsht,bthd->bshd", p, v))

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.over(x, self.cache[..., :C], self.cache[..., C:])

    changed = type("Changed", (Cached,), {"attend": attend, "forward": forward})
    x = randn(2, length, D)
    try:
        with torch.no_grad():
            expected = changed()(x)
    except RuntimeError:
        return  # eager itself can't view it so
    assert only_site(same_as_eager(changed, (x,), inner="aot_eager" if name == "heads_joined" else "eager")).matched
    if name == "returned":
        compiled, _ = compile_passes(changed(), inner="aot_eager")
        with torch.no_grad():
            kept = [i for i, size in enumerate(expected.shape) if size > 1]  # no stride of a dimension of 1 is used
            assert [compiled(x).stride(i) for i in kept] == [expected.stride(i) for i in kept]


def test_result_viewed_behind_a_graph_break() -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        o = sdpa(q, k, v, is_causal=True)
        torch._dynamo.graph_break()
        return o.view(2, H, -1).unflatten(-1, (S, V))

    same_as_eager(toy(attend=attend), inner="aot_eager")


def test_result_changed_in_place_while_training() -> None:
    """The operator keeps its result for the backward; the model may overwrite it."""

    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        o = sdpa(q, k, v, is_causal=True)
        o.transpose(1, 2)[..., 1].mul_(3)
        return o

    same_as_eager(toy(attend=attend), train=True)


def test_a_refusal_leaves_the_graph_as_it_was() -> None:
    nodes: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        from dscompile.passes import pipeline

        nodes.append([str(n.format_node()) for n in gm.graph.nodes])
        outcome = pipeline.run(gm, inputs)
        assert outcome.sites[0].refusal == "UnboundValue"
        nodes.append([str(n.format_node()) for n in gm.graph.nodes])
        return gm.forward

    module = toy(attend=lambda self, *qkv: checkpoint(lambda *t: sdpa(*t), *qkv, use_reentrant=False))()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend)(randn(2, S, D))
    assert nodes[0] == nodes[1]


# ------------------------------------------------------------------ bodies of higher-order operators


@pytest.mark.parametrize(
    ("count", "preserve_rng_state", "train"),
    [(1, False, True), (1, True, True), (3, True, False), (3, False, True)],
    ids=["one", "one-rng", "three-rng-inference", "three"],
)
def test_checkpointed_layers(count: int, preserve_rng_state: bool, train: bool) -> None:
    settings = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    layer = toy(forward=lambda self, x: checkpoint(lambda x: Toy.forward(self, x), x, **settings))
    (report,) = same_as_eager(stack(*[lambda i=i: layer(i) for i in range(count)]), train=train)
    assert report.op_counts == {"mla": count}


def test_checkpointed_keys_alone() -> None:
    changed = toy(up=lambda self, latent: checkpoint(lambda c: Toy.up(self, c), latent, use_reentrant=False))
    assert only_site(same_as_eager(changed, train=True)).matched


def test_checkpoint_with_dropout_behind_the_attention() -> None:
    """The rewritten body is run twice by the backward; its random numbers must be the same both times."""
    changed = toy(
        forward=lambda self, x: checkpoint(lambda x: F.dropout(Toy.forward(self, x), 0.5), x, use_reentrant=False)
    )
    compiled, reports = compile_passes(changed(), inner="aot_eager")
    x = randn(2, S, D).requires_grad_()
    y = compiled(x)
    y.sum().backward()
    assert only_site(reports).matched and x.grad is not None and 0.2 < float((y == 0).double().mean()) < 0.8


@torch.compiler.nested_compile_region
def _region(q_nope, q_rope, latent, k_rope, w, mask):  # type: ignore[no-untyped-def]
    kv = F.linear(latent, w).view(2, S, H, N + V).transpose(1, 2)
    k = torch.cat([kv[..., :N], k_rope.expand(-1, H, -1, -1)], -1)
    return sdpa(torch.cat([q_nope, q_rope], -1), k, kv[..., N:], attn_mask=mask)


@pytest.mark.parametrize(
    ("first", "second"),
    [("full", "causal"), ("causal", "full"), ("causal", "causal"), ("causal", "window"), ("window", "full")],
)
def test_runs_of_one_body_with_different_masks(first: str, second: str) -> None:
    """One body, compiled once and run twice: a mask that was proved for one run says nothing of the other."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        parts, i = self.parts(x), torch.arange(S)
        reach = {"full": 100, "window": 1, "causal": 0}
        a, b = (_region(*parts, self.b.weight, i <= i[:, None] + reach[m]) for m in (first, second))
        return a, b

    same_as_eager(toy(forward=forward))


@pytest.mark.parametrize("count", [2, 3])
def test_layers_that_share_a_body(count: int) -> None:
    layer = toy(forward=torch.compiler.nested_compile_region(lambda self, x: Toy.forward(self, x)))
    (report,) = same_as_eager(stack(*[lambda i=i: layer(i) for i in range(count)]))
    assert [s.matched for s in report.sites] == [True] * count
    assert report.op_counts == {"mla": 1}, "one body"
    assert all(s.kernel and s.decision for s in report.sites)


def test_branches_of_a_condition_are_left_alone() -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        causal = lambda q, k, v: sdpa(q, k, v, is_causal=True).clone()  # noqa: E731
        return torch.cond(q.sum() > 0, causal, lambda q, k, v: sdpa(q, k, v).clone(), (q, k.clone(), v.clone()))

    same_as_eager(toy(attend=attend))


# ------------------------------------------------------------------ dtypes


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


MIXED: dict[str, Callable] = {
    "same": lambda self, qn, qr, c, r: _plain(self, qn, qr, self.b(c), r),
    "wide_up_projection": lambda self, qn, qr, c, r: _plain(
        self, qn, qr, F.linear(c.float(), self.b.weight.float()).to(c.dtype), r
    ),
    "wide_from_there_on": lambda self, qn, qr, c, r: _plain(
        self, qn.float(), qr.float(), F.linear(c.float(), self.b.weight.float()), r.float()
    ),
    "wide_attention": lambda self, qn, qr, c, r: _plain(self, qn.float(), qr.float(), self.b(c).float(), r.float()),
    "narrow_latent": lambda self, qn, qr, c, r: _plain(self, qn, qr, self.b(c.half().to(c.dtype)), r),
}


def _plain(self, q_nope, q_rope, kv, k_rope):  # type: ignore[no-untyped-def]
    kv = kv.view(2, S, H, N + V).transpose(1, 2)
    k = torch.cat([kv[..., :N], k_rope.expand(-1, H, -1, -1)], -1)
    return sdpa(torch.cat([q_nope, q_rope], -1), k, kv[..., N:], is_causal=True)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name: str) -> None:
    """bfloat16 with wider parts: the result has eager's dtype and is no further from float64 than twice eager's."""
    changed = toy(forward=lambda self, x: MIXED[name](self, *self.parts(x)))
    module, wide = changed(dtype=torch.bfloat16), changed()
    wide.load_state_dict(module.state_dict())
    x = randn(2, S, D, dtype=torch.bfloat16)
    compiled, reports = compile_passes(module)
    with torch.no_grad():
        exact = _plain(wide, *(t := wide.parts(x.double()))[:2], wide.b(t[2]), t[3])
        eager, found = module(x), compiled(x)
    assert found.dtype is eager.dtype
    assert _error(found, exact) <= 2 * _error(eager, exact) + 1e-12
    expected = "NarrowedPrecision" if name == "wide_up_projection" else ""
    assert only_site(reports).refusal == expected


@pytest.mark.parametrize("region", ["all", "up_projection", "attention", "all_but_attention"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "train"])
def test_autocast(region: str, train: bool) -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        cast = torch.autocast("cpu", torch.bfloat16, enabled=region in ("all", "all_but_attention"))
        up = torch.autocast("cpu", torch.bfloat16, enabled=region != "attention")
        last = torch.autocast("cpu", torch.bfloat16, enabled=region in ("all", "attention"))
        with cast:
            q_nope, q_rope, latent, k_rope = self.parts(x)
        with up:
            kv = self.b(latent)
        with last:
            parts = (q_nope, q_rope, kv, k_rope)
            return _plain(self, *(parts if region == "all" else (t.float() for t in parts)))

    changed = toy(forward=forward)
    module, wide = changed(dtype=torch.float32), Toy()
    wide.load_state_dict(module.state_dict())
    x = randn(2, S, D, dtype=torch.float32)
    compiled, reports = compile_passes(module, inner="aot_eager")
    exact_y = _plain(wide, *(t := wide.parts(x.double()))[:2], wide.b(t[2]), t[3])
    results = []
    for call, weights in ((lambda x: exact_y, wide), (module, module), (compiled, module)):
        with torch.set_grad_enabled(train):
            y = call(x)
            grads = (
                torch.autograd.grad(y.double().square().sum(), [weights.q.weight, weights.b.weight]) if train else ()
            )
        results.append([y.detach(), *grads])
    # A product in float32 in front of an attention in bfloat16 would become one in bfloat16.
    assert only_site(reports).refusal == ("NarrowedPrecision" if region == "attention" else "")
    exact, eager, found = results
    for e, ours, true in zip(eager, found, exact):
        assert ours.dtype is e.dtype and _error(ours, true) <= 2 * _error(e, true)


def test_a_transform_of_torch_func_is_left_alone() -> None:
    """Inside it gradients flow although no input requires one."""
    module, x = Toy(), randn(2, S, D)

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: module(y).square().sum())(x)

    compiled, reports = compile_passes(slope, inner="aot_eager")
    torch.testing.assert_close(compiled(x), slope(x))
    assert [r.op_counts.get("mla", 0) for r in reports] == [0] * len(reports)
