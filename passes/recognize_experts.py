"""recognize_experts: two products by expert with a gated activation between them -> ``dsinfra::experts``.

Before:  sort ids -> gather tokens -> product by expert -> act(gate) * up -> product by expert -> weigh, unsort, sum
After:   ``dsinfra::experts(x, topk_idx, topk_weight, w_gate_up, w_down, biases, activation, ..)``, the rest left dead

    y[t] = sum_k topk_weight[t, k] * W_down[e] act(W_gate_up[e] x[t])          e = topk_idx[t, k]

because rows of one expert may be computed in any order and place, as long as each comes back to its (token, choice).
What the index tensors are is read by ``experts_values``, where rows come from by ``experts_rows``, the expert's own
arithmetic by ``experts_mlp``, the way to the result by ``experts_combine``. *Exact*: the same products in the same
dtypes; the sum over choices is accumulated in float32 and rounded once, where the model rounds as much or more.

A loop over experts is proved by ``experts_loop``. Each proof reads every node of a layer once and evaluates nothing, so
that layers are not replayed but proved one by one, at all assignments of symbolic sizes together. Refuses: another
permutation, padding or capacity, weights before the second product, another activation, dropout, values with a second
reader, weights kept apart where joining them doesn't pay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from dscompile.passes.absorb import hint
from dscompile.passes.emit import Emitter
from dscompile.passes.experts_bind import Binding, Place, Written, write
from dscompile.passes.experts_combine import Combine, Combined
from dscompile.passes.experts_joined import Joiner
from dscompile.passes.experts_loop import Loop, Loops, Part
from dscompile.passes.experts_mlp import ARITHMETIC, Hidden, Product, Products, Reader
from dscompile.passes.experts_rows import Rows
from dscompile.passes.experts_values import CASTS, COPIES, VIEWS, Indices, name, readers, sizes_of
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.graph import is_tensor, module_path, source_line
from dscompile.passes.memory import Memory
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import ExpertWeights, IntermediateUsed, Refusal, UnboundValue, Unsupported
from dscompile.passes.shadow import Shadow

aten = torch.ops.aten
NAME = "recognize_experts"


@dataclass(frozen=True)
class Match:
    """A proved expert layer; ``experts`` of them."""

    down: Product
    hidden: Hidden
    combined: Combined
    experts: int

    @property
    def ids(self) -> fx.Node:
        return self.down.source

    @property
    def out(self) -> fx.Node:
        return self.combined.out

    def describe(self) -> str:
        form, hidden = "grouped" if self.down.grouped else "batched", self.hidden
        parts = "" if hidden.joint else ", gate and up apart"
        sizes = f"E {self.experts}, top-{hidden.tokens.top_k}, F {hidden.gate.count}"
        return f"{form}, {sizes}, {hidden.activation.kind}{parts}"


class Recognizer:
    """Proves the expert layers of one shadow."""

    def __init__(self, shadow: Shadow, training: bool):
        self.memory = Memory(shadow.graph, training)
        self.rows = Rows(Indices(self.memory, sizes_of(shadow.graph)))
        self.products = Products(self.rows)

    def candidates(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, Callable[[], Match | Loop]]]:
        """(anchor of the report, its proof) of everything that could be an expert layer."""
        for anchor in self.second_products(graph):
            yield anchor, partial(self.match, anchor)
        loops = Loops(self.rows)
        for ids, masks in loops.find(graph):
            yield masks[min(masks)], partial(loops.prove, ids, masks)

    def second_products(self, graph: fx.Graph) -> list[fx.Node]:
        """Products by expert whose rows come from another one, and those that feed none: all but the first of pairs."""
        candidates = [n for n in graph.nodes if self.products.is_candidate(n)]
        known = set(candidates)
        feeding = {n: self._sources(n, known) for n in candidates}
        first = set().union(*feeding.values()) if feeding else set()
        return [n for n in candidates if feeding[n] or n not in first]

    def _sources(self, product: fx.Node, candidates: set[fx.Node]) -> set[fx.Node]:
        """Products that the rows of this one are computed from, through elementwise operators and views."""
        found, seen, todo = set(), set(), [a for a in product.args[:2] if is_tensor(a)]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in candidates:
                found.add(node)
            elif name(node) in _BETWEEN:
                todo += node.all_input_nodes
        return found

    def match(self, anchor: fx.Node) -> Match:
        """The layer that ends in the second product ``anchor``; raises a Refusal."""
        down = self.products.find(anchor)
        assert down is not None
        hidden = Reader(self.products).hidden(down)
        combine = Combine(self.rows, down, hidden)
        combined = combine.walk()
        _enclosed(hidden.region | combine.region, combined.out)
        if (hidden.gate.bias is None) != (hidden.up.bias is None):
            raise Unsupported("only one of gate and up has a bias", anchor)
        return Match(down, hidden, combined, self.rows.indices.shape(down.weight.node)[0][0])


# Operators that lead from the first product's columns to the second product's rows.
_BETWEEN = VIEWS | COPIES | CASTS | set(ARITHMETIC)
_BETWEEN |= {"getitem", "chunk", "split", "split_with_sizes", "tensor_split", "slice", "masked_fill", "tanh", "relu"}


def _enclosed(region: set[fx.Node], out: fx.Node) -> None:
    """Refuses a layer of which a value is read outside it: the operator does not keep it."""
    for node in region:
        if node.meta.get("dsinfra_returned") or any(u not in region and u is not out for u in readers(node)):
            raise IntermediateUsed(f"`{node.name}` inside the expert layer is used outside it", node)


# ------------------------------------------------------------------ writing


class Plan:
    """Dynamo nodes of one layer's operands, in front of the place of its result."""

    def __init__(self, binding: Binding, place: Place, match: Match, joiner: Joiner):
        hidden, out = match.hidden, match.combined.out

        def held(node: fx.Node | None) -> fx.Node | None:
            return None if node is None else binding.held(place, node, out)

        first = [hidden.gate] if hidden.joint else [hidden.gate, hidden.up]
        self.place, self.joiner = place, joiner
        self.operands = tuple(held(n) for n in (hidden.tokens.x, match.ids, match.combined.weight))
        self.gate_up = tuple(held(c.product.weight.node) for c in first)
        self.swapped = tuple(c.product.weight.swapped for c in first)
        self.b_gate_up = tuple(held(c.bias) for c in first if c.bias is not None)
        self.down, self.down_swapped = held(match.down.weight.node), match.down.weight.swapped
        self.b_down = held(match.combined.bias)
        activation = hidden.activation
        self.settings = (activation.kind, hidden.interleaved, activation.alpha, activation.limit)
        self.top_k = hidden.tokens.top_k

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and vars(self) == vars(other)

    def build(self, e: Emitter) -> tuple[fx.Node, list[tuple[Place, fx.Node]]]:
        """The operator and what it replaces."""
        x, ids, weight = self.operands
        ids, weight = (_by_token(e, node, self.top_k) for node in (ids, weight))
        gate_up, b_gate_up = self._first(e)
        down = _weight(e, self.down, self.down_swapped)
        y = e.call(
            torch.ops.dsinfra.experts.default, x, ids, weight, gate_up, down, b_gate_up, self.b_down, *self.settings
        )
        return y, [(self.place, y)]

    def _first(self, e: Emitter) -> tuple[fx.Node, fx.Node | None]:
        """(gate and up as one weight [E, 2F, D], their biases)."""
        biases = self.b_gate_up
        if len(self.gate_up) == 1:
            return _weight(e, self.gate_up[0], self.swapped[0]), biases[0] if biases else None
        rows = hint(self.operands[0].meta["example_value"].shape[0]) * self.top_k
        joined = self.joiner.joined(e, self.place, self.gate_up, self.swapped, rows)
        return joined, e.call(aten.cat.default, list(biases), 1) if biases else None


