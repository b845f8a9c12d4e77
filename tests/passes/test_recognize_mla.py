"""Recognition on a toy of a few lines: what becomes `dsinfra::mla`, what is refused and why, and never another result.

The zoo holds the written forms of whole modules; here one thing at a time is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dscompile.passes import refusals
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

# ------------------------------------------------------------------ matches


@pytest.mark.parametrize("count", [0, 1, 3])
def test_op_counts(count: int) -> None:
    layers = [lambda i=i: Toy(i) for i in range(count)]
    (report,) = same_as_eager(stack(lambda: nn.Linear(D, D, dtype=torch.float64), *layers))
    assert report.op_counts == ({"mla": count} if count else {})
    assert [s.matched for s in report.sites] == [True] * count


def test_eager_form_leaves_no_softmax() -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        mask = torch.full((S, S), -math.inf, dtype=q.dtype).triu(1)
        return torch.softmax(q @ k.transpose(2, 3) * 0.3 + mask, -1) @ v

    (report,) = same_as_eager(toy(attend=attend))
    assert report.op_counts == {"mla": 1}
    assert only_site([report]).mask == "causal"


def test_training_gives_eagers_gradients() -> None:
    (report,) = same_as_eager(stack(Toy, lambda: Toy(1)), train=True)
    assert report.op_counts == {"mla": 2}


def test_report_names_module_line_form_and_kernel() -> None:
    (report,) = same_as_eager(stack(Toy, lambda: Toy(1)))
    for i, site in enumerate(report.sites):
        assert site.module_path == f"layers.{i}"
        assert re.fullmatch(r"passes/toy\.py:\d+", site.source)
        assert f"H {H}, N {N} + R {R}, V {V}, C {C}" in site.form and site.kernel == "reference"


def test_a_router_beside_it_is_no_attention() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        return Toy.forward(self, x) * torch.softmax(x[..., :3], -1)[..., :1]

    (report,) = same_as_eager(toy(forward=forward))
    assert len(report.sites) == 1 and report.op_counts == {"mla": 1, "softmax": 1}


@pytest.mark.parametrize("lengths", [True, False], ids=["dynamic", "automatic"])
def test_lengths_share_a_proof(lengths: bool) -> None:
    calls = [(randn(2, n, D, seed=n),) for n in (10, 17, 29, 23)]
    reports = same_as_eager(Toy, *calls, lengths=lengths, inner="aot_eager")
    assert len(reports) == (1 if lengths else 2)
    assert all(r.op_counts == {"mla": 1} for r in reports)


def cross(mask: Callable[[int, int], torch.Tensor | None]) -> type[Toy]:
    """Queries of one sequence over the keys of another; `mask(S, T)`."""

    def forward(self, x, y):  # type: ignore[no-untyped-def]
        q_nope, q_rope, *_ = self.parts(x)
        _, _, latent, k_rope = self.parts(y)
        return self.finish(q_nope, q_rope, self.up(latent)[0], k_rope, self.up(latent)[1], mask(x.shape[1], y.shape[1]))

    return toy(forward=forward, attend=lambda self, q, k, v, mask: sdpa(q, k, v, attn_mask=mask))


@pytest.mark.parametrize(
    ("mask", "kind"),
    {
        "full": (lambda S, T: None, "full"),
        "causal": (lambda S, T: torch.ones(S, T, dtype=torch.bool).tril(T - S), "causal"),
        "top_left": (lambda S, T: torch.ones(S, T, dtype=torch.bool).tril(), "operand"),
    }.values(),
    ids=["full", "causal", "top_left"],
)
def test_two_dynamic_lengths(mask: Callable, kind: str) -> None:
    calls = [(randn(2, a, D), randn(2, b, D, seed=2)) for a, b in ((7, 9), (12, 31), (30, 41))]
    (report,) = same_as_eager(cross(mask), *calls, lengths=True)
    assert only_site([report]).mask.startswith(kind)


# ------------------------------------------------------------------ refusals


def _scores(q, k):  # type: ignore[no-untyped-def]
    return q @ k.transpose(2, 3) * 0.3


def _fixed_keys(self, x, k_nope, v):  # type: ignore[no-untyped-def]
    q_nope, q_rope, latent, k_rope = self.parts(x)
    return self.finish(q_nope, q_rope, k_nope(self, latent, x), k_rope, v(self, latent, x))


def _kv(self, x, change):  # type: ignore[no-untyped-def]
    """Keys and values from `change(latent)` -> kv_BS(H (N + V))."""
    q_nope, q_rope, latent, k_rope = self.parts(x)
    kv = change(latent).view(*x.shape[:2], H, N + V).transpose(1, 2)
    return self.finish(q_nope, q_rope, kv[..., :N], k_rope, kv[..., N:])


def _per_head_rope(self, x):  # type: ignore[no-untyped-def]
    q_nope, q_rope, latent, k_rope = self.parts(x)
    per_head = k_rope * torch.arange(1.0, H + 1, dtype=x.dtype).view(1, H, 1, 1)
    return self.finish(q_nope, q_rope, self.up(latent)[0], per_head, self.up(latent)[1])


def _rope_in_the_middle(self, x):  # type: ignore[no-untyped-def]
    q_nope, q_rope, latent, k_rope = self.parts(x)
    k_nope, v = self.up(latent)
    q = torch.cat([q_nope[..., :2], q_rope, q_nope[..., 2:]], -1)
    k = torch.cat([k_nope[..., :2], k_rope.expand(-1, H, -1, -1), k_nope[..., 2:]], -1)
    return sdpa(q, k, v)


def _rows_by_column(self, x):  # type: ignore[no-untyped-def]
    q_nope, q_rope, latent, k_rope = self.parts(x)
    kv = self.b(latent).view(*x.shape[:2], N + V, H).permute(0, 3, 1, 2)
    return self.finish(q_nope, q_rope, kv[..., :N], k_rope, kv[..., N:])


def _wide_then_narrow(self, x):  # type: ignore[no-untyped-def]
    q_nope, q_rope, latent, k_rope = (t.float() for t in self.parts(x))
    kv = F.linear(latent.double(), self.b.weight).float().view(*x.shape[:2], H, N + V).transpose(1, 2)
    k = torch.cat([kv[..., :N], k_rope.expand(-1, H, -1, -1)], -1)
    return sdpa(torch.cat([q_nope, q_rope], -1), k, kv[..., N:]).double()


def _plane() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(S)[:, None], torch.arange(S)[None]


# name of the class -> (change of the toy, words of the reason)
REFUSALS: dict[str, tuple[dict[str, Callable], str]] = {
    "NotBilinear": ({"attend": lambda s, q, k, v: torch.softmax(_scores(q, k).tanh(), -1) @ v}, "tanh"),
    "SoftmaxSink": (
        {"attend": lambda s, q, k, v: torch.softmax(torch.cat([x := _scores(q, k), x[..., :1]], -1), -1)[..., :-1] @ v},
        "columns",
    ),
    "ProbabilitiesUsed": (
        {"attend": lambda s, q, k, v: (p := torch.softmax(_scores(q, k), -1)) @ v + p.sum()},
        "2 readers",
    ),
    "AttentionDropout": ({"attend": lambda s, q, k, v: sdpa(q, k, v, dropout_p=0.1)}, "0.1"),
    "SlidingWindow": (
        {"attend": lambda s, q, k, v: sdpa(q, k, v, (d := _plane()[0] - _plane()[1]).ge(0) & d.lt(4))},
        "4 keys",
    ),
    "GroupedHeads": ({"attend": lambda s, q, k, v: sdpa(q, k[:, :2], v[:, :2], enable_gqa=True)}, "2 key heads for 4"),
    "NoUpProjection": (
        {"forward": lambda s, x: _kv(s, x, lambda latent: F.silu(s.b(latent)))},
        "silu.default`, not an up-projection",
    ),
    "UpProjectionBias": (
        {"forward": lambda s, x: _kv(s, x, lambda latent: F.linear(latent, s.b.weight, s.b.weight[:, 0]))},
        "bias",
    ),
    "DifferentLatents": (
        {"forward": lambda s, x: _fixed_keys(s, x, lambda s, c, x: s.up(c)[0], lambda s, c, x: s.up(c * 2)[1])},
        "latent",
    ),
    "RowsDisagree": ({"forward": _rows_by_column}, "offset + head * stride"),
    "PerHeadRopeKey": ({"forward": _per_head_rope}, "differs between heads"),
    "KeyLayout": ({"forward": _rope_in_the_middle}, "interleaved"),
    "UnboundValue": (
        {"attend": lambda s, *qkv: checkpoint(lambda *t: sdpa(*t, is_causal=True), *qkv, use_reentrant=False)},
        "no tensor in the graph",
    ),
    "MutatedOperand": (
        {"attend": lambda s, q, k, v: torch.softmax((x := _scores(q, k), x[..., 3].zero_())[0], -1) @ v},
        "in place",
    ),
    "NarrowedPrecision": ({"forward": _wide_then_narrow}, "float64, the attention computes in torch.float32"),
    "Unsupported": (
        {"attend": lambda s, q, k, v: sdpa(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(0, (-1, H))},
        "dimensions",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    """Each class by a small module: the right values, the class, a reason, a hint of what to change, and a line."""
    changes, reason = REFUSALS[name]
    if name == "AttentionDropout":
        compiled, reports = compile_passes(toy(**changes)())
        with torch.no_grad():
            compiled(randn(2, S, D))
    else:
        reports = same_as_eager(toy(**changes))
    site = only_site(reports)
    assert (site.matched, site.refusal) == (False, name), site
    assert reason in site.reason
    assert site.hint == getattr(refusals, name).hint and site.decision == "left to Inductor"
    assert re.fullmatch(r"(passes/test_recognize_mla|\w+/\w+)\.py:\d+", site.source), site.source
    assert "mla" not in reports[0].op_counts


def test_sizes_disagree() -> None:
    """Which rows of the weight are used depends on the length: no one structure holds for all lengths."""

    class ByLength(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wide", randn(400, C))

        def forward(self, x):  # type: ignore[no-untyped-def]
            return _kv(self, x, lambda latent: F.linear(latent, self.wide[x.shape[1] :][: H * (N + V)]))

    site = only_site(same_as_eager(ByLength, *[(randn(2, n, D),) for n in (10, 17)], lengths=True))
    assert site.refusal == "SizesDisagree"


def test_every_refusal_is_covered() -> None:
    """NotAttention is raised for softmaxes of other uses, and is no line of the report (the router above); fuel and
    the self-check have tests of their own."""
    found = [c for c in vars(refusals).values() if isinstance(c, type) and issubclass(c, refusals.Refusal)]
    classes = {c.__name__ for c in found if not issubclass(c, refusals.LayerRefusal)}
    others = {"Refusal", "NotAttention", "SizesDisagree", "OutOfFuel", "WrongResult", "Withdrawn"}
    assert classes == {*REFUSALS, *others}


def test_a_refused_site_leaves_the_others() -> None:
    changes, _ = REFUSALS["UpProjectionBias"]
    (report,) = same_as_eager(stack(Toy, toy(**changes), lambda: Toy(2)))
    assert [s.refusal for s in report.sites] == ["", "UpProjectionBias", ""]
    assert report.op_counts == {"mla": 2, "scaled_dot_product_attention": 1}


@pytest.mark.parametrize("rank", ["value", "mask"])
def test_a_site_that_the_analysis_fails_on_leaves_the_others(rank: str) -> None:
    """Broadcasting over tensors of other ranks: refused or matched, but no end of the analysis."""

    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        if rank == "value":
            return torch.softmax(_scores(q, k), -1) @ v[0]
        return (torch.softmax(_scores(q, k) + torch.zeros(1, 1, 1, S, S, dtype=q.dtype), -1) @ v)[0]

    (report,) = same_as_eager(stack(toy(attend=attend), Toy))
    assert report.sites[-1].matched


def test_a_symbolic_scale_is_no_error() -> None:
    changed = toy(attend=lambda self, q, k, v: sdpa(q, k, v, scale=1.0 / q.shape[2]))
    same_as_eager(changed, *[(randn(2, n, D, seed=n),) for n in (10, 17)], lengths=True)


def test_autocast_with_casts_written_out() -> None:
    """Casts to the dtype that a value has already under autocast."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        with torch.autocast("cpu", torch.bfloat16):
            q_nope, q_rope, latent, k_rope = self.parts(x)
            kv = self.b(latent)
            q_nope, q_rope, kv, k_rope = (t.to(kv.dtype) for t in (q_nope, q_rope, kv, k_rope))
            k_nope, v = kv.view(*kv.shape[:2], H, N + V).transpose(1, 2).split([N, V], -1)
            return self.finish(q_nope, q_rope, k_nope, k_rope, v)

    make, x = lambda: toy(forward=forward)(dtype=torch.float32), randn(2, S, D, dtype=torch.float32)
    assert only_site(same_as_eager(make, (x,), rtol=0.1)).matched


