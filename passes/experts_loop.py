"""Experts written as a loop: one small network an expert, over the tokens that chose it, or over all of them.

    for e in range(E):
        t, k = where(idx == e)
        y.index_add_(0, t, expert_e(x[t]) * weight[t, k, None])   or   y += expert_e(x) * (weight * (idx == e)).sum(-1)

Both are y[t] = sum_k weight[t, k] expert_{idx[t, k]}(x[t]): every (t, k) is met by exactly one e. The anchor is the
set of masks ``idx == e`` for e = 0 .. E - 1 over the same ids; from each mask the walk goes forward to the expert's
term, and the terms have to be one chain of additions that starts at zeros. The expert's network is read as that of the
batched forms (``experts_mlp``). Experts are slices of one weight, or have parameters of their own; those are stacked
once and kept beside the model's own in inference (``fp8_prepared``) and refused in training, where copies would be
made on each step. The last experts may return their tokens as they are: their term stays outside the operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dscompile.passes.experts_mlp import ARITHMETIC, Hidden, Product, Products, ProductTable, Reader, Weight, swaps
from dscompile.passes.experts_rows import Rows, Tokens
from dscompile.passes.experts_values import CASTS, arg, dtype, name, option, readers
from dscompile.passes.graph import is_tensor
from dscompile.passes.refusals import (
    CombineForm,
    ExpertActivation,
    ExpertWeights,
    NarrowedPrecision,
    RoutingWeights,
    RowsNotTokens,
)
from dscompile.passes.trail import Trail

LEAST = 2  # masks of one tensor that make a loop


@dataclass(frozen=True)
class Term:
    """What one expert adds: ``rows`` are its token numbers (None: all tokens), ``down`` its second product's result."""

    expert: int
    rows: fx.Node | None
    weight: fx.Node
    down: fx.Node
    before: object  # what it is added to
    after: fx.Node


@dataclass(frozen=True)
class Part:
    """One kind of weight of all experts: ``whole`` [E, ..] if they are its slices, else one node each."""

    nodes: tuple[fx.Node, ...]
    swapped: bool
    whole: fx.Node | None


@dataclass(frozen=True)
class Loop:
    """A proved loop. ``gate_up`` has one part, or two (gate and up)."""

    ids: fx.Node
    weight: fx.Node
    out: fx.Node
    hidden: Hidden
    gate_up: tuple[Part, ...]
    down: Part
    b_gate_up: tuple[Part, ...]
    b_down: Part | None
    experts: int
    identities: int  # ids behind the experts' whose network returns its rows

    def describe(self) -> str:
        rows = "all tokens" if self.hidden.tokens.order is None else "its tokens"
        width, kind = self.hidden.gate.count, self.hidden.activation.kind
        more = f" and {self.identities} that return their tokens" if self.identities else ""
        return f"loop over experts, each over {rows}, E {self.experts}{more}, F {width}, {kind}"


class _Linears(Products):
    """Plain products with the weight of one expert, whose rows are chosen by ``ids``."""

    def __init__(self, rows: Rows, ids: fx.Node):
        super().__init__(rows)
        self.ids = ids

    def table(self) -> ProductTable:
        return {"linear": _Linears.linear, "matmul": _Linears.product, "mm": _Linears.product}

    def linear(self, node: fx.Node) -> Product | None:
        bias = arg(node, 2) if len(node.args) > 2 else None
        return self._plain(node, False, bias)

    def product(self, node: fx.Node) -> Product | None:
        return self._plain(node, True, None)

    def _plain(self, node: fx.Node, swapped: bool, bias: fx.Node | None) -> Product | None:
        rows, weight = arg(node, 0), arg(node, 1)
        if len(self.indices.shape(rows)) != 2 or len(self.indices.shape(weight)) != 2:
            return None
        if dtype(weight) != dtype(node) or bias is not None and dtype(bias) != dtype(node):
            raise ExpertWeights(f"weights are converted to {dtype(node)} by the product itself", node)
        self.rows.through(node)
        at = self.rows.memory.position[node]
        base = self._two(weight, at, swapped)
        return Product(node, rows, base, self.ids, None, False, "md", bias)

    def _two(self, node: fx.Node, at: int, swapped: bool) -> Weight:
        self.indices.intact(node, at)
        while (swaps(node, 2) or name(node) == "t") and not self.rows.memory.stops_gradient(node):
            at, swapped, node = self.rows.memory.position[node], not swapped, arg(node, 0)
            self.indices.intact(node, at)
        return Weight(node, swapped)


