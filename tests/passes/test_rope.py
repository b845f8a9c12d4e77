"""The name of a rotation: read off the elements' expressions, reported, and never a condition of a match."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dscompile.passes import rope
from tests.passes.toy import D, H, N, R, S, Toy, only_site, randn, same_as_eager, toy

FREQUENCIES = torch.tensor([1.0, 0.1], dtype=torch.float64)


def tables(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * FREQUENCIES
    return angle.cos(), angle.sin()


def half(x: torch.Tensor, sign: int = -1) -> torch.Tensor:
    cos, sin = tables(x)
    first, second = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([sign * second, first], -1) * torch.cat([sin, sin], -1)


def half_written_apart(x: torch.Tensor) -> torch.Tensor:
    (cos, sin), (a, b) = tables(x), x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    (cos, sin), a, b = tables(x), x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def complex_pairs(x: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * FREQUENCIES
    turns = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)


def read_in_pairs(x: torch.Tensor) -> torch.Tensor:
    return half(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2))


def first_pair_alone(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([half(x)[..., :2], x[..., 2:]], -1)


NAMES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "half": (half, "half"),
    "half_written_apart": (half_written_apart, "half"),
    "interleaved": (interleaved, "interleaved"),
    "complex": (complex_pairs, "interleaved"),
    "read_in_pairs": (read_in_pairs, "interleaved to half"),
    "none": (lambda x: x, "none"),
    "reflection": (lambda x: half(x, 1), "unproven"),
    "partial": (first_pair_alone, "unproven"),
}


def rotated(rotate: Callable, rotate_key: Callable | None = None) -> type[Toy]:
    def parts(self, x):  # type: ignore[no-untyped-def]
        q_nope, q_rope = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2).split([N, R], -1)
        latent, k_rope = self.a(x).split([self.b.in_features, R], -1)
        return q_nope, rotate(q_rope), latent, (rotate_key or rotate)(k_rope.unsqueeze(1))

    return toy(parts=parts)


def rotation_of(form: str) -> str:
    return form.partition(", rope ")[2]


@pytest.mark.parametrize("name", NAMES)
def test_name(name: str) -> None:
    """The site is matched whatever the rotation is, and its name is reported."""
    rotate, expected = NAMES[name]
    site = attention(same_as_eager(rotated(rotate)))
    assert site.matched
    found = rotation_of(site.form)
    if expected == "unproven":
        assert found.startswith("unproven (") and len(found) > len("unproven ()"), found
    else:
        assert found == expected


def attention(reports: list) -> Any:
    """The one site that is no rotation itself: those of complex numbers are."""
    (site,) = (s for report in reports for s in report.sites if s.kind != "rotation")
    return site


@pytest.mark.parametrize("name", ["half", "interleaved"])
def test_name_with_dynamic_lengths(name: str) -> None:
    calls = [(randn(2, n, D),) for n in (10, 13)]
    assert rotation_of(only_site(same_as_eager(rotated(NAMES[name][0]), *calls, lengths=True)).form) == NAMES[name][1]


def test_query_and_key_that_differ_are_both_named() -> None:
    site = only_site(same_as_eager(rotated(half, interleaved)))
    assert site.matched and rotation_of(site.form) == "query half, key interleaved"


def test_a_key_that_was_rotated_before_it_was_cached() -> None:
    site = only_site(same_as_eager(rotated(half, lambda x: x)))
    assert rotation_of(site.form) == "half"


def test_tables_that_are_inputs_hide_the_rotation() -> None:
    def forward(self, x, cos, sin):  # type: ignore[no-untyped-def]
        q_nope, q_rope = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2).split([N, R], -1)
        latent, k_rope = self.a(x).split([self.b.in_features, R], -1)
        a, b = q_rope.chunk(2, -1)
        q_rope = q_rope * cos + torch.cat([-b, a], -1) * sin
        return self.finish(q_nope, q_rope, self.up(latent)[0], k_rope.unsqueeze(1), self.up(latent)[1])

    cos, sin = (t.repeat(1, 2) for t in tables(randn(1, 1, S, R)))
    site = only_site(same_as_eager(toy(forward=forward), (randn(2, S, D), cos, sin)))
    assert site.matched and "cos and sin tables are not computed in this graph" in site.form


def test_without_rotated_columns() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
        q_nope, _, latent, _ = self.parts(x)
        k_nope, v = self.up(latent)
        return self.o(self.attend(q_nope, k_nope, v).transpose(1, 2).flatten(2))

    site = only_site(same_as_eager(toy(forward=forward)))
    assert site.matched and rotation_of(site.form) == "none" and "R 0" in site.form


@pytest.mark.parametrize("width", [2, 6, 8, 10, 12, 16, 64, 128])
def test_columns_that_are_read_hold_their_partners(width: int) -> None:
    """Whether columns are paired (i, i + R/2) or (2i, 2i + 1)."""
    columns = set(rope._columns(width))
    half = width // 2
    assert {(c + half) % width for c in columns} == columns
    assert {c ^ 1 for c in columns} == columns
    assert {0, width - 1} <= columns and len(columns) <= max(8, width if width % 4 else 8)
