"""Modules that look like a mixture of experts and are not: each breaks one premise and must be left as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.experts import Layer, ToyExperts


class Descending(ToyExperts):
    """Rows lie in descending order of their experts, the groups in ascending order."""

    def sorted(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, perm = torch.sort(ids, descending=True)
        return perm, ids


class OtherIds(ToyExperts):
    """Rows are sorted by other ids than those that are counted."""

    def sorted(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().sorted((ids + 1) % self.E)

    def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
        return F.one_hot(idx_TK, self.E).sum((0, 1)).cumsum(0, dtype=torch.int32)


class Starts(ToyExperts):
    """Groups end where they should start: every expert gets the rows of the one before."""

    def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
        ends = super().ends(idx_TK, ids_M)
        return torch.cat([ends.new_zeros(1), ends[:-1]])


class Capacity(ToyExperts):
    """An expert computes two rows at most: rows move up to the wrong expert, the last get none."""

    def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
        counts = torch.histc(ids_M.float(), bins=self.E, min=0, max=self.E - 1)
        return counts.clamp(max=2).cumsum(0, dtype=torch.int32)


class WideBins(ToyExperts):
    """Bins wider than one id: experts share a count."""

    def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
        counts = torch.histc(ids_M.float(), bins=self.E, min=0, max=2 * self.E)
        return counts.cumsum(0, dtype=torch.int32)


class Dropped(ToyExperts):
    """Rows behind a place are dropped: their results are zeroed by a mask that is not that of an id."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        return super().combine(z.masked_fill((perm >= 6).unsqueeze(-1), 0.0), weight_TK, perm, x)


class MaskedExperts(ToyExperts):
    """Rows of two real experts are masked as if they were rows of none."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        return super().combine(z.masked_fill((self.ids >= 3).unsqueeze(-1), 0.0), weight_TK, perm, x)

    def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
        self.ids = ids
        return super().mlp(rows, product, ids)


class MaskedByOthers(ToyExperts):
    """Rows are masked by the ids of another routing."""

    def __init__(self) -> None:
        super().__init__(Layer(products="batched"))

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        others = torch.arange(z.shape[0]) % 7
        return super().combine(z.masked_fill((others >= self.E).unsqueeze(-1), 0.0), weight_TK, perm, x)


class Rolled(ToyExperts):
    """Tokens are gathered one place off."""

    def gathered(self, x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
        return x[(perm // self.layer.top_k).roll(1)]


class ScaledRows(ToyExperts):
    """Routing weights multiply the rows before the experts: another function, the activation is not linear."""

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.scale = weight
        return super().experts(x, idx, torch.ones_like(weight))

    def gathered(self, x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
        return super().gathered(x, perm) * self.scale.reshape(-1)[perm].unsqueeze(-1)


class ScaledHidden(ToyExperts):
    """Each expert's hidden columns have a scale of their own, as a static quantisation would."""

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return super().activate(gate, up) * torch.linspace(0.5, 1.5, gate.shape[-1], dtype=gate.dtype)


class Swapped(ToyExperts):
    """The activation is applied to the second half."""

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return super().activate(up, gate)


class Ungated(ToyExperts):
    """Both halves pass the activation."""

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * F.silu(up)


class Relu(ToyExperts):
    """An activation that the operator does not know."""

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.relu(gate) * up


class UnevenClamp(ToyExperts):
    """The clamped activation with a lower bound of another size than its upper one."""

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=0.7), up.clamp(min=-0.3, max=0.7)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


class Mean(ToyExperts):
    """The mean over the choices."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        z = z * weight_TK.reshape(-1)[perm].unsqueeze(-1)
        return self.unsorted(z, perm).view(x.shape[0], self.layer.top_k, -1).mean(1)


class WrongAxis(ToyExperts):
    """Rows are read as [K, T] and summed over the first dimension: results of different tokens are mixed."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        z = z * weight_TK.reshape(-1)[perm].unsqueeze(-1)
        return self.unsorted(z, perm).view(self.layer.top_k, x.shape[0], -1).sum(0)


