"""From the placement in force to a better one, for the least weights that have to travel.

A move is a slot whose expert its GPU didn't hold before: its weights come from another GPU. Slots of one GPU may be
exchanged for nothing. Two kinds of candidates, for each layer by itself:

    steps   from the old placement, each time the swap (two moves) or replacement (one) that relieves the fullest GPU
            most for each move; every step's result is a candidate, and so is the old placement itself
    fresh   a plan made without regard to the old one, its GPUs (nodes first, then GPUs inside each) renamed so that
            most experts stay where they are

Of those, the *frontier* are the ones that no other beats in both moves and balance. Each GPU keeps an expert that stays
in the slot that it had. *Exact* as a frontier of these candidates; the true one is as hard as packing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.runtime import eplb, eplb_search
from dscompile.runtime.eplb import PlacementError


@dataclass(frozen=True)
class Option:
    """One placement of one layer: ``phy2log`` [P], the ``moves`` to it, and the ``balance`` (mean over maximum)."""

    phy2log: Tensor
    moves: int
    balance: float


def moved(old: Tensor, new: Tensor, num_gpus: int) -> Tensor:
    """Which slots of ``new`` [..,P] hold an expert that their GPU doesn't hold in ``old``: bool."""
    before, after = (t.unflatten(-1, (num_gpus, -1)) for t in (old, new))
    return (after.unsqueeze(-1) != before.unsqueeze(-2)).all(-1).flatten(-2)


