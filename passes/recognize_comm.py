"""recognize_comm: expert layers that a model has spread over ranks itself, which must not be spread once more.

A layer under a model's own expert parallelism looks like any other, with the few experts that a rank holds. Its tokens
come from an `all_to_all_single` (each rank's go to the ranks of their experts), or its result ends in an `all_reduce`
(each rank computes its experts for a batch that all share). Ranks hold different weights then: to take one rank's slice
of "all" of them would give wrong numbers without an error, so `expert_parallel` refuses the layer. *Exact*: nothing is
rewritten; the layer is computed as the model says, its own exchange stays as it is.

Where the exchange also says which expert a row is for (each rank sends its counts along), no ids are left in the graph
and no layer is recognised: the products themselves are reported then.

Looked at is what lies between the layer and the next product or attention in either direction, in the same graph:
element-wise operators, views, sorts and gathers of rows, and what is added to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from dscompile.passes.graph import called
from dscompile.passes.recognize_fp8 import operator_name

_BEFORE = ("all_to_all_single", "all_to_all_single_autograd", "all_to_all_vdev", "all_to_all_vdev_2d")
_BEHIND = ("all_reduce", "all_reduce_", "reduce_scatter_tensor", *_BEFORE)
_GROUPED = ("grouped_mm", "grouped_mm_fallback")
_STOPS = ("linear", "matmul", "mm", "addmm", "bmm", "einsum", "scaled_dot_product_attention", "layer_norm", "rms_norm")


def own_exchange(layer: fx.Node) -> fx.Node | None:
    """The collective by which a model exchanges this layer's tokens or results itself, if there is one.

    Args:
        layer: a call of `dsinfra::experts`, or the node that stands where it will.
    """
    return _reached(layer.args[0], lambda node: node.all_input_nodes, _BEFORE) or _reached(
        layer, lambda node: node.users, _BEHIND
    )


def exchanged_products(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Collectives that bring rows to grouped products -> the first of these products."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if called(node).strip("_") in _GROUPED:
            collective = _reached(node.args[0], lambda n: n.all_input_nodes, _BEFORE)
            if collective is not None:
                found.setdefault(collective, node)
    return found


def _reached(start: object, ways: Callable[[fx.Node], Iterable[fx.Node]], wanted: tuple[str, ...]) -> fx.Node | None:
    """The first node of those names that is reached from `start` without passing a product."""
    todo = list(ways(start)) if isinstance(start, fx.Node) else []
    todo += [start] if isinstance(start, fx.Node) else []
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if called(node) in wanted:
            return node
        if node.op in ("placeholder", "get_attr", "output") or _stops(node, start):
            continue
        todo += ways(node)
    return None


def _stops(node: fx.Node, start: object) -> bool:
    return node is not start and (called(node).strip("_") in _STOPS or bool(operator_name(node)))
