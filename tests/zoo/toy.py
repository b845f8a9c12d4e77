"""Multi-head latent attention written by hand in the ways people write it: one module with a switch for each habit.

All dimensions differ from one another, so that a matcher that confuses two of them is caught by a shape. Suffixes:
B requests, S query and key length, H heads, D model width, L query latent, C latent, N nope, R rope, V value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Form:
    """How the module is written. Every value computes multi-head latent attention unless it says otherwise."""

    heads: int = 4
    q_lora: bool = True  # a low-rank query, as in DeepSeek-V3, or one projection, as in V2-Lite
    fused_a: bool = False  # the two down-projections as one linear
    kv_b: Literal["fused", "separate", "einsum"] = "fused"
    noise: bool = False  # copies, clones and transposes that change nothing
    rope: Literal["half", "interleaved", "deinterleaved", "complex", "none", "reflection"] = "half"
    order: Literal["nope_first", "rope_first"] = "nope_first"
    attention: Literal["sdpa", "eager"] = "sdpa"
    mask: Literal["flag", "tril", "triu", "padding", "none", "window"] = "flag"
    scale: float | None = None  # None: 1 / sqrt(N + R)
    scale_on: Literal["scores", "query", "key"] = "scores"
    dropout: float = 0.0


class ToyMLA(nn.Module):
    """`forward(x_BSD, keep_BS=None) -> y_BSD`; `keep_BS` is read by the `padding` mask, True where a token is real."""

    D, L, C, N, R, V = 64, 48, 32, 16, 8, 12

    def __init__(self, form: Form | None = None):
        super().__init__()
        self.form = form = form or Form()
        H, D, L, C, N, R, V = form.heads, self.D, self.L, self.C, self.N, self.R, self.V
        self.scale = form.scale or (N + R) ** -0.5
        if not form.q_lora:
            self.q, self.kv_a = nn.Linear(D, H * (N + R), bias=False), nn.Linear(D, C + R, bias=False)
        elif form.fused_a:
            self.qkv_a = nn.Linear(D, L + C + R, bias=False)
        else:
            self.q_a, self.kv_a = nn.Linear(D, L, bias=False), nn.Linear(D, C + R, bias=False)
        if form.q_lora:
            self.q_norm, self.q_b = nn.RMSNorm(L, eps=1e-6), nn.Linear(L, H * (N + R), bias=False)
        self.kv_norm = nn.RMSNorm(C, eps=1e-6)
        if form.kv_b == "separate":
            self.k_b, self.v_b = nn.Linear(C, H * N, bias=False), nn.Linear(C, H * V, bias=False)
        else:
            self.kv_b = nn.Linear(C, H * (N + V), bias=False)
        self.o = nn.Linear(H * V, D, bias=False)
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, R, 2).float() / R))

    def forward(self, x_BSD: torch.Tensor, keep_BS: torch.Tensor | None = None) -> torch.Tensor:
        q_nope, q_rope, latent, k_rope = self.project(x_BSD)
        q_rope, k_rope = self.rotate(q_rope), self.rotate(k_rope)
        k_nope, v = self.up_project(self.kv_norm(latent))
        k_rope = self.share(k_rope)
        if self.form.noise:
            k_rope, q_nope = k_rope.contiguous(), q_nope.clone()
            v = v.transpose(1, 2).contiguous().transpose(1, 2)
        parts = slice(None) if self.form.order == "nope_first" else slice(None, None, -1)
        q, k = torch.cat((q_nope, q_rope)[parts], -1), torch.cat((k_nope, k_rope)[parts], -1)
        o = self.attend(q, k, v, self.mask(x_BSD, keep_BS))
        return self.o(o.transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x_BSD -> q_nope_BHSN, q_rope_BHSR, latent_BSC, k_rope_B1SR, nothing rotated or normalised yet."""
        if self.form.fused_a:
            q_a, latent, k_rope = self.qkv_a(x).split([self.L, self.C, self.R], -1)
        else:
            latent, k_rope = self.kv_a(x).split([self.C, self.R], -1)
            q_a = self.q_a(x) if self.form.q_lora else None
        q = self.q_b(self.q_norm(q_a)) if self.form.q_lora else self.q(x)
        q = q.view(*x.shape[:2], -1, self.N + self.R).transpose(1, 2)
        q_nope, q_rope = q.split([self.N, self.R], -1)
        return q_nope, q_rope, latent, k_rope.unsqueeze(1)

    def up_project(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """latent_BSC -> k_nope_BHSN, v_BHSV."""
        B, S, H = *latent.shape[:2], self.form.heads
        if self.form.kv_b == "separate":
            k = self.k_b(latent).view(B, S, H, self.N).transpose(1, 2)
            return k, self.v_b(latent).view(B, S, H, self.V).transpose(1, 2)
        if self.form.kv_b == "einsum":
            weight_HEC = self.kv_b.weight.view(H, self.N + self.V, self.C)
            kv = torch.einsum("bsc,hec->bhse", latent, weight_HEC)
        else:
            kv = self.kv_b(latent).view(B, S, H, self.N + self.V)
            kv = kv.transpose(1, 2)
            if self.form.noise:
                kv = kv.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3).clone()
        k, v = kv.split([self.N, self.V], -1)
        return k, v

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x_BHSR with position s of S, rotated as the form spells it (`reflection` has one sign wrong: no rotation)."""
        angle = torch.arange(x.shape[2], device=x.device)[:, None].float() * self.inv_freq
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        spelling = self.form.rope
        if spelling == "none":
            return x
        if spelling == "complex":
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3).type_as(x)
        if spelling == "interleaved":
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        if spelling == "deinterleaved":
            x = x.view(*x.shape[:3], -1, 2).transpose(4, 3).reshape(x.shape)
        first, second = x.chunk(2, -1)
        turned = torch.cat([second if spelling == "reflection" else -second, first], -1)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)

    def share(self, k_rope: torch.Tensor) -> torch.Tensor:
        """k_rope_B1SR -> the rotated key of each head, BHSR."""
        return k_rope.expand(-1, self.form.heads, -1, -1)

    def mask(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor | None:
        """A mask that broadcasts to BHSS, or None where the form passes a flag or nothing."""
        S, kind = x.shape[1], self.form.mask
        if kind == "triu" or (kind == "flag" and self.form.attention == "eager"):
            return torch.full((S, S), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        if kind in ("flag", "none"):
            return None
        seen = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
        if kind == "window":
            return seen & ~seen.tril(-4)
        return seen if kind == "tril" else seen & keep[:, None, None, :]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q, k of BHS(N+R), v_BHSV -> o_BHSV."""
        scale = self.scale
        if self.form.scale_on != "scores":
            q, k, scale = (q * scale, k, 1.0) if self.form.scale_on == "query" else (q, k * scale, 1.0)
        dropout = self.form.dropout if self.training else 0.0
        if self.form.attention == "eager":
            scores = torch.matmul(q, k.transpose(2, 3)) * scale
            weights = self.weigh(self.add_mask(scores, mask)).to(q.dtype)
            return F.dropout(weights, dropout) @ v
        causal = self.form.mask == "flag"
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)

    def add_mask(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Masked scores BHSS -> attention weights."""
        return F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