# ------------------------------------------------------------------ never another result


EAGER: dict[str, Callable] = {
    # A boolean tensor that is *added* adds ones; it hides nothing.
    "bool_is_added": lambda q, k, v: torch.softmax(_scores(q, k) + _plane()[1].le(_plane()[0]), -1) @ v,
    "int_is_added": lambda q, k, v: torch.softmax(_scores(q, k) + torch.arange(S), -1) @ v,
    # -1e4 hides a key, -1 does not.
    "fill_is_scaled_down": lambda q, k, v: torch.softmax(_scores(q, k).masked_fill(_hidden(), -1e4) * 1e-4, -1) @ v,
    "fill_is_negated": lambda q, k, v: torch.softmax(_scores(q, k).masked_fill(_hidden(), -1e9) * -0.3, -1) @ v,
    "scores_are_rounded": lambda q, k, v: torch.softmax((_scores(q, k) * 4).int().double(), -1) @ v,
    "maximum_over_queries": lambda q, k, v: torch.softmax((x := _scores(q, k)) - x.amax(-2, keepdim=True), -1) @ v,
    "maximum_of_another_row": lambda q, k, v: torch.softmax((x := _scores(q, k)) - x.amax(-1)[:, :, None], -1) @ v,
    "weights_from_the_right": lambda q, k, v: (v.mT @ torch.softmax(_scores(q, k), -1)).mT,
    "weights_changed_in_place": lambda q, k, v: (p := torch.softmax(_scores(q, k), -1), p[..., 0].zero_(), p @ v)[-1],
    "weights_scaled_in_place": lambda q, k, v: torch.softmax(_scores(q, k), -1).mul_(2) @ v,
    "scores_changed_in_place": lambda q, k, v: torch.softmax((x := _scores(q, k), x[..., 5:].fill_(-9))[0], -1) @ v,
    "scores_filled_in_place": lambda q, k, v: torch.softmax(_scores(q, k).masked_fill_(_hidden(), -math.inf), -1) @ v,
    "row_without_a_key": lambda q, k, v: torch.softmax(_scores(q, k).masked_fill(_hidden(0), -1e9), -1) @ v,
}


