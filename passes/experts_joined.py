"""Gate and up kept in two weights: joined into the one that the operator reads, once or on each call, if that pays.

In inference the joined weight is made once and kept beside the model's own, up to date with it (``fp8_prepared``), as
long as the memory for it is free. In training, or where a weight is computed in the graph, gate and up are joined in
the graph, and gradients reach both; that copies 2 F D numbers an expert on each call, so it is done from ``JOIN_ROWS``
rows an expert on. Otherwise the layer is refused and stays as it was.
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes.emit import Emitter
from dscompile.passes.experts_bind import Place
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.refusals import SeparateGateUp

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
        reason = self._keep(place, weights, swapped)
        if not reason:
            assert self.prepared is not None
            (both,) = self.prepared.add("gate_up", _by_column if swapped[0] else _by_row, weights)
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

    def _keep(self, place: Place, weights: tuple[fx.Node, ...], swapped: tuple[bool, ...]) -> str:
        """Why no joined weight can be kept; empty if it can."""
        if self.training:
            return "trained apart"
        if self.prepared is None or place.module is not self.prepared.module or swapped[0] != swapped[1]:
            return "not inputs of the same graph in one layout"
        refusal = self.prepared.refusal(weights)
        if refusal:
            return refusal
        values = [self.prepared.tensor(w) for w in weights]
        size = sum(v.nbytes for v in values)
        if values[0].is_cuda and self.kept + size > torch.cuda.mem_get_info(values[0].device)[0] // 2:
            return f"{size / 2**20:.0f} MiB more would take over half of the free memory"
        return ""


def _by_row(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.cat([gate, up], 1),)


def _by_column(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.cat([gate, up], 2),)
