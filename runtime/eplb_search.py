"""Placements that balance better than the greedy ones of ``eplb.py``: search by swaps and by giving slots to others.

From each of a few starting placements the fullest GPU is relieved, one step at a time, by the better of

    swap      slots i (on the fullest GPU a) and j (on b) exchange experts:  d = s_i - s_j > 0
              a: load - d                  b: load + d
    replace   slot j, on b, of expert y that has others, becomes a further replica of expert x, which a holds
              x: w / (c + 1) on each of its GPUs, b too       y: w / (c - 1) on each of its other GPUs

as long as every GPU that a step touches stays below what a had: loads in descending order fall, so it ends.
Two replicas of one expert are never on one GPU, where the second would cost memory and balance nothing. All layers and
starts are rows of one tensor; the placement with the lowest peak is kept, and EPLB's own is among the starts wherever
it has no such pair. With two slots a GPU, packing longest first is the optimal pairing of given replicas (the fullest
with the emptiest), so there the search chooses which experts are replicated.

Nodes: ``strict`` keeps an expert's replicas in the node of its group, as EPLB's hierarchical policy does; ``primary``
keeps at least one there and lets spare replicas relieve other nodes; ``none`` knows no nodes.

Shape suffixes as in ``eplb.py``, N rows (a layer and a start), n slots of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.runtime import eplb
from dscompile.runtime.eplb import PlacementError

LOCALITY = ("strict", "primary", "none")
_ELEMENTS = 1 << 20  # of the two largest tensors of a step: how many starts are worth their time
_FEWEST, _STARTS = 4, 512
_ROUNDS, _DISTURBANCES = 3, 4  # where there are more starts than the fewest: search again around the best
_SPREAD = 3.0  # of the logarithm of loads in the last start: next to random


@dataclass(frozen=True)
class Shape:
    """What all layers share: ``gpus`` G, ``nodes``, ``groups``, and how much of the nodes is respected."""

    gpus: int
    nodes: int = 1
    groups: int = 1
    locality: str = "none"


def place_experts(
    weight: Tensor,
    num_replicas: int,
    num_gpus: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    *,
    locality: str = "strict",
    tolerance: float = 1e-4,
    starts: int | None = None,
) -> Tensor:
    """-> phy2log [L,P] int64 on the CPU: better balanced than EPLB's, with no expert twice on a GPU.

    Args:
        weight, num_replicas, num_gpus, num_groups, num_nodes: as ``eplb.rebalance_experts``.
        locality: "strict", "primary" or "none"; without effect where nodes don't divide the groups.
        tolerance: stop a layer this far, relatively, above the bound that no placement can be below.
        starts: placements that the search begins from; None: by the size, 4 to 512.

    Raises:
        PlacementError: as there; or more replicas than experts x GPUs, which must put one twice on a GPU.
    """
    weight = eplb.checked_loads(weight)
    L, E = weight.shape
    eplb.check_sizes(E, num_replicas, num_groups, num_nodes, num_gpus)
    shape = shape_of(E, num_replicas, num_gpus, num_groups, num_nodes, locality)
    if starts is None:
        a_step = L * (num_replicas * (num_replicas // num_gpus) + num_gpus * E)
        starts = max(_FEWEST, min(_STARTS, _ELEMENTS // a_step))
    first = _starts(weight, num_replicas, shape, starts)
    w = weight.double().repeat(starts, 1)
    home = home_of(weight, shape).repeat(starts, 1)
    goal = (eplb.lower_bound(weight, num_replicas, num_gpus) * (1 + tolerance)).repeat(starts)
    found, _ = improve(w, first, home, shape, goal)
    best = _best(w, found, num_gpus, starts)
    if starts > _FEWEST and shape.nodes == 1:
        generator = torch.Generator().manual_seed(1)
        for _ in range(_ROUNDS):
            found, _ = improve(w, _disturbed(best.repeat(starts, 1), w, num_gpus, generator), home, shape, goal)
            found[:L] = best
            best = _best(w, found, num_gpus, starts)
    return best


def _best(weight: Tensor, found: Tensor, gpus: int, starts: int) -> Tensor:
    """Of each layer [L,P] the placement with the lowest peak."""
    peak = eplb.gpu_loads(weight, found, gpus).amax(1).view(starts, -1)
    return found.view(starts, peak.shape[1], -1)[peak.argmin(0), torch.arange(peak.shape[1])]


def _disturbed(found: Tensor, weight: Tensor, gpus: int, generator: torch.Generator) -> Tensor:
    """Placements [N,P] after a few swaps and replacements at random, where they leave a placement."""
    N, P = found.shape
    for _ in range(_DISTURBANCES):
        i, j = torch.randint(P, (2, N, 1), generator=generator)
        x, y = found.gather(1, i), found.gather(1, j)
        swap = torch.randint(2, (N, 1), generator=generator).bool()
        new = found.scatter(1, j, x)
        new.scatter_(1, i, torch.where(swap, y, x))
        count = torch.zeros_like(weight, dtype=torch.int64).scatter_add_(1, new, torch.ones_like(new))
        fine = (count > 0).all(1) & ~has_pair(new, gpus)
        found = torch.where(fine.unsqueeze(1), new, found)
    return found


def shape_of(E: int, P: int, G: int, groups: int, nodes: int, locality: str) -> Shape:
    """Checks what `place_experts` was given; raises PlacementError."""
    if locality not in LOCALITY:
        raise PlacementError(f"locality is {locality!r}", "No such rule is defined", f"Use one of {LOCALITY}")
    if groups % nodes or nodes == 1:
        groups, nodes, locality = 1, 1, "none"
    most = E * (G // nodes if locality == "strict" else G)
    if most < P:
        raise PlacementError(
            f"{P} replicas of {E} experts on {G} GPUs of {nodes} nodes",
            "Some GPU would hold an expert twice, which balances nothing",
            f"Use {most} replicas or fewer",
        )
    return Shape(G, 1, 1, locality) if locality == "none" else Shape(G, nodes, groups, locality)


def home_of(weight: Tensor, shape: Shape) -> Tensor:
    """Node of each expert's group [L,E]."""
    if shape.nodes == 1:
        return torch.zeros(weight.shape, dtype=torch.int64)
    return eplb.seats(weight, shape.groups, shape.nodes) // (weight.shape[1] // shape.nodes)