def _hidden(diagonal: int = 1) -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(diagonal)


@pytest.mark.parametrize("name", EAGER)
def test_written_softmax(name: str) -> None:
    same_as_eager(toy(attend=lambda self, q, k, v: EAGER[name](q, k, v)))


def _small(dtype: torch.dtype, n: int) -> torch.Tensor:
    return torch.arange(n).to(dtype)


NARROW: dict[str, Callable[[int], torch.Tensor]] = {
    "bfloat16": lambda n: _small(torch.bfloat16, n)[None] <= _small(torch.bfloat16, n)[:, None],
    "bfloat16_arange": lambda n: (p := torch.arange(n, dtype=torch.bfloat16))[None] <= p[:, None],
    "uint8": lambda n: _small(torch.uint8, n)[None] <= _small(torch.uint8, n)[:, None],
    "uint8_below_zero": lambda n: (_small(torch.uint8, n) - 1)[None] <= (_small(torch.uint8, n) - 1)[:, None],
    "int8_product": lambda n: (_small(torch.int8, n) * 20)[None] <= (_small(torch.int8, n) * 20)[:, None],
    "uint8_sum": lambda n: torch.ones(n, n).cumsum(1, dtype=torch.uint8) <= torch.arange(1, n + 1)[:, None],
    "float_steps": lambda n: (p := torch.arange(0, n * 0.1 - 1e-6, 0.1))[None] <= p[:, None],
}


