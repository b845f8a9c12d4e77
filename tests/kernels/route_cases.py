"""Routers to test, a reference in float64, and the rows on which a reference can be held to exact indices.

Logits lie on a grid of 1/8, so that equal scores are common, and are equal in any precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Router:
    """One configuration; `name` says which published models have it."""

    name: str
    experts: int
    top_k: int
    score: str
    bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0

    def arguments(self) -> tuple:
        """What follows bias in `route`."""
        groups = (self.n_group, self.topk_group, self.group_score)
        return self.top_k, self.score, *groups, self.renormalize, self.eps, self.scale


ROUTERS = [
    Router("deepseek_v3", 256, 8, "sigmoid", True, 8, 4, "top2", True, 1e-20, 2.5),
    Router("deepseek_v3, zeros", 256, 8, "sigmoid", True, 8, 4, "top2_zero", True, 1e-20, 2.5),
    Router("deepseek_v2", 160, 6, "softmax", False, 8, 3, "max_zero", scale=16.0),
    Router("deepseek_v2, minus infinity", 160, 6, "softmax", False, 8, 3, "max", scale=16.0),
    Router("deepseek_v2 lite", 64, 6, "softmax"),
    Router("kimi, one group", 384, 8, "sigmoid", True, 1, 1, "top2", True, 1e-20, 2.827),
    Router("qwen3", 128, 8, "softmax", renormalize=True),
    Router("mixtral", 8, 2, "softmax", renormalize=True),
    Router("gpt_oss", 32, 4, "softmax_topk"),
    Router("longcat", 300, 12, "softmax", True, scale=6.0),
    Router("softmax_topk with bias and groups", 12, 3, "softmax_topk", True, 3, 2, "top2"),
    Router("one expert", 1, 1, "sigmoid", renormalize=True, eps=1e-20),
    Router("every expert", 7, 7, "softmax", True),
    Router("the most", 512, 32, "sigmoid", True, 16, 9, "max", True, 1e-6, 0.5),
    Router("groups smaller than top_k", 12, 8, "sigmoid", False, 4, 1, "max"),
]


def logits_and_bias(
    router: Router, tokens: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of `tokens` tokens in dtype, and the bias in float32 where the router has one."""
    torch.manual_seed(3)
    logits = (torch.randint(-32, 33, (tokens, router.experts)) / 8).to(device, dtype)
    bias = (torch.randint(-8, 9, (router.experts,)) / 64).to(device) if router.bias else None
    return logits, bias


def scores(router: Router, logits: torch.Tensor) -> torch.Tensor:
    """Scores [T, E] without the bias, float64; softmax_topk chooses by the logits."""
    logits = logits.double()
    return {"softmax": lambda: logits.softmax(1), "sigmoid": logits.sigmoid, "softmax_topk": lambda: logits}[
        router.score
    ]()


def reference(
    router: Router, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """topk_idx, topk_weight (float64), and [T] whether the choice was clear: see `_clear`."""
    score = scores(router, logits)
    choice = score if bias is None else score + bias.double()
    clear = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if router.n_group > 1:
        grouped = choice.view(len(logits), router.n_group, -1)
        best = grouped.sort(dim=2, descending=True).values
        group = best[:, :, :2].sum(2) if router.group_score.startswith("top2") else best[:, :, 0]
        values, kept = group.sort(dim=1, descending=True, stable=True)
        clear &= _clear(values)
        out = torch.ones_like(group).scatter(1, kept[:, : router.topk_group], 0).bool()
        fill = 0.0 if router.group_score.endswith("_zero") else -torch.inf
        choice = grouped.masked_fill(out[:, :, None], fill).flatten(1)
    values, order = choice.sort(dim=1, descending=True, stable=True)
    clear &= _clear(values[:, : router.top_k + 1])
    idx = order[:, : router.top_k]
    weight = score.gather(1, idx)
    return idx, _finish(router, weight), clear


def weights_of(router: Router, logits: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The weights that belong to experts already chosen, float64."""
    return _finish(router, scores(router, logits).gather(1, idx))


def _finish(router: Router, weight: torch.Tensor) -> torch.Tensor:
    if router.score == "softmax_topk":
        weight = weight.softmax(1)
    if router.renormalize:
        weight = weight / (weight.sum(1, keepdim=True) + router.eps)
    return weight * router.scale


def _clear(values: torch.Tensor) -> torch.Tensor:
    """values [T, n] descending -> [T] whether neighbours are equal or so far apart that float32 tells them apart."""
    gap = (values[:, :-1] - values[:, 1:]).nan_to_num(0.0)
    size = values[:, 1:].abs().clamp_min(1e-3 / 448).nan_to_num(1.0, posinf=1.0)
    return ((gap <= 1e-14) | (gap > 1e-5 * size)).all(1)


def problems(router: Router, got: tuple, logits: torch.Tensor, bias: torch.Tensor | None) -> list[str]:
    """What is wrong with (topk_idx, topk_weight), in words; empty when all is right."""
    idx, weight = got
    want_idx, _, clear = reference(router, logits, bias)
    if idx.dtype != torch.int64 or weight.dtype != torch.float32 or idx.shape != want_idx.shape:
        return [f"idx {idx.dtype} {tuple(idx.shape)}, weight {weight.dtype} {tuple(weight.shape)}"]
    found = []
    if len(logits) and clear.float().mean() < 0.9:
        found.append(f"only {int(clear.sum())} of {len(clear)} rows are clear: the case tests too little")
    wrong = (idx != want_idx).any(1) & clear
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        found.append(f"{int(wrong.sum())} rows of indices, e.g. {idx[row].tolist()} for {want_idx[row].tolist()}")
    if bool((idx < 0).any() or (idx >= router.experts).any()):
        return [*found, "indices outside the experts"]
    want = weights_of(router, logits, idx)
    error = (weight.double() - want).abs()
    if bool((error > 1e-5 * want.abs() + 1e-9).any()):
        found.append(f"weights are off by {float((error / want.abs().clamp_min(1e-9)).max()):.1e} of their value")
    return found