class _LoopReader(Reader):
    """Reads one expert's network, whose rows are ``x[rows]``, or x itself."""

    def __init__(self, products: Products, rows: fx.Node | None):
        super().__init__(products)
        self.taken = rows

    def tokens(self, product: Product) -> Tokens:
        node, at = product.rows, self.rows.memory.position[product.node]
        self.indices.intact(node, at)
        while name(node) in CASTS:
            self.rows.through(node)
            at, node = self.rows.memory.position[node], arg(node, 0)
            self.indices.intact(node, at)
        if self.taken is None:
            return Tokens(node, None, 0, "")
        index = arg(node, 1) if name(node) == "index" else [arg(node, 2)] if name(node) == "index_select" else []
        if len(index) != 1 or index[0] is not self.taken or name(node) == "index_select" and arg(node, 1) != 0:
            raise RowsNotTokens("an expert's rows are not the tokens that chose it", node)
        self.rows.through(node)
        self.indices.intact(arg(node, 0), self.rows.memory.position[node])
        return Tokens(arg(node, 0), self.taken, 0, "")


class Loops:
    """Finds and proves loops over experts in one shadow graph."""

    def __init__(self, rows: Rows):
        self.rows, self.indices, self.memory = rows, rows.indices, rows.memory

    def find(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, dict[int, fx.Node]]]:
        """(ids, {expert: its mask}) of each loop."""
        masks: dict[fx.Node, dict[int, fx.Node]] = defaultdict(dict)
        for node in graph.nodes:
            if name(node) == "eq" and isinstance(arg(node, 1), int) and _integral(arg(node, 0)):
                masks[self.indices.base(arg(node, 0))][arg(node, 1)] = node
        for ids, found in masks.items():
            if len(found) >= LEAST and len(self.indices.shape(ids)) == 2:
                yield ids, found

    def prove(self, ids: fx.Node, masks: dict[int, fx.Node], trail: Trail) -> Loop:
        """The loop over these masks; raises a Refusal."""
        if sorted(masks) != list(range(len(masks))):
            raise RowsNotTokens(f"a loop over experts {sorted(masks)}, not 0 .. {len(masks) - 1}", masks[min(masks)])
        terms = [self.term(e, masks[e]) for e in sorted(masks)]
        trail.holds("each expert adds its rows, weighed, to the tokens that chose it")
        weights = {t.weight for t in terms}
        if len(weights) != 1:
            raise RoutingWeights("experts of one loop are weighed by different tensors", terms[-1].after)
        out = self.chain(terms)
        trail.holds("the experts' terms are one sum from zeros")
        networks = [self.network(t, ids) for t in terms if not self.identity(t)]
        if not networks or any(map(self.identity, terms[: len(networks)])):
            raise ExpertActivation("experts that return their rows do not come last", terms[0].after)
        trail.holds("each expert is two products around a gated activation")
        products, first = [p for p, _ in networks], networks[0][1]
        if any(self.identity(t) is not first.tokens.x for t in terms[len(networks) :]):
            raise RowsNotTokens("experts that return their rows return others than are read", terms[-1].after)
        for _, other in networks[1:]:
            same = (other.activation, other.joint, other.interleaved) == (
                first.activation,
                first.joint,
                first.interleaved,
            )
            if not same or other.tokens.x is not first.tokens.x:
                raise ExpertActivation("experts of one loop differ in more than their weights", other.gate.product.node)
        wide = dtype(first.tokens.x)
        if torch.promote_types(dtype(out), wide) != wide:
            raise NarrowedPrecision(f"the sum is made in {dtype(out)}, the operator rounds it to {wide}", out)
        if any(self.indices.shape(arg(m, 0)) != self.indices.shape(ids) for m in masks.values()):
            raise RowsNotTokens("experts are compared with ids of another shape", terms[0].after)
        if self.indices.shape(first.tokens.x)[0] != self.indices.shape(ids)[0]:
            raise RowsNotTokens("ids are not those of the tokens", first.tokens.x)
        roles = [[h.gate for _, h in networks]] + ([] if first.joint else [[h.up for _, h in networks]])
        biased = any(c.bias is not None for role in roles for c in role)
        return Loop(
            ids=ids,
            weight=weights.pop(),
            out=out,
            hidden=first,
            gate_up=tuple(self.part([c.product.weight for c in role]) for role in roles),
            down=self.part([p.weight for p in products]),
            b_gate_up=tuple(self.biases([c.bias for c in role]) for role in roles) if biased else (),
            b_down=self.biases([p.bias for p in products]) if any(p.bias is not None for p in products) else None,
            experts=len(networks),
            identities=len(masks) - len(networks),
        )

    # ---- one expert's term

    def term(self, expert: int, mask: fx.Node) -> Term:
        """From the mask to what is added for the expert; raises a Refusal."""
        self.only(mask)
        for reader in readers(mask):
            if name(reader) == "where" and len(reader.args) == 1:
                return self.chosen(expert, reader)
        return self.everywhere(expert, mask)

    def chosen(self, expert: int, where: fx.Node) -> Term:
        """``index_add(y, 0, t, z * weight[t, k, None])``."""
        items = {arg(user, 1): user for user in where.users if name(user) == "getitem"}
        rows, choices = items.get(0), items.get(1)
        added = [u for u in readers(rows) if name(u) == "index_add" and arg(u, 2) is rows] if rows is not None else []
        if rows is None or choices is None or len(added) != 1 or arg(added[0], 1) != 0:
            raise CombineForm("an expert's rows are not added to the tokens that they came from", where)
        self.rows.through(added[0])
        if option(added[0], 4, "alpha", 1) != 1:
            raise CombineForm("an expert's rows are scaled as they are added", added[0])
        left, right = self.factors(arg(added[0], 3), added[0])
        for z, scale in ((left, right), (right, left)):
            weight = self.taken_weight(scale, rows, choices)
            if weight is not None:
                return Term(expert, rows, weight, z, arg(added[0], 0), added[0])
        raise RoutingWeights("an expert's rows are not weighed by the weights of their choices", added[0])

    def taken_weight(self, node: fx.Node, rows: fx.Node, choices: fx.Node) -> fx.Node | None:
        """w of ``w[t, k]`` with a dimension behind."""
        node = self.behind(node, {"unsqueeze", "view", "reshape"})
        if name(node) != "index" or list(arg(node, 1)) != [rows, choices]:
            return None
        self.rows.through(node)
        weight = self.behind(arg(node, 0), {"unsqueeze"})
        return weight if len(self.indices.shape(weight)) == 2 else None

    def everywhere(self, expert: int, mask: fx.Node) -> Term:
        """``y + z * (weight * mask).sum(-1, keepdim)``."""
        node, weight = mask, None
        while name(found := self.reader(node)) in CASTS:
            node = found
        if name(found) == "mul" and is_tensor(arg(found, 0)) and is_tensor(arg(found, 1)):
            weight = arg(found, 1) if arg(found, 0) is node else arg(found, 0)
        if weight is None or self.indices.shape(weight) != self.indices.shape(mask):
            raise RoutingWeights("routing weights are not masked by the ids of an expert", found)
        self.indices.intact(weight, self.memory.position[found])
        summed = self.reader(found)
        if name(summed) != "sum" or [d % 2 for d in option(summed, 1, "dim") or ()] != [1]:
            raise RoutingWeights("the weights of an expert are not summed over the choices", summed)
        scale = summed
        if not option(summed, 2, "keepdim", False):
            scale = self.reader(summed)
            if name(scale) != "unsqueeze" or arg(scale, 1) not in (1, -1):
                raise RoutingWeights("the weights of an expert are not one number a token", scale)
        product = self.reader(scale)
        left, right = self.factors(product, product)
        z = right if left is scale else left
        added = self.reader(product)
        if name(added) != "add" or option(added, 2, "alpha", 1) != 1 or (left is scale) == (right is scale):
            raise CombineForm("an expert's results are not added up", added)
        self.only(product)
        before = arg(added, 1) if arg(added, 0) is product else arg(added, 0)
        return Term(expert, None, weight, z, before, added)

    def factors(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
        node = self.behind(node, CASTS, self.memory.position[reader])
        if name(node) != "mul" or not is_tensor(arg(node, 0)) or not is_tensor(arg(node, 1)):
            raise RoutingWeights(f"an expert's results are `{node.target}`, not weighed rows", node)
        self.rows.through(node)
        return arg(node, 0), arg(node, 1)

    def behind(self, node: fx.Node, kinds: set[str], time: int | None = None) -> fx.Node:
        """Through operators of these kinds, each reading what it was given unchanged."""
        if time is not None:
            self.indices.intact(node, time)
        while name(node) in kinds:
            self.rows.through(node)
            self.indices.intact(arg(node, 0), self.memory.position[node])
            node = arg(node, 0)
        return node

    def reader(self, node: fx.Node) -> fx.Node:
        found = readers(node)
        if len(found) != 1:
            raise CombineForm(f"`{node.name}` of a loop over experts has {len(found)} readers", node)
        if name(found[0]) not in CASTS or dtype(node).is_floating_point:  # a mask has no gradient to begin with
            self.rows.through(found[0])
        self.indices.intact(node, self.memory.position[found[0]])
        return found[0]

    def only(self, node: fx.Node) -> None:
        if not self.memory.unchanged(node, self.memory.position[node] + 1, len(self.memory.position)):
            raise CombineForm(f"`{node.name}` of a loop over experts is changed in place", node)

    # ---- all experts

    def chain(self, terms: list[Term]) -> fx.Node:
        """The sum of all terms, and of nothing else: from zeros, each added to the one before."""
        by_start = {t.before: t for t in terms}
        made = {t.after for t in terms}
        starts = [t for t in terms if t.before not in made]
        if len(starts) != 1 or len(by_start) != len(terms) or not self.from_zeros(starts[0]):
            raise CombineForm("the results of a loop's experts are not one sum that starts at zeros", terms[0].after)
        last = starts[0]
        for _ in terms[1:]:
            if last.after not in by_start or readers(last.after) != [by_start[last.after].after]:
                raise CombineForm("a partial sum of a loop over experts is read elsewhere", last.after)
            self.indices.intact(last.after, self.memory.position[by_start[last.after].after])
            last = by_start[last.after]
        return last.after

    def from_zeros(self, term: Term) -> bool:
        if not is_tensor(term.before):
            return term.before in (0, 0.0)
        return self.indices.zeros(term.before, self.memory.position[term.after])

    def identity(self, term: Term) -> fx.Node | None:
        """x, if the expert returns its rows of x as they are."""
        node = self.behind(term.down, CASTS)
        if term.rows is None:
            return None if _Linears(self.rows, node).find(node) is not None or name(node) in ARITHMETIC else node
        index = arg(node, 1) if name(node) == "index" else []
        return arg(node, 0) if len(index) == 1 and index[0] is term.rows else None

    def network(self, term: Term, ids: fx.Node) -> tuple[Product, Hidden]:
        """(second product, what it reads) of one expert."""
        linears = _Linears(self.rows, ids)
        node = self.behind(term.down, CASTS)
        down = linears.find(node)
        if down is None:
            raise ExpertActivation(f"an expert ends in `{node.target}`, not in a product", node)
        return down, _LoopReader(linears, term.rows).hidden(down)

    def part(self, weights: list[Weight]) -> Part:
        if len({w.swapped for w in weights}) != 1:
            raise ExpertWeights("experts of one loop store their weights in different layouts", weights[0].node)
        return self._part([w.node for w in weights], weights[0].swapped)

    def biases(self, nodes: list[fx.Node | None]) -> Part:
        if any(n is None for n in nodes):
            raise ExpertWeights("only some experts of a loop have a bias")
        return self._part([n for n in nodes if n is not None], False)

    def _part(self, nodes: list[fx.Node], swapped: bool) -> Part:
        slices = [(arg(n, 0), arg(n, 1), arg(n, 2)) for n in nodes if name(n) == "select"]
        whole = None
        if slices == [(slices[0][0], 0, e) for e in range(len(nodes))] if slices else False:
            if min(self.indices.shape(slices[0][0])[0]) >= len(nodes):  # more: of experts that return their rows
                whole = slices[0][0]
                for node in nodes:
                    self.indices.intact(whole, self.memory.position[node])
        return Part(tuple(nodes), swapped, whole)


def _integral(node: object) -> bool:
    return is_tensor(node) and dtype(node) in (torch.int16, torch.int32, torch.int64)
