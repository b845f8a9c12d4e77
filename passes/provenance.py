"""What each rewrite bound to what, and which of the model's calls it replaced: read by nobody but people.

Nothing here decides anything. :func:`fill` runs once, behind the last pass, when it is known what is read no more. It
looks through the views and casts that were written for an operator, at the values of the model itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from dscompile.passes.commits import Commits, Link
from dscompile.passes.graph import called, graph_names, place

_WRITERS = {"setitem", "iadd", "isub", "imul", "itruediv", "triton_kernel_wrapper_mutation"}
_VIEWS = {
    *("getitem", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "select", "narrow"),
    *("slice", "split", "chunk", "unbind", "t", "flatten", "unflatten", "contiguous", "to", "detach"),
}


def type_of(node: fx.Node) -> str:
    """``bfloat16[256, 64]``, or '' for what is no tensor."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in value.shape)}]"


def fill(module: fx.GraphModule, commits: Commits) -> None:
    """Gives every rewritten site its node, what was bound there, and the calls that only served what was replaced."""
    names = graph_names(module)
    memory = {graph: _live(graph) for graph in {link.old.graph for link in commits.links}}
    arguments = {e.node: (e.args, e.kwargs) for e in commits.erased}
    before = {link.new: link.old for link in commits.links}
    ours: set[fx.Node] = set()
    for link in commits.links:
        if link.old not in ours:  # else a later pass changed what an earlier one wrote
            region = [node.name for node in sorted(_dead(link.old, *memory[link.old.graph]))]
            bound = _bound(link, arguments, before)
            here = place(link.old, names)
            for site in link.sites:
                if site.node in ("", here):  # else the rewrite was for several sites together, and ends at another
                    site.node, site.bound = here, site.bound or bound
                    site.region += [name for name in region if name not in site.region]
        ours |= link.made


def _bound(link: Link, arguments: dict[fx.Node, tuple], before: dict[fx.Node, fx.Node]) -> dict[str, str]:
    """What each operand of the operator is, by its schema's names; operands that are absent are left out.

    Args:
        arguments: (args, kwargs) of erased nodes.
        before: the value that stood where a pass wrote another one.
    """
    operator = next((n for n in (link.new, *sorted(link.made, reverse=True)) if _is_ours(n)), None)
    if operator is None:
        return {}
    found = {}
    given, _ = arguments.get(operator, (operator.args, {}))
    for argument, value in zip(operator.target._schema.arguments, given, strict=False):  # type: ignore[union-attr]
        if isinstance(value, fx.Node):
            sources = _sources(value, link.made, arguments)
            found[argument.name] = "; ".join(_described(n, before) for n in sources)
        elif value is not None:
            found[argument.name] = str(value)
    return found


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "dsinfra"


def _described(node: fx.Node, before: dict[fx.Node, fx.Node]) -> str:
    while node in before:
        node = before[node]
    kind = type_of(node)
    return f"{node.name}: {kind}" if kind else node.name


def _sources(node: fx.Node, made: frozenset[fx.Node], arguments: dict[fx.Node, tuple]) -> list[fx.Node]:
    """The nodes outside of ``made`` that a value was computed from, each once."""
    found: dict[fx.Node, None] = {}
    todo, seen = [node], {node}
    while todo:
        one = todo.pop()
        inputs: list[fx.Node] = []
        fx.node.map_arg(arguments.get(one, (one.args, one.kwargs)), inputs.append)
        if one not in made or not inputs:
            found[one] = None
            continue
        todo += [n for n in reversed(inputs) if n not in seen]
        seen.update(inputs)
    return list(found)


Writers = dict[fx.Node, list[fx.Node]]


def _live(graph: fx.Graph) -> tuple[set[fx.Node], Writers]:
    """Nodes that the output depends on, writes into their memory and into the graph's inputs included; all writes."""
    todo = [graph.output_node()]
    writers: Writers = defaultdict(list)
    for node in graph.nodes:
        if _writes(node):
            for written in _memory(node):
                writers[written].append(node)
                if written.op in ("placeholder", "get_attr"):
                    todo.append(node)
    live: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += [*node.all_input_nodes, *writers[node]]
    return live, writers


def _writes(node: fx.Node) -> bool:
    name, schema = called(node), getattr(node.target, "_schema", None)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITERS or (schema is not None and schema.is_mutable)


def _memory(write: fx.Node) -> Iterator[fx.Node]:
    """What a call that writes its first argument writes: that value, and those that it is a view of."""
    node = write
    while node is write or called(node) in _VIEWS or _writes(node):
        if not (node.args and isinstance(node.args[0], fx.Node)):
            return
        node = node.args[0]
        yield node


def _dead(root: fx.Node, live: set[fx.Node], writers: Writers) -> Iterator[fx.Node]:
    """``root``, if nothing reads it any more, and the calls that it depends on and nothing that is read does."""
    todo, seen = [root], {root}
    while todo:
        node = todo.pop()
        if node in live or node.op not in ("call_function", "call_method"):
            continue
        yield node
        before = [n for n in (*node.all_input_nodes, *writers[node]) if n not in seen]
        todo += before
        seen.update(before)
