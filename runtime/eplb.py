"""Which GPU holds which expert, from the experts' loads: EPLB's published policies, vectorised over layers.

A layer has E logical experts and P physical slots, P / G of them on each of G GPUs; an expert that is chosen often gets
several slots (replicas), between which its tokens are divided evenly. Two steps, both greedy:

    replicate   each spare slot goes to the expert whose share, load / replicas, is largest    (exact for that maximum)
    pack        items in descending order of load, each to the lightest GPU that has room       (longest first)

*Global* packs all replicas at once. *Hierarchical*, where nodes divide the expert groups evenly, first packs groups to
nodes and then does both steps inside each node, so that tokens limited to a few groups reach few nodes. Results are
equal to EPLB's bit for bit, ties and float32 sums included; ``eplb_search.py`` has a policy that balances better.

Refused, each with what to change: loads that are NaN, infinite or negative; sizes that don't divide. Shape suffixes: L
layers, E experts, P slots, G GPUs, X most replicas of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PlacementError(ValueError):
    """Loads or sizes that no placement fits: what was found, why it can't be done, what to change."""

    def __init__(self, found: str, why: str, change: str):
        super().__init__(f"{found}. {why}. {change}.")


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """EPLB's placement for measured loads.

    Args:
        weight: [L,E], load of each expert in any real or integer dtype on any device; counted in float32.
        num_replicas: P, slots of all GPUs together, a multiple of ``num_gpus``.
        num_groups: groups of experts in the router; where ``num_nodes`` doesn't divide it, the policy is global.
        num_nodes: servers, among which links are slower than inside; divides ``num_gpus``.
        num_gpus: G.

    Returns:
        On the CPU, int64: phy2log [L,P], the expert in each slot, GPU after GPU; log2phy [L,E,X], the slots of each
        expert in the order in which replicas were made, -1 behind them, X = P - E + 1; logcnt [L,E], its replicas.

    Raises:
        PlacementError: see above.
    """
    weight = checked_loads(weight)
    check_sizes(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    phy2log, rank, logcnt = _hierarchical(weight, num_replicas, num_groups, num_nodes, num_gpus)
    L, E = weight.shape
    width = num_replicas - E + 1
    log2phy = torch.full((L, E * width), -1, dtype=torch.int64)
    log2phy.scatter_(1, phy2log * width + rank, torch.arange(num_replicas).expand(L, -1))
    return phy2log, log2phy.view(L, E, width), logcnt


# ------------------------------------------------------------------ checks


def checked_loads(weight: Tensor) -> Tensor:
    """The loads as float32 [L,E] on the CPU; raises PlacementError for what is no load."""
    if weight.dim() != 2 or 0 in weight.shape or weight.is_complex():
        raise PlacementError(
            f"loads are {list(weight.shape)} of {weight.dtype}",
            "A plan is made from one number for each layer and expert",
            "Give a tensor [layers, experts] of counts",
        )
    loads = weight.detach().to("cpu", torch.float32)
    for name, wrong in (("NaN", loads.isnan()), ("infinite", loads.isinf()), ("negative", loads < 0)):
        if wrong.any():
            layer, expert = wrong.nonzero()[0].tolist()
            raise PlacementError(
                f"the load of expert {expert} in layer {layer} is {weight[layer, expert].item()}, and "
                f"{int(wrong.sum())} of {loads.numel()} are {name}",
                "Loads are counts of tokens",
                "Look at what fills the counters; a window that is still empty holds zeros",
            )
    if not loads.sum(1).isfinite().all():
        raise PlacementError(
            f"loads up to {loads.max().item():.3g} have an infinite sum",
            "They are added up in float32",
            "Scale them down",
        )
    return loads


def check_sizes(experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    """Raise PlacementError for sizes that don't fit each other."""
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise PlacementError(f"{name} is {size!r}", "It counts things that exist", "Give an int of 1 or more")
    if num_replicas < experts:
        raise PlacementError(
            f"{num_replicas} replicas for {experts} experts",
            "Every expert needs a slot",
            f"Give num_replicas of {experts} or more, or loads of the experts that there are",
        )
    if num_gpus > num_replicas:
        raise PlacementError(
            f"{num_gpus} GPUs for {num_replicas} replicas",
            "A GPU without a slot would do nothing",
            f"Use {num_replicas} GPUs at most, or num_replicas of {num_gpus} or more",
        )
    for (whole, total), (part, divisor), why in (
        (("num_replicas", num_replicas), ("num_gpus", num_gpus), "GPUs have equally many slots"),
        (("num_gpus", num_gpus), ("num_nodes", num_nodes), "Nodes have equally many GPUs"),
        (("experts", experts), ("num_groups", num_groups), "Groups have equally many experts"),
    ):
        if total % divisor:
            lower, upper = total // divisor * divisor, -(-total // divisor) * divisor
            near = f"{whole} of {lower} or {upper}" if lower else f"{whole} of {upper}"
            raise PlacementError(
                f"{whole} {total} isn't divisible by {part} {divisor}", why, f"Use {near}, or another {part}"
            )


# ------------------------------------------------------------------ the two greedy steps


def pack(weight: Tensor, packs: int) -> tuple[Tensor, Tensor]:
    """Items into packs of equally many, longest first.

    Args:
        weight: [N,X] loads of X items, N problems at once; float32 sums as EPLB's, float64 ones where it is float64.

    Returns:
        (pack, place in its pack) of each item, [N,X] int64. One item a pack: item i goes to pack i.
    """
    N, X = weight.shape
    size = X // packs
    if size == 1:
        return torch.arange(X).repeat(N, 1), torch.zeros(N, X, dtype=torch.int64)
    sorted_, order = weight.sort(dim=1, descending=True, stable=True)
    steps = sorted_.t().contiguous().unsqueeze(2)  # [X,N,1]
    load, room = weight.new_zeros(N, packs), torch.full((N, packs), size - 1)
    chosen, places = torch.empty(X, N, 1, dtype=torch.int64), torch.empty(X, N, 1, dtype=torch.int64)
    minus_one, full = torch.full((N, 1), -1), weight.new_full((), float("inf"))
    for i in range(X):
        lightest = torch.argmin(load, dim=1, keepdim=True, out=chosen[i])  # the first of equals
        left = torch.gather(room, 1, lightest, out=places[i])
        load.scatter_add_(1, lightest, torch.where(left == 0, full, steps[i]))
        room.scatter_add_(1, lightest, minus_one)
    back = order.argsort(dim=1)
    return chosen[..., 0].t().gather(1, back), (size - 1 - places[..., 0].t()).gather(1, back)


def replicate(weight: Tensor, slots: int, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Spare slots to the experts of the largest shares.

    Args:
        weight: [N,E] loads.
        slots: of one problem; the first E hold each expert once.
        most: replicas that an expert may have at most.

    Returns:
        (expert of each slot [N,slots], which of its replicas it is [N,slots], replicas of each expert [N,E]), int64.
    """
    N, E = weight.shape
    expert = torch.arange(slots).repeat(N, 1)
    rank, count = torch.zeros(N, slots, dtype=torch.int64), torch.ones(N, E, dtype=torch.int64)
    share, one = weight.clone(), torch.ones(N, 1, dtype=torch.int64)
    for slot in range(E, slots):
        largest = share.argmax(dim=1, keepdim=True)
        had = count.gather(1, largest)
        expert[:, slot : slot + 1], rank[:, slot : slot + 1] = largest, had
        count.scatter_add_(1, largest, one)
        new = weight.gather(1, largest) / (had + 1)
        share.scatter_(1, largest, new if most is None else new.masked_fill(had + 1 >= most, -1.0))
    return expert, rank, count


def _hierarchical(weight: Tensor, P: int, groups: int, nodes: int, gpus: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> (expert [L,P] and replica [L,P] of each slot, replicas of each expert [L,E])."""
    L, E = weight.shape
    seat = seats(weight, groups, nodes)  # [L,E]: node after node
    expert_of_seat = seat.argsort(dim=1)
    in_node = weight.gather(1, expert_of_seat).view(L * nodes, E // nodes)
    local, rank, count = replicate(in_node, P // nodes)
    gpu, place = pack((in_node / count).gather(1, local), gpus // nodes)
    item = (gpu * (P // gpus) + place).argsort(dim=1)  # of each slot of the node
    first_seat = torch.arange(0, E, E // nodes).view(1, nodes, 1)
    seat_of_slot = (local.gather(1, item).view(L, nodes, -1) + first_seat).flatten(1)
    phy2log = expert_of_seat.gather(1, seat_of_slot)
    return phy2log, rank.gather(1, item).view(L, P), count.view(L, E).gather(1, seat)


def seats(weight: Tensor, groups: int, nodes: int) -> Tensor:
    """Seat of each expert [L,E] when groups are packed to nodes: node * E / nodes + place in the node."""
    L, E = weight.shape
    size = E // groups
    node, place = pack(weight.view(L, groups, size).sum(2), nodes)
    return (((node * (groups // nodes) + place) * size).unsqueeze(2) + torch.arange(size)).flatten(1)


# ------------------------------------------------------------------ what a placement is worth


def maps_of(phy2log: Tensor, experts: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """(log2phy [L,E,X], logcnt [L,E]) of slots' experts [L,P], replicas in the order of their slots.

    ``width``: X, for maps that keep their shape from plan to plan; by default the most replicas that there can be.

    Raises:
        PlacementError: an expert has no slot, or more than ``width``.
    """
    L, P = phy2log.shape
    width = P - experts + 1 if width is None else width
    count = torch.zeros(L, experts, dtype=torch.int64).scatter_add_(1, phy2log, torch.ones_like(phy2log))
    for wrong, what, change in (
        (count == 0, "no slot", "Plan with the right number of experts"),
        (count > width, f"more slots than {width}", "Make maps of a larger width, or plan with fewer replicas"),
    ):
        if wrong.any():
            layer, expert = wrong.nonzero()[0].tolist()
            raise PlacementError(
                f"expert {expert} of layer {layer} has {what} of {P}", "Tokens find an expert by its slots", change
            )
    slots = phy2log.argsort(dim=1, stable=True)  # expert after expert
    first = count.cumsum(1) - count
    expert = phy2log.gather(1, slots)
    rank = torch.arange(P) - first.gather(1, expert)
    log2phy = torch.full((L, experts * width), -1, dtype=torch.int64).scatter_(1, expert * width + rank, slots)
    return log2phy.view(L, experts, width), count


def gpu_loads(weight: Tensor, phy2log: Tensor, num_gpus: int) -> Tensor:
    """Load of each GPU [L,G] in float64, an expert's tokens divided evenly among its replicas."""
    count = torch.zeros_like(weight, dtype=torch.float64)
    count.scatter_add_(1, phy2log, torch.ones_like(phy2log, dtype=torch.float64))
    share = (weight.double() / count).gather(1, phy2log)
    return share.view(weight.shape[0], num_gpus, -1).sum(2)


def balancedness(loads: Tensor) -> Tensor:
    """Mean over maximum of the last dimension, in 0 to 1; 1 where nothing is loaded."""
    most = loads.amax(-1)
    return torch.where(most > 0, loads.mean(-1) / most, 1.0)


def lower_bound(weight: Tensor, num_replicas: int, num_gpus: int) -> Tensor:
    """A load [L] that the fullest GPU can't be below in any placement without two replicas of an expert on one GPU.

    The larger of the mean and the largest share when replicas only serve to lower that (`replicate` is exact for it).
    Without spare slots a GPU is full, too: the expert of the largest load stands beside the smallest of others.
    """
    weight = weight.double()
    E, size = weight.shape[1], num_replicas // num_gpus
    count = replicate(weight, num_replicas, num_gpus)[2]
    bound = torch.maximum(weight.sum(1) / num_gpus, (weight / count).amax(1))
    if num_replicas == E:
        ascending = weight.sort(dim=1).values
        bound = torch.maximum(bound, ascending[:, -1] + ascending[:, : size - 1].sum(1))
    return bound
