"""`dsinfra::expert_load`, `place` and `place_counted`: count what the router chose, and name a replica for each choice.

    expert_load     counter[e] += number of entries of topk_idx that are e        (in place, int64, sentinels left out)
    place           out[t,k] = log2phy[e, r]        e = topk_idx[t,k],            0 <= r < logcnt[e]
    place_counted   both, which a kernel does in one launch

Physical ids number the slots of all ranks, slot p being on rank p // (slots of a rank). Which replica serves a token:

    round_robin   r = t mod logcnt[e]: no state, even over the rows of a batch
    water_filling loads of ranks are levelled within the batch: each expert's rows, in the order of tokens, go to its
                  replicas in parts found on the device by moving load from fuller to emptier ranks, several times over

Both are exact in integers, so that kernel and reference agree to the bit on any device. The maps are device tensors
and arguments of the graph: a new plan is copied into them, which neither recompiles nor recaptures anything. An id
that is no expert stays what it is if it is negative, and becomes the first id behind the slots if it is E or more, so
that `experts` leaves its row out as before.

Refused: maps of other shapes or dtypes. Ids have no gradient, and the weights of the choices don't pass here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dscompile.lowering.errors import OperatorError, ShapeMismatch
from dscompile.lowering.grouped import concrete, on_cuda
from dscompile.lowering.ops.library import define
from dscompile.lowering.ops.row_checks import IDS, check_devices, check_dtype, check_rank, check_shape
from dscompile.lowering.select import YES, Decision, no, size, table
from dscompile.runtime import whole_weights  # noqa: F401  (registers `gather_experts`, by which slots are read)

POLICIES = ("round_robin", "water_filling")
ROUNDS = 8  # of water filling, in the kernels too
_UNIT = 16  # parts of a row in which water is filled


class PolicyError(OperatorError):
    """A replica was asked for by a rule that isn't defined, or slots that ranks can't share evenly."""


# ------------------------------------------------------------------ checks and shape functions


def check_load(topk_idx: Tensor, counter: Tensor) -> None:
    """Raise what is wrong with the arguments of `expert_load`, if anything is."""
    op = "expert_load"
    check_rank(op, "topk_idx", topk_idx, "TK")
    check_dtype(op, "topk_idx", topk_idx, IDS)
    check_rank(op, "counter", counter, "E")
    check_dtype(op, "counter", counter, (torch.int64,))
    check_devices(op, topk_idx, counter=counter)


def check_place(topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int, policy: str) -> None:
    """Raise what is wrong with the arguments of `place`, if anything is."""
    op = "place"
    check_rank(op, "topk_idx", topk_idx, "TK")
    check_dtype(op, "topk_idx", topk_idx, IDS)
    check_rank(op, "log2phy", log2phy, "EX")
    check_dtype(op, "log2phy", log2phy, (torch.int64,))
    check_shape(op, "logcnt", logcnt, (log2phy.shape[0],), "It counts each expert's replicas", log2phy=log2phy)
    check_dtype(op, "logcnt", logcnt, (torch.int64,))
    check_devices(op, topk_idx, log2phy=log2phy, logcnt=logcnt)
    if policy not in POLICIES:
        raise PolicyError(f"{op}: policy is {policy!r}", "No such rule is defined", f"Use one of {POLICIES}")
    if ranks < 1 or slots % ranks:
        raise PolicyError(f"{op}: {slots} slots on {ranks} ranks", "Ranks have equally many slots", "Use a multiple")
    if isinstance(log2phy.shape[0], int) and slots < log2phy.shape[0]:
        raise ShapeMismatch(
            f"{op}: {slots} slots for log2phy {list(log2phy.shape)}",
            "Every expert needs a slot",
            "Give the number of slots of all ranks together",
        )


def check_place_counted(topk_idx: Tensor, counter: Tensor, log2phy: Tensor, *args: Any) -> None:
    """Raise what is wrong with the arguments of `place_counted`, if anything is."""
    check_load(topk_idx, counter)
    check_place(topk_idx, log2phy, *args)
    check_shape("place_counted", "counter", counter, (log2phy.shape[0],), "It counts each expert", log2phy=log2phy)


def _fake_load(topk_idx: Tensor, counter: Tensor) -> None:
    check_load(topk_idx, counter)


def _fake_place(topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int, policy: str) -> Tensor:
    check_place(topk_idx, log2phy, logcnt, slots, ranks, policy)
    return topk_idx.new_empty(topk_idx.shape)


def _fake_place_counted(
    topk_idx: Tensor, counter: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int, policy: str
) -> Tensor:
    check_place_counted(topk_idx, counter, log2phy, logcnt, slots, ranks, policy)
    return topk_idx.new_empty(topk_idx.shape)


# ------------------------------------------------------------------ references


def load_reference(topk_idx: Tensor, counter: Tensor) -> None:
    """On any device; integer additions, so that their order doesn't matter."""
    E = counter.shape[0]
    ids = topk_idx.flatten().long()
    valid = (ids >= 0) & (ids < E)
    counter.scatter_add_(0, ids.clamp(0, E - 1), valid.to(torch.int64))


