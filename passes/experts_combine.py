"""From the second product to the layer's result: bias, routing weights, back to token order, the sum over choices.

    y[t] = sum_k weight[t, k] * z[row of (t, k)]

The walk goes forward from the second product, one reader at a time, and notes at each operator what it does to the
rows (one row of ``STEPS`` an operator), until every token has its sum. A value with a second reader would have to exist
anyway: refused. The sum may be written as a view and ``sum``, a batched product with the weights, or added row by row
into zeros; the operator's float32 sum rounds no more than any of them. What follows the sum stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from dscompile.passes.experts_meanings import Extent, Inverse, Order, Outside, Perm, Token, Within
from dscompile.passes.experts_mlp import Hidden, Product, check_dropout
from dscompile.passes.experts_rows import Own, Rows, aligned, sums_choices, times
from dscompile.passes.experts_sentinels import by_row
from dscompile.passes.experts_values import (
    CASTS,
    DETERMINISTIC_SCATTER_ADD,
    arg,
    dtype,
    index_of,
    is_fresh,
    name,
    option,
    placed_values,
    readers,
)
from dscompile.passes.refusals import (
    CombineForm,
    ExpertWeights,
    IntermediateUsed,
    NarrowedPrecision,
    RoutingWeights,
)
from dscompile.passes.trail import Trail


@dataclass(frozen=True)
class Flow:
    """Where the walk is: ``node`` holds the experts' results, laid out ``labels``, rows in ``order``."""

    node: fx.Node
    labels: str
    order: Order
    weight: Own | None = None
    bias: fx.Node | None = None
    summed: bool = False
    owing: bool = False  # rows of no expert hold a bias, and have to be masked
    returned: Outside | None = None  # rows of no expert hold their tokens

    def facts(self) -> list[str]:
        """What the walk has shown so far."""
        shown = {
            "each result is multiplied with its routing weight": self.weight is not None,
            "results are back in the order of the tokens": self.order is None,
            "the results of each token are summed": self.summed,
        }
        return [fact for fact, holds in shown.items() if holds]


@dataclass(frozen=True)
class Combined:
    """``out`` [T, D] is the layer's result; ``weight`` holds the routing weights in flat order."""

    out: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    returned: Outside | None = None  # ids of experts that return their tokens: these are not among the products'


