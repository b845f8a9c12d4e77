"""Where the second half of an expert-parallel layer stands: as late as it may, so that other work lies in between.

A model computes its shared experts behind the routed ones, or in front of them, and adds both. ``dispatch_start`` stays
where the routed experts were; what waits for it is moved down to the first node that computes with the layer's result,
through views and casts of it, which move along. Between the two then stand the nodes that don't need the result: the
shared experts, on their own rank. *Exact*: what moves are pure operators and views of fresh memory, and they move past
nodes that write nothing and don't change how gradients or dtypes are handled.
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.passes.graph import called

_VIEWS = {"view", "reshape", "to", "type", "type_as", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze"}
_WRITES = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "copy_"}
_MODES = ("_enter_", "_exit_", "_set_", "_saved_")


def sink(made: list[fx.Node], y: fx.Node) -> int:
    """Moves ``made``, pure nodes that end in ``y``, down; -> how many nodes that are read are in front of them now."""
    chain, target = _first_reader(y)
    moved = [*made, *chain]
    skipped = 0
    node = y.next
    while node is not target and node.op != "output":
        if node not in moved:
            if is_fence(node):
                target, chain = node, [n for n in chain if n < node]
                break
            skipped += node.op in ("call_function", "call_method") and bool(node.users)
        node = node.next
    for node in [*made, *chain]:
        target.prepend(node)
    return skipped


def _first_reader(y: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """(views and casts that lead from ``y`` alone to the first node that computes with it, that node)."""
    chain: list[fx.Node] = []
    node = y
    while True:
        first = min(node.users)
        only = len(node.users) == 1 and first.args and first.args[0] is node
        if not only or first.op == "output" or called(first) not in _VIEWS:
            return chain, first
        chain.append(first)
        node = first
        if not node.users:
            return chain[:-1], first


def is_fence(node: fx.Node) -> bool:
    """True for what may write memory, or changes what operators behind it do."""
    name, schema = called(node), getattr(node.target, "_schema", None)
    return (
        isinstance(node.target, torch._ops.HigherOrderOperator)
        or name in _WRITES
        or (name.endswith("_") and not name.endswith("__"))
        or "out" in node.kwargs
        or bool(getattr(schema, "is_mutable", False))
        or name.startswith(_MODES)
    )
