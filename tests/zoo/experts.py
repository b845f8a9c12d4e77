"""Mixture-of-experts layers written by hand in the ways people write them: one module with a switch for each habit.

Suffixes: B requests, S length, T tokens, D width, F expert width, E experts, K choices, M = T * K rows. All sizes
differ from one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers its grouped product)
from torch import nn

_ACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass(frozen=True)
class Layer:
    """How the layer is written. Every value computes the same kind of layer unless it says otherwise."""

    top_k: int = 2
    products: Literal["grouped", "batched"] = "grouped"
    sort: Literal["sort", "argsort", "stable"] = "sort"
    counts: Literal["histc", "one_hot", "equal", "scatter_add", "chosen", "searchsorted"] = "histc"
    gather: Literal["index", "index_select", "gather", "repeated"] = "index"
    unsort: Literal["index_put", "argsort", "scatter", "rows", "index_add", "scatter_add"] = "index_put"
    weigh: Literal["sorted", "flat", "bmm", "einsum"] = "sorted"
    weights: Literal["joint", "interleaved", "apart"] = "joint"
    stored: Literal["out_in", "in_out"] = "out_in"
    activation: Literal["silu", "gelu", "gelu_tanh", "oai"] = "silu"
    bias: bool = False
    sentinels: bool = False


class ToyExperts(nn.Module):
    """`forward(x_BSD) -> y_BSD`: a softmax router and the experts behind it."""

    D, F, E = 24, 20, 5

    def __init__(self, layer: Layer | None = None):
        super().__init__()
        self.layer = layer = layer or Layer()
        D, W, E = self.D, self.F, self.E
        out_in = layer.stored == "out_in"

        def weight(out: int, into: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(E, *((out, into) if out_in else (into, out))) / into**0.5)

        self.router = nn.Linear(D, E, bias=False)
        if layer.weights == "apart":
            self.w_gate, self.w_up = weight(W, D), weight(W, D)
        else:
            self.w_gate_up = weight(2 * W, D)
        self.w_down = weight(D, W)
        if layer.bias:
            self.b_gate_up, self.b_down = nn.Parameter(torch.randn(E, 2 * W)), nn.Parameter(torch.randn(E, D))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BSD.reshape(-1, self.D)
        idx_TK, weight_TK = self.route(x_TD)
        return self.experts(x_TD, idx_TK, weight_TK).view(x_BSD.shape)

    def route(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.router(x_TD).softmax(-1)
        weight, idx = scores.topk(self.layer.top_k)
        return idx, weight / weight.sum(-1, keepdim=True)

    # ---- rows by expert

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x_TD, idx_TK, weight_TK -> y_TD."""
        if self.layer.products == "batched":
            rows = x.repeat_interleave(self.layer.top_k, 0)
            z = self.mlp(rows, self.by_row(idx.reshape(-1)), idx.reshape(-1))
            return self.combine(z, weight, None, x)
        perm, ids = self.sorted(idx.reshape(-1))
        ends = self.ends(idx, ids)
        rows = self.gathered(x, perm)
        if self.layer.sentinels:
            outside = (ids >= self.E).unsqueeze(-1)
            ids.clamp_(max=self.E - 1)
            rows.masked_fill_(outside, 0.0)
        z = self.mlp(rows, self.by_group(ends), ids)
        if self.layer.sentinels:
            z = z.masked_fill(outside, 0.0)
        return self.combine(z, weight, perm, x)

    def sorted(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the sort, and the ids in its order."""
        if self.layer.sort == "sort":
            ids, perm = torch.sort(ids)
            return perm, ids
        perm = torch.argsort(ids, stable=self.layer.sort == "stable")
        return perm, ids[perm]

    def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
        """-> the end of each expert's rows, int32 [E]."""
        E, form = self.E, self.layer.counts
        if form == "searchsorted":
            return torch.searchsorted(ids_M, torch.arange(E), right=True).int()
        if form == "histc":
            counts = torch.histc(ids_M.float(), bins=E, min=0, max=E - 1)
        elif form == "one_hot":
            counts = F.one_hot(idx_TK, E).sum((0, 1))
        elif form == "chosen":
            chosen = torch.zeros(*idx_TK.shape[:-1], E, dtype=torch.bool)
            counts = chosen.scatter_(-1, idx_TK, True).sum(tuple(range(idx_TK.dim() - 1)))
        elif form == "equal":
            counts = (idx_TK.reshape(-1, 1) == torch.arange(E)).sum(0)
        else:
            counts = torch.zeros(E, dtype=torch.int64).scatter_add_(0, ids_M, torch.ones_like(ids_M))
        return counts.cumsum(0, dtype=torch.int32)

    def gathered(self, x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
        K, form = self.layer.top_k, self.layer.gather
        if form == "repeated":
            return x.repeat_interleave(K, dim=0)[perm]
        token = perm // K
        if form == "index_select":
            return x.index_select(0, token)
        return x[token] if form == "index" else x.gather(0, token.unsqueeze(-1).expand(-1, x.shape[1]))

    # ---- the expert

    def by_group(self, ends: torch.Tensor):  # type: ignore[no-untyped-def]
        def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return grouped_mm(rows, weight.transpose(1, 2) if self.layer.stored == "out_in" else weight, ends)

        return product

    def by_row(self, ids: torch.Tensor):  # type: ignore[no-untyped-def]
        def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if self.layer.stored == "out_in":
                return torch.bmm(weight[ids], rows.unsqueeze(-1))[..., 0]
            return torch.bmm(rows.unsqueeze(1), weight[ids]).squeeze(1)

        return product

    def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
        """rows_MD -> z_MD."""
        if self.layer.weights == "apart":
            gate, up = product(rows, self.w_gate), product(rows, self.w_up)
        else:
            both = product(rows, self.w_gate_up)
            if self.layer.bias:
                both = both + self.b_gate_up[ids]
            gate, up = both.chunk(2, -1) if self.layer.weights == "joint" else (both[:, ::2], both[:, 1::2])
        z = product(self.activate(gate, up), self.w_down)
        return z + self.b_down[ids] if self.layer.bias else z

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.layer.activation == "oai":
            gate, up = gate.clamp(max=0.7), up.clamp(min=-0.7, max=0.7)
            return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        return _ACT[self.layer.activation](gate) * up

    # ---- back to tokens

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        """z_MD in the order of `perm` (None: flat) -> y_TD."""
        T, K, D = x.shape[0], self.layer.top_k, self.D
        if self.layer.weigh == "sorted":
            weight = weight_TK.reshape(-1)
            z = z * (weight if perm is None else weight[perm]).unsqueeze(-1)
        if self.layer.unsort in ("index_add", "scatter_add"):
            token = (torch.arange(T * K) if perm is None else perm) // K
            zeros = torch.zeros_like(x)
            if self.layer.unsort == "index_add":
                return zeros.index_add_(0, token, z)
            return zeros.scatter_add(0, token.unsqueeze(-1).expand(-1, D), z)
        z_TKD = self.unsorted(z, perm).view(T, K, D)
        if self.layer.weigh == "bmm":
            return torch.bmm(weight_TK.reshape(-1, 1, K), z_TKD).squeeze(1)
        if self.layer.weigh == "einsum":
            return torch.einsum("tkd,tk->td", z_TKD, weight_TK)
        return (z_TKD if self.layer.weigh == "sorted" else z_TKD * weight_TK.unsqueeze(-1)).sum(1)

    def unsorted(self, z: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
        if perm is None:
            return z
        if self.layer.unsort == "rows":
            flat = torch.zeros_like(z)
            flat[perm] = z
            return flat
        if self.layer.unsort == "argsort":
            return z[torch.argsort(perm)]
        places = torch.arange(perm.numel(), device=perm.device)
        if self.layer.unsort == "scatter":
            return z[torch.zeros_like(perm).scatter_(0, perm, places)]
        inverse = torch.empty_like(perm)
        inverse[perm] = places
        return z[inverse]


class ReturningExperts(ToyExperts):
    """The router's last experts have no weights and return their tokens, as LongCat's do: that needs no product.

    `how`: what a layer of products does with their rows. "where" and "within" put the token in the result's place,
    "masked" zeroes their weights and adds the tokens behind the sum.
    """

    def __init__(self, layer: Layer | None = None, how: Literal["where", "within", "masked"] = "where"):
        super().__init__(layer)
        self.how, self.router = how, nn.Linear(self.D, self.E + 3, bias=False)

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.chosen, none = idx.reshape(-1), idx >= self.E
        if self.how == "masked":
            returned = x * (weight * none).sum(-1, keepdim=True)
            idx = torch.where(none, 0, idx) if self.layer.bias else idx.masked_fill(none, 0)
            return returned + super().experts(x, idx, weight.masked_fill(none, 0.0))
        return super().experts(x, idx.clamp(max=self.E - 1) if self.layer.products == "batched" else idx, weight)

    def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
        if self.how == "masked":
            return super().mlp(rows, product, ids)
        z = super().mlp(rows, product, ids.clamp(max=self.E - 1) if self.layer.bias else ids)
        if self.layer.products == "batched":
            ids = self.chosen
        return self.returned(rows, z, ids)

    def returned(self, rows: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self.how == "within":
            return torch.where((ids < self.E).unsqueeze(-1), z, rows)
        return torch.where((ids >= self.E).unsqueeze(-1), rows, z)


class OneChoice(ToyExperts):
    """One expert a token, whose rows are the tokens themselves (batched) or a sorted copy; `scaled` as a norm does."""

    def __init__(self, layer: Layer | None = None, scaled: bool = False):
        super().__init__(layer or Layer(top_k=1))
        self.scale = nn.Parameter(torch.rand(self.D) + 0.5) if scaled else 1.0

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        if self.layer.products == "batched":
            return self.mlp(x, self.by_row(idx.squeeze(-1)), idx.squeeze(-1)) * weight
        perm, ids = self.sorted(idx.reshape(-1))
        return self.combine(self.mlp(x[perm], self.by_group(self.ends(idx, ids)), ids), weight, perm, x)


class TitanMoE(nn.Module):
    """torchtitan's spelling: sigmoid scores, a stable argsort, three products, results put back by index.

    `before`: scores multiply the rows before the experts (its `score_before_experts`), which is another function.
    """

    D, F, E, K = 24, 20, 5, 2

    def __init__(self, before: bool = False):
        super().__init__()
        self.before = before
        D, W, E = self.D, self.F, self.E
        self.gate = nn.Linear(D, E, bias=False)
        self.w1, self.w3 = nn.Parameter(torch.randn(E, W, D) / D**0.5), nn.Parameter(torch.randn(E, W, D) / D**0.5)
        self.w2 = nn.Parameter(torch.randn(E, D, W) / W**0.5)
        self.register_buffer("expert_bias", torch.linspace(-0.1, 0.1, E))
        self.register_buffer("tokens_per_expert", torch.zeros(E))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        B, S, D = x_BSD.shape
        x = x_BSD.view(-1, D)
        scores = torch.sigmoid(self.gate(x).to(torch.promote_types(x.dtype, torch.float32)))
        chosen = torch.topk(scores + self.expert_bias, k=self.K, dim=1)[1]
        top_scores = scores.gather(dim=1, index=chosen)
        top_scores = top_scores / (top_scores.sum(dim=-1, keepdim=True) + 1e-20)
        counts = torch.histc(chosen.view(-1).to(scores.dtype), bins=self.E, min=0, max=self.E)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        order = torch.argsort(chosen.view(-1), stable=True)
        sorted_scores = top_scores.view(-1)[order]
        rows = x[order // self.K]
        if self.before:
            rows = (rows * sorted_scores.reshape(-1, 1)).to(x.dtype)
        rows = self.experts(rows, counts)
        back = torch.zeros((B * S * self.K, D), dtype=rows.dtype, device=rows.device)
        back[order] = rows
        back = back.reshape(-1, self.K, D)
        if self.before:
            return back.sum(dim=1).reshape(B, S, D)
        y = torch.bmm(top_scores.reshape(-1, 1, self.K), back.to(top_scores.dtype)).to(x.dtype).squeeze(1)
        return y.reshape(B, S, D)

    def experts(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(grouped_mm(rows, self.w1.transpose(-2, -1), ends))
        h = h * grouped_mm(rows, self.w3.transpose(-2, -1), ends)
        return grouped_mm(h, self.w2.transpose(-2, -1), ends).type_as(rows)


# What trains a layer that stays as it was: the backward of transformers' product was, before it became an operator, a
# loop over `offs.tolist()`, which AOTAutograd can't trace.
LEFT_ALONE = "aot_eager" if hasattr(torch.ops.transformers, "grouped_mm_fallback_backward") else "eager"


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows_MK, weight_EKN, ends_E -> [M, N], as transformers does where torch's own has no kernel for the dtype."""
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)
