"""Choices, maps and policies for the kernels of placed experts, which must give the references' bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.kernels import place
from dscompile.lowering.ops import placement as reference


@dataclass(frozen=True)
class Case:
    """A deployment: `spare` slots go to the first experts in turn, `width` is the room for replicas in log2phy."""

    experts: int
    ranks: int
    spare: int
    width: int
    top_k: int

    def __str__(self) -> str:
        return f"E{self.experts}-EP{self.ranks}-spare{self.spare}-X{self.width}-K{self.top_k}"

    @property
    def slots(self) -> int:
        return self.experts + self.spare

    def maps(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """log2phy [E,X], whose padding is -1, and logcnt [E]; slots are dealt to experts at random."""
        slots = torch.randperm(self.slots, generator=torch.Generator().manual_seed(7)).tolist()
        held: list[list[int]] = [[] for _ in range(self.experts)]
        for i, slot in enumerate(slots):
            expert = i if i < self.experts else (i - self.experts) // (self.width - 1)
            held[expert].append(slot)
        log2phy = torch.tensor([one + [-1] * (self.width - len(one)) for one in held])
        return log2phy.to(device), torch.tensor([len(one) for one in held]).to(device)

    def ids(self, tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
        """[T,K] of a skewed load, with some ids below 0 and some of E and more."""
        g = torch.Generator().manual_seed(seed)
        popular = torch.arange(1, self.experts + 1, dtype=torch.float64) ** -0.7
        ids = torch.multinomial(popular, max(tokens, 1) * self.top_k, replacement=True, generator=g)[
            : tokens * self.top_k
        ]
        lost = torch.rand(ids.shape, generator=g)
        ids = torch.where(lost < 0.03, -1 - ids, torch.where(lost > 0.97, self.experts + ids, ids))
        return ids.view(tokens, self.top_k).to(device, dtype)


CASES = [
    Case(256, 4, 0, 1, 8),
    Case(256, 8, 16, 4, 8),
    Case(256, 144, 32, 3, 8),
    Case(40, 5, 25, 6, 3),
    Case(7, 1, 14, 3, 2),
    Case(160, 8, 240, 8, 6),
]


def problems(case: Case, policy: str, ids: Tensor) -> list[str]:
    """What is wrong with the kernels on `ids`, in words: all three ways to call them, against the references."""
    log2phy, logcnt = case.maps(str(ids.device))
    rule = log2phy, logcnt, case.slots, case.ranks, policy
    want = reference.place_reference(ids, *rule)
    start = torch.arange(case.experts, device=ids.device) << 40  # sums beyond 32 bits
    counted = start.clone()
    reference.load_reference(ids, counted)
    alone, fused = start.clone(), start.clone()
    place.load(ids, alone)
    results = {"place": place.place(ids, *rule), "place with a counter": place.place(ids, *rule, counter=fused)}
    found = []
    for name, got in results.items():
        if got.dtype != want.dtype or not torch.equal(got, want):
            wrong = (got != want).nonzero()
            found.append(f"{name}: {len(wrong)} of {want.numel()} differ, first at {wrong[:1].tolist()}")
    for name, got in (("load", alone), ("counter of place", fused)):
        if not torch.equal(got, counted):
            found.append(f"{name}: {(got - counted).nonzero().flatten()[:4].tolist()} differ")
    return found