# ------------------------------------------------------------------ starts


def _starts(weight: Tensor, P: int, shape: Shape, starts: int) -> Tensor:
    """[starts * L, P]: greedy for the loads, EPLB's own, then greedy for loads with more and more noise."""
    L = weight.shape[0]
    noise = torch.randn(2, starts, *weight.shape, generator=torch.Generator().manual_seed(0))
    noise *= torch.linspace(0.0, _SPREAD, starts).view(-1, 1, 1)
    noise[:, :2] = 0.0
    to_replicate, to_pack = (weight * noise.exp()).view(2, starts * L, -1).double()
    home = home_of(weight, shape).repeat(starts, 1)
    found = _packed(to_pack, _counts(to_replicate, P, shape, home), home, shape)
    theirs = eplb.rebalance_experts(weight, P, shape.groups, shape.nodes, shape.gpus)[0]
    if starts > 1:
        fine = ~has_pair(theirs, shape.gpus)
        found[L : 2 * L][fine] = theirs[fine]
    return found


def _counts(loads: Tensor, P: int, shape: Shape, home: Tensor) -> Tensor:
    """Replicas of each expert [N,E]: within each node where it is strict, over all GPUs otherwise."""
    if shape.locality != "strict":
        return eplb.replicate(loads, P, shape.gpus)[2]
    N, E = loads.shape
    order = home.argsort(dim=1, stable=True)
    inside = loads.gather(1, order).view(N * shape.nodes, E // shape.nodes)
    count = eplb.replicate(inside, P // shape.nodes, shape.gpus // shape.nodes)[2]
    return torch.empty_like(home).scatter_(1, order, count.view(N, E))


def _packed(weight: Tensor, count: Tensor, home: Tensor, shape: Shape) -> Tensor:
    """Replicas onto GPUs, longest first; an expert's first replica in its home node, the others where they may.

    Args:
        weight: [N,E] float64. count: [N,E], P in each row. home: [N,E].
    """
    N, E = weight.shape
    P = int(count[0].sum())
    G, size = shape.gpus, P // shape.gpus
    expert = torch.repeat_interleave(torch.arange(E).repeat(N), count.flatten()).view(N, P)
    rank = torch.arange(P) - (count.cumsum(1) - count).gather(1, expert)
    share = (weight / count).gather(1, expert)
    bound_ = rank == 0 if shape.locality == "primary" else torch.full_like(rank, shape.locality == "strict", dtype=bool)
    order = share.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~bound_).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))  # bound ones first
    expert, share, bound_ = (t.gather(1, order) for t in (expert, share, bound_))
    node_of_gpu = torch.arange(G) // (G // shape.nodes)
    load, room = weight.new_zeros(N, G), torch.full((N, G), size)
    # A node's bound replicas fit in it: they are at most its slots, since P >= E.
    holds, rows = torch.zeros(N, G, E, dtype=torch.bool), torch.arange(N)
    found = torch.empty(N, G, size, dtype=torch.int64)
    for i in range(P):
        e = expert[:, i]
        away = bound_[:, i : i + 1] & (home[rows, e].unsqueeze(1) != node_of_gpu)
        key = load.masked_fill(holds[rows, :, e], torch.finfo(load.dtype).max)  # a last resort, repaired below
        g = key.masked_fill(away | (room == 0), torch.inf).argmin(1)
        found[rows, g, size - room[rows, g]] = e
        load[rows, g] += share[:, i]
        room[rows, g] -= 1
        holds[rows, g, e] = True
    found = found.view(N, P)
    for row in has_pair(found, G).nonzero().flatten().tolist():
        found[row] = _separated(found[row].view(G, size), weight[row], home[row], shape)
    return found