class Combine:
    """Walks from one second product to the result of its layer."""

    def __init__(self, rows: Rows, down: Product, hidden: Hidden):
        self.rows, self.indices = rows, rows.indices
        self.down, self.hidden = down, hidden
        self.region: set[fx.Node] = set()
        tokens = self.indices.shape(hidden.tokens.x)[0]
        self.top_k = hidden.tokens.top_k
        self.tokens = tokens
        self.count: Extent = times(tokens, (self.top_k,) * len(tokens))

    def walk(self, trail: Trail | None = None) -> Combined:
        """The result; raises a Refusal that names the operator which breaks the proof."""
        flow = Flow(self.down.node, self.down.labels, self.hidden.tokens.order)
        while not self.done(flow):
            self.region.add(flow.node)
            reader = self.reader(flow.node)
            step = STEPS.get(name(reader))
            if step is None and self.rows.passes(reader):
                step = Combine.view
            if step is None:
                raise CombineForm(f"the experts' results go into `{reader.target}`", reader)
            self.rows.through(reader)
            self.indices.intact(flow.node, self.rows.memory.position[reader])
            flow = step(self, flow, reader)
            if trail is not None:
                trail.holds(*flow.facts())
        if flow.weight is None:
            raise RoutingWeights("the results are summed without routing weights", flow.node)
        if flow.owing:
            raise CombineForm("rows of no expert get the bias of the last one", flow.node)
        return Combined(self.rounded(flow.node), flow.weight.base, flow.bias, flow.returned)

    def done(self, flow: Flow) -> bool:
        """Every token has its sum; with one choice a token there is none, and the weights come last."""
        alone = self.top_k == 1 and flow.labels == "md" and flow.order is None and flow.weight is not None
        return alone or flow.labels == "td" and flow.summed

    def reader(self, node: fx.Node) -> fx.Node:
        found = readers(node)
        if len(found) != 1 or node.meta.get("dsinfra_returned"):
            raise IntermediateUsed(f"`{node.name}` inside the expert layer has {len(found)} readers", node)
        return found[0]

    def rounded(self, node: fx.Node) -> fx.Node:
        """``node``, or the cast to the dtype of x behind it if its own is wider (the operator rounds there)."""
        wanted = dtype(self.hidden.tokens.x)
        while torch.promote_types(dtype(node), wanted) != wanted:
            self.region.add(node)
            found = readers(node)
            if len(found) != 1 or name(found[0]) not in CASTS or node.meta.get("dsinfra_returned"):
                raise NarrowedPrecision(f"the sum is used in {dtype(node)}, the operator rounds it to {wanted}", node)
            node = found[0]
        return node

    # ---- steps, one an operator

    def view(self, flow: Flow, node: fx.Node) -> Flow:
        return replace(flow, node=node, labels=self.rows.relabel(node, flow.labels))

    def add(self, flow: Flow, node: fx.Node) -> Flow:
        """``+ bias[ids]``, before the routing weights."""
        other = self.other(flow, node)
        if option(node, 2, "alpha", 1) != 1 or flow.weight is not None or flow.bias is not None or flow.summed:
            raise CombineForm("something is added to the weighted results of the experts", node)
        table = self.rows.table(other, self.rows.memory.position[node])
        mine = table.source is self.down.source and table.order is flow.order
        if not mine or aligned(flow.labels, table.labels) != flow.labels or not flow.labels.endswith("d"):
            raise ExpertWeights("the bias of the second product is not that of the row's expert", node)
        exact = self.indices.below(table.source, self.indices.shape(table.base)[0][0])
        return replace(flow, node=node, bias=table.base, owing=table.clamped and not exact)

    def weigh(self, flow: Flow, node: fx.Node) -> Flow:
        if flow.weight is not None or flow.summed:
            raise RoutingWeights("the results are scaled a second time", node)
        weight = self.own(self.other(flow, node), node, flow)
        labels = aligned(flow.labels, weight.labels)
        if labels != flow.labels:
            raise RoutingWeights(f"weights laid out {weight.labels} for results laid out {flow.labels}", node)
        return replace(flow, node=node, weight=weight)

    def other(self, flow: Flow, node: fx.Node) -> fx.Node:
        first, second = node.args[:2]
        if (first is flow.node) == (second is flow.node):
            raise CombineForm("the experts' results are combined with themselves", node)
        other = second if first is flow.node else first
        if not isinstance(other, fx.Node):
            raise CombineForm(f"the experts' results meet the constant {other}", node)
        return other

    def own(self, weight: fx.Node, node: fx.Node, flow: Flow) -> Own:
        own = self.rows.own(weight, self.rows.memory.position[node], self.count)
        if own.order is not flow.order:
            raise RoutingWeights("routing weights are in another order than the results", node)
        if not dtype(own.base).is_floating_point:
            raise RoutingWeights("routing weights are no floating numbers", node)
        return own

    def mask(self, flow: Flow, node: fx.Node) -> Flow:
        if arg(node, 0) is not flow.node or not self.rows.leaves_out(node, flow.order):
            raise CombineForm("results are masked by something else than ids of no expert", node)
        return replace(flow, node=node, owing=False)

    def choose(self, flow: Flow, node: fx.Node) -> Flow:
        """``where(ids >= E, rows, z)``: experts past the last one of the products return their tokens."""
        mask, at = arg(node, 0), self.rows.memory.position[node]
        found = self.indices.read(mask, at)
        if flow.weight is not None or flow.summed or flow.returned is not None or len(node.args) != 3:
            raise CombineForm("weighted results are chosen among others", node)
        if not isinstance(found, (Outside, Within)) or found.order is not flow.order:
            raise CombineForm("results are chosen by something else than ids of no expert", node)
        returned, kept = (arg(node, i) for i in ((1, 2) if isinstance(found, Outside) else (2, 1)))
        if kept is not flow.node or not by_row(self.indices, mask, found, flow.node):
            raise CombineForm("results are chosen by something else than ids of no expert", node)
        mine = self.hidden.tokens
        itself = returned is mine.x and mine.top_k == 1 and mine.order is None and flow.labels == "md"
        if itself:
            self.indices.intact(returned, at)
        tokens = replace(mine, labels="md") if itself else self.rows.tokens(returned, at)
        if (tokens.x, tokens.order, tokens.top_k) != (mine.x, mine.order, mine.top_k) or tokens.labels != flow.labels:
            raise CombineForm("experts that return their rows return others than are read", node)
        outside = Outside(found.source, found.order, found.groups)
        return replace(flow, node=node, owing=False, returned=outside)

    def permute(self, flow: Flow, node: fx.Node) -> Flow:
        """``z[inverse]``: sorted rows in flat order."""
        index = index_of(node)
        found = self.indices.read(index, self.rows.memory.position[node]) if index is not None else None
        whole = name(node) != "gather" and len(self.indices.shape(index)) == 1 if index is not None else False
        if arg(node, 0) is not flow.node or not isinstance(found, Inverse) or not whole or flow.labels[:1] != "m":
            raise CombineForm("results are taken in an order that is not the tokens'", node)
        if found.order is not flow.order:
            raise CombineForm("results are put back by the inverse of another sort", node)
        return replace(flow, node=node, order=None)

    def place(self, flow: Flow, node: fx.Node) -> Flow:
        """Rows written, or added, into a fresh buffer: by the sort, or by token."""
        placed = placed_values(node)
        rows_or_one = flow.labels in ("md", "d")  # a single row may come without its dimension
        if placed is None or placed[1] is not flow.node or not rows_or_one or option(node, 4, "alpha", 1) != 1:
            raise CombineForm("results are written to places that are not the rows' own", node)
        index, _, adds = placed
        buffer, at = arg(node, 0), self.rows.memory.position[node]
        found = self.indices.read(index, at)
        written = flow.node if "scatter" in name(node) else index
        if self.indices.shape(index) != self.indices.shape(written)[: 2 if written is flow.node else 1]:
            raise CombineForm("a part of each row is written", node)
        if not is_fresh(buffer) or self.rows.memory.version(buffer, at) or adds and not self.indices.zeros(buffer, at):
            raise CombineForm("results go into a tensor that holds something already", node)
        rows = self.indices.shape(buffer)[0]
        if isinstance(found, Perm) and found.order is flow.order and rows == self.count:
            return replace(flow, node=node, order=None, labels="md")
        if isinstance(found, Token) and (found.order, found.top_k) == (flow.order, self.top_k) and adds:
            if rows == self.tokens:
                return replace(flow, node=node, order=None, labels="td", summed=True)
        raise CombineForm("results are written to places that are not the rows' own", node)

    def sum(self, flow: Flow, node: fx.Node) -> Flow:
        if flow.order is not None:
            raise CombineForm("rows are summed in sorted order", node)
        return replace(flow, node=node, labels=sums_choices(node, self.choices(flow.labels)), summed=True)

    def choices(self, labels: str) -> str:
        """With one choice a token, rows are tokens, and a dimension of size 1 behind them their choices."""
        one = {"m1": "tk", "m1d": "tkd", "m11": "t1k"} if self.top_k == 1 else {}
        return one.get(labels, labels)

    def product(self, flow: Flow, node: fx.Node) -> Flow:
        """``bmm(weights [T, 1, K], z [T, K, D])``: weights and sum at once."""
        left, right = node.args[:2]
        if flow.order is not None or flow.weight is not None or right is not flow.node:
            raise CombineForm(f"the experts' results go into `{node.target}`", node)
        weight = self.own(arg(node, 0), node, flow)
        if self.choices(flow.labels) != "tkd" or self.choices(weight.labels) != "t1k":
            raise CombineForm(f"weights {weight.labels} times results {flow.labels} is no sum over choices", node)
        return replace(flow, node=node, weight=weight, labels="t1d", summed=True)

    def einsum(self, flow: Flow, node: fx.Node) -> Flow:
        equation, operands = str(arg(node, 0)).replace(" ", ""), arg(node, 1)
        if "->" not in equation or "." in equation or len(operands) != 2 or flow.weight or flow.order is not None:
            raise CombineForm(f"the experts' results go into einsum {equation}", node)
        inputs, result = equation.split("->")
        terms = inputs.split(",")
        mine = 0 if operands[0] is flow.node else 1
        weight = self.own(operands[1 - mine], node, flow)
        letters = dict(zip(terms[mine], self.choices(flow.labels), strict=True))
        if "".join(letters.get(c, "?") for c in terms[1 - mine]) != "tk" or self.choices(weight.labels) != "tk":
            raise CombineForm(f"einsum {equation} of results laid out {flow.labels}", node)
        labels = "".join(letters.get(c, "?") for c in result)
        if labels != "td" or self.choices(flow.labels) != "tkd":
            raise CombineForm(f"einsum {equation} is no sum over choices", node)
        return replace(flow, node=node, weight=weight, labels="td", summed=True)

    def mean(self, flow: Flow, node: fx.Node) -> Flow:
        raise CombineForm("the experts' results are averaged, not summed", node)

    def dropout(self, flow: Flow, node: fx.Node) -> Flow:
        check_dropout(node)
        return replace(flow, node=node)


STEPS: dict[str, Callable[[Combine, Flow, fx.Node], Flow]] = {
    "add": Combine.add,
    "mul": Combine.weigh,
    "masked_fill": Combine.mask,
    "where": Combine.choose,
    **dict.fromkeys(("index", "index_select", "gather"), Combine.permute),
    **dict.fromkeys(("index_put", "index_copy", "index_add", "scatter", "scatter_add"), Combine.place),
    DETERMINISTIC_SCATTER_ADD: Combine.place,
    "sum": Combine.sum,
    "mean": Combine.mean,
    **dict.fromkeys(("bmm", "matmul"), Combine.product),
    "einsum": Combine.einsum,
    **dict.fromkeys(("dropout", "native_dropout"), Combine.dropout),
}