@pytest.mark.parametrize("name", NARROW)
def test_masks_of_narrow_numbers(name: str) -> None:
    """Positions beyond what the dtype counts to: the mask is what torch computes, not what integers would give."""
    length = 10 if name in ("uint8_below_zero", "int8_product", "float_steps") else 300
    changed = toy(attend=lambda self, q, k, v: sdpa(q, k, v, attn_mask=NARROW[name](length)))
    same_as_eager(changed, (randn(1, length, D),))


LONG: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "window_of_128": lambda i, j: (j <= i) & (j > i - 128),
    "first_100": lambda i, j: (j < 100).expand(len(i), -1),
    "one_row": lambda i, j: (j <= i) | (i == 100),
}


@pytest.mark.parametrize("name", LONG)
def test_masks_that_change_at_a_length(name: str) -> None:
    """With symbolic lengths: causal or full at a few dozen tokens, and something else at 200."""

    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
        return sdpa(q, k, v, attn_mask=LONG[name](i, j))

    same_as_eager(toy(attend=attend), *[(randn(1, n, D),) for n in (200, 150, 300)], lengths=True)


def test_values_that_change_at_a_length() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        latent = torch.cat([latent[:, :100], latent[:, :100], latent[:, 200:]], 1)
        return self.finish(q_nope, q_rope, self.up(latent)[0], k_rope, self.up(latent)[1])

    same_as_eager(toy(forward=forward), *[(randn(1, n, D),) for n in (220, 250)], lengths=True)


