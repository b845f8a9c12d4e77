"""MLA written the slow way in float64, one request and head at a time, to hold the operators against.

Shares no code with the package: keys and values are built per head, the visible keys of each query are listed, and
softmax runs over the listed ones only. Differentiable, so it is the oracle of gradients too.
"""

import math

import torch
from torch import Tensor


def visible_keys(S: int, T: int, mask_ST: Tensor | None, causal: bool) -> Tensor:
    """-> bool [S,T]; a float mask hides nothing by itself."""
    visible = torch.ones(S, T, dtype=torch.bool)
    if causal:
        for i in range(S):
            visible[i, max(0, i + T - S + 1) :] = False
    if mask_ST is not None and mask_ST.dtype == torch.bool:
        visible &= mask_ST.cpu()
    return visible


def attend(q_SD: Tensor, k_TD: Tensor, v_TV: Tensor, visible_ST: Tensor, bias_ST: Tensor | None, scale: float):
    """-> o [S,V], lse [S]; a query without a visible key gives 0 and -inf."""
    scores = scale * (q_SD @ k_TD.T)
    if bias_ST is not None:
        scores = scores + bias_ST
    scores = scores.masked_fill(~visible_ST.to(scores.device), -math.inf)
    lse = torch.logsumexp(scores, -1)
    alive = visible_ST.any(-1).to(scores.device) & (lse > -math.inf)
    p = torch.softmax(scores[alive], -1)
    o = torch.zeros(q_SD.shape[0], v_TV.shape[1], dtype=scores.dtype, device=scores.device)
    return o.index_put((alive.nonzero()[:, 0],), p @ v_TV), lse


def mla(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal):
    """`dsinfra::mla` in float64: -> o [B,H,S,V], lse [B,H,S]."""
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (x.double() for x in (q_nope, q_rope, latent, k_rope, w_uk, w_uv))
    (B, H, S, _), T = q_nope.shape, latent.shape[1]
    if mask is not None:
        mask = mask.expand(B, H, S, T)
    outs, lses = [], []
    for b in range(B):
        for h in range(H):
            k = torch.cat([latent[b] @ w_uk[h].T, k_rope[b]], -1)
            q = torch.cat([q_nope[b, h], q_rope[b, h]], -1)
            own = None if mask is None else mask[b, h]
            bias = own.double() if own is not None and own.dtype != torch.bool else None
            o, lse = attend(q, k, latent[b] @ w_uv[h].T, visible_keys(S, T, own, causal), bias, scale)
            outs.append(o)
            lses.append(lse)
    return torch.stack(outs).unflatten(0, (B, H)), torch.stack(lses).unflatten(0, (B, H))


def mla_decode(q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, scale, causal):
    """`dsinfra::mla_decode` in float64, touching valid rows only: -> o [B,S,H,C], lse [B,S,H]."""
    B, S, H, C = q_latent.shape
    o = torch.zeros(B, S, H, C, dtype=torch.float64, device=q_latent.device)
    lse = torch.full((B, S, H), -math.inf, dtype=torch.float64, device=q_latent.device)
    for b, length in enumerate(seqlens.tolist()):
        if page_table is None:
            c, r = latent[b, :length], k_rope[b, :length]
        else:
            pages = page_table[b, : -(-length // 64)].long()
            c, r = latent[pages].flatten(0, 1)[:length], k_rope[pages].flatten(0, 1)[:length]
        if not length:
            continue
        keys, values = torch.cat([c, r], -1).double(), c.double()
        for i in range(S):
            seen = length - (S - 1 - i) if causal else length
            visible = torch.arange(length) < seen
            if mask is not None:
                visible &= mask[b if mask.shape[0] > 1 else 0, i, :length].cpu()
            for h in range(H):
                q = torch.cat([q_latent[b, i, h], q_rope[b, i, h]]).double()[None]
                row, row_lse = attend(q, keys, values, visible[None], None, scale)
                o[b, i, h], lse[b, i, h] = row[0], row_lse[0]
    return o, lse
