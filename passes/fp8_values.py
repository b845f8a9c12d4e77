"""FP8 weights as values: dequantised once for a graph's weights, or in the graph in front of their reader."""

from __future__ import annotations

import functools

import torch
from torch import fx

from dscompile.lowering.block_scales import BLOCK, dequantize_weight
from dscompile.passes.emit import Emitter
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.graph import called

aten = torch.ops.aten


def dequantized(e: Emitter, prepared: Prepared | None, weight: fx.Node, scale: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A node of Dynamo's graph with the values of an FP8 weight [N, K] in ``dtype``.

    Made once and kept where both tensors are weights of a module; else written in front of the emitter's anchor.
    """
    kept = _before_casts(scale)
    if prepared is not None and weight.graph is prepared.module.graph and not prepared.refusal([weight, kept]):
        name = f"dequantized_{str(dtype).removeprefix('torch.')}"
        return prepared.add(name, functools.partial(_dequantize, dtype), [weight, kept])[0]
    wide = e.call(aten.repeat_interleave.self_int, e.cast(scale, torch.float32), BLOCK, 0)
    wide = e.call(aten.repeat_interleave.self_int, wide, BLOCK, 1)
    rows, columns = weight.meta["example_value"].shape
    wide = e.narrow(e.narrow(wide, 0, 0, rows), 1, 0, columns)
    return e.cast(e.call(aten.mul.Tensor, e.cast(weight, torch.float32), wide), dtype)


def _dequantize(dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (dequantize_weight(weight, scale.to(torch.float32)).to(dtype),)


def _before_casts(node: fx.Node) -> fx.Node:
    """The scales as the module holds them: adapters convert them to float32 in the graph. Roundings stay."""
    while called(node) in ("to", "float", "detach") and isinstance(node.args[0], fx.Node):
        (held, kept) = (n.meta["example_value"].dtype for n in (node.args[0], node))
        if kept not in (held, torch.float32) or (held, kept) == (torch.float64, torch.float32):
            break
        node = node.args[0]
    return node
