"""What a zoo case is: a recipe for a module with its inputs, and what the recogniser is expected to do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

Mode = Literal["prefill", "lengths", "padded", "packed", "static_decode", "dynamic_decode", "generate", "train"]

# Tables that a model keeps in float32 whatever its weights are.
_ALWAYS_FLOAT32 = ("e_score_correction_bias",)


@dataclass(frozen=True)
class Precision:
    """Weights are rounded to `weights` and then held, as all arithmetic is done, in `compute`.

    `Precision(torch.bfloat16, torch.float32)` is the reference of a bfloat16 model: equal weights, wider arithmetic.
    """

    weights: torch.dtype = torch.float32
    compute: torch.dtype | None = None

    @property
    def working(self) -> torch.dtype:
        return self.compute or self.weights

    def settle(self, module: nn.Module) -> nn.Module:
        """Cast a float32 module in place: parameters, and buffers that hold a cache."""
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and not name.endswith(_ALWAYS_FLOAT32):
                parameter.data = parameter.data.to(self.weights).to(self.working)
        for name, buffer in module.named_buffers():
            if name.endswith("_cache"):
                buffer.data = buffer.data.to(self.working)
        return module


@dataclass(frozen=True)
class Size:
    """How large the models of the matrix are built, where they run, and how their weights are stored."""

    name: Literal["micro", "true"]
    device: str
    precision: Precision


# `true` has the widths that the kernels are written for.
MICRO_SIZE = Size("micro", "cpu", Precision())
TRUE_SIZE = Size("true", "cuda", Precision(torch.bfloat16))


class Example(NamedTuple):
    """A module, the arguments of its first call, and the positional arguments of the calls after it.

    The keyword arguments are those of every call: a cache in them is written by one call and read by the next. `keep`
    [B, S] is True where the output means something; None: everywhere.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    more: tuple[tuple[Any, ...], ...] = ()
    keep: torch.Tensor | None = None

    @property
    def calls(self) -> tuple[tuple[Any, ...], ...]:
        return (self.args, *self.more)


@dataclass(frozen=True)
class ZooCase:
    """One module with what is expected of it.

    name: readable and unique, the id of its tests.
    make: builds it; the same precision gives the same weights and inputs every time.
    mode: what is run; `train` means forward and backward, `generate` that `args` and `kwargs` are those of the module's
        `generate`.
    sites: attention sites that must become `dsinfra::mla` or `dsinfra::mla_decode` in each graph; None where both a
        match and a refusal are right, and only the numbers are checked.
    experts: expert layers that must become `dsinfra::experts` in each graph.
    routers: routers that must become `dsinfra::route` in each graph.
    refusal: class name of the refusal that must be reported (see `dscompile.passes.refusals`), if one must.
    graphs: the most graphs that all calls together may compile.
    router_softmaxes: softmaxes of each graph that belong to no attention.
    widest: the widest arithmetic its code allows; the reference of a float32 run is computed in it.
    random: the module draws random numbers, so that its values can't be compared.
    autocast: run under `torch.autocast` to this dtype.
    fullgraph: whether one graph must hold the whole module.
    precision: of the compiled run, unless a test asks for another.
    tags: words to select by.
    """

    name: str
    make: Callable[[Precision], Example]
    mode: Mode = "prefill"
    sites: int | None = 1
    experts: int = 0
    routers: int = 0
    refusal: str | None = None
    graphs: int = 1
    router_softmaxes: int = 0
    widest: torch.dtype = torch.float64
    random: bool = False
    autocast: torch.dtype | None = None
    fullgraph: bool = True
    precision: Precision = Precision()
    tags: frozenset[str] = field(default_factory=frozenset)

    def example(self, precision: Precision | None = None) -> Example:
        """Build the module with the inputs of all its calls."""
        return self.make(precision or self.precision)

    def reference(self, precision: Precision) -> Precision:
        """The precision of the run to compare with: equal weights, wider arithmetic where the module allows it."""
        return Precision(precision.weights, self.widest if precision.working is torch.float32 else torch.float32)

    def build(self, precision: Precision | None = None) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Build the module with the inputs of its first call."""
        example = self.example(precision)
        return example.module, example.args, example.kwargs