ROUNDED: dict[str, Callable] = {
    "key_to_int": lambda k, v: (k.int().to(k.dtype), v),
    "value_to_int": lambda k, v: (k, v.int().to(v.dtype)),
    "key_to_bool": lambda k, v: (k.bool().to(k.dtype), v),
    "key_to_float8": lambda k, v: (k.to(torch.float8_e4m3fn).to(k.dtype), v),
    "value_to_bfloat16": lambda k, v: (k, v.bfloat16().to(v.dtype)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_on_the_way_from_the_up_projection(name: str) -> None:
    """A cast to fewer values and back is a computation: the operator would not do it."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = ROUNDED[name](*self.up(latent))
        return self.finish(q_nope, q_rope, k_nope, k_rope, v)

    same_as_eager(toy(forward=forward))


@pytest.mark.parametrize("name", ["latent", "k_rope", "q_nope", "weight"])
def test_rounding_in_front_of_it(name: str) -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        parts = dict(zip(("q_nope", "q_rope", "latent", "k_rope"), self.parts(x)))
        parts["weight"] = self.b.weight
        parts[name] = (parts[name] * 2).to(torch.float8_e4m3fn).to(x.dtype)
        kv = F.linear(parts["latent"], parts["weight"]).view(2, S, H, N + V).transpose(1, 2)
        return self.finish(parts["q_nope"], parts["q_rope"], kv[..., :N], parts["k_rope"], kv[..., N:])

    same_as_eager(toy(forward=forward))


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * 0.5


def _without_gradient(function: Callable) -> Callable:
    def call(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return function(x)

    return call


def _hooked(x: torch.Tensor) -> torch.Tensor:
    x.register_hook(lambda gradient: gradient * 0.5)
    return x


STOPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "detach": lambda x: x.detach(),
    "no_grad": _without_gradient(lambda x: x.clone()),
    "function": lambda x: _Halved.apply(x),
    "hook": _hooked,
}


@pytest.mark.parametrize(
    ("value", "stop"),
    [*((value, "detach") for value in ("q", "k", "v", "latent", "k_rope", "weight"))]
    + [(value, stop) for value in ("k", "latent") for stop in ("no_grad", "function", "hook")],
)
def test_gradients_that_are_stopped(value: str, stop: str) -> None:
    """The values are those of the plain toy; only the gradients differ, and must."""

    def at(name: str, x: torch.Tensor) -> torch.Tensor:
        return STOPS[stop](x) if name == value else x

    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        kv = F.linear(at("latent", latent), at("weight", self.b.weight)).view(2, S, H, N + V).transpose(1, 2)
        k = torch.cat([kv[..., :N], at("k_rope", k_rope).expand(-1, H, -1, -1)], -1)
        q = torch.cat([q_nope, q_rope], -1)
        return sdpa(at("q", q), at("k", k), at("v", kv[..., N:]), is_causal=True)

    same_as_eager(toy(forward=forward), train=True)


@pytest.mark.parametrize("what", ["scores", "weights"])
def test_gradients_stopped_inside_the_softmax(what: str) -> None:
    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        if what == "scores":
            return torch.softmax(_scores(q, k).detach(), -1) @ v
        return torch.softmax(_scores(q, k), -1).detach() @ v

    same_as_eager(toy(attend=attend), train=True)


@pytest.mark.parametrize("part", ["up-projection", "attention"])
def test_parts_under_no_grad(part: str) -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        with torch.set_grad_enabled(part != "up-projection"):
            k_nope, v = self.up(latent)
        with torch.set_grad_enabled(part != "attention"):
            o = self.finish(q_nope, q_rope, k_nope, k_rope, v)
        return o + x

    same_as_eager(toy(forward=forward), train=True)


def test_a_learned_mask_keeps_its_gradient() -> None:
    class Learned(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(randn(H, S, S))

        def attend(self, q, k, v):  # type: ignore[no-untyped-def]
            return sdpa(q, k, v, attn_mask=self.bias)

    assert not only_site(same_as_eager(Learned, train=True)).matched
    assert only_site(same_as_eager(Learned)).mask.startswith("operand")


def test_keys_that_are_also_read_elsewhere() -> None:
    changed = toy(attend=lambda self, q, k, v: sdpa(q, k, v, is_causal=True) + k.mean() + v.mean())
    assert only_site(same_as_eager(changed, train=True)).matched


REORDERED = {
    "neighbours": lambda w: torch.cat([w[:, :1], w[:, 2:3], w[:, 1:2], w[:, 3:]], 1),
    "by_views": lambda w: w.unflatten(1, (3, 4)).transpose(1, 2).reshape(w.shape),
    "inner_digits": lambda w: w.unflatten(1, (3, 2, 2)).transpose(2, 3).reshape(w.shape),
    "of_the_last_rows": lambda w: torch.cat([w[:-5], w[-5:].unflatten(1, (3, 4)).transpose(1, 2).flatten(1)]),
}


@pytest.mark.parametrize("name", REORDERED)
def test_a_weight_with_its_inner_columns_reordered(name: str) -> None:
    """The first and the last column stay where they are."""
    changed = REORDERED[name]
    reports = same_as_eager(toy(up=lambda s, c: _up(s, F.linear(c, changed(s.b.weight)))))
    assert only_site(reports).refusal == "RowsDisagree"


def _up(self: Toy, kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return kv.view(*kv.shape[:2], H, N + V).transpose(1, 2).split([N, V], -1)


@pytest.mark.parametrize(("digits", "pair"), [((8, 2, 2, 2), (2, 3)), ((2, 2, 16), (1, 2)), ((4, 16), (1, 2))], ids=str)
def test_positions_reordered_by_views(digits: tuple[int, ...], pair: tuple[int, int]) -> None:
    """Keys and values read positions in another order than the latent has, and so must the operator."""

    def forward(self: Toy, x: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent.unflatten(1, digits).transpose(*pair).reshape(latent.shape))
        return self.finish(q_nope, q_rope, k_nope, k_rope, v)

    reports = same_as_eager(toy(forward=forward), (randn(1, 64, D),))
    assert only_site(reports).matched


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_query_that_is_changed_behind_the_attention(train: bool) -> None:
    """The operator's backward reads it, eager's reads the query times the scale."""

    def forward(self: Toy, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2)
        _, _, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        o = sdpa(q, torch.cat([k_nope, k_rope.expand(-1, H, -1, -1)], -1), v)
        return self.o(o.transpose(1, 2).flatten(2)), q.mul_(2)

    site = only_site(same_as_eager(toy(forward=forward), train=train))
    assert (site.matched, site.refusal) == ((False, "MutatedOperand") if train else (True, ""))
