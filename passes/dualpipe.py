"""A pipeline stage as graphs: its forward, the two halves of its backward, and a forward and a backward woven into one.

    joint graph  ->  split:  F (weights, x) -> (y, saved)      I (saved, dy) -> (dx, handed)      W (held) -> dweights
    F of one stage + B of another  ->  weave:  one graph, its nodes in the order that a scheduler gives

The joint graph is AOTAutograd's, without mutation. A node belongs to F if no output gradient reaches it; of the rest, I
is what dx depends on and W what is left, which only weights wait for. So any order that respects the edges computes the
same: *exact*, to the bit. W is what fills gaps: a scheduler finds F, I or W in ``node.meta["part"]``.

Refused: orders that aren't one of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

NAME = "dualpipe"

Cost = Callable[[fx.Node], tuple[str, float]]  # -> ("compute" or "comm", microseconds)
Order = Callable[[fx.Graph, Cost], list[fx.Node]]  # -> its nodes in another order

# Calls by which ranks exchange: torch's collectives, and the first word of our exchange's operators.
_COMM = ("_c10d_functional", "_dtensor", "symm_mem")
_EXCHANGES = ("dispatch", "combine")


class OrderError(ValueError):
    """What a scheduler returned is no order of the graph's nodes in which each comes after its inputs."""


@dataclass(frozen=True)
class Split:
    """A stage's graphs. ``F(*primals) -> (y, *saved)``, ``B(*saved, dy) -> (dx, *dweights)``, in one or two steps.

    Attributes:
        infer: F without what is saved, for inference.
        forward, backward: F and B. The nodes of B that are I come first.
        input: I(*saved, dy) -> (dx, *handed).
        weight: W(*held) -> (*dweights).
        held: what W takes: (True, i) is the i-th of I's inputs (saved, dy), (False, i) the i-th of ``handed``.
        weights: the primals whose gradient W gives, by position.
    """

    infer: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    input: fx.GraphModule
    weight: fx.GraphModule
    held: tuple[tuple[bool, int], ...]
    weights: tuple[int, ...]

    def sizes(self) -> dict[str, int]:
        """Number of calls in F, I and W."""
        graphs = {"F": self.forward.graph, "I": self.input.graph, "W": self.weight.graph}
        return {part: sum(node.op == "call_function" for node in graph.nodes) for part, graph in graphs.items()}


def split(joint: fx.GraphModule, x: int) -> Split:
    """Takes a joint graph apart.

    Args:
        joint: (primals, dy) -> (y, gradient of each primal or None), in AOTAutograd's names and order.
        x: which primal is the stage's input.
    """
    graph = joint.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    primals, dy = inputs[:-1], inputs[-1]
    y, *grads = fx.node.map_arg(graph.output_node().args[0], lambda node: node)
    late = _users([dy])
    dx = grads[x]
    weights = tuple(i for i, grad in enumerate(grads) if i != x and isinstance(grad, fx.Node))
    dws = [grads[i] for i in weights]

    critical = _inputs([dx]) & late if isinstance(dx, fx.Node) else set()
    for node in graph.nodes:  # what a call of I returns beside dx is picked from it in I
        if node.target is operator.getitem and node.args[0] in critical:
            critical.add(node)
    needed = _inputs([dx, *dws]) & late
    parts = {n: "F" if n not in late else "I" if n in critical else "W" for n in graph.nodes}
    for node, part in parts.items():
        node.meta["part"] = part

    saved = [n for n in graph.nodes if n not in late and any(user in needed for user in n.users)]
    saved += [n for n in dict.fromkeys([dx, *dws]) if isinstance(n, fx.Node) and n not in late and n not in saved]
    given = [*saved, dy]
    tail = [n for n in graph.nodes if parts[n] == "W" and n in needed]
    handed = [n for n in graph.nodes if n in critical and (n in dws or any(user in tail for user in n.users))]
    held = [n for n in (*given, *handed) if n in dws or any(user in tail for user in n.users)]
    ordered = [*(n for n in graph.nodes if n in critical), *tail]
    return Split(
        _part(joint, primals, graph.nodes, [y]),
        _part(joint, primals, graph.nodes, [y, *saved]),
        _part(joint, given, ordered, [dx, *dws]),
        _part(joint, given, ordered, [dx, *handed]),
        _part(joint, held, ordered, dws),
        tuple((n in given, given.index(n) if n in given else handed.index(n)) for n in held),
        weights,
    )