def place_reference(topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int, policy: str) -> Tensor:
    """On any device, in integers; nothing is read on the host."""
    E = log2phy.shape[0]
    ids = topk_idx.long()
    valid = (ids >= 0) & (ids < E)
    expert = ids.clamp(0, E - 1)
    if policy == "water_filling":
        replica = _water_filled(expert, valid, log2phy, logcnt, slots, ranks)
    else:
        token = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        replica = token % logcnt[expert]
    placed = log2phy[expert, replica]
    return torch.where(valid, placed, torch.where(ids < 0, ids, slots)).to(topk_idx.dtype)


def place_counted_reference(topk_idx: Tensor, counter: Tensor, *args: Any) -> Tensor:
    """The two above."""
    load_reference(topk_idx, counter)
    return place_reference(topk_idx, *args)


def _water_filled(expert: Tensor, valid: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int) -> Tensor:
    """Replica of each choice [T,K], so that ranks have about equally many rows.

    An expert's rows start in even parts; in each round all experts move their parts halfway to the level at which their
    ranks, without them, would be filled evenly: halfway, since the others move at the same time.
    """
    (E, X), device = log2phy.shape, expert.device
    has = torch.arange(X, device=device) < logcnt.unsqueeze(1)  # [E,X]
    rank = log2phy.clamp(min=0) // (slots // ranks)
    units = torch.zeros(E, dtype=torch.int64, device=device)
    units = units.scatter_add_(0, expert.flatten(), valid.flatten().long() * _UNIT).unsqueeze(1)
    shared = logcnt.clamp(min=1).unsqueeze(1)
    part = units // shared + (torch.arange(X, device=device) < units % shared)
    part = part.masked_fill(~has, 0)
    for _ in range(ROUNDS):
        load = torch.zeros(ranks, dtype=torch.int64, device=device).scatter_add_(0, rank.flatten(), part.flatten())
        part = (part + _poured(load[rank] - part, has, units)) // 2
    ends = (part.cumsum(1) + _UNIT // 2) // _UNIT
    return _ordinal(expert, valid, E).unsqueeze(-1).ge(ends[expert]).sum(-1).minimum(logcnt[expert] - 1)


def _poured(others: Tensor, has: Tensor, units: Tensor) -> Tensor:
    """What each place gets [E,X] when `units` [E,1] are poured on the levels `others` [E,X], rounded down.

    The surface is the least mean of the units and the j lowest levels, for any j.
    """
    most = torch.iinfo(torch.int64).max
    low = others.masked_fill(~has, most).sort(dim=1).values
    number = torch.arange(1, low.shape[1] + 1, device=low.device)
    counted = low < most
    means = (units + low.masked_fill(~counted, 0).cumsum(1)) // number
    surface = means.masked_fill(~counted, most).amin(1, keepdim=True)
    return (surface - others).clamp(min=0).masked_fill(~has, 0)


def _ordinal(expert: Tensor, valid: Tensor, E: int) -> Tensor:
    """Which of its expert's rows each choice is [T,K], in the order of tokens."""
    flat = torch.where(valid, expert, E).flatten()
    order = flat.sort(stable=True).indices
    count = torch.zeros(E + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    first = count.cumsum(0) - count
    place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.shape[0], device=flat.device))
    return (place - first[flat]).view_as(expert)