class LoopPlan:
    """As :class:`Plan`, for a loop over experts."""

    def __init__(self, binding: Binding, place: Place, loop: Loop, joiner: Joiner):
        def part(of: Part) -> tuple[tuple[fx.Node, ...], bool, bool]:
            nodes = of.nodes if of.whole is None else (of.whole,)
            return tuple(binding.held(place, n, loop.out) for n in nodes), of.swapped, of.whole is not None

        self.place, self.joiner = place, joiner
        self.operands = tuple(binding.held(place, n, loop.out) for n in (loop.hidden.tokens.x, loop.ids, loop.weight))
        self.weights = tuple(part(p) for p in (*loop.gate_up, loop.down))
        self.biases = tuple(part(p) for p in (*loop.b_gate_up, loop.b_down) if p is not None)
        activation = loop.hidden.activation
        self.settings = (activation.kind, loop.hidden.interleaved, activation.alpha, activation.limit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoopPlan) and vars(self) == vars(other)

    def build(self, e: Emitter) -> tuple[fx.Node, list[tuple[Place, fx.Node]]]:
        """The operator and what it replaces."""
        parts = (*self.weights, *self.biases)
        if len({whole for *_, whole in parts}) != 1 or 0 < len(self.biases) != len(self.weights):
            raise ExpertWeights("some of the experts' weights are slices of one tensor, others their own")
        if parts[0][2]:
            gate_up, down, *biases = self._slices(e)
        else:
            kinds = [(nodes, swapped) for nodes, swapped, _ in self.weights]
            gate_up, down, *biases = self.joiner.stacked(e, self.place, kinds, [nodes for nodes, *_ in self.biases])
        y = e.call(torch.ops.dsinfra.experts.default, *self.operands, gate_up, down, *biases, *self.settings)
        return y, [(self.place, y)]

    def _slices(self, e: Emitter) -> tuple[fx.Node | None, ...]:
        first, (down, down_swapped, _) = self.weights[:-1], self.weights[-1]
        if len(first) == 1:
            gate_up = _weight(e, first[0][0][0], first[0][1])
        else:
            rows = (
                hint(self.operands[0].meta["example_value"].shape[0]) * self.operands[1].meta["example_value"].shape[1]
            )
            pair = (first[0][0][0], first[1][0][0]), (first[0][1], first[1][1])
            gate_up = self.joiner.joined(e, self.place, *pair, rows)
        biases = [nodes[0] for nodes, *_ in self.biases]
        b_gate_up = e.call(aten.cat.default, biases[:-1], 1) if len(biases) == 3 else biases[0] if biases else None
        return gate_up, _weight(e, down[0], down_swapped), b_gate_up, biases[-1] if biases else None