def weave(
    forward: fx.GraphModule, backward: fx.GraphModule, order: Order | None = None, cost: Cost | None = None
) -> fx.GraphModule:
    """F of one stage and B of another as one graph: (*inputs of F, *inputs of B) -> (*outputs of F, *outputs of B).

    Args:
        order: None: :func:`alternate`. ``cost``: what it is given; None: :func:`unit_cost`.

    Raises:
        OrderError: with the first node that is missing, new, or before one of its inputs.
    """
    graph, held = fx.Graph(), nn.Module()
    copies: list[dict[fx.Node, fx.Node]] = [{}, {}]
    sides = ((forward, "forward", copies[0]), (backward, "backward", copies[1]))
    for module, side, copy in sides:
        for node in module.graph.find_nodes(op="placeholder"):
            copy[node] = graph.placeholder(f"{side}_{node.name}")
            copy[node].meta = dict(node.meta)
    for module, side, copy in sides:
        for node in _calls(module.graph):
            copy[node] = made = graph.node_copy(node, copy.__getitem__)
            if node.op == "get_attr":
                made.target = f"{side}_{str(node.target).replace('.', '_')}"
                setattr(held, made.target, operator.attrgetter(str(node.target))(module))
    outputs = [
        fx.node.map_arg(out, copy.__getitem__)
        for module, _, copy in sides
        for out in module.graph.output_node().args[0]
    ]
    graph.output(tuple(outputs))
    found = (order or alternate)(graph, cost or unit_cost)
    return fx.GraphModule(held, reordered(graph, found))


def alternate(graph: fx.Graph, cost: Cost) -> list[fx.Node]:
    """F against I and then W, each in its own order and at such a pace that both end together."""
    nodes = _calls(graph)
    forward = [n for n in nodes if n.meta.get("part") == "F"]
    backward = [n for n in nodes if n.meta.get("part") != "F"]
    at = {n: (i + 1) / len(part) for part in (forward, backward) for i, n in enumerate(part)}
    return sorted(nodes, key=at.__getitem__)


def unit_cost(node: fx.Node) -> tuple[str, float]:
    """One microsecond a call, of communication if it is a collective's or of our exchange."""
    if node.op != "call_function" or node.target is operator.getitem:
        return "compute", 0.0
    namespace, _, name = str(node.target).partition(".")
    ours = namespace == "dsinfra" and name.startswith(_EXCHANGES)
    return ("comm" if namespace in _COMM or ours else "compute"), 1.0


def reordered(graph: fx.Graph, order: Sequence[fx.Node]) -> fx.Graph:
    """The graph with its calls in this order. Inputs and the output may be in it or not.

    Raises:
        OrderError: see :func:`weave`.
    """
    calls = _calls(graph)
    wanted = [node for node in order if node.op not in ("placeholder", "output")]
    if len(wanted) != len(calls) or set(wanted) != set(calls):
        odd = [n.name for n in calls if n not in set(wanted)] or [n.name for n in wanted if n not in set(calls)]
        raise OrderError(
            f"{len(wanted)} nodes for a graph of {len(calls)}; {odd[0] if odd else 'one of them'} is missing, twice or "
            "of another graph. A scheduler may move nodes and nothing else. Return each node of the graph once."
        )
    made = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    for node in (*(n for n in graph.nodes if n.op == "placeholder"), *wanted, graph.output_node()):
        early = next((n for n in node.all_input_nodes if n not in copy), None)
        if early is not None:
            raise OrderError(
                f"{node.name} comes before {early.name}, which it takes. An order respects every edge of the graph. "
                "Put a node after all of its inputs."
            )
        copy[node] = made.node_copy(node, copy.__getitem__)
    return made


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _inputs(nodes: Iterable[object]) -> set[fx.Node]:
    """These and all that they depend on."""
    found: set[fx.Node] = set()
    todo = [node for node in nodes if isinstance(node, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _users(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These and all that depends on them, the output excepted."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "output":
            found.add(node)
            todo.extend(node.users)
    return found


def _part(
    joint: fx.GraphModule, inputs: Sequence[fx.Node], order: Iterable[fx.Node], outputs: Sequence[object]
) -> fx.GraphModule:
    """The nodes between ``inputs`` and ``outputs``, in ``order``."""
    graph = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copy[node] = graph.placeholder(node.name)
        copy[node].meta = dict(node.meta)
    needed: set[fx.Node] = set()
    todo = [node for node in outputs if isinstance(node, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in needed and node not in copy:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    constants = [node for node in joint.graph.nodes if node.op == "get_attr"]
    for node in dict.fromkeys((*constants, *order)):
        if node in needed and node not in copy:
            copy[node] = graph.node_copy(node, copy.__getitem__)
    graph.output(tuple(copy[n] if isinstance(n, fx.Node) else None for n in outputs))
    return fx.GraphModule(joint, graph)
