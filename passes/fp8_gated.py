"""Gated layers in Dynamo's graph: down(silu(gate(x)) * up(x)), three linear layers of which nothing else is read.

Found so that gate and up can be one product over their joined weight, and silu(gate) * up can be quantised as it is
computed, in float32: ``silu_mul_quantize_1x128``. Layers of another shape are quantised one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dscompile.lowering.block_scales import BLOCK
from dscompile.passes.graph import torch_call


@dataclass(frozen=True)
class Gated:
    """The nodes of one gated layer; ``x`` is what gate and up both read."""

    x: fx.Node
    gate: fx.Node
    up: fx.Node
    down: fx.Node

    @property
    def weights(self) -> tuple[fx.Node, fx.Node]:
        """Of gate and up."""
        return self.gate.args[1], self.up.args[1]  # type: ignore[return-value]


def find(graph: fx.Graph) -> dict[fx.Node, Gated]:
    """Each linear layer that is a part of a gated one -> that one."""
    found: dict[fx.Node, Gated] = {}
    for down in graph.nodes:
        gated = _gated(down) if torch_call(down) == "linear" else None
        if gated is not None and not any(node in found for node in (gated.gate, gated.up, gated.down)):
            found |= dict.fromkeys((gated.gate, gated.up, gated.down), gated)
    return found


def _gated(down: fx.Node) -> Gated | None:
    product = down.args[0] if len(down.args) > 1 else None
    if (
        not isinstance(product, fx.Node)
        or torch_call(product) != "mul"
        or set(product.users) != {down}
        or len(product.args) != 2
    ):
        return None
    for silu, up in (product.args, product.args[::-1]):
        if not (isinstance(silu, fx.Node) and isinstance(up, fx.Node)) or torch_call(silu) != "silu":
            continue
        gate = silu.args[0]
        if silu.kwargs.get("inplace") or len(silu.args) > 1 and silu.args[1]:
            continue
        read_once = set(gate.users) == {silu} and set(silu.users) == set(up.users) == {product}
        if read_once and _plain(gate) and _plain(up) and gate is not up and gate.args[0] is up.args[0]:
            gated = Gated(gate.args[0], gate, up, down)
            return gated if _joins(gated) else None
    return None


def _plain(node: fx.Node) -> bool:
    """A linear layer without a bias."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return torch_call(node) == "linear" and len(node.args) > 1 and bias is None


def _joins(gated: Gated) -> bool:
    """True if no block of the joined weight holds rows of both, so that it is the two quantised weights."""
    first, second = (w.meta["example_value"] for w in gated.weights)
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and first.dim() == 2 and first.shape[0] % BLOCK == 0
