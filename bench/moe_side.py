"""What surrounds an expert layer's GEMMs: routing, the sort by expert with the gather, the weighted sum; bfloat16 rows.

The anchor is Inductor's default mode for the same steps in PyTorch: softmax or sigmoid, topk, masks and gathers;
a stable sort and an index; a gather and a float32 sum. All is timed in CUDA graphs, after each was checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.results import check, check_close
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels import moe
from dscompile.kernels.route import route
from tests.kernels.moe_cases import combine_reference, plan_reference
from tests.kernels.route_cases import ROUTERS, Router, logits_and_bias, problems

GPUS = 1
_ANCHOR = "inductor default mode, same run"
_TOKENS = (1, 16, 128, 4096)
_LAYERS = [(256, 8, 7168), (128, 8, 2048)]  # experts, top_k, width: DeepSeek V3, Qwen3 30B
_ROUTERS = ("deepseek_v3", "qwen3")


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick takes 16 tokens only."""
    warm_up()
    tokens = (16,) if quick else _TOKENS
    routers = [router for router in ROUTERS if router.name in _ROUTERS]
    rows = [_route(router, n) for router in routers for n in tokens]
    rows += [_gather(*layer, n) for layer in _LAYERS for n in tokens]
    return rows + [_combine(*layer, n) for layer in _LAYERS for n in tokens]


def _row(case: str, ours: list[Callable[[], Any]], anchor: list[Callable[[], Any]]) -> dict[str, Any]:
    us, anchor_us = graph_us(ours), graph_us(anchor)
    return {"case": case, "us": round(us, 2), "anchor": _ANCHOR, "anchor_us": round(anchor_us, 2)}


def _compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _route(router: Router, tokens: int) -> dict[str, Any]:
    case = f"route {router.name}, {tokens} tokens, {router.top_k} of {router.experts} experts"
    logits, bias = logits_and_bias(router, tokens, torch.float32, "cuda")
    logits = logits + torch.randn_like(logits) / 100

    def formula(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score = logits.softmax(1) if router.score == "softmax" else logits.sigmoid()
        choice = score if bias is None else score + bias
        if router.n_group > 1:
            grouped = choice.view(len(choice), router.n_group, -1)
            best = grouped.topk(2, 2, sorted=False).values.sum(2).topk(router.topk_group, 1, sorted=False).indices
            kept = torch.zeros(grouped.shape[:2], device="cuda").scatter(1, best, 1).bool()
            choice = grouped.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
        idx = choice.topk(router.top_k, 1, sorted=False).indices
        weight = score.gather(1, idx)
        if router.renormalize:
            weight = weight / (weight.sum(1, keepdim=True) + router.eps)
        return idx, weight * router.scale

    got = route(logits, bias, *router.arguments())
    check(not problems(router, got, logits, bias), case)
    anchor = _compiled(formula)
    chosen = anchor(logits)[0].sort(1).values == got[0].sort(1).values
    check(float(chosen.float().mean()) > 0.999, f"{case}: inductor")
    return _row(case, [lambda: route(logits, bias, *router.arguments())], [lambda: anchor(logits)])


def _ids(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    return torch.rand(tokens, experts, device="cuda").topk(top_k, 1).indices


def _gather(experts: int, top_k: int, width: int, tokens: int) -> dict[str, Any]:
    case = f"plan and gather, {tokens} tokens x {top_k} of {experts} experts, width {width}"

    def formula(x: torch.Tensor, topk_idx: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = topk_idx.flatten()
        order = torch.sort(flat, stable=True).indices
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cuda"))
        ends = torch.histc(flat.int(), bins=experts, min=0, max=experts - 1).cumsum(0).int()
        return x[order // top_k], order, position, ends

    sets = min(8, buffer_sets(tokens * width * 2 * (top_k + 1)))
    inputs = [
        (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16), _ids(tokens, top_k, experts))
        for _ in range(sets)
    ]
    anchor = _compiled(formula)
    order, position, ends = plan_reference(inputs[0][1], experts)
    want = inputs[0][0][order.long() // top_k]
    for name, got in (("kernel", moe.plan_and_gather(*inputs[0], experts)), ("inductor", anchor(*inputs[0]))):
        check(torch.equal(got[0], want) and torch.equal(got[1].int(), order), f"{case}, {name}: rows")
        same = torch.equal(got[2].int().flatten(), position.flatten()) and torch.equal(got[3], ends)
        check(same, f"{case}, {name}: plan")
    ours = [lambda args=args: moe.plan_and_gather(*args, experts) for args in inputs]
    return _row(case, ours, [lambda args=args: anchor(*args) for args in inputs])


def _combine(experts: int, top_k: int, width: int, tokens: int) -> dict[str, Any]:
    case = f"combine, {tokens} tokens x {top_k} of {experts} experts, width {width}"

    def formula(z: torch.Tensor, position: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (z[position].float() * weight[:, :, None]).sum(1).to(z.dtype)

    inputs = []
    for _ in range(min(8, buffer_sets(tokens * width * 2 * (top_k + 1)))):
        topk_idx = _ids(tokens, top_k, experts)
        position = plan_reference(topk_idx, experts)[1]
        z = torch.randn(tokens * top_k, width, device="cuda", dtype=torch.bfloat16)
        inputs.append((z, position, torch.rand(tokens, top_k, device="cuda"), topk_idx, experts))
    anchor = _compiled(formula)
    want = combine_reference(*inputs[0])
    for name, got in (("kernel", moe.combine(*inputs[0])), ("inductor", anchor(*inputs[0][:3]))):
        check_close(got, want, atol=1e-3, rtol=1.01 * 2**-8, what=f"{case}, {name}")
    ours = [lambda args=args: moe.combine(*args) for args in inputs]
    return _row(case, ours, [lambda args=args: anchor(*args[:3]) for args in inputs])
