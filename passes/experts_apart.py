"""Gate and up as two products by expert: a layer whose weights are kept apart, where joining them doesn't pay.

Before:  sort ids -> gather tokens -> two products by expert -> act(gate) * up -> product by expert -> weighted sum
After:   ``moe_plan`` -> ``moe_gather`` -> two ``grouped_linear`` -> act, mul -> ``grouped_linear`` -> ``moe_combine``

The operator ``dsinfra::experts`` reads gate and up as one weight. Its pieces do not: the same proof lets the layer be
written as them, which copies no weight and keeps none, and each piece has a gradient of its own. The activation is left
to the compiler behind, which makes one kernel of it. *Exact*: the same products in the same dtypes as the layer's own,
summed over the choices in float32. Refuses biases, which only the operator adds by expert, and the clamped swiglu.
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes.emit import Emitter
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.refusals import SeparateGateUp

aten = torch.ops.aten

_ACTIVATIONS = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
}
SAID = "gate and up multiplied apart"


def refuse_apart(refusal: SeparateGateUp, kind: str, biased: bool) -> None:
    """Raises the ``refusal`` of a joined weight, with what stands against two products, if anything does."""
    if biased:
        raise SeparateGateUp(f"{refusal.found}; with biases they can't be multiplied apart") from refusal
    if kind not in _ACTIVATIONS:
        raise SeparateGateUp(f"{refusal.found}; with the activation {kind} they can't be multiplied apart") from refusal


def in_pieces(product: fx.Node) -> bool:
    """Whether what was written for a layer is its pieces; ``product`` is the node that stands for it."""
    return operator_name(product) == "grouped_linear"


def refuse_pieces(product: fx.Node) -> None:
    """Raises for a layer in pieces: for passes that rewrite the operator of a layer as a whole."""
    if in_pieces(product):
        raise SeparateGateUp("gate and up are multiplied apart: no operator is the layer as a whole", product)


def multiplied_apart(
    e: Emitter, routed: tuple[fx.Node, fx.Node, fx.Node], weights: tuple[fx.Node, fx.Node, fx.Node], kind: str
) -> tuple[fx.Node, fx.Node]:
    """The layer as pieces.

    Args:
        e: writes in front of the layer's result.
        routed: x [T, D], ids [T, K], routing weights [T, K].
        weights: gate and up [E, F, D], down [E, D, F], of one dtype and of any strides.
        kind: the activation, one that ``refuse_apart`` lets pass.

    Returns:
        (y [T, D] in the dtype of x, the product of the down projection [T K, D]).
    """
    ops, (x, ids, weight), (gate, up, down) = torch.ops.dsinfra, routed, weights
    dtype, experts = down.meta["example_value"].dtype, down.meta["example_value"].shape[0]
    plan = e.call(ops.moe_plan.default, ids, experts)
    order, position, ends = (e.item(plan, i) for i in range(3))
    rows = e.call(ops.moe_gather.default, e.cast(x, dtype), order, position)
    gated, other = (e.call(ops.grouped_linear.default, rows, w, ends) for w in (gate, up))
    activation, settings = _ACTIVATIONS[kind]
    h = e.call(aten.mul.Tensor, e.call(activation, gated, **settings), other)
    z = e.call(ops.grouped_linear.default, h, down, ends)
    y = e.call(ops.moe_combine.default, z, position, weight, ids, experts, x.meta["example_value"].dtype)
    return y, z
