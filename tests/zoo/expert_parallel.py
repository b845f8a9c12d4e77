"""An expert layer with shared experts behind the routed ones, alone, in a row and side by side."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.experts import Layer, ToyExperts


class SharedToy(ToyExperts):
    """`forward(x_BSD) -> y_BSD`: eight routed experts and one that sees every token, added to the tokens."""

    E = 8

    def __init__(self, layer: Layer | None = None):
        super().__init__(layer)
        self.up, self.down = nn.Linear(self.D, 10, bias=False), nn.Linear(10, self.D, bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        routed = super().forward(x_BSD)
        return x_BSD + (routed + self.down(self.up(x_BSD).relu()))


class WideToy(SharedToy):
    """Of a width whose rows in 16 bits are aligned, as grouped products on a GPU need them."""

    D, F = 256, 128


class Stack(nn.Module):
    """Layers one after the other, or side by side (which ranks could exchange in different orders)."""

    def __init__(self, layers: int, beside: bool = False, kind: type[SharedToy] = SharedToy):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.beside = beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.beside:
            return sum(layer(x) for layer in self.layers)
        for layer in self.layers:
            x = layer(x)
        return x


def build(
    layers: int = 1, beside: bool = False, dtype: torch.dtype = torch.float64, kind: type[SharedToy] = SharedToy
) -> Stack:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack(layers, beside, kind).to(dtype)


def rows(
    seed: int, batch: int, length: int, dtype: torch.dtype = torch.float64, kind: type[SharedToy] = SharedToy
) -> torch.Tensor:
    """x [B, S, D]."""
    return torch.randn(batch, length, kind.D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
