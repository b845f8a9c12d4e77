"""What each node of an ATen graph costs: FLOPs by torch's formulas, bytes by shapes, rows on the wire by expectation.

Costs come from a table that is handed in (``runtime.cost.Table``: measured, else a roofline). Views cost nothing;
elementwise nodes cost what they write, since Inductor joins them and what they read was just written. A start operator
is communication: each token goes once to every other rank that holds one of its K experts, which for evenly chosen
experts are (W - 1) (1 - (1 - 1/W)^K) ranks. A wait reads what arrived.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from dscompile.passes.graph import aliased_argument
from dscompile.passes.overlap import COMM, COMPUTE
from dscompile.passes.recognize_fp8 import operator_name

STARTS = ("dispatch_start", "combine_start", "redispatch_start")
WAITS = ("dispatch_wait", "combine_wait", "redispatch_wait")
_SUMS_ROWS = "combine_start"


class Table(Protocol):
    """What is asked for costs, in microseconds."""

    def us(self, operator: str, operands: list[tuple[tuple[Any, ...], str]], **work: Any) -> Any: ...


class NodeCosts:
    """``costs(node) -> (resource, microseconds)`` for nodes with a fake tensor in ``meta["val"]``.

    Args:
        table: see above.
        ranks: W, of the group that the graph's exchanges run in.
    """

    def __init__(self, table: Table, ranks: int):
        self.table, self.ranks = table, ranks
        self._known: dict[fx.Node, tuple[str, float]] = {}

    def __call__(self, node: fx.Node) -> tuple[str, float]:
        if node not in self._known:
            self._known[node] = self._cost(node)
        return self._known[node]

    def _cost(self, node: fx.Node) -> tuple[str, float]:
        name = operator_name(node) or _name(node)
        if node.op != "call_function" or node.target is operator.getitem or aliased_argument(node) is not None:
            return COMPUTE, 0.0
        inputs = [_value(n) for n in node.all_input_nodes]
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        operands = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
        results = [x for x in pytree.tree_leaves(_value(node)) if isinstance(x, torch.Tensor)]
        if name in STARTS:
            return COMM, float(self.table.us(name, operands, wire=self._wire(node, name)))
        if not results or (not tensors and not node.all_input_nodes):  # made of constants
            return COMPUTE, 0.0
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return COMPUTE, float(self.table.us(name, operands, bytes=_bytes(results))) - self._launch()
        flops = _flops(node) * _filled(node, name)
        attention = "scaled_dot_product" in name or name.startswith("mla")
        moved = _bytes(tensors if name not in WAITS else results) + _bytes(results)
        return COMPUTE, float(self.table.us(name, operands, flops=flops, bytes=moved, attention=attention))

    def _launch(self) -> float:
        """What an empty kernel costs: an elementwise node has none of its own."""
        return float(self.table.us("", []))

    def _wire(self, node: fx.Node, name: str) -> float:
        """Bytes that leave this rank."""
        W = self.ranks
        if name == _SUMS_ROWS:
            rows, _, plan, *_ = node.args
            tokens, K = _value(plan).shape[0] - 1, _choices(plan)
            width = _value(rows).shape[1] * _value(rows).itemsize
        else:
            x, ids = (_value(n) for n in node.args[:2])
            tokens, K = x.shape[0], ids.shape[1]
            width = x.shape[1] * x.itemsize + K * 8 + 4
        return max(1.0, tokens * width * (W - 1) * (1 - (1 - 1 / W) ** K))


def _choices(plan: fx.Node) -> int:
    """K, of the dispatch that made this plan."""
    while operator_name(plan) != "dispatch_start":
        plan = plan.all_input_nodes[0]
    return _value(plan.args[1]).shape[1]


def _filled(node: fx.Node, name: str) -> float:
    """Of the rows that an expert layer has room for, the part that arrives if ranks have and choose evenly."""
    source = node.args[0]
    while name == "experts" and source.target is operator.getitem:  # type: ignore[union-attr]
        source = source.args[0]  # type: ignore[union-attr]
    if name != "experts" or operator_name(source) != "dispatch_wait":  # type: ignore[arg-type]
        return 1.0
    return _value(source.args[2]).shape[0] / _value(source)[0].shape[0]  # type: ignore[union-attr]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_overloadpacket", node.target)).removeprefix("aten.")


def _value(node: Any) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _bytes(values: Iterable[torch.Tensor]) -> int:
    """Bytes that are read or written; a broadcast dimension is read once."""
    total = 0
    for x in values:
        count = x.itemsize
        for size, stride in zip(x.shape, x.stride(), strict=True):
            count *= size if stride else 1
        total += count
    return total


def _flops(node: fx.Node) -> int:
    """By torch's table, which our operators are in; 0 for what it doesn't list."""
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), _value)
    return int(formula(*args, **kwargs, out_val=_value(node)))
