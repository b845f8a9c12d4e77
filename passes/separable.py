"""separable: which dimension of every value of a graph counts the requests, shown operator by operator.

Values of a functional ATen graph are *shared* (they don't depend on any request: weights, position tables, masks of the
sequence alone), or have an :class:`Axis`: the dimension in which request b has its own part, computed from request b's
part of the inputs alone. Inputs with an axis are given; each operator's rule (``microbatch_rules.py``) says where the
axis of its result is, or that it *mixes* requests. If no operator between inputs and a value mixes, the value of half
of the requests is the half of the value: a graph may run on each half by itself.

A dimension may count more than requests: tokens [B*S, D] have Axis(dim=0, before=1, after=S), since request b owns
rows b*S to (b+1)*S. What an exchange delivers to a rank is :class:`Private`: rows of whichever ranks sent some, of no
size in common with the tokens; it belongs to the exchange, may be computed with row by row, and goes back by it.

*Requests* may be anything that is independent: where inputs hold one request each, tokens are tried in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.passes.graph import called
from dscompile.passes.refusals import Refusal


@dataclass(frozen=True)
class Axis:
    """Dimension ``dim`` of a tensor has size before * B * after; part b is what has index b in the middle."""

    dim: int
    before: int = 1
    after: int = 1


@dataclass(frozen=True)
class Private:
    """Rows of an exchange whose tokens have this axis."""

    tokens: Axis


@dataclass(frozen=True)
class Half:
    """In the arguments of a rule's result: a shared tensor, of which the half that belongs to the requests is read."""

    node: fx.Node
    axis: Axis


@dataclass(frozen=True)
class Applied:
    """What a rule found: the state of the result (a tuple of them for several), and the arguments on one half."""

    state: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Mixes(Refusal):
    """An operator computes with several requests at once, or has no rule that says it doesn't."""

    hint = "requests must not depend on each other; a missing rule belongs into passes/microbatch_rules.py"


State = Any  # None (shared), Axis, Private, Mixes, or a tuple of these


@dataclass
class Analysis:
    """States of all nodes; ``applied`` holds those that aren't shared and don't mix."""

    batch: int
    states: dict[fx.Node, State]
    applied: dict[fx.Node, Applied]


def analyse(graph: fx.Graph, seeds: Mapping[fx.Node, Axis], batch: int) -> Analysis:
    """Propagates the axis through every node; a node that mixes has its refusal as state, and so has what reads it.

    Args:
        graph: functional, ATen and ``dsinfra`` operators, with ``meta["val"]``; sizes are numbers.
        seeds: placeholders that hold requests, and where.
        batch: B, even.
    """
    from dscompile.passes import microbatch_rules

    found = Analysis(batch, {}, {})
    for node in graph.nodes:
        if node.op == "placeholder":
            found.states[node] = seeds.get(node)
            continue
        read = [found.states[n] for n in node.all_input_nodes]
        mixed = next((m for state in read for m in _flat(state) if isinstance(m, Mixes)), None)
        if node.op == "output" or all(part is None for state in read for part in _flat(state)):
            found.states[node] = None
        elif mixed is not None and called(node) != "getitem":  # whose rule looks at the item
            found.states[node] = mixed
        else:
            try:
                found.applied[node] = microbatch_rules.apply(node, found.states, batch)
                found.states[node] = found.applied[node].state
            except Mixes as refusal:
                found.states[node] = refusal
    return found


def prove(graph: fx.Graph, seeds: Mapping[fx.Node, Axis], batch: int) -> Analysis:
    """As :func:`analyse`, for the whole graph.

    Raises:
        Mixes: the first operator that mixes, with its node and so its source line.
    """
    found = analyse(graph, seeds, batch)
    for state in found.states.values():
        for part in _flat(state):
            if isinstance(part, Mixes):
                raise part
    return found


def half(shape: torch.Size | tuple[int, ...], axis: Axis) -> list[int]:
    """A shape with half of the requests."""
    return [size // 2 if dim == axis.dim else size for dim, size in enumerate(shape)]


def value(node: fx.Node) -> Any:
    return node.meta["val"]


def _flat(state: State) -> tuple[State, ...]:
    return state if isinstance(state, tuple) else (state,)
