"""Weights kept apart: joined into the one that the operator reads, once or on each call, if that pays.

In inference a joined weight is made once and kept beside the model's own, up to date with it (``fp8_prepared``), as
long as the memory for it is free: gate and up as one, or the parameters of every expert of a loop as one stack. In
training, or where a weight is computed in the graph, gate and up are joined in the graph, and gradients reach both;
that copies 2 F D numbers an expert on each call, so it is done from ``JOIN_ROWS`` rows an expert on. Otherwise the
layer is refused and stays as it was; so is a loop over experts with parameters of their own in training.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from dscompile.passes.emit import Emitter
from dscompile.passes.experts_bind import Place
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.graph import called
from dscompile.passes.refusals import ExpertsApart, SeparateGateUp

aten = torch.ops.aten

# Reading and writing 2 F D bfloat16 numbers takes 8 F D bytes / 3.3 TB/s, and the products of one row 6 F D flop /
# 600 TFLOP/s (an H100's rates): from this many rows the copy is a quarter of the layer's forward.
JOIN_ROWS = 1024


class Joiner:
    """Joins weights of one graph; ``said``: what was done at a place, for the report."""

    def __init__(self, prepared: Prepared | None, training: bool):
        self.prepared, self.training = prepared, training
        self.kept = 0  # bytes, of this graph
        self.said: dict[fx.Node, str] = {}

    def joined(
        self, e: Emitter, place: Place, weights: tuple[fx.Node, ...], swapped: tuple[bool, ...], rows: int
    ) -> fx.Node:
        """``[E, 2F, D]``, gate first, of two weights [E, F, D] (``swapped``: [E, D, F]); raises SeparateGateUp."""
        dtype = weights[0].meta["example_value"].dtype
        stored = tuple(_stored(w) for w in weights)
        reason = self._keep(place, stored, swapped)
        if not reason:
            assert self.prepared is not None
            name = "gate_up" if stored == weights else f"gate_up_{str(dtype).removeprefix('torch.')}"
            (both,) = self.prepared.add(name, partial(_joined, 2 if swapped[0] else 1, dtype), stored)
            size = both.meta["example_value"].nbytes
            self.kept += size
            self.said[place.node] = f"gate and up joined once, {size / 2**20:.1f} MiB kept"
            return e.call(aten.transpose.int, both, 1, 2) if swapped[0] else both
        needed = JOIN_ROWS // 3 if self.training else JOIN_ROWS  # the backward multiplies twice more
        experts = weights[0].meta["example_value"].shape[0]
        if rows < needed * experts:
            raise SeparateGateUp(
                f"gate and up are two weights, {reason}; {rows // experts} rows an expert, joined from {needed}"
            )
        self.said[place.node] = f"gate and up joined on each call, {reason}"
        views = [e.call(aten.transpose.int, w, 1, 2) if s else w for w, s in zip(weights, swapped, strict=True)]
        return e.call(aten.cat.default, views, 1)

    def stacked(
        self, e: Emitter, place: Place, kinds: list[tuple[tuple[fx.Node, ...], bool]], biases: list[tuple[fx.Node, ...]]
    ) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]:
        """(w_gate_up [E, 2F, D], w_down, b_gate_up, b_down) of each expert's own parameters; raises ExpertsApart.

        ``kinds``: (nodes by expert, stored [in, out]) of gate_up, or of gate and up, then of down; ``biases`` alike, or
        empty.
        """
        nodes = tuple(n for kind, _ in kinds for n in kind) + tuple(n for kind in biases for n in kind)
        reason = self.refusal(place, nodes)
        if reason:
            raise ExpertsApart(f"each expert has parameters of its own, {reason}")
        assert self.prepared is not None
        swapped = tuple(s for _, s in kinds)
        label = "experts_" + "".join("ti"[s] for s in swapped) + f"_{len(biases)}"
        stacks = self.prepared.add(label, partial(_stack, len(kinds[0][0]), swapped), nodes)
        size = sum(s.meta["example_value"].nbytes for s in stacks)
        self.kept += size
        self.said[place.node] = f"experts stacked once, {size / 2**20:.1f} MiB kept"
        return (*stacks, None, None)[:4] if biases else (stacks[0], stacks[1], None, None)

    def _keep(self, place: Place, weights: tuple[fx.Node, ...], swapped: tuple[bool, ...]) -> str:
        """Why no joined weight can be kept; empty if it can."""
        return "in two layouts" if swapped[0] != swapped[1] else self.refusal(place, weights)

    def refusal(self, place: Place, weights: tuple[fx.Node, ...]) -> str:
        """Why no copy of these weights can be kept; empty if it can."""
        if self.training:
            return "trained apart"
        if self.prepared is None or place.module is not self.prepared.module:
            return "inside the body of another operator"
        if refusal := self.prepared.refusal(weights):
            return refusal
        values = [self.prepared.tensor(w) for w in weights]
        size = sum(v.nbytes for v in values)
        if values[0].is_cuda and self.kept + size > torch.cuda.mem_get_info(values[0].device)[0] // 2:
            return f"{size / 2**20:.0f} MiB more would take over half of the free memory"
        return ""


def _stack(experts: int, swapped: tuple[bool, ...], *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights of all experts as [E, 2F, D] and [E, D, F], then their biases if there are any."""
    kinds = [parameters[i : i + experts] for i in range(0, len(parameters), experts)]
    count = len(swapped)
    laid = [[w.t() if s else w for w in kind] for kind, s in zip(kinds, swapped)]
    return tuple(
        torch.stack([torch.cat(parts) for parts in zip(*some)])
        for group in (laid, kinds[count:])
        if group
        for some in (group[:-1], group[-1:])
    )


def _stored(weight: fx.Node) -> fx.Node:
    """The weight that the model converts in its graph, as its module holds it; any other node itself."""
    inputs = weight.all_input_nodes
    if called(weight) not in _CASTS or len(inputs) != 1 or weight.args[:1] != (inputs[0],):
        return weight
    before, after = inputs[0].meta.get("example_value"), weight.meta["example_value"]
    same = isinstance(before, torch.Tensor) and (before.shape, before.device) == (after.shape, after.device)
    return inputs[0] if same and before.is_floating_point() and after.is_floating_point() else weight


_CASTS = ("to", "float", "bfloat16", "half", "double", "type")


def _joined(dim: int, dtype: torch.dtype, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.cat([gate.to(dtype), up.to(dtype)], dim),)
