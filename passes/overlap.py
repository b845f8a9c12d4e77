"""overlap: the order of a graph's nodes in which communication runs under computation.

A graph is a DAG over two resources. *Compute* is one stream that runs what it is given one after the other;
*communication* is another, which a start operator hands work to and a wait operator of the compute stream waits for:

    compute   attn A | attn B        | wait A, experts A | wait B, experts B | ...
    comm               dispatch A    | dispatch B        | combine A         | ...

:func:`order` is a list scheduler: of the nodes whose inputs exist it issues, first, what costs nothing and what begins
communication; then the compute node that wouldn't make the stream wait, the one with the longest path behind it first.
While communication runs, kernels have `SMS - comm_sms` multiprocessors and take longer by that ratio. *Exact*: only
the order changes; reads and writes of one memory, random draws and exchanges keep theirs (ranks that exchange in
different orders would read each other's rows wrongly, and costs may differ between ranks). :func:`simulate` is the same
model over an order that is given, so that what is predicted for two orders can be compared.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from dscompile.passes.graph import aliased_argument, written_arguments

if TYPE_CHECKING:
    import networkx as nx

COMPUTE, COMM = "compute", "comm"
SMS = 132  # multiprocessors of an H100
Cost = Callable[[fx.Node], tuple[str, float]]  # node -> (resource, microseconds)


@dataclass(frozen=True)
class Span:
    """One node on the timeline, in microseconds."""

    node: fx.Node
    row: str
    start: float
    end: float


@dataclass
class Timeline:
    """What a sequence of nodes would do; spans of nodes that cost nothing are left out."""

    spans: list[Span] = field(default_factory=list)
    total: float = 0.0

    def busy(self, row: str) -> float:
        return sum(span.end - span.start for span in self.spans if span.row == row)

    @property
    def hidden(self) -> float:
        """The part of communication during which the compute stream works; 1 where there is none."""
        comm = [(s.start, s.end) for s in self.spans if s.row == COMM]
        work = [(s.start, s.end) for s in self.spans if s.row == COMPUTE]
        total = sum(end - start for start, end in comm)
        return _common(comm, work) / total if total else 1.0

    @property
    def idle(self) -> float:
        """The part of the whole time in which the compute stream waits."""
        return 1.0 - self.busy(COMPUTE) / self.total if self.total else 0.0


def _common(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    """Time that lies in an interval of both lists; each is sorted and without overlaps."""
    found, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        found += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found


class Machine:
    """Both streams as they stand after the nodes that were issued."""

    def __init__(self, cost: Cost, comm_sms: int = 0):
        if not 0 <= comm_sms < SMS:
            raise ValueError(f"comm_sms is {comm_sms}: communication can have 0 to {SMS - 1} of {SMS} multiprocessors")
        self.cost, self.speed = cost, (SMS - comm_sms) / SMS
        self.free = {COMPUTE: 0.0, COMM: 0.0}
        self.ends: dict[fx.Node, float] = {}
        self.timeline = Timeline()
        self.comm: list[tuple[float, float]] = []

    def ready(self, node: fx.Node) -> float:
        """When what the node reads exists."""
        return max((self.ends.get(n, 0.0) for n in node.all_input_nodes), default=0.0)

    def issue(self, node: fx.Node) -> None:
        row, us = self.cost(node)
        if us == 0:
            self.ends[node] = self.ready(node)
            return
        start = max(self.free[row], self.ready(node))
        if row == COMM:
            end = start + us
            self.comm.append((start, end))
        else:
            end = self._end(start, us)
        self.free[row] = self.ends[node] = end
        self.timeline.spans.append(Span(node, row, start, end))
        self.timeline.total = max(self.timeline.total, end)

    def _end(self, start: float, us: float) -> float:
        """When `us` of computation end that begin at `start`: slower under communication."""
        now = start
        for begin, end in self.comm:
            if end <= now:
                continue
            if now < begin:
                if us <= begin - now:
                    return now + us
                us -= begin - now
                now = begin
            if us <= (end - now) * self.speed:
                return now + us / self.speed
            us -= (end - now) * self.speed
            now = end
        return now + us


def simulate(nodes: Iterable[fx.Node], cost: Cost, comm_sms: int = 0) -> Timeline:
    """The timeline of nodes that are issued in this order."""
    machine = Machine(cost, comm_sms)
    for node in nodes:
        machine.issue(node)
    return machine.timeline


# ------------------------------------------------------------------ the DAG


def dag(graph: fx.Graph, comm_order: Sequence[fx.Node]) -> nx.DiGraph:
    """An edge a -> b where b must stay behind a: it reads a, or the order of both can be observed.

    Raises:
        ValueError: ``comm_order`` asks for an order that data doesn't allow.
    """
    import networkx as nx  # a tenth of a second, for graphs that are split alone

    found = nx.DiGraph()
    last: dict[fx.Node, fx.Node] = {}  # memory -> what wrote it last
    readers: dict[fx.Node, list[fx.Node]] = {}  # memory -> what read it since
    ordered: fx.Node | None = None  # the last one with an effect that isn't memory
    for node in graph.nodes:
        found.add_node(node)
        found.add_edges_from((n, node) for n in node.all_input_nodes)
        written = {root(n) for n in written_arguments(node)}
        for memory in {root(n) for n in node.all_input_nodes} | written:
            if memory in last:
                found.add_edge(last[memory], node)
            if memory in written:
                found.add_edges_from((n, node) for n in readers.pop(memory, ()) if n is not node)
                last[memory] = node
            else:
                readers.setdefault(memory, []).append(node)
        if _has_effect(node) and not written:
            if ordered is not None:
                found.add_edge(ordered, node)
            ordered = node
    found.add_edges_from(zip(comm_order, comm_order[1:], strict=False))
    if not nx.is_directed_acyclic_graph(found):
        raise ValueError("the order that was asked for its exchanges is not one that the graph's data allows")
    return found


def root(node: fx.Node) -> fx.Node:
    """The node whose memory this one shares."""
    above = aliased_argument(node)
    while above is not None:
        node, above = above, aliased_argument(above)
    return node


def _has_effect(node: fx.Node) -> bool:
    """True for random draws, and for what runs a body or a module of its own."""
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr", "output")
    return draws(node) or isinstance(node.target, torch._ops.HigherOrderOperator)


def draws(node: fx.Node) -> bool:
    """True for operators that draw random numbers; an attention without dropout draws none."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in declared}
    given |= {a.name: value for a, value in zip(declared, node.args, strict=False)} | dict(node.kwargs)
    return given.get("dropout_p", 1.0) != 0.0