def has_pair(phy2log: Tensor, gpus: int) -> Tensor:
    """[N] bool: some GPU holds an expert twice."""
    held = phy2log.view(phy2log.shape[0], gpus, -1).sort(dim=2).values
    return (held[..., 1:] == held[..., :-1]).flatten(1).any(1)


def _separated(held: Tensor, weight: Tensor, home: Tensor, shape: Shape) -> Tensor:
    """A placement [P] of one layer with no expert twice on a GPU: the slot of a second replica goes to another expert.

    That is the one of the largest share among those that this GPU lacks, where nodes are strict of its node's; there is
    one, since a GPU has no more slots than there are such experts.
    """
    held = held.clone()
    count = torch.bincount(held.flatten(), minlength=weight.shape[0])
    node_of_gpu = torch.arange(shape.gpus) // (shape.gpus // shape.nodes)
    for g in has_pair(held, 1).nonzero().flatten().tolist():
        for place in range(held.shape[1]):
            e = held[g, place]
            if (held[g, :place] == e).any():
                share = (weight / count).index_fill(0, held[g], -1.0)
                if shape.locality == "strict":
                    share[home != node_of_gpu[g]] = -1.0
                held[g, place] = x = share.argmax()
                count[e] -= 1
                count[x] += 1
    return held.flatten()


# ------------------------------------------------------------------ steps


