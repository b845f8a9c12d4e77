"""Counting choices and finding replicas of placed experts, beside the expert layer that they are added to.

The layer is one rank's of DeepSeek-V3's width under EP8: 32 experts of 256 and 4 spare slots, of width 7168 and 2048 in
bfloat16, with the rows of a balanced load: every rank sends as many tokens. Its time holds routing, the sort, both
grouped GEMMs and the sum, without any exchange, which would only make it longer. All is timed in CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from bench.results import check
from bench.timing import graph_us, warm_up
from dscompile.kernels.place import POLICIES
from dscompile.kernels.route import route
from tests.kernels.place_cases import Case, problems
from tests.kernels.route_cases import ROUTERS, logits_and_bias

GPUS = 1
_CASE = Case(experts=256, ranks=8, spare=32, width=8, top_k=8)
_HERE = _CASE.slots // _CASE.ranks
_D, _F = 7168, 2048
_ANCHOR = "routing and 36 experts of the layer on one rank of 8, same run"


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of both policies; quick takes 128 tokens only."""
    warm_up()
    g = torch.Generator("cuda").manual_seed(0)
    shapes = (_HERE, 2 * _F, _D), (_HERE, _D, _F)
    weights = [torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=g).mul_(0.02) for s in shapes]
    rows = []
    for tokens in (128,) if quick else (1, 16, 128, 1024, 4096):
        layer_us = _layer(tokens, weights)
        for policy in POLICIES:
            us = _place(tokens, policy)
            case = f"place_counted {policy}, {tokens} tokens x 8 of 256 experts, {_CASE.slots} slots on 8 ranks"
            print(f"{case}: {us:.2f} us, {us / layer_us:.2%} of the layer", flush=True)
            rows.append({"case": case, "us": round(us, 2), "anchor": _ANCHOR, "anchor_us": round(layer_us, 1)})
    return rows


def _place(tokens: int, policy: str) -> float:
    """Microseconds, once the bits are the reference's."""
    ids = _CASE.ids(tokens, torch.int64, "cuda")
    found = problems(_CASE, policy, ids)
    check(not found, f"{policy}, {tokens} tokens: {found}")
    counter = torch.zeros(_CASE.experts, dtype=torch.int64, device="cuda")
    rule = *_CASE.maps("cuda"), _CASE.slots, _CASE.ranks, policy
    return graph_us([lambda: torch.ops.dsinfra.place_counted(ids, counter, *rule)])


def _layer(tokens: int, weights: list[torch.Tensor]) -> float:
    """Microseconds of the layer without placement, for as many choices among the experts here."""
    router = next(r for r in ROUTERS if r.name == "deepseek_v3")
    logits, bias = logits_and_bias(router, tokens, torch.float32, "cuda")
    x = torch.randn(tokens, _D, device="cuda", dtype=torch.bfloat16)
    local = torch.rand(tokens, _HERE, device="cuda").topk(_CASE.top_k, 1).indices

    def call() -> torch.Tensor:
        _, weight = route(logits, bias, *router.arguments())
        return torch.ops.dsinfra.experts(x, local, weight, *weights, None, None, "silu", False, 1.0, 0.0)

    check(bool(call().isfinite().all()), f"the layer of {tokens} tokens")
    return graph_us([call])
