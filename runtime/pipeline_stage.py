"""What a pipeline asks of a stage, and the plain way to give it: a module run by autograd.

A stage keeps what its backward needs of each micro-batch in flight, and sums the gradients of its weights itself, apart
from ``.grad``, until the step is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class Stage(Protocol):
    """One stage's computations. x is its input, y its output, both one tensor of a micro-batch.

    Attributes:
        weights: those that are trained, in an order that every copy of the stage shares.
        gradients: of each weight that has one, summed over micro-batches since the last ``clear``.
    """

    weights: list[nn.Parameter]
    gradients: dict[nn.Parameter, Tensor]

    def infer(self, x: Tensor) -> Tensor:
        """y, with nothing kept."""

    def forward(self, micro: int, x: Tensor) -> Tensor:
        """y; keeps what the backward of this micro-batch needs."""

    def backward(self, micro: int, dy: Tensor) -> Tensor | None:
        """dx, None where x isn't differentiable; the weights' gradients too."""

    def backward_input(self, micro: int, dy: Tensor) -> Tensor | None:
        """dx alone, as soon as can be; keeps what ``backward_weight`` needs."""

    def backward_weight(self, micro: int) -> None:
        """The rest of a backward that began as ``backward_input``."""

    def overlapped(
        self, micro: int, x: Tensor, other: Stage, other_micro: int, dy: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(y, dx): this stage's ``forward`` beside ``other``'s ``backward`` of another micro-batch."""

    def clear(self) -> None:
        """Forgets micro-batches and gradients."""


class ModuleStage:
    """A module of one tensor, by autograd. It can't be taken apart: I is the whole backward, W has nothing left to do.

    So results are right under any schedule, and no bubble is filled. ``dscompile.pipeline`` makes stages of graphs,
    which are taken apart.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.weights = trained(module)
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def infer(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.module(x)

    def forward(self, micro: int, x: Tensor) -> Tensor:
        x = leaf(x)
        with torch.enable_grad():
            y = self.module(x)
        self._kept[micro] = x, y
        return y.detach()

    def backward(self, micro: int, dy: Tensor) -> Tensor | None:
        x, y = self._kept.pop(micro)
        wanted = [x, *self.weights] if x.requires_grad else self.weights
        found = list(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        dx = found.pop(0) if x.requires_grad else None
        add_gradients(self.gradients, zip(self.weights, found))
        return dx

    def backward_input(self, micro: int, dy: Tensor) -> Tensor | None:
        return self.backward(micro, dy)

    def backward_weight(self, micro: int) -> None:
        pass

    def overlapped(
        self, micro: int, x: Tensor, other: Stage, other_micro: int, dy: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return self.forward(micro, x), other.backward(other_micro, dy)

    def clear(self) -> None:
        self._kept.clear()
        self.gradients.clear()


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def leaf(x: Tensor) -> Tensor:
    """A tensor whose gradient can be asked for, if it has one."""
    return x.detach().requires_grad_(x.is_floating_point())


def add_gradients(gradients: dict[nn.Parameter, Tensor], found: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    """Sums, out of place for the first: it may share memory with what autograd handed out."""
    for p, grad in found:
        if grad is not None:
            gradients[p] = gradients[p] + grad if p in gradients else grad
