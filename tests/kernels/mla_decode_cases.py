"""Inputs, expected values and bars of the MLA decode tests and its benchmark.

Every row that must not count is poisoned: cached rows from a request's length on, pages that nobody owns and the
padding of a cache are NaN, table entries past a length point outside the pool. The expected values are the operator's
own reference, fed in float64. Values and bars are those of FlashMLA's tests: randn / 10 cut at +-1; outputs within 8e-4
or 2.01/128 of the value, and a cosine difference below 5e-6; lse within 1e-6 or 8.01/65536 of the value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dscompile.lowering.ops.mla_decode import reference

LAYOUTS = ("paged", "plain", "sliced")  # a pool of pages; two tensors; slices of one tensor
SCALE = 576**-0.5


@dataclass(frozen=True)
class Case:
    """One call. `capacity` is that of the cache, in rows a request; None of the lengths may pass it."""

    lengths: tuple[int, ...]
    s_q: int = 1
    heads: int = 16
    latent: int = 512
    rope: int = 64
    capacity: int = 1000
    layout: str = "paged"
    causal: bool = True
    mask: tuple[int, int] | None = None  # its leading sizes, each 1 or the full one
    dtype: torch.dtype = torch.bfloat16
    scale: float = SCALE

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)


def make(case: Case, device: str, seed: int = 0) -> tuple:
    """The nine positional arguments of `mla_decode`, poisoned."""
    g = torch.Generator(device=device).manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g, device=device) / 10).clamp(-1, 1).to(case.dtype)

    requests, width = len(case.lengths), case.latent + case.rope
    seqlens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    q_latent, q_rope = (values(requests, case.s_q, case.heads, w) for w in (case.latent, case.rope))
    pages = -(-case.capacity // 64)
    rows = values(requests, pages * 64, width)
    rows[torch.arange(pages * 64, device=device) >= seqlens[:, None]] = float("nan")
    latent, k_rope, table = _CACHES[case.layout](case, rows, seqlens, g)
    mask = None
    if case.mask is not None:
        keys = case.capacity if table is None else pages * 64
        mask = torch.rand((*case.mask, keys), generator=g, device=device) < 0.6
    return q_latent, q_rope, latent, k_rope, seqlens, mask, table, case.scale, case.causal


def _paged(case: Case, rows: torch.Tensor, seqlens: torch.Tensor, g: torch.Generator) -> tuple:
    requests, capacity, width = rows.shape
    pages = capacity // 64
    owned = torch.randperm(requests * pages + 3, generator=g, device=rows.device)[: requests * pages]
    pool = rows.new_full((requests * pages + 3, 64, width), float("nan"))
    pool[owned] = rows.view(-1, 64, width)
    table = owned.view(requests, pages).to(torch.int32)
    used = torch.arange(pages, device=rows.device) * 64 < seqlens[:, None]
    return pool[..., : case.latent], pool[..., case.latent :], table.masked_fill(~used, 1 << 30)


def _plain(case: Case, rows: torch.Tensor, seqlens: torch.Tensor, g: torch.Generator) -> tuple:
    """As a cache that was allocated longer: the requests lie further apart than their rows reach."""
    parts = []
    for part in rows.split([case.latent, case.rope], -1):
        whole = rows.new_full((rows.shape[0], case.capacity + 24, part.shape[-1]), float("nan"))
        whole[:, : case.capacity] = part[:, : case.capacity]
        parts.append(whole[:, : case.capacity])
    return *parts, None


def _sliced(case: Case, rows: torch.Tensor, seqlens: torch.Tensor, g: torch.Generator) -> tuple:
    whole = rows[:, : case.capacity].contiguous()
    return whole[..., : case.latent], whole[..., case.latent :], None


_CACHES = {"paged": _paged, "plain": _plain, "sliced": _sliced}


def expected(args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse by the operator's reference in float64 (which rounds lse to float32 at the end)."""
    q_latent, q_rope, latent, k_rope, *rest = args
    return reference(q_latent.double(), q_rope.double(), latent.double(), k_rope.double(), *rest)


def problems(got: tuple, want: tuple, scale: float = SCALE) -> list[str]:
    """What is wrong with (o, lse), in words; empty when they are within the bars."""
    (o, lse), (want_o, want_lse) = got, want
    found = []
    if o.shape != want_o.shape or lse.shape != want_lse.shape or not o.is_contiguous() or lse.dtype != torch.float32:
        return [f"o {tuple(o.shape)} contiguous={o.is_contiguous()}, lse {tuple(lse.shape)} {lse.dtype}"]
    dead = want_lse == -torch.inf
    if not torch.equal(lse == -torch.inf, dead) or bool(o[dead].ne(0).any()):
        found.append("rows that see no key must give o = 0 and lse = -inf, and no others")
    x, y = o.double(), want_o
    error = (x - y).abs()
    found += _off("outputs", error, (error <= 8e-4) | (error <= 2.01 / 128 * y.abs()))
    difference = 1 - 2 * float((x * y).sum()) / max(float((x * x + y * y).sum()), 1e-30)
    if bool(y.any()) and not difference < 5e-6:
        found.append(f"cosine difference {difference:.2e}")
    x, y = lse.double().masked_fill(dead, 0.0), want_lse.double().masked_fill(dead, 0.0)
    error = (x - y).abs()
    # Scores are rounded before they are scaled: the absolute part grows with a scale beyond the usual one.
    within = (error <= 1e-6 * max(1.0, scale / SCALE)) | (error <= 8.01 / 65536 * y.abs())
    return found + _off("lse", error, within)


def _off(what: str, error: torch.Tensor, within: torch.Tensor) -> list[str]:
    if bool(within.all()):
        return []
    worst = float(error.nan_to_num(torch.inf).max())
    return [f"{int((~within).sum())} of {within.numel()} {what} are off, the worst by {worst:.2e}"]
