"""The graphs of one compilation around each pass, every node's text stored once.

A pass changes few of ten thousand nodes, and a model's layers share their source lines. So a node's line is a *row*,
kept under a number; a graph is a list of runs of such numbers; passes that changed nothing point to the same graph.
``as_dict`` is what ``graphs.json`` holds:

``names``    names of nodes
``rows``     [body, name, type, call, arguments, place] of each distinct line: ``body`` an index into ``bodies``,
             ``name`` into ``names``, ``place`` into ``places`` or -1; ``arguments`` texts and indices into ``names``
``graphs``   [[first row, number of rows], ..] of each distinct graph
``passes``   {pass: {"before" | "after": index into graphs}}
``places``   [index into files, line]
``files``    {"file", "lines": {line: text}}: lines that nodes point at, and two on either side, of readable files
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from dscompile.passes.graph import graph_names, short_name, source_place
from dscompile.passes.provenance import type_of

CONTEXT = 2  # lines on either side of one that a node points at
LONGEST = 400  # characters of a source line
Row = tuple[int, int, str, str, tuple["str | int", ...], int]


class Snapshots:
    """Graphs, as they were when they were added."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._bodies: dict[str, int] = {}
        self._rows: dict[Row, int] = {}
        self._places: dict[tuple[str, int], int] = {}
        self._traces: dict[str, int] = {}
        self._graphs: dict[tuple[tuple[int, int], ...], int] = {}
        self._passes: dict[str, dict[str, int]] = {}

    def add(self, name: str, stage: str, module: fx.GraphModule) -> None:
        """The graph of pass ``name`` ("before" or "after" it), with the bodies of higher-order operators."""
        numbers = [
            self._rows.setdefault(self._row(_index(self._bodies, body), node), len(self._rows))
            for graph, body in graph_names(module).items()
            for node in graph.nodes
        ]
        graph = tuple(_runs(numbers))
        self._passes.setdefault(name, {})[stage] = self._graphs.setdefault(graph, len(self._graphs))

    def _row(self, body: int, node: fx.Node) -> Row:
        kind, call, arguments = parts(node)
        split = arguments.split("\0")  # text, name, text, name, ..
        mixed = tuple(_index(self._names, s) if i % 2 else s for i, s in enumerate(split) if i % 2 or s)
        return body, _index(self._names, node.name), kind, call, mixed, self._place(node)

    def _place(self, node: fx.Node) -> int:
        trace = node.meta.get("stack_trace") or ""
        if trace not in self._traces:
            found = source_place(node)
            self._traces[trace] = -1 if found is None else _index(self._places, found)
        return self._traces[trace]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; source lines are read now."""
        files: dict[str, set[int]] = {}
        for file, line in self._places:
            files.setdefault(file, set()).update(range(max(1, line - CONTEXT), line + CONTEXT + 1))
        order = {file: i for i, file in enumerate(files)}
        return {
            "names": list(self._names),
            "bodies": list(self._bodies),
            "rows": [list(row) for row in self._rows],
            "graphs": [list(graph) for graph in self._graphs],
            "passes": self._passes,
            "places": [[order[file], line] for file, line in self._places],
            "files": [{"file": short_name(file), "lines": _lines(file, wanted)} for file, wanted in files.items()],
        }


def parts(node: fx.Node) -> tuple[str, str, str]:
    """(type, what is called, arguments) of a node's line; names of nodes in the arguments stand between NUL signs."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_function" and hasattr(node.target, "_schema"):
        target = str(node.target)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), _Reference)
    return type_of(node), target, ", ".join([*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())])


class _Reference:
    """Stands for a node where arguments are turned into text."""

    def __init__(self, node: fx.Node):
        self.name = node.name

    def __repr__(self) -> str:
        return f"\0{self.name}\0"


def _index(table: dict[Any, int], key: Any) -> int:
    return table.setdefault(key, len(table))


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of successive numbers."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def _lines(file: str, wanted: set[int]) -> dict[int, str]:
    """Those lines of a file; none if it can't be read."""
    try:
        with open(file, errors="replace") as stream:
            return {i: line.rstrip()[:LONGEST] for i, line in enumerate(stream, 1) if i in wanted}
    except (OSError, ValueError):
        return {}