# ------------------------------------------------------------------ registration


def _load_kernel(topk_idx: Tensor, counter: Tensor) -> None:
    check_load(topk_idx, counter)
    table("expert_load").run(topk_idx, counter)


def _place_kernel(topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int, policy: str) -> Tensor:
    check_place(topk_idx, log2phy, logcnt, slots, ranks, policy)
    return table("place").run(topk_idx, log2phy, logcnt, slots, ranks, policy)


def _place_counted_kernel(topk_idx: Tensor, counter: Tensor, *args: Any) -> Tensor:
    check_place_counted(topk_idx, counter, *args)
    return table("place_counted").run(topk_idx, counter, *args)


def _supports_everything(*_: Any) -> Decision:
    return YES


def _supports_load(topk_idx: Tensor, counter: Tensor) -> Decision:
    if not counter.is_contiguous():
        return no("the counter isn't contiguous, and is written in place")
    return _asked(topk_idx, size(counter.shape[0]))


def _supports_place(topk_idx: Tensor, log2phy: Tensor, logcnt: Tensor, slots: int, ranks: int, policy: str) -> Decision:
    return _asked(topk_idx, size(log2phy.shape[0]), size(log2phy.shape[1]), slots, ranks, policy)


def _supports_place_counted(topk_idx: Tensor, counter: Tensor, *args: Any) -> Decision:
    if not counter.is_contiguous():
        return no("the counter isn't contiguous, and is written in place")
    return _supports_place(topk_idx, *args)


def _asked(topk_idx: Tensor, *args: Any) -> Decision:
    present = on_cuda(topk_idx)
    if not present:
        return present
    from dscompile.kernels import place

    refusal = place.refusal(concrete(topk_idx), *args)
    return no(refusal) if refusal else YES


def _load(topk_idx: Tensor, counter: Tensor) -> None:
    from dscompile.kernels import place

    place.load(topk_idx, counter)


def _place(topk_idx: Tensor, *args: Any) -> Tensor:
    from dscompile.kernels import place

    return place.place(topk_idx, *args)


def _place_counted(topk_idx: Tensor, counter: Tensor, log2phy: Tensor, logcnt: Tensor, *rule: Any) -> Tensor:
    from dscompile.kernels import place

    slots, ranks, policy = rule
    return place.place(topk_idx, log2phy, logcnt, slots, ranks, policy, counter)


_MAPS = "Tensor log2phy, Tensor logcnt, int slots, int ranks, str policy"
define(
    "expert_load", "(Tensor topk_idx, Tensor(a!) counter) -> ()", kernel=_load_kernel, fake=_fake_load, autocast=False
)
define("place", f"(Tensor topk_idx, {_MAPS}) -> Tensor", kernel=_place_kernel, fake=_fake_place, autocast=False)
define(
    "place_counted",
    f"(Tensor topk_idx, Tensor(a!) counter, {_MAPS}) -> Tensor",
    kernel=_place_counted_kernel,
    fake=_fake_place_counted,
    autocast=False,
)
table("expert_load").register("kernel", _supports_load, _load)
table("expert_load").register("reference", _supports_everything, load_reference)
table("place").register("kernel", _supports_place, _place)
table("place").register("reference", _supports_everything, place_reference)
table("place_counted").register("kernel", _supports_place_counted, _place_counted)
table("place_counted").register("reference", _supports_everything, place_counted_reference)


@register_flop_formula([torch.ops.dsinfra.expert_load, torch.ops.dsinfra.place, torch.ops.dsinfra.place_counted])
def placement_flops(*_: Any, **__: Any) -> int:
    """Integers aren't counted."""
    return 0