def improve(
    weight: Tensor,
    phy2log: Tensor,
    home: Tensor,
    shape: Shape,
    goal: Tensor,
    *,
    limit: int = 400,
    per_move: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Steps from given placements until the fullest GPU is at ``goal``, or no step helps.

    Args:
        weight: [N,E] float64. phy2log: [N,P]. home: [N,E], the node of each expert's group. goal: [N].
        limit: the most steps.
        per_move: take the step that relieves the fullest GPU most for each expert that is moved, and keep a record.

    Returns:
        (placements [N,P], record): after each step the rows that changed and what they are, where ``per_move`` is set.
    """
    found, active, record = phy2log.clone(), torch.arange(phy2log.shape[0]), []
    for _ in range(limit):
        step = Step(weight[active], found[active], home[active], shape)
        far = step.peak > goal[active]
        if not far.all():
            active = active[far]
            if not active.numel():
                break
            step = Step(weight[active], found[active], home[active], shape)
        helped = step.take(per_move)
        active = active[helped]
        if not active.numel():
            break
        found[active] = step.expert[helped]
        if per_move:
            record.append((active, found[active]))
    return found, record


class Step:
    """One step for each row; everything about the placement in front of it."""

    def __init__(self, weight: Tensor, expert: Tensor, home: Tensor, shape: Shape):
        self.weight, self.expert, self.home, self.shape = weight, expert, home, shape
        N, P = expert.shape
        self.G, self.n = shape.gpus, P // shape.gpus
        self.rows = torch.arange(N)
        self.count = torch.zeros_like(weight).scatter_add_(1, expert, torch.ones_like(expert, dtype=weight.dtype))
        self.share = (weight / self.count).gather(1, expert)  # [N,P]
        self.load = self.share.view(N, self.G, self.n).sum(2)
        self.peak, self.fullest = self.load.max(1)

    def take(self, per_move: bool) -> Tensor:
        """Changes ``expert``; -> which rows [N] bool found a step."""
        N, P = self.expert.shape
        self.node = torch.arange(P) // (P // self.shape.nodes)
        self.load_P = self.load.repeat_interleave(self.n, 1)
        self.slot_i = self.fullest.unsqueeze(1) * self.n + torch.arange(self.n)  # [N,n]
        self.held = torch.zeros(N, self.G, self.weight.shape[1], dtype=torch.bool)
        gpu = (torch.arange(P) // self.n).expand(N, P)
        self.held[self.rows.unsqueeze(1), gpu, self.expert] = True
        e_i = self.expert.gather(1, self.slot_i)
        there = self.held.gather(2, e_i.unsqueeze(1).expand(-1, self.G, -1))  # [N,G,n]: x is on that GPU
        there = there.transpose(1, 2).repeat_interleave(self.n, 2)  # [N,n,P]
        swaps, replaces = self._swaps(e_i, there), self._replaces(e_i, there)
        swap, at = swaps.flatten(1).min(1)
        replace, where = replaces.flatten(1).min(1) if replaces is not None else (torch.full_like(swap, torch.inf), at)
        small = self.peak * 1e-9
        helped = torch.minimum(swap, replace) < self.peak - small
        cost = 2.0 if per_move else 1.0
        swapped = (self.peak - swap) / cost >= self.peak - replace
        index = torch.where(swapped, at, where)
        i, j = self.slot_i.gather(1, (index // P).unsqueeze(1)), (index % P).unsqueeze(1)
        x, y = self.expert.gather(1, i), self.expert.gather(1, j)
        self.expert = self.expert.clone().scatter_(1, j, x)
        self.expert.scatter_(1, i, torch.where(swapped.unsqueeze(1), y, x))
        return helped

    def _swaps(self, e_i: Tensor, there: Tensor) -> Tensor:
        """[N,n,P]: the larger load of the two GPUs behind each swap, infinite where it isn't allowed."""
        d = self.share.gather(1, self.slot_i).unsqueeze(2) - self.share.unsqueeze(1)
        after = torch.maximum(self.peak.view(-1, 1, 1) - d, self.load_P.unsqueeze(1) + d)
        here = self.held[self.rows, self.fullest].gather(1, self.expert)  # y is on the fullest, itself included
        wrong = there | here.unsqueeze(1) | (d <= 0)
        if self.shape.nodes > 1:
            wrong |= self._across() & ~self._may_leave(e_i)
        return after.masked_fill_(wrong, torch.inf)

    def _replaces(self, e_i: Tensor, there: Tensor) -> Tensor | None:
        """As ``_swaps`` for replacing, with loads of y's other GPUs as if x fell on none of them."""
        count_P = self.count.gather(1, self.expert)
        if bool((count_P < 2).all()):
            return None
        w_i, c_i = self.weight.gather(1, e_i), self.count.gather(1, e_i)
        less = (w_i / c_i - w_i / (c_i + 1)).unsqueeze(2)
        more = self.weight.gather(1, self.expert) / (count_P - 1).clamp(min=1)
        others = self._fullest_other() + (more - self.share)
        new_b = (self.load_P - self.share).unsqueeze(1) + (w_i / (c_i + 1)).unsqueeze(2)
        after = torch.maximum(self.peak.view(-1, 1, 1) - less, new_b)
        after = torch.maximum(after, others.unsqueeze(1))
        wrong = there | (count_P < 2).unsqueeze(1) | (less <= 0)
        if self.shape.locality == "strict":
            wrong |= self._across()
        elif self.shape.nodes > 1:
            wrong |= ~self._spare().unsqueeze(1)
        return after.masked_fill_(wrong, torch.inf)

    def _fullest_other(self) -> Tensor:
        """[N,P]: the largest load among the GPUs that hold a slot's expert, its own GPU left out; -inf if none does."""
        none = torch.full_like(self.weight, -torch.inf)
        top = none.scatter_reduce(1, self.expert, self.load_P, "amax").gather(1, self.expert)
        is_top = self.load_P == top
        below = self.load_P.masked_fill(is_top, -torch.inf)
        second = none.scatter_reduce(1, self.expert, below, "amax").gather(1, self.expert)
        tops = torch.zeros_like(self.weight).scatter_add_(1, self.expert, is_top.to(self.weight.dtype))
        return torch.where(is_top & (tops.gather(1, self.expert) < 2), second, top)

    # -------------------------------------------------------------- nodes

    def _across(self) -> Tensor:
        """[N,1,P]: slot j is in another node than the fullest GPU."""
        return (self.node != (self.fullest // (self.G // self.shape.nodes)).unsqueeze(1)).unsqueeze(1)

    def _spare(self) -> Tensor:
        """[N,P]: a slot whose expert doesn't need it, to be in the node of its group."""
        if self.shape.locality == "strict":
            return torch.zeros_like(self.expert, dtype=torch.bool)
        at_home = self.home.gather(1, self.expert) == self.node
        count = torch.zeros_like(self.home).scatter_add_(1, self.expert, at_home.long())
        return ~at_home | (count.gather(1, self.expert) > 1)

    def _may_leave(self, e_i: Tensor) -> Tensor:
        """[N,n,P]: the experts of both slots may go to another node."""
        spare = self._spare()
        return spare.gather(1, self.slot_i).unsqueeze(2) & spare.unsqueeze(1)