def align(old: Tensor, new: Tensor, num_gpus: int, num_nodes: int = 1) -> Tensor:
    """``new`` [N,P] with nodes, and GPUs inside a node, renamed and slots ordered so that most of ``old`` stays.

    Renaming is greedy, the pair with the most experts in common first.
    """
    N, P = new.shape
    E = int(max(old.max(), new.max())) + 1
    in_node = num_gpus // num_nodes
    if num_nodes > 1:
        target = _pairs(_common(old, new, num_nodes, E))
        new = _renamed(new, target, num_nodes)
    old_, new_ = (t.reshape(N * num_nodes, P // num_nodes) for t in (old, new))
    new_ = _renamed(new_, _pairs(_common(old_, new_, in_node, E)), in_node)
    return _in_place(old.view(N * num_gpus, -1), new_.reshape(N * num_gpus, -1), E).view(N, P)


def _common(old: Tensor, new: Tensor, parts: int, E: int) -> Tensor:
    """[N,parts,parts]: how many experts part j of ``new`` has in common with part i of ``old``."""
    held = []
    for placement in (old, new):
        one = torch.zeros(old.shape[0], parts, E)
        held.append(one.scatter_(2, placement.view(old.shape[0], parts, -1), 1.0))
    return held[0] @ held[1].transpose(1, 2)


def _pairs(common: Tensor) -> Tensor:
    """For each part of the old placement the part of the new one that takes its name, [N,A]."""
    N, A, _ = common.shape
    common, rows = common.clone(), torch.arange(N)
    target = torch.empty(N, A, dtype=torch.int64)
    for _ in range(A):
        best = common.flatten(1).argmax(1)
        i, j = best // A, best % A
        target[rows, i] = j
        common[rows, i], common[rows, :, j] = -1.0, -1.0
    return target


def _renamed(placement: Tensor, target: Tensor, parts: int) -> Tensor:
    N = placement.shape[0]
    held = placement.view(N, parts, -1)
    return held.gather(1, target.unsqueeze(2).expand_as(held)).view(N, -1)


def _in_place(old: Tensor, new: Tensor, E: int) -> Tensor:
    """Slots of each GPU [M,n]: what stays in its old slot, the others in the slots that become free, in their order."""
    M, n = old.shape
    slot_of = torch.full((M, E), n).scatter_(1, old, torch.arange(n).expand(M, n))
    wanted = slot_of.gather(1, new)  # n: comes from elsewhere
    again = (new.unsqueeze(2) == new.unsqueeze(1)).tril(-1).any(2)  # a second replica, which EPLB's plans may have
    stays = (wanted < n) & ~again
    taken = torch.zeros(M, n + 1, dtype=torch.bool).scatter_(1, wanted, True)[:, :n]
    free = taken.to(torch.uint8).argsort(dim=1, stable=True)  # the free slots first
    coming = (~stays).cumsum(1) - 1
    slot = torch.where(stays, wanted, free.gather(1, coming.clamp(min=0)))
    return torch.empty_like(new).scatter_(1, slot, new)


# ------------------------------------------------------------------ the frontier and a choice on it


def frontier(
    weight: Tensor,
    old: Tensor,
    num_gpus: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    *,
    locality: str = "strict",
    starts: int | None = None,
) -> list[list[Option]]:
    """Placements of each layer that nothing beats in both moves and balance, the fewest moves first.

    Args:
        weight: [L,E], loads.
        old: [L,P], the experts in the slots now.
        others: as ``eplb_search.place_experts``.

    Raises:
        PlacementError: as there, or ``old`` doesn't hold every expert.
    """
    weight = eplb.checked_loads(weight)
    L, E = weight.shape
    old = _checked_placement(old, L, E)
    P = old.shape[1]
    fresh = eplb_search.place_experts(weight, P, num_gpus, num_groups, num_nodes, locality=locality, starts=starts)
    fresh = align(old, fresh, num_gpus, num_nodes if locality != "none" else 1)
    candidates: list[list[Tensor]] = [[old[layer], fresh[layer]] for layer in range(L)]
    for rows, placements in _steps(weight, old, num_gpus, num_groups, num_nodes, locality):
        for layer, placement in zip(rows.tolist(), placements):
            candidates[layer].append(placement)
    return [_pareto(weight[layer], old[layer], torch.stack(c), num_gpus) for layer, c in enumerate(candidates)]


def _steps(weight: Tensor, old: Tensor, G: int, groups: int, nodes: int, locality: str) -> list[tuple[Tensor, Tensor]]:
    E, P = weight.shape[1], old.shape[1]
    shape = eplb_search.shape_of(E, P, G, groups, nodes, locality)
    home = eplb_search.home_of(weight, shape)
    if shape.nodes > 1:  # groups live where most of their experts are now
        home = _present_home(old, E, shape.groups, shape.nodes)
    goal = eplb.lower_bound(weight, P, G) * 1.0001
    return eplb_search.improve(weight.double(), old, home, shape, goal, per_move=True)[1]


def _present_home(old: Tensor, E: int, groups: int, nodes: int) -> Tensor:
    """The node [L,E] in which a group has most of its replicas."""
    L, P = old.shape
    group = old // (E // groups)
    node = (torch.arange(P) // (P // nodes)).expand(L, P)
    count = torch.zeros(L, groups * nodes).scatter_add_(1, group * nodes + node, torch.ones(L, P))
    return count.view(L, groups, nodes).argmax(2).repeat_interleave(E // groups, 1)


def _pareto(weight: Tensor, old: Tensor, candidates: Tensor, G: int) -> list[Option]:
    moves = moved(old.expand_as(candidates), candidates, G).sum(1).tolist()
    balance = eplb.balancedness(eplb.gpu_loads(weight.expand(len(candidates), -1), candidates, G)).tolist()
    kept: list[Option] = []
    for i in sorted(range(len(candidates)), key=lambda i: (moves[i], -balance[i])):
        if not kept or balance[i] > kept[-1].balance:
            kept.append(Option(candidates[i], moves[i], balance[i]))
    held = old.view(G, -1)
    return [Option(_in_place(held, o.phy2log.view(G, -1), weight.shape[0]).flatten(), o.moves, o.balance) for o in kept]


def choose(options: list[Option], *, least: float = 0.99, most_moves: int | None = None) -> Option:
    """The option with the fewest moves that reaches ``least`` times the best balance there is.

    Args:
        options: one layer's frontier.
        most_moves: a budget; of what it allows, the best balanced where ``least`` isn't reached.
    """
    within = [o for o in options if most_moves is None or o.moves <= most_moves]
    wanted = least * options[-1].balance
    return next((o for o in within if o.balance >= wanted), within[-1])


def _checked_placement(old: Tensor, L: int, E: int) -> Tensor:
    old = old.detach().to("cpu", torch.int64)
    if old.dim() != 2 or old.shape[0] != L or (old < 0).any() or (old >= E).any():
        raise PlacementError(
            f"the old placement is {list(old.shape)} with experts {old.min().item()} to {old.max().item()}",
            f"It names one of {E} experts for each slot of {L} layers",
            "Give the phy2log of the plan in force",
        )
    eplb.maps_of(old, E)
    return old
