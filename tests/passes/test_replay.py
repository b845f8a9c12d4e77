"""Replay: one layer's proof is taken for the next only where they are the same in everything that it looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.toy import (
    D,
    H,
    N,
    R,
    S,
    Toy,
    V,
    compile_passes,
    randn,
    same_as_eager,
    sdpa,
    stack,
    toy,
)


def note(report: Any) -> str:
    (record,) = [r for r in report.records if r.name == "recognize_mla"]
    return record.note


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("lengths", [False, True], ids=["static", "dynamic"])
def test_identical_layers_are_proved_once(count: int, lengths: bool) -> None:
    layers = [lambda i=i: Toy(i) for i in range(count)]
    (report,) = same_as_eager(stack(*layers), *[(randn(2, n, D),) for n in (10, 13)][: 1 + lengths], lengths=lengths)
    expected = f"{count - 1} of {count} sites by replay" if count > 1 else ""
    assert note(report).startswith(expected) and bool(note(report)) == (count > 1)
    assert report.op_counts == {"mla": count}


def _joined(self, x, order=(0, 1), change=lambda *parts: parts, **settings):  # type: ignore[no-untyped-def]
    q_nope, q_rope, latent, k_rope = self.parts(x)
    k_nope, v = self.up(latent)
    q_rope, k_nope, k_rope = change(q_rope, k_nope, k_rope.expand(-1, H, -1, -1))
    q, k = (torch.cat([pair[i] for i in order], -1) for pair in ((q_nope, q_rope), (k_nope, k_rope)))
    return self.o(sdpa(q, k, v, **{"is_causal": True, **settings}).transpose(1, 2).flatten(2))


def _heads_apart(q_rope, k_nope, k_rope):  # type: ignore[no-untyped-def]
    return q_rope, k_nope, torch.cat([k_rope[:, :1], k_rope[:, 1:] * 2], 1)


# What the fourth layer does otherwise -> the refusals that say so, or "" for a match.
FOURTH: dict[str, tuple[Callable, str]] = {
    "scale": (lambda self, x: _joined(self, x, scale=0.7), ""),
    "rope_first": (lambda self, x: _joined(self, x, order=(1, 0)), ""),
    "no_mask": (lambda self, x: _joined(self, x, is_causal=False), ""),
    "query_turned_back": (lambda self, x: _joined(self, x, change=lambda q, k, r: (q.flip(-1), k, r)), ""),
    "key_bias": (lambda self, x: _joined(self, x, change=lambda q, k, r: (q, k + 1, r)), "NoUpProjection"),
    "rope_key_per_head": (lambda self, x: _joined(self, x, change=_heads_apart), "PerHeadRopeKey"),
    "heads_rolled": (lambda self, x: _joined(self, x, change=lambda q, k, r: (q, k.roll(1, 1), r)), "NoUpProjection"),
    "positions_cut": (
        lambda self, x: _joined(self, x, change=lambda q, k, r: (q, torch.cat([k[:, :, 1:], k[:, :, :1]], 2), r)),
        "NoUpProjection|DifferentLatents",
    ),
}


@pytest.mark.parametrize("name", FOURTH)
def test_a_layer_that_differs_a_little(name: str) -> None:
    """Three equal layers and a fourth: proved by itself or refused, never taken for one of the three."""
    forward, refusal = FOURTH[name]
    same = toy(forward=_joined)
    (report,) = same_as_eager(stack(*[lambda i=i: same(i) for i in range(3)], lambda: toy(forward=forward)(7)))
    *first, last = [s.refusal for s in report.sites]
    assert first == ["", "", ""] and last in refusal.split("|")
    assert report.op_counts["mla"] == 3 + (not refusal)
    if name != "query_turned_back":  # the proof doesn't look behind the query's rotation, so it may be either
        replays = 3 if name == "no_mask" else 2  # the mask is classified apart
        assert note(report).startswith(f"{replays} of 4 sites by replay")


def test_a_layer_with_a_bias() -> None:
    def biased() -> Toy:
        layer = Toy(5)
        layer.b = torch.nn.Linear(layer.b.in_features, layer.b.out_features, dtype=torch.float64)
        return layer

    (report,) = same_as_eager(stack(Toy, lambda: Toy(1), biased))
    assert [s.refusal for s in report.sites] == ["", "", "UpProjectionBias"]


def test_layers_of_other_widths() -> None:
    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__(3)
            self.b = torch.nn.Linear(24, H * (N + V), False, dtype=torch.float64)
            self.a = torch.nn.Linear(D, 24 + R, False, dtype=torch.float64)

        def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q_nope, q_rope = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2).split([N, R], -1)
            latent, k_rope = self.a(x).split([24, R], -1)
            return q_nope, q_rope, latent, k_rope.unsqueeze(1)

    (report,) = same_as_eager(stack(Toy, Wider, lambda: Toy(1)))
    assert report.op_counts == {"mla": 3} and note(report).startswith("1 of 3")
    assert "C 24" in report.sites[1].form


def _written(order: str) -> Callable:
    """A key built in a buffer and overwritten before or behind the attention: the same operators in another order."""

    def attend(self, q, k, v):  # type: ignore[no-untyped-def]
        buffer = torch.empty_like(k)
        buffer[..., :N], buffer[..., N:] = k[..., :N], k[..., N:]
        if order == "before":
            buffer[..., :N] = 0
        o = sdpa(q, buffer, v, is_causal=True)
        if order == "behind":
            buffer[..., :N] = 0
        return o

    return toy(attend=attend)


def _latent_written(order: str) -> Callable:
    """A copy of the latent that is overwritten before the up-projection, before the attention or behind it."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope, latent, k_rope = self.parts(x)
        buffer = torch.empty_like(latent)
        buffer.copy_(latent)

        def write(now: str) -> None:
            if now == order:
                buffer[:, :3] = latent[:, 1:4]

        write("first")
        k_nope, v = self.up(buffer)
        write("between")
        y = self.finish(q_nope, q_rope, k_nope, k_rope, v)
        write("behind")
        return y

    return toy(forward=forward)


