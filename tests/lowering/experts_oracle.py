"""Expert layers, routers and FP8 blocks written the slow way, one token and block at a time, to hold the operators
against.

Shares no code with the package. Everything but the FP8 rounding itself is float64, and differentiable where the
operators are.
"""

import math

import torch
from torch import Tensor


def gated(row_2F: Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """h of one row."""
    F = row_2F.shape[0] // 2
    columns = [(2 * i, 2 * i + 1) if interleaved else (i, F + i) for i in range(F)]
    gate = torch.stack([row_2F[g] for g, _ in columns])
    up = torch.stack([row_2F[u] for _, u in columns])
    if activation == "swiglu_oai":
        if limit > 0:
            gate, up = torch.minimum(gate, torch.full_like(gate, limit)), up.clamp(-limit, limit)
        return (up + 1) * gate / (1 + torch.exp(-alpha * gate))
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def experts(x, topk_idx, topk_weight, w_gate_up, w_down, b_gate_up, b_down, activation, interleaved, alpha, limit):
    """`dsinfra::experts` in float64."""
    x, topk_weight, w_gate_up, w_down = (t.double() for t in (x, topk_weight, w_gate_up, w_down))
    rows = []
    for t, ids in enumerate(topk_idx.tolist()):
        y = torch.zeros_like(x[t])
        for k, e in enumerate(ids):
            if not 0 <= e < w_down.shape[0]:
                continue
            gate_up = w_gate_up[e] @ x[t] + (0 if b_gate_up is None else b_gate_up[e].double())
            z = w_down[e] @ gated(gate_up, activation, interleaved, alpha, limit)
            y = y + topk_weight[t, k] * (z + (0 if b_down is None else b_down[e].double()))
        rows.append(y)
    return torch.stack(rows) if rows else x


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """-> q as float64 [M,K], scale float64 [M, ceil(K/128)], block by block; scales are rounded to float32."""
    q = torch.zeros(x.shape, dtype=torch.float64)
    scale = torch.zeros(x.shape[0], -(-x.shape[1] // 128), dtype=torch.float64)
    for m in range(x.shape[0]):
        for b in range(scale.shape[1]):
            block = x[m, 128 * b : 128 * (b + 1)].float()
            s = torch.maximum(block.abs().max() / 448, torch.tensor(torch.finfo(torch.float32).tiny))
            scale[m, b] = s
            q[m, 128 * b : 128 * (b + 1)] = (block / s).to(torch.float8_e4m3fn).double()
    return q, scale


def dequantized(x: Tensor) -> Tensor:
    """x through FP8 and back, float64."""
    q, scale = quantize(x)
    return q * scale.repeat_interleave(128, 1)[:, : x.shape[1]]


def weight_of(w: Tensor, scale: Tensor) -> Tensor:
    """An FP8 weight [N,K] in float64."""
    n, k = (torch.arange(size) // 128 for size in w.shape)
    return w.double() * scale.double()[n][:, k]


def fp8_weight(*shape: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random FP8 weight [...,N,K] and its scales, such that W's elements are about 1 / sqrt(K)."""
    *lead, N, K = shape
    w = (100 * torch.randn(*shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    spread = 0.5 + torch.rand(*lead, -(-N // 128), -(-K // 128), generator=generator)
    return w, spread / (100 * math.sqrt(K))


def grouped(x: Tensor, weights: list[Tensor], ends: list[int]) -> Tensor:
    """Row by row: y[m] = W[group of m] x[m], 0 past the last end; in float64."""
    y = torch.zeros(x.shape[0], weights[0].shape[0], dtype=torch.float64)
    for m in range(x.shape[0]):
        group = next((g for g, end in enumerate(ends) if m < end), None)
        if group is not None:
            y[m] = weights[group].double() @ x[m].double()
    return y


def route(logits, bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale):
    """`dsinfra::route` in float64, by sorting Python lists: -> ids and weights as lists of lists."""
    all_ids, all_weights = [], []
    for row in logits.double().tolist():
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in row]
        elif score == "softmax":
            total = sum(math.exp(v - max(row)) for v in row)
            scores = [math.exp(v - max(row)) / total for v in row]
        else:
            scores = row
        choice = [s + (0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
        if n_group > 1:
            each = len(choice) // n_group
            best = 2 if group_score.startswith("top2") else 1
            of_group = [sum(sorted(choice[g * each : (g + 1) * each])[-best:]) for g in range(n_group)]
            kept = sorted(range(n_group), key=lambda g: (-of_group[g], g))[:topk_group]
            out = 0.0 if group_score.endswith("zero") else -math.inf
            choice = [c if e // each in kept else out for e, c in enumerate(choice)]
        ids = sorted(range(len(choice)), key=lambda e: (-choice[e], e))[:top_k]
        weights = [scores[e] for e in ids]
        if score == "softmax_topk":
            total = sum(math.exp(v - max(weights)) for v in weights)
            weights = [math.exp(v - max(weights)) / total for v in weights]
        if renormalize:
            weights = [w / (sum(weights) + eps) for w in weights]
        all_ids.append(ids)
        all_weights.append([w * scale for w in weights])
    return all_ids, all_weights