# ------------------------------------------------------------------ the scheduler


def order(
    graph: fx.Graph,
    cost: Cost,
    *,
    comm_order: Sequence[fx.Node] | None = None,
    comm_sms: int = 0,
    memory: int | None = None,
) -> list[fx.Node]:
    """All nodes in an order that hides communication; :func:`apply` puts them in it.

    Args:
        graph: values in ``meta["val"]`` or ``["example_value"]`` give sizes of results, where memory is bounded.
        cost: of each node, ("compute" or "comm", microseconds).
        comm_order: the order of all "comm" nodes, the same on every rank; None: the graph's own.
        comm_sms: multiprocessors that communication takes from kernels.
        memory: bytes of results that may be alive at once; beyond them, what frees memory goes first.

    Raises:
        ValueError: the order of exchanges contradicts the graph's data.
    """
    costs = {node: cost(node) for node in graph.nodes}
    if comm_order is None:
        comm_order = [node for node in graph.nodes if costs[node][0] == COMM]
    edges = dag(graph, comm_order)
    behind = _behind(edges, costs)
    place = {node: i for i, node in enumerate(graph.nodes)}
    waiting = {node: edges.in_degree(node) for node in graph.nodes}
    machine, live = Machine(costs.__getitem__, comm_sms), Live()
    now: list[tuple[int, fx.Node]] = []  # a heap of what is issued at once, by place
    later: list[fx.Node] = []
    found: list[fx.Node] = []

    def at_once(node: fx.Node) -> bool:
        row, us = costs[node]
        return row == COMM or (us == 0 and machine.ready(node) <= machine.free[COMPUTE])

    def add(node: fx.Node) -> None:
        if at_once(node):
            heapq.heappush(now, (place[node], node))
        else:
            later.append(node)

    for node in graph.nodes:
        if not waiting[node]:
            add(node)
    while now or later:
        if not now:  # what costs nothing and would have waited for communication, which has ended since
            now = [(place[n], n) for n in later if at_once(n)]
            later = [n for n in later if not at_once(n)]
            heapq.heapify(now)
        if now:
            node = heapq.heappop(now)[1]
        else:
            node = min(later, key=lambda n: (*_rank(n, machine, behind[n], live, memory), place[n]))
            later.remove(node)
        machine.issue(node)
        live.issue(node)
        found.append(node)
        for follower in edges.successors(node):
            waiting[follower] -= 1
            if not waiting[follower]:
                add(follower)
    found.sort(key=lambda n: 0 if n.op == "placeholder" else 2 if n.op == "output" else 1)  # stable
    return found


def _rank(node: fx.Node, machine: Machine, behind: float, live: Live, memory: int | None) -> tuple[bool, float, float]:
    """Smallest first: what memory allows, what doesn't stall, the longest path behind it."""
    grows = live.grows(node) if memory is not None else 0
    stall = max(0.0, machine.ready(node) - machine.free[COMPUTE])
    return grows > 0 and live.bytes + grows > memory, stall, -behind  # type: ignore[operator]


def _behind(edges: nx.DiGraph, costs: dict[fx.Node, tuple[str, float]]) -> dict[fx.Node, float]:
    """Of each node, the microseconds of the longest path that begins with it."""
    import networkx as nx

    found: dict[fx.Node, float] = {}
    for node in reversed(list(nx.topological_sort(edges))):
        found[node] = costs[node][1] + max((found[n] for n in edges.successors(node)), default=0.0)
    return found


class Live:
    """Bytes of results that later nodes still read; what shares memory with its input holds none."""

    def __init__(self) -> None:
        self.bytes = 0
        self._left: dict[fx.Node, int] = {}  # users that weren't issued yet

    def issue(self, node: fx.Node) -> None:
        self.bytes += self.grows(node)
        for n in node.all_input_nodes:
            self._left[n] = self._left.get(n, len(n.users)) - 1

    def grows(self, node: fx.Node) -> int:
        freed = sum(nbytes(n) for n in node.all_input_nodes if self._left.get(n, len(n.users)) == 1)
        return nbytes(node) - freed


def nbytes(node: fx.Node) -> int:
    """Of a result that has memory of its own; inputs of the graph are not counted."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or aliased_argument(node) is not None:
        return 0
    return int(value.numel()) * value.itemsize if isinstance(value.numel(), int) else 0


def apply(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Puts the nodes of a graph in this order.

    Raises:
        ValueError: it isn't an order of these nodes.
    """
    if len(nodes) != len(graph.nodes) or set(nodes) != set(graph.nodes):
        raise ValueError(f"{len(nodes)} nodes were given for a graph of {len(graph.nodes)}: each must be there once")
    for node in reversed(nodes):
        graph._root.append(node)
    graph.lint()