@pytest.mark.parametrize(("first", "second"), [("behind", "before"), ("before", "behind"), ("behind", "behind")])
def test_order_of_writes_to_a_key(first: str, second: str) -> None:
    same_as_eager(stack(_written(first), lambda: _written(second)(1)))


@pytest.mark.parametrize("second", ["first", "between", "behind"])
@pytest.mark.parametrize("first", ["first", "between", "behind"])
def test_order_of_writes_to_a_latent(first: str, second: str) -> None:
    same_as_eager(stack(_latent_written(first), lambda: _latent_written(second)(1)))


@pytest.mark.parametrize("first", ["bshd,bthd->bhst", "bhsd,bthd->bhst"])
@pytest.mark.parametrize("second", ["bshd,bthd->bhst", "bhsd,bthd->bhst"])
def test_meaning_of_a_querys_dimensions(first: str, second: str) -> None:
    """As many queries as heads: the same query tensor, read as [B, S, H, .] or as [B, H, S, .]."""

    def layer(equation: str) -> Callable:
        def attend(self, q, k, v):  # type: ignore[no-untyped-def]
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return torch.einsum("bhst,bthv->bhsv", torch.softmax(torch.einsum(equation, q.contiguous(), k), -1), v)

        return toy(attend=attend)

    same_as_eager(stack(layer(first), lambda: layer(second)(1)), (randn(2, H, D),))


def test_one_module_used_twice() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Toy()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x + self.layer(x))

    (report,) = same_as_eager(Tied, train=True)
    assert report.op_counts == {"mla": 2} and note(report).startswith("1 of 2")


def test_layers_over_caches_of_their_own() -> None:
    """Each replayed layer reads its own cache and weight, not the first one's."""

    class Cached(Toy):
        def __init__(self, seed: int):
            super().__init__(seed)
            self.register_buffer("cache", randn(2, 16, self.b.in_features + R, seed=seed))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q_nope, q_rope, latent, k_rope = self.parts(x)
            self.cache.index_copy_(1, torch.tensor([5]), torch.cat([latent, k_rope.squeeze(1)], -1))
            latent, k_rope = self.cache[..., :-R], self.cache[..., -R:].unsqueeze(1)
            return self.finish(q_nope, q_rope, self.up(latent)[0], k_rope, self.up(latent)[1])

        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sdpa(q, k, v)

    (report,) = same_as_eager(stack(*[lambda i=i: Cached(i) for i in range(3)]), (randn(2, 1, D),))
    assert report.op_counts == {"mla_decode": 3} and note(report).startswith("2 of 3")


def test_replayed_sites_report_their_own_module_and_line() -> None:
    compiled, reports = compile_passes(stack(Toy, lambda: Toy(1), lambda: Toy(2))())
    with torch.no_grad():
        compiled(randn(2, S, D))
    assert [s.module_path for s in reports[0].sites] == ["layers.0", "layers.1", "layers.2"]
    assert len({s.form for s in reports[0].sites}) == 1