class NotUnsorted(ToyExperts):
    """Results are permuted by the sort instead of its inverse."""

    def unsorted(self, z: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
        return z[perm]


class StaysSorted(ToyExperts):
    """Results are summed in the order of the experts."""

    def unsorted(self, z: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
        return z


class UnsortedWeights(ToyExperts):
    """Sorted results are weighed by weights that are not sorted."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        z = z * weight_TK.reshape(-1).unsqueeze(-1)
        return self.unsorted(z, perm).view(x.shape[0], self.layer.top_k, -1).sum(1)


class Unweighted(ToyExperts):
    """The plain sum of the chosen experts."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        return self.unsorted(z, perm).view(x.shape[0], self.layer.top_k, -1).sum(1)


class WeighedTwice(ToyExperts):
    """Weights multiply sorted and unsorted results."""

    def unsorted(self, z: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
        return super().unsorted(z, perm) * self.kept.reshape(-1, 1)

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.kept = weight
        return super().experts(x, idx, weight)


class OntoResidual(ToyExperts):
    """Results are added in place to a tensor that holds the tokens."""

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        z = z * weight_TK.reshape(-1)[perm].unsqueeze(-1)
        return x.clone().index_add_(0, perm // self.layer.top_k, z)


class BiasOfOthers(ToyExperts):
    """Sorted rows get the bias of the expert of the unsorted row at their place."""

    def __init__(self) -> None:
        super().__init__(Layer(bias=True))

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.flat = idx.reshape(-1)
        return super().experts(x, idx, weight)

    def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
        return super().mlp(rows, product, self.flat)


class SharedBias(ToyExperts):
    """One bias for all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(self.D))

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        return super().combine(z + self.b, weight_TK, perm, x)


class TwoRoutings(ToyExperts):
    """The second product's experts are chosen by other ids than the first's."""

    def __init__(self) -> None:
        super().__init__(Layer(products="batched"))

    def by_row(self, ids: torch.Tensor):  # type: ignore[no-untyped-def]
        def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            chosen = ids if weight is self.w_gate_up else (ids + 1) % self.E
            return torch.bmm(weight[chosen], rows.unsqueeze(-1)).squeeze(-1)

        return product


class Returned(ToyExperts):
    """The experts' results leave the layer one by one."""

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = super().forward(x_BSD)
        return y, self.z

    def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
        self.z = z
        return super().combine(z, weight_TK, perm, x)


class Dropout(ToyExperts):
    """Dropout on the experts' hidden rows, active in training."""

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().activate(gate, up), 0.5, self.training)


class IdsChanged(ToyExperts):
    """The ids are overwritten behind the sort."""

    def gathered(self, x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
        self.chosen.add_(1)
        return super().gathered(x, perm)

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.chosen = idx + 0
        return super().experts(x, self.chosen, weight)


class TokensChanged(ToyExperts):
    """The tokens are overwritten behind their gather."""

    def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
        self.x.mul_(2)
        return super().mlp(rows, product, ids)

    def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.x = x.clone()
        return super().experts(self.x, idx, weight)


# Class -> the refusals that may be reported for it.
NEAR_MISSES: dict[type[ToyExperts], str] = {
    Descending: "RowsNotTokens|GroupEnds",
    OtherIds: "GroupEnds",
    Starts: "GroupEnds",
    Capacity: "GroupEnds",
    WideBins: "GroupEnds",
    Dropped: "CombineForm",
    MaskedExperts: "CombineForm",
    MaskedByOthers: "CombineForm",
    Rolled: "RowsNotTokens",
    ScaledRows: "RoutingWeights",
    ScaledHidden: "ExpertActivation",
    Swapped: "ExpertActivation",
    Ungated: "ExpertActivation",
    Relu: "ExpertActivation",
    UnevenClamp: "ExpertActivation",
    Mean: "CombineForm",
    WrongAxis: "CombineForm|Unsupported",
    NotUnsorted: "CombineForm",
    StaysSorted: "CombineForm",
    UnsortedWeights: "RoutingWeights",
    Unweighted: "RoutingWeights",
    WeighedTwice: "RoutingWeights",
    OntoResidual: "CombineForm",
    BiasOfOthers: "ExpertWeights",
    SharedBias: "ExpertWeights",
    TwoRoutings: "GroupEnds",
    Returned: "IntermediateUsed",
    IdsChanged: "MutatedOperand",
    TokensChanged: "MutatedOperand",
}
