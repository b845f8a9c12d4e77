"""Routings to exchange, and the whole exchange in plain PyTorch, all ranks in one process: the oracle of every tier.

Payloads name their origin, so that a row in a wrong place says where it came from: column c of token t of rank r holds
a value made of r, t, c and the round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dscompile.kernels.exchange import Spec
from dscompile.kernels.exchange_launch import Arrived, Plan
from tests.kernels.moe_cases import quantize_reference


@dataclass
class Inputs:
    """Of one rank: x [T, D], topk_idx [T, K] of all ranks' experts, topk_weight float32 [T, K]."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weight: torch.Tensor


# name -> ids [T, K] of one rank; some ids may name no expert
ROUTINGS = {
    "uniform": lambda spec, t, g: torch.rand(t, spec.experts, generator=g).argsort(1)[:, : spec.top_k],
    "one rank": lambda spec, t, g: torch.randint(0, spec.local_experts, (t, spec.top_k), generator=g),
    "last expert": lambda spec, t, g: torch.full((t, spec.top_k), spec.experts - 1),
    "some nowhere": lambda spec, t, g: torch.randint(-2, spec.experts + 2, (t, spec.top_k), generator=g),
    "all nowhere": lambda spec, t, g: torch.full((t, spec.top_k), -1),
    "all ranks": lambda spec, t, g: (
        (
            torch.arange(spec.top_k)[None] * spec.local_experts
            + torch.randint(0, spec.local_experts, (t, 1), generator=g)
        )
        % spec.experts
    ),
}


def origin(spec: Spec, rank: int, tokens: int, number: int = 0) -> torch.Tensor:
    """x [T, D]: columns 0 to 3 are the rank + 1, the token % 256, the token // 256, the round; then noise."""
    g = torch.Generator().manual_seed(number * 64 + rank)
    x = torch.randn(tokens, spec.width, generator=g)
    token = torch.arange(tokens)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = rank + 1, token % 256, token // 256, number % 256
    return x.to(getattr(torch, spec.dtype))


def make_inputs(spec: Spec, rank: int, tokens: int, routing: str, number: int = 0) -> Inputs:
    """Inputs of one rank and round; every rank can make those of all."""
    g = torch.Generator().manual_seed(number * 4096 + rank)
    ids = ROUTINGS[routing](spec, tokens, g).to(getattr(torch, spec.index)).contiguous()
    return Inputs(origin(spec, rank, tokens, number), ids, torch.rand(tokens, spec.top_k, generator=g))


def plan_reference(spec: Spec, topk_idx: torch.Tensor) -> Plan:
    """Written as a loop over ranks, each an exclusive count of the tokens before."""
    inside = (topk_idx >= 0) & (topk_idx < spec.experts)
    owner = torch.where(inside, topk_idx // spec.local_experts, -1)
    place = torch.full((len(topk_idx), spec.world), -1, dtype=torch.int32)
    counts = torch.zeros(spec.world, dtype=torch.int32)
    for rank in range(spec.world):
        goes = (owner == rank).any(1)
        place[goes, rank] = torch.arange(int(goes.sum()), dtype=torch.int32)
        counts[rank] = goes.sum()
    return Plan(place, counts)


def dispatch_reference(spec: Spec, inputs: list[Inputs], rank: int) -> Arrived:
    """What comes to `rank`. Unused rows are zero; the scale's are too, as the kernel leaves them."""
    m, k = spec.rows, spec.top_k
    rows = torch.zeros(m, spec.width, dtype=getattr(torch, spec.dtype))
    ids, weights = torch.full((m, k), -1, dtype=torch.int32), torch.zeros(m, k)
    source_token, counts = torch.full((m,), -1, dtype=torch.int32), torch.zeros(spec.world, dtype=torch.int32)
    for source, given in enumerate(inputs):
        tokens = (plan_reference(spec, given.topk_idx).place[:, rank] >= 0).nonzero().flatten()
        at = slice(source * spec.capacity, source * spec.capacity + len(tokens))
        local = given.topk_idx[tokens] - rank * spec.local_experts
        here = (local >= 0) & (local < spec.local_experts)
        rows[at], source_token[at], counts[source] = given.x[tokens], tokens.int(), len(tokens)
        ids[at] = torch.where(here, local, -1).int()
        weights[at] = torch.where(here, given.topk_weight[tokens], 0.0)
    if not spec.quantized:
        return Arrived(rows, None, ids, weights, source_token, counts)
    q, scale = quantize_reference(rows.float())
    scale[:, :m][:, source_token < 0] = 0
    return Arrived(q, scale, ids, weights, source_token, counts)


def combine_reference(
    spec: Spec, sent_back: list[torch.Tensor], extras: list[torch.Tensor], plan: Plan, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [T, D], extra_sum [T, K] of `rank`, of every rank's rows [M, D], extras [M, K]: float32, ranks in order."""
    y = torch.zeros(len(plan.place), spec.width)
    extra_sum = torch.zeros(len(plan.place), spec.top_k)
    for source, (rows, extra) in enumerate(zip(sent_back, extras)):
        tokens = (plan.place[:, source] >= 0).nonzero().flatten()
        at = rank * spec.capacity + plan.place[tokens, source].long()
        y[tokens] += rows[at].float()
        extra_sum[tokens] += extra[at]
    return y.to(getattr(torch, spec.dtype)), extra_sum


def explain_rows(spec: Spec, got: torch.Tensor, want: torch.Tensor, used: torch.Tensor, receiver: int) -> str | None:
    """None where used rows [M, D] agree bit for bit, else the first that doesn't: where it lies, what it holds."""
    equal = (got.view(torch.uint8) == want.view(torch.uint8)).all(1) | ~used
    if bool(equal.all()):
        return None
    row = int((~equal).nonzero()[0])
    columns = (got[row].view(torch.uint8) != want[row].view(torch.uint8)).nonzero().flatten()
    return (
        f"rank {receiver}: {int((~equal).sum())} rows wrong, the first is {row % spec.capacity} of rank "
        f"{row // spec.capacity}; {len(columns)} bytes from {int(columns[0])} on: begins "
        f"{got[row, :4].float().tolist()}, expected {want[row, :4].float().tolist()} (rank + 1, token % 256, token // "
        "256, round)"
    )