def _by_token(e: Emitter, node: fx.Node, top_k: int) -> fx.Node:
    """As [T, K]."""
    shape = node.meta["example_value"].shape
    whole = len(shape) == 2 and isinstance(shape[1], int) and shape[1] == top_k
    return node if whole else e.call(aten.reshape.default, node, [-1, top_k])


def _weight(e: Emitter, node: fx.Node, swapped: bool) -> fx.Node:
    return e.call(aten.transpose.int, node, 1, 2) if swapped else node


def run(
    shadow: Shadow, training: bool, prepared: Prepared | None = None
) -> tuple[PassRecord, list[Written], list[fx.Node]]:
    """Rewrites every provable expert layer; -> the record, what was written, and the ids of all layers looked at."""
    record, written, ids = PassRecord(NAME), [], []
    recognizer = Recognizer(shadow, training)
    binding, joiner = Binding(shadow, recognizer.memory), Joiner(prepared, training)
    plans: dict[fx.Node, list[tuple[Plan | LoopPlan, fx.Node, Site]]] = defaultdict(list)
    for anchor, prove in recognizer.candidates(shadow.graph):
        try:
            match = prove()
            ids.append(match.ids)
            place = binding.place(match.out)
            plan = (Plan if isinstance(match, Match) else LoopPlan)(binding, place, match, joiner)  # type: ignore[arg-type]
            site = Site("experts", module_path(anchor), source_line(anchor), True, form=match.describe())
            plans[place.node].append((plan, anchor, site))
        except Refusal as refusal:
            record.sites.append(refused(anchor, refusal))
        except Exception as error:  # a fault of ours costs this site, not the others
            record.sites.append(refused(anchor, Unsupported(f"the analysis raised {type(error).__name__}: {error}")))
    for found in plans.values():
        (plan, anchor, _), sites = found[0], [site for *_, site in found]
        try:
            if any(other != plan for other, *_ in found):
                raise UnboundValue("the runs of one shared body bind to different values", anchor)
            written.append(write(plan.place, sites, plan.build))
            for site in sites:
                site.decision = joiner.said.get(plan.place.node, "")
        except Refusal as refusal:
            sites = [refused(anchor, refusal, site) for _, anchor, site in found]
        record.sites.extend(sites)
    for module in {w.module for w in written}:
        module.graph.lint()
        module.recompile()
    return record, written, ids


def refused(anchor: fx.Node, refusal: Refusal, site: Site | None = None, kind: str = "experts") -> Site:
    """Report line of a site that stays as it was."""
    site = site or Site(kind, module_path(anchor), "", False)
    site.matched = False
    site.source = refusal.source(anchor)
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint
    site.decision = "left to Inductor"
    return site
