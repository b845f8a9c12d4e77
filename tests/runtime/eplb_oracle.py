"""What the planner is compared with: EPLB as its README and paper describe it, item by item; and the best placement."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

Lists = list[list[int]]


def packed(weights: Tensor, packs: int) -> list[tuple[int, int]]:
    """Items of one problem into packs of equally many: the heaviest first, each to the lightest pack that has room.

    -> (pack, place in it) of each item. Packs of one item keep the items' order.
    """
    size = len(weights) // packs
    if size == 1:
        return [(i, 0) for i in range(packs)]
    order = sorted(range(len(weights)), key=lambda i: -weights[i].item())  # sorted is stable, as the planner's is
    load = [torch.zeros((), dtype=weights.dtype) for _ in range(packs)]
    inside = [0] * packs
    found = [(-1, -1)] * len(weights)
    for item in order:
        pack = min((p for p in range(packs) if inside[p] < size), key=lambda p: load[p].item())
        found[item] = pack, inside[pack]
        load[pack] = load[pack] + weights[item]
        inside[pack] += 1
    return found


def replicated(weights: Tensor, slots: int) -> tuple[list[int], list[int], list[int]]:
    """-> (expert of each slot, which of its replicas, replicas of each expert): spare slots to the largest share."""
    experts = len(weights)
    expert, rank, count = list(range(experts)), [0] * experts, [1] * experts
    while len(expert) < slots:
        share = [(weights[e] / count[e]).item() for e in range(experts)]
        e = share.index(max(share))
        expert.append(e)
        rank.append(count[e])
        count[e] += 1
    return expert, rank, count


def rebalanced(weight: Tensor, slots: int, groups: int, nodes: int, gpus: int) -> tuple[Lists, list[Lists], Lists]:
    """As `rebalance_experts`, in lists; `weight` [L,E] in float32."""
    if groups % nodes:
        groups = nodes = 1
    layers = [_layer(row, slots, groups, nodes, gpus) for row in weight.float()]
    return tuple(map(list, zip(*layers)))  # type: ignore[return-value]


def _layer(w: Tensor, slots: int, groups: int, nodes: int, gpus: int) -> tuple[list[int], Lists, list[int]]:
    experts, size, per_gpu = len(w), len(w) // groups, slots // gpus
    of_groups = w.view(groups, size).sum(1)
    seats: list[list[list[int]]] = [[[]] * (groups // nodes) for _ in range(nodes)]  # a node's groups, by place
    for group, (node, place) in enumerate(packed(of_groups, nodes)):
        seats[node][place] = list(range(group * size, (group + 1) * size))
    phy2log: list[int] = []
    log2phy = [[-1] * (slots - experts + 1) for _ in range(experts)]
    logcnt = [0] * experts
    for node in range(nodes):
        own = [e for group in seats[node] for e in group]
        local, rank, count = replicated(w[own], slots // nodes)
        share = w[own] / torch.tensor(count)
        held = [-1] * (slots // nodes)
        for item, (gpu, place) in enumerate(packed(share[local], gpus // nodes)):
            held[gpu * per_gpu + place] = own[local[item]]
            log2phy[own[local[item]]][rank[item]] = node * (slots // nodes) + gpu * per_gpu + place
        for i, e in enumerate(own):
            logcnt[e] = count[i]
        phy2log += held
    return phy2log, log2phy, logcnt


def best_peak(weight: list[float], slots: int, gpus: int) -> float:
    """Lowest load of the fullest GPU over all placements with no expert twice on a GPU; for a dozen slots."""
    best = float("inf")
    for count in _counts(len(weight), slots, gpus):
        shares = sorted(((w / c, e) for e, (w, c) in enumerate(zip(weight, count)) for _ in range(c)), reverse=True)
        if shares[0][0] < best:
            best = _best_packing(shares, slots // gpus, [0.0] * gpus, [set() for _ in range(gpus)], 0, best)
    return best


def _counts(experts: int, slots: int, most: int) -> Iterator[list[int]]:
    for extra in itertools.combinations_with_replacement(range(experts), slots - experts):
        count = [1 + extra.count(e) for e in range(experts)]
        if max(count) <= most:
            yield count


def _best_packing(
    shares: list[tuple[float, int]], size: int, load: list[float], held: list[set[int]], at: int, best: float
) -> float:
    """Branch and bound: GPUs that look alike are tried once, and what reaches `best` is cut off."""
    if at == len(shares):
        return max(load)
    share, e = shares[at]
    seen = set()
    for gpu in range(len(load)):
        looks = load[gpu], frozenset(held[gpu])
        if looks in seen or e in held[gpu] or len(held[gpu]) == size or load[gpu] + share >= best:
            continue
        seen.add(looks)
        load[gpu] += share
        held[gpu].add(e)
        best = _best_packing(shares, size, load, held, at + 1, best)
        load[gpu] -= share
        held[gpu].remove(e)
    return best
