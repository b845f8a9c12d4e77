"""Writes the graph of two micro-batches: the nodes of a region twice, each on half of the requests, and the rest once.

    x ──slice──► first half of the region ──┐
      └─slice──► second half of the region ─┴─cat──► the rest

Slices are views. The region ends where the fewest bytes leave it, usually at the sum of a residual: Inductor computes
both halves of such a sum straight into their places in the joined tensor, so nothing is copied. Every node of a half is
run on fake tensors as it is written, and must have half of the shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from dscompile.lowering import inductor
from dscompile.passes.microbatch_rules import SLOT, First
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.refusals import Unsupported
from dscompile.passes.separable import Analysis, Axis, Half, Mixes, half, value

aten = torch.ops.aten
EXCHANGE = ("dispatch_start", "dispatch_wait", "combine_start", "combine_wait")
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


def region(graph: fx.Graph, analysis: Analysis) -> set[fx.Node]:
    """Nodes that are computed by halves: what exchanges depend on, and what follows until the fewest bytes leave.

    Raises:
        Mixes: something that an exchange depends on mixes requests.
    """
    found: set[fx.Node] = set()
    todo = [node for node in graph.nodes if operator_name(node) in EXCHANGE]
    while todo:
        node = todo.pop()
        state = analysis.states[node]
        if isinstance(state, Mixes):
            raise state
        if node in analysis.applied and node not in found:
            found.add(node)
            todo += node.all_input_nodes
    best, least = set(found), _leaving(found, analysis)
    for node in graph.nodes:
        reads = (n in found or n.op == "placeholder" or analysis.states[n] is None for n in node.all_input_nodes)
        if node in analysis.applied and node not in found and all(reads):
            found.add(node)
            leaving = _leaving(found, analysis)
            if leaving < least:
                best, least = set(found), leaving
    if not math.isfinite(least):
        raise Unsupported("what leaves the two micro-batches can't be joined in one dimension")
    return best


def _leaving(found: set[fx.Node], analysis: Analysis) -> float:
    """Bytes of the results that nodes outside read."""
    total = 0.0
    for node in found:
        if any(user not in found for user in node.users):
            state, held = analysis.states[node], value(node)
            joins = isinstance(state, Axis) and state.before == 1 and isinstance(held, torch.Tensor)
            total += held.numel() * held.itemsize if joins else math.inf
    return total


class Split:
    """The new graph; ``halves[i][node]`` is a node's copy in micro-batch i, ``whole[node]`` that of all requests."""

    def __init__(self, traced: fx.GraphModule, module: fx.GraphModule, analysis: Analysis, inside: set[fx.Node]):
        self.analysis, self.inside = analysis, inside
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, fx.Node] = {}
        self.halves: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})
        self.mode = detect_fake_mode([value(n) for n in traced.graph.nodes if n.op == "placeholder"])
        self._slices: dict[tuple[fx.Node, int, int], fx.Node] = {}
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        for node, known in zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True):
            self.whole[node] = inductor.copied_input(self.graph, known)
            self.whole[node].meta["val"] = value(node)
        self._write(traced, module)

    def _write(self, traced: fx.GraphModule, module: fx.GraphModule) -> None:
        """One micro-batch after the other, then the rest."""
        states = self.analysis.states
        rest: list[fx.Node] = []
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                self.whole[node] = self._constant(node, traced, module)
            elif node in self.inside:
                self._half(node, 0)
            elif node.op == "output" or states[node] is not None:
                rest.append(node)
            elif node.op != "placeholder":
                self._once(node)
        for node in traced.graph.nodes:
            if node in self.inside:
                self._half(node, 1)
        for node in rest:
            if node.op != "placeholder":
                self._once(node)
        self.graph.lint()

    def starts(self) -> list[fx.Node]:
        """What begins communication, the micro-batches by turns: an order that is the same on every rank."""
        each = [[self.halves[i][n] for n in self.inside if operator_name(n).endswith("_start")] for i in range(2)]
        each = [sorted(nodes) for nodes in each]
        return [node for pair in zip(*each, strict=True) for node in pair]

    # -------------------------------------------------------------- one node

    def _once(self, node: fx.Node) -> None:
        for n in node.all_input_nodes:
            if n not in self.whole:
                self.whole[n] = self._joined(n)
        self.whole[node] = self.graph.node_copy(node, self.whole.__getitem__)
        if "val" in node.meta:
            self.whole[node].meta["example_value"] = value(node)

    def _half(self, node: fx.Node, i: int) -> None:
        applied = self.analysis.applied[node]

        def part(arg: Any) -> Any:
            if isinstance(arg, Half):
                return self._slice(arg.node, arg.axis, 0 if isinstance(arg, First) else i)
            if not isinstance(arg, fx.Node):
                return arg
            if arg.op == "placeholder" and self.analysis.states[arg] is not None:
                return self._slice(arg, self.analysis.states[arg], i)
            return self.halves[i][arg] if arg in self.inside else self.whole[arg]

        leaf = {"is_leaf": lambda x: isinstance(x, (fx.Node, Half))}
        args = pytree.tree_map(part, tuple(applied.args), **leaf)
        kwargs = pytree.tree_map(part, dict(applied.kwargs), **leaf)
        if operator_name(node) in EXCHANGE:
            args = (*args[:SLOT], 2 * args[SLOT] + i)  # both micro-batches' exchanges are open at once
        made = self._call(node, node.target, args, kwargs)
        self._check(node, made)
        self.halves[i][node] = made

    def _check(self, node: fx.Node, made: fx.Node) -> None:
        states = self.analysis.states[node]
        pairs: Iterable[Any] = [(value(node), value(made), states)]
        if isinstance(states, tuple):
            pairs = zip(value(node), value(made), states, strict=True)
        for old, new, state in pairs:
            if isinstance(state, Axis) and isinstance(old, torch.Tensor) and list(new.shape) != half(old.shape, state):
                raise Unsupported(f"half of `{node.name}` {list(old.shape)} has shape {list(new.shape)}", node)

    def _call(self, like: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
        fakes, fake_kwargs = fx.node.map_arg((args, kwargs), value)
        with self.mode, torch.no_grad():
            result = target(*fakes, **fake_kwargs)
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {name: held for name, held in like.meta.items() if name in _KEPT_META}
        node.meta |= {"val": result, "example_value": result}
        return node

    def _slice(self, node: fx.Node, axis: Axis, i: int) -> fx.Node:
        """The half of a value that exists whole."""
        key = node, axis.dim, i
        if key not in self._slices:
            middle = value(node).shape[axis.dim] // 2
            bounds = (axis.dim, i * middle, (i + 1) * middle)
            self._slices[key] = self._call(node, aten.slice.Tensor, (self.whole[node], *bounds), {})
        return self._slices[key]

    def _joined(self, node: fx.Node) -> fx.Node:
        """Both halves of a value."""
        axis = self.analysis.states[node]
        return self._call(node, aten.cat.default, ([self.halves[0][node], self.halves[1][node]], axis.dim), {})

    def _constant(self, node: fx.Node, traced: fx.GraphModule, module: fx.GraphModule) -> fx.Node:
        name = f"_dsinfra_{node.target}"
        setattr(module, name, getattr(traced, str(node.target)))
        made = self.graph.create_node("get_attr", name)
        made.meta = dict(node.meta)
        return made
