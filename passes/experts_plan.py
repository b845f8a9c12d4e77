"""The operands of one proved expert layer as nodes of Dynamo's graph, and the call that is written from them.

A plan is made before anything is written and compared with those of other runs of the same body; it fails where a value
has no node in front of the layer's result, or is overwritten before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dscompile.passes.absorb import hint
from dscompile.passes.emit import Emitter
from dscompile.passes.experts_apart import SAID, multiplied_apart, refuse_apart
from dscompile.passes.experts_bind import Binding, Place
from dscompile.passes.experts_combine import Combined
from dscompile.passes.experts_joined import Joiner
from dscompile.passes.experts_loop import Loop, Part
from dscompile.passes.experts_mlp import Hidden, Product
from dscompile.passes.refusals import ExpertWeights, SeparateGateUp

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """A proved expert layer; ``experts`` of them."""

    down: Product
    hidden: Hidden
    combined: Combined
    experts: int
    wraps: bool = False  # ids below 0 count from the last expert
    routed: fx.Node | None = None  # ids of which those past the last expert add no product, if not the products' own

    @property
    def ids(self) -> fx.Node:
        return self.routed or self.down.source

    @property
    def out(self) -> fx.Node:
        return self.combined.out

    def describe(self) -> str:
        form, hidden = "grouped" if self.down.grouped else "batched", self.hidden
        parts = "" if hidden.joint else ", gate and up apart"
        sizes = f"E {self.experts}, top-{hidden.tokens.top_k}, F {hidden.gate.count}"
        more = ", later ids return their tokens" if self.combined.returned is not None else ""
        return f"{form}, {sizes}, {hidden.activation.kind}{parts}{more}"


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
        self.wrapped = match.experts if match.wraps else 0
        self.returned = match.experts if match.combined.returned is not None else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and vars(self) == vars(other)

    def build(self, e: Emitter) -> tuple[fx.Node, list[tuple[Place, fx.Node]]]:
        """The operator and what it replaces."""
        x, ids, weight = self.operands
        ids, weight = (_by_token(e, node, self.top_k) for node in (ids, weight))
        if self.returned:  # one rounding for both terms
            x = e.cast(x, torch.promote_types(x.meta["example_value"].dtype, torch.float32))
        if self.wrapped:
            own = e.call(aten.add.Tensor, ids, self.wrapped)
            ids = e.call(aten.where.self, e.call(aten.lt.Scalar, ids, 0), own, ids)
        down = _weight(e, self.down, self.down_swapped)
        try:
            gate_up, b_gate_up = self._first(e)
        except SeparateGateUp as refusal:
            refuse_apart(refusal, self.settings[0], bool(self.b_gate_up) or self.b_down is not None)
            gate, up = (_weight(e, w, s) for w, s in zip(self.gate_up, self.swapped, strict=True))
            y, product = multiplied_apart(e, (x, ids, weight), (gate, up, down), self.settings[0])
            self.joiner.said[self.place.node] = SAID
            return product, [(self.place, self._with_returned(e, y, (x, ids, weight)))]
        y = e.call(
            torch.ops.dsinfra.experts.default, x, ids, weight, gate_up, down, b_gate_up, self.b_down, *self.settings
        )
        return y, [(self.place, self._with_returned(e, y, (x, ids, weight)))]

    def _with_returned(self, e: Emitter, y: fx.Node, routed: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
        """``y + x * (weights of the ids at or past E)``, where those experts return their tokens."""
        if not self.returned:
            return y
        x, ids, weight = routed
        return _plus_tokens(e, y, x, weight, e.call(aten.ge.Scalar, ids, self.returned))

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
        self.experts, self.identities = loop.experts, loop.identities

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoopPlan) and vars(self) == vars(other)

    def build(self, e: Emitter) -> tuple[fx.Node, list[tuple[Place, fx.Node]]]:
        """The operator and what it replaces."""
        parts = (*self.weights, *self.biases)
        if len({whole for *_, whole in parts}) != 1 or 0 < len(self.biases) != len(self.weights):
            raise ExpertWeights("some of the experts' weights are slices of one tensor, others their own")
        if parts[0][2]:
            try:
                gate_up, down, *biases = self._slices(e)
            except SeparateGateUp as refusal:
                return self._apart(e, refusal)
        else:
            kinds = [(nodes, swapped) for nodes, swapped, _ in self.weights]
            gate_up, down, *biases = self.joiner.stacked(e, self.place, kinds, [nodes for nodes, *_ in self.biases])
        y = e.call(torch.ops.dsinfra.experts.default, *self.operands, gate_up, down, *biases, *self.settings)
        return y, [(self.place, self._with_identities(e, y) if self.identities else y)]

    def _apart(self, e: Emitter, refusal: SeparateGateUp) -> tuple[fx.Node, list[tuple[Place, fx.Node]]]:
        """As :meth:`build`, gate and up being slices of two weights that are not joined."""
        refuse_apart(refusal, self.settings[0], bool(self.biases))
        gate, up, down = (self._slice(e, nodes[0], swapped) for nodes, swapped, _ in self.weights)
        y, product = multiplied_apart(e, self.operands, (gate, up, down), self.settings[0])
        self.joiner.said[self.place.node] = SAID
        return product, [(self.place, self._with_identities(e, y) if self.identities else y)]

    def _slice(self, e: Emitter, node: fx.Node, swapped: bool = False) -> fx.Node:
        """The experts' entries of a weight that may hold more, as [E, out, in]."""
        return _weight(e, e.narrow(node, 0, 0, self.experts), swapped)

    def _with_identities(self, e: Emitter, y: fx.Node) -> fx.Node:
        """``y + x * (weights of the ids behind the experts')``."""
        x, ids, weight = self.operands
        behind = e.call(aten.ge.Scalar, ids, self.experts)
        known = e.call(aten.lt.Scalar, ids, self.experts + self.identities)
        return _plus_tokens(e, y, x, weight, e.call(aten.logical_and.default, behind, known))

    def _slices(self, e: Emitter) -> tuple[fx.Node | None, ...]:
        first, (down, down_swapped, _) = self.weights[:-1], self.weights[-1]
        if len(first) == 1:
            gate_up = self._slice(e, first[0][0][0], first[0][1])
        else:
            tokens, top_k = (self.operands[i].meta["example_value"].shape[i] for i in (0, 1))
            pair = tuple(e.narrow(nodes[0], 0, 0, self.experts) for nodes, *_ in first)
            swapped = tuple(swapped for _, swapped, _ in first)
            gate_up = self.joiner.joined(e, self.place, pair, swapped, hint(tokens) * top_k)
        biases = [e.narrow(nodes[0], 0, 0, self.experts) for nodes, *_ in self.biases]
        b_gate_up = e.call(aten.cat.default, biases[:-1], 1) if len(biases) == 3 else biases[0] if biases else None
        return gate_up, self._slice(e, down[0], down_swapped), b_gate_up, biases[-1] if biases else None


def _plus_tokens(e: Emitter, y: fx.Node, x: fx.Node, weight: fx.Node, returned: fx.Node) -> fx.Node:
    """``y + x * sum_k weight * returned``."""
    own = e.call(aten.mul.Tensor, weight, returned)
    total = e.call(aten.sum.dim_IntList, own, [-1], True)
    return e.call(aten.add.Tensor, y, e.call(aten.mul.Tensor, x, total))


def _by_token(e: Emitter, node: fx.Node, top_k: int) -> fx.Node:
    """As [T, K]."""
    shape = node.meta["example_value"].shape
    whole = len(shape) == 2 and isinstance(shape[1], int) and shape[1] == top_k
    return node if whole else e.call(aten.reshape.default, node, [-1, top_k])


def _weight(e: Emitter, node: fx.Node, swapped: bool) -> fx.Node:
    return e.call(aten.transpose.int, node, 1, 2) if swapped else node
