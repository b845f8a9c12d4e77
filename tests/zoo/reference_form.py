"""Attention as DeepSeek's own inference code spells it: einsum scores laid out [B, S, H, T] over a cache.

`naive` keeps no cache; `cached_heads` caches keys and values of each head; `absorbed` caches the latent and the rotated
key, moves the key half of the up-projection to the query and the value half behind the attention, and adds two score
terms. The softmax is in float32, `start_pos` is a Python int, and the rotation multiplies complex numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tests.zoo import fp8


@dataclass(frozen=True)
class Widths:
    """D model, H heads, Q query's latent, C latent, N + R a key's two parts, V value."""

    D: int = 64
    H: int = 4
    Q: int = 48
    C: int = 32
    N: int = 16
    R: int = 8
    V: int = 12


def rotate_pairs(x_BSHR: torch.Tensor, turns_SR: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs by complex factors of modulus 1, in float32."""
    pairs = torch.view_as_complex(x_BSHR.float().view(*x_BSHR.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns_SR.view(1, pairs.size(1), 1, pairs.size(-1))).flatten(3).to(x_BSHR.dtype)


class ReferenceMLA(nn.Module):
    """`forward(x_BSD, start_pos)`: reads and extends its caches of `max_len` tokens in place."""

    def __init__(
        self,
        form: Literal["naive", "cached_heads", "absorbed"],
        max_batch: int = 3,
        max_len: int = 40,
        widths: Widths | None = None,
    ):
        super().__init__()
        w = widths or Widths()
        self.D, self.H, self.C, self.N, self.R, self.V = D, H, C, N, R, V = w.D, w.H, w.C, w.N, w.R, w.V
        self.form, self.softmax_scale = form, (N + R) ** -0.5
        self.wq_a, self.q_norm = nn.Linear(D, w.Q, False), nn.RMSNorm(w.Q)
        self.wq_b = nn.Linear(w.Q, H * (N + R), False)
        self.wkv_a, self.kv_norm = nn.Linear(D, C + R, False), nn.RMSNorm(C)
        self.wkv_b, self.wo = nn.Linear(C, H * (N + V), False), nn.Linear(H * V, D, False)
        angles = torch.arange(max_len)[:, None] * 10000.0 ** -(torch.arange(0, R, 2).float() / R)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)
        for name, shape in self.cache_shapes().items():
            self.register_buffer(name, torch.zeros(max_batch, max_len, *shape), persistent=False)

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.form == "absorbed":
            return {"kv_cache": (self.C,), "pe_cache": (self.R,)}
        if self.form == "cached_heads":
            return {"k_cache": (self.H, self.N + self.R), "v_cache": (self.H, self.V)}
        return {}

    def forward(self, x: torch.Tensor, start_pos: int) -> torch.Tensor:
        B, S, _ = x.shape
        end, turns = start_pos + S, self.turns[start_pos : start_pos + S]
        mask = torch.full((S, S), -math.inf, dtype=x.dtype, device=x.device).triu_(1) if S > 1 else None
        q = self.wq_b(self.q_norm(self.wq_a(x))).view(B, S, self.H, self.N + self.R)
        q_nope, q_pe = torch.split(q, [self.N, self.R], dim=-1)
        q_pe = rotate_pairs(q_pe, turns)
        kv, k_pe = torch.split(self.wkv_a(x), [self.C, self.R], dim=-1)
        k_pe = rotate_pairs(k_pe.unsqueeze(2), turns)
        attend = self.attend_absorbed if self.form == "absorbed" else self.attend_naive
        return self.wo(attend(q_nope, q_pe, self.kv_norm(kv), k_pe, start_pos, end, mask).flatten(2))

    def weigh(self, scores: torch.Tensor, mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if mask is not None:
            scores += mask.unsqueeze(1)
        return scores.softmax(dim=-1, dtype=torch.promote_types(like.dtype, torch.float32)).type_as(like)

    def attend_naive(self, q_nope, q_pe, kv, k_pe, start, end, mask):  # type: ignore[no-untyped-def]
        B, S = kv.shape[:2]
        kv = self.wkv_b(kv).view(B, S, self.H, self.N + self.V)
        k_nope, v = torch.split(kv, [self.N, self.V], dim=-1)
        k, q = torch.cat([k_nope, k_pe.expand(-1, -1, self.H, -1)], dim=-1), torch.cat([q_nope, q_pe], dim=-1)
        if self.form == "cached_heads":
            self.k_cache[:B, start:end], self.v_cache[:B, start:end] = k, v
            k, v = self.k_cache[:B, :end], self.v_cache[:B, :end]
        scores = torch.einsum("bshd,bthd->bsht", q, k) * self.softmax_scale
        return torch.einsum("bsht,bthd->bshd", self.weigh(scores, mask, q), v)

    def attend_absorbed(self, q_nope, q_pe, kv, k_pe, start, end, mask):  # type: ignore[no-untyped-def]
        B = kv.shape[0]
        w_EC = self.wkv_b.weight
        if w_EC.dtype == fp8.FP8:  # for every call anew
            w_EC = fp8.dequantized(w_EC, self.wkv_b.scale).to(kv.dtype)
        w_HEC = w_EC.view(self.H, -1, self.C)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, w_HEC[:, : self.N])
        self.kv_cache[:B, start:end] = kv
        self.pe_cache[:B, start:end] = k_pe.squeeze(2)
        scores = (
            torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:B, :end])
            + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:B, :end])
        ) * self.softmax_scale
        o = torch.einsum("bsht,btc->bshc", self.weigh(scores, mask, q_nope), self.kv_cache[:B, :end])
        return torch.einsum("bshc,hdc->bshd", o, w_HEC[:, -self.V :])
