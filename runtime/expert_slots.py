"""From experts that are spread over a group to slots that can be placed: what `options={"placement": Book}` needs.

:class:`PlacedExperts` takes over an ``ExpertStore``: each layer's rows of this rank [L,..] become slots [n,..], n = L +
spare, whose maps, counters and weights the compiled graph reads and a ``Rebalancer`` writes. The own experts fill the
first slots, and the spare ones begin as replicas of the next rank's. The rows' memory is given back. The model's own
code still reads whole weights [E,..], gathered from the slots by the maps in force: it is right, and slow, at every
moment, and so is the store's ``state_dict``.

Refused: layers whose experts aren't two weights [E,2F,D] and [E,D,F] (biases, gate and up apart, transposed ones), more
spare slots than the next rank has experts, and weights on the meta device: load them first. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dscompile.runtime.expert_store import ExpertStore, ExpertStoreError, expert_weights
from dscompile.runtime.movement import ExpertSlots, Move
from dscompile.runtime.whole_weights import gather_experts


class PlacedExperts:
    """The slots of every expert layer of a store; made by all ranks alike.

    Args:
        store: of a model whose weights are loaded.
        spare: slots of this rank, and of each other, beyond its own experts.
        replicas: the most replicas of an expert that maps have room for, which a plan must not exceed; None: one on
            every rank. Water filling by the kernel takes at most 8.

    Attributes:
        layers: module path -> its slots; phy2log: [layers, P], what is where now, for ``Rebalancer``.
        ranks, group: number and name of the group's ranks, for ``Book``.

    Raises:
        ExpertStoreError: see above; nothing was changed then.
        MovementFailed: replicas could not be sent.
    """

    def __init__(self, store: ExpertStore, spare: int = 0, replicas: int | None = None):
        group = store.group
        self.ranks, self.group, self.store = group.size, group.name, store
        found = {name: pair for name, module in store.model.named_modules() if (pair := _pair(name, module))}
        experts = {len(one[1]) * group.size for pair in found.values() for one in pair}
        if len(experts) != 1:
            raise ExpertStoreError(
                f"the layers have {sorted(experts)} experts. Slots of all layers are placed by one plan [layers, P]. "
                "Place a model whose layers have equally many."
            )
        (E,) = experts
        L = E // group.size
        if not 0 <= spare <= (L if group.size > 1 else 0):
            raise ExpertStoreError(
                f"{spare} spare slots on each of {group.size} ranks of {L} experts: they begin as replicas of the next "
                f"rank's, and an expert is at most once on a rank. Ask for 0 to {L if group.size > 1 else 0}."
            )
        width = group.size if replicas is None else replicas
        own = torch.arange(E).view(group.size, L)
        new = torch.cat((own, own.roll(-1, 0)[:, :spare]), 1).flatten()
        old = torch.cat((own, own[:, :spare]), 1).flatten()
        self.layers: dict[str, ExpertSlots] = {}
        for name, pair in found.items():
            self.layers[name] = _slots(store.model.get_submodule(name), pair, spare, E, width)
            move = Move(self.layers[name], old, new, group.process_group, group.timeout)
            move.stage()
            move.commit()
        self.phy2log = new.repeat(len(found), 1)


class Placed(nn.Module):
    """The parametrization: this rank's slots [n,..] -> the weights of all experts [E,..], by the maps in force."""

    def __init__(self, group: str, slots: int, log2phy: Tensor):
        super().__init__()
        self.group, self.slots = group, slots
        self.register_buffer("log2phy", log2phy, persistent=False)

    def forward(self, own: Tensor) -> Tensor:
        return gather_experts(own, self.group, self.slots)[self.log2phy[:, 0]]


def _pair(path: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, rows [L,..]) of the two weights of a module that a store has spread; [] of another module."""
    lists = getattr(module, "parametrizations", {})
    if not lists or not expert_weights(_Rows(lists)):
        return []
    held = {name: one.original for name, one in lists.items()}
    pair = sorted(held.items(), key=lambda item: -item[1].shape[1] * (item[1].dim() == 3))
    shapes = [list(one.shape) for _, one in pair]
    if len(pair) != 2 or any(len(s) != 3 for s in shapes) or shapes[0][1:] != [2 * shapes[1][2], shapes[1][1]]:
        raise ExpertStoreError(
            f"{path} holds {', '.join(f'{name} {shape}' for (name, _), shape in zip(pair, shapes))} here. Slots hold "
            "an expert's [2F, D] and [D, F]. Join gate and up, leave biases out, or don't place this model."
        )
    if any(one.is_meta for _, one in pair):
        raise ExpertStoreError(f"{path} is on the meta device: there is nothing to place. Load its weights first.")
    return pair


class _Rows(nn.Module):
    """The rows of parametrizations as parameters of a module, for `expert_weights`."""

    def __init__(self, lists: nn.ModuleDict):
        super().__init__()
        for name, one in lists.items():
            if isinstance(getattr(one, "original", None), nn.Parameter):
                self.register_parameter(name, one.original)


def _slots(module: nn.Module, pair: list[tuple[str, Tensor]], spare: int, E: int, width: int) -> ExpertSlots:
    """Slots in place of a module's rows, the spare ones holding the first of them for now."""
    device = pair[0][1].device
    maps = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((E, width), (E,), (E,))]
    weights = []
    for name, rows in pair:
        own = rows.detach()
        slots = torch.cat((own, own[:spare])) if spare else own
        weights.append(slots)
        held = module.parametrizations[name]  # type: ignore[index, operator]
        ranks = E // len(own)
        held.original = nn.Parameter(slots, requires_grad=False)
        held[0] = Placed(held[0].group, len(slots) * ranks, maps[0])
    return ExpertSlots(weights, maps[0], maps[1], maps[2])
