"""Inputs of the float8 decode tests: a poisoned case of `mla_decode_cases`, its cache quantised into 656-byte rows."""

from __future__ import annotations

import torch

from dscompile.kernels.mla_cache import append_fp8_plain, row_bytes, views
from dscompile.kernels.mla_decode import PAGE
from tests.kernels.mla_decode_cases import Case, make


def make_fp8(case: Case, device: str, seed: int = 0) -> tuple:
    """The ten positional arguments. Rows that don't count are bytes 0x7f or 0xff: NaN in each of the three parts."""
    q_latent, q_rope, latent, k_rope, seqlens, mask, table, *rest = make(case, device, seed)
    pool = torch.full(
        (*latent.shape[:2], row_bytes(case.latent, case.rope, case.dtype)), 0x7F, dtype=torch.uint8, device=device
    )
    pool[..., 1::2] = 0xFF
    dead = latent.isnan().any(-1).flatten()
    rows = torch.arange(dead.numel(), device=device).masked_fill(dead, -1)
    append_fp8_plain(pool, latent.flatten(0, 1).contiguous(), k_rope.flatten(0, 1).contiguous(), rows)
    latent8, rope, scale = views(pool, case.latent, case.rope, case.dtype)
    assert table is None or pool.shape[1] == PAGE
    return q_latent, q_rope, latent8, rope, seqlens, mask, table, *rest, scale


def dequantized(args: tuple) -> tuple:
    """The same call over a plain cache: what the float8 one stands for, in float64."""
    q_latent, q_rope, latent8, rope, *rest, scale = args
    wide = latent8.double().unflatten(-1, (scale.shape[-1], -1)) * scale.double().unsqueeze(-1)
    return q_latent.double(), q_rope.double(), wide.flatten(-2), rope.double(), *rest
