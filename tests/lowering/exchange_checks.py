"""What the ranks of `test_exchange_ranks.py` run: dispatch and combine against the whole batch on one rank."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering.errors import NotDifferentiable
from dscompile.runtime import groups, whole_weights  # noqa: F401  (registers gather_experts)

OPS = torch.ops.dsinfra
D, F, K, E = 16, 8, 3, 8


@functools.cache
def group_of(size: int) -> groups.Group | None:
    """The group of the first `size` ranks; None in the others."""
    made = dist.new_group(list(range(size)))
    return groups.join(made) if dist.get_rank() < size else None


def tokens(rank: int, count: int, skew: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights of one rank. With `skew`, every id is one of the two experts from `skew` on."""
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, D, generator=g)
    idx = torch.rand(count, E, generator=g).topk(K).indices
    if skew is not None:
        idx = torch.stack([torch.arange(skew, skew + 2).repeat(count // 2 + 1)[:count]] * K, 1)
    else:
        idx = torch.where(torch.rand(count, K, generator=g) < 0.1, -1, idx)  # sentinels
    return x, idx, torch.rand(count, K, generator=g)


def weights() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(E, 2 * F, D, generator=g), torch.randn(E, D, F, generator=g)


def layer(x: Tensor, idx: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return OPS.experts.default(x, idx, weight, gate_up, down, None, None, "silu", False, 1.0, 0.0)


def spread(group: groups.Group, capacity: int, x: Tensor, idx: Tensor, weight: Tensor, *whole: Tensor) -> Tensor:
    """The layer over a group: `whole` are the weights of all experts, of which each rank reads its own."""
    where = group.name, E, capacity, 0
    own = slice(group.rank * E // group.size, (group.rank + 1) * E // group.size)
    plan, inbox = OPS.dispatch_start.default(x, idx, weight, None, *where)
    rows, ids, row_weights, arrived, _ = OPS.dispatch_wait.default(plan, inbox, x, idx, weight, None, *where)
    # Unused rows may hold anything: nothing that is read may depend on them.
    rows = torch.where((ids >= 0).any(1, keepdim=True), rows, float("nan"))
    y = layer(rows, ids, row_weights, *(w[own] for w in whole))
    y = torch.where((ids >= 0).any(1, keepdim=True), y, float("nan"))
    inbox = OPS.combine_start.default(y, None, plan, arrived, *where)
    return OPS.combine_wait.default(inbox, y, None, plan, arrived, *where)[0]


def check_layer(rank: int, size: int, counts: list[int], skew: int | None = None) -> None:
    """Output and gradients of the layer over `size` ranks, with `counts[r]` tokens on rank r, are those on one."""
    group = group_of(size)
    if group is None:
        return
    capacity = max(*counts, 1)
    mine = [t.requires_grad_(t.is_floating_point()) for t in tokens(rank, counts[rank], skew)]
    whole = [w.requires_grad_() for w in weights()]
    y = spread(group, capacity, *mine, *whole)
    grad_y = torch.sin(y.detach() * 100)
    y.backward(grad_y)
    again = spread(group, capacity, *mine, *whole)
    assert torch.equal(y, again), "not repeatable"

    each = [tokens(r, counts[r], skew) for r in range(size)]
    alone = [torch.cat(parts).requires_grad_(parts[0].is_floating_point()) for parts in zip(*each)]
    alone_whole = [w.requires_grad_() for w in weights()]
    expected = layer(*alone, *alone_whole)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    torch.testing.assert_close(y, expected[own], rtol=1e-5, atol=1e-5)
    expected.backward(torch.sin(_everybody(group, y.detach(), counts) * 100))
    for one, other in ((mine[0], alone[0]), (mine[2], alone[2])):
        torch.testing.assert_close(one.grad, other.grad[own], rtol=1e-4, atol=1e-5)
    # A rank's gradient of all weights holds its own experts', of everybody's tokens; the rest is zero.
    first, last = group.rank * E // size, (group.rank + 1) * E // size
    for one, other in zip(whole, alone_whole):
        torch.testing.assert_close(one.grad[first:last], other.grad[first:last], rtol=1e-4, atol=1e-4)
        assert not one.grad[:first].any() and not one.grad[last:].any()


def _everybody(group: groups.Group, y: Tensor, counts: list[int]) -> Tensor:
    """The results of all ranks, in their order."""
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, y, group=group.process_group)
    assert [len(part) for part in found] == counts
    return torch.cat(found)


def check_rows(rank: int, size: int) -> None:
    """Where each row comes from: values are the origin's rank and place, so that a misplaced row shows."""
    group = group_of(size)
    if group is None:
        return
    capacity, T = 6, 5 - rank
    x = (rank * 100 + torch.arange(T).float()).unsqueeze(1).repeat(1, D)
    _, idx, weight = tokens(rank, T)
    where = group.name, E, capacity, 0
    plan, inbox = OPS.dispatch_start.default(x, idx, weight, None, *where)
    rows, ids, row_weights, arrived, _ = OPS.dispatch_wait.default(plan, inbox, x, idx, weight, None, *where)
    L = E // size
    for source, (block, block_ids, block_weights) in enumerate(
        zip(rows.split(capacity), ids.split(capacity), row_weights.split(capacity))
    ):
        _, sent, sent_weight = tokens(source, 5 - source)
        here = [t for t in range(5 - source) if ((sent[t] >= rank * L) & (sent[t] < (rank + 1) * L)).any()]
        assert block[: len(here), 0].tolist() == [source * 100 + t for t in here]  # once each, in their order
        assert (block_ids[len(here) :] == -1).all()
        named = arrived[source * capacity : (source + 1) * capacity].tolist()
        assert named == here + [-1] * (capacity - len(here)) and arrived[size * capacity + source] == len(here)
        for place, t in enumerate(here):
            own = (sent[t] - rank * L).tolist()
            assert block_ids[place].tolist() == [e if 0 <= e < L else -1 for e in own]
            kept = block_ids[place] >= 0
            assert torch.equal(block_weights[place][kept], sent_weight[t][kept])


def check_quantised(rank: int, size: int) -> None:
    """Rows that were quantised travel bit for bit, scales included, in half the bytes; gradients are refused."""
    group = group_of(size)
    if group is None:
        return
    width, T, where = 200, (5, 0, 3, 2)[rank], (group.name, E, 7, 0)
    _, idx, weight = tokens(rank, T)
    x = torch.randn(T, width, generator=torch.Generator().manual_seed(rank)).bfloat16()
    q, scale = OPS.quantize_1x128.default(x)
    found = []
    for sent, beside in ((x, None), (q, scale)):
        plan, inbox = OPS.dispatch_start.default(sent, idx, weight, beside, *where)
        arrived = OPS.dispatch_wait.default(plan, inbox, sent, idx, weight, beside, *where)
        found.append((plan, *arrived, inbox.shape[1]))
    (plan, rows, ids, weights, arrived, none, wide), (again, q_rows, *same, row_scale, narrow) = found
    for one, other in zip((plan, ids, weights, arrived), (again, *same)):
        assert torch.equal(one, other)
    here = (ids >= 0).any(1)
    expected, scales = OPS.quantize_1x128.default(rows)
    assert torch.equal(q_rows.view(torch.uint8)[here], expected.view(torch.uint8)[here])
    assert row_scale.shape == scales.shape and none.numel() == 0
    assert torch.equal(row_scale[:, : len(here)][:, here], scales[:, : len(here)][:, here])
    assert wide - narrow == 2 * width - (width + 2 * 4)
    plan, inbox = OPS.dispatch_start.default(q, idx, weight, scale, *where)
    try:
        OPS.dispatch_wait.default(plan, inbox, q, idx, weight.requires_grad_(), scale, *where)
    except NotDifferentiable as error:
        assert "dispatch_wait: a gradient through rows" in str(error)
    else:
        raise AssertionError("a gradient through rows in FP8 was not refused")


def check_halves(rank: int, dtype: torch.dtype) -> None:
    """Two exchanges that are begun before either is waited for, in 16 bits; sums are rounded once."""
    group = group_of(2)
    if group is None:
        return
    where = group.name, E, 4
    mine = [tokens(rank + 10 * i, 4) for i in range(2)]
    args = [(x.to(dtype), idx, weight) for x, idx, weight in mine]
    begun = [OPS.dispatch_start.default(*a, None, *where, slot) for slot, a in enumerate(args)]
    for slot, a in reversed(list(enumerate(args))):
        plan, _ = begun[slot]
        rows, _, _, arrived, _ = OPS.dispatch_wait.default(*begun[slot], *a, None, *where, slot)
        inbox = OPS.combine_start.default(rows, None, plan, arrived, *where, slot)
        y, _ = OPS.combine_wait.default(inbox, rows, None, plan, arrived, *where, slot)
        reached = (plan[:-1] >= 0).sum(1, keepdim=True)
        assert y.dtype is dtype and torch.equal(y, (a[0].float() * reached).to(dtype))


def check_whole_weights(rank: int) -> None:
    """`gather_experts` gives all ranks' weights; its gradient is the sum of everybody's for the own part."""
    group = group_of(4)
    assert group is not None
    local = weights()[0][rank * 2 : rank * 2 + 2].clone().requires_grad_()
    whole = OPS.gather_experts.default(local, group.name, E)
    assert torch.equal(whole, weights()[0])
    (whole * (rank + 1)).sum().backward()
    assert torch.equal(local.grad, torch.full_like(local, 1 + 2 + 3 + 4))


def check_everybody(rank: int) -> None:
    """What ranks say about a topic: the same list everywhere, asked for once."""
    group = group_of(4)
    assert group is not None
    expected = [{"rank": r, "says": ["a", None]} for r in range(4)]
    for _ in range(2):
        assert group.everybody("topic", {"rank": rank, "says": ["a", None]}) == expected
    assert group.everybody("another", rank) == [0, 1, 2, 3]


def check_disagreement(rank: int, field: str) -> str:
    """The error of every rank where one gives another value."""
    group = groups.join(dist.new_group([0, 1, 2, 3]), timeout=20)
    x, idx, weight = tokens(rank, 2)
    experts, capacity = E, 4
    if rank == 2:
        if field == "capacity":
            capacity = 5
        elif field == "experts":
            experts = 2 * E
        elif field == "dtype":
            x = x.double()
        elif field == "width":
            x = x[:, :8]
    try:
        OPS.dispatch_start.default(x, idx, weight, None, group.name, experts, capacity, 0)
    except groups.RanksDisagree as error:
        return str(error)
    finally:
        group.close()
    return ""


def check_lost(rank: int, what: str) -> tuple[str, float]:
    """Rank 1 fails in its third round: -> the error of each other rank, and how long it waited for it."""
    group = groups.join("world", timeout=3)
    x, idx, weight = tokens(rank, 4)
    start = time.monotonic()
    try:
        for turn in range(4):
            if rank == 1 and turn == 2:
                if what == "dies":
                    os._exit(1)
                time.sleep(10)
                return "", 0.0
            start = time.monotonic()
            spread(group, 4, x, idx, weight, *weights())
    except groups.RankLost as error:
        waited = time.monotonic() - start
        assert error.rank == 1 and error.operator in str(error), (error.rank, error.operator)
        again = ""
        if what == "stalls":
            time.sleep(2 * groups.BEAT)
            try:
                spread(group, 4, x, idx, weight, *weights())
            except groups.RankLost as second:
                again = str(second)
            assert again == str(error), "not the same error at the next call"
        else:
            time.sleep(12 * groups.BEAT)  # alive until the others have found out, too
        return str(error), waited
    return "", 0.0
