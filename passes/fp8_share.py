"""fp8_share: rows that several FP8 products read are quantised once.

Before:  quantize_1x128(x.reshape(-1, K)) for each layer that reads x (two down-projections, gate and up)
After:   the first of them, read by all

*Exact*: the same function of the same values. Legal where both read the same tensor through views that keep its rows,
and nothing writes it in between.
"""

from __future__ import annotations

from torch import fx

from dscompile.passes import commits
from dscompile.passes.graph import called, settle
from dscompile.passes.memory import Memory
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord
from dscompile.passes.shadow import Shadow

NAME = "fp8_share"
_FLATTENS = {"reshape", "view", "flatten"}


def run(module: fx.GraphModule, shadow: Shadow) -> PassRecord:
    """Replaces repeated quantisations in Dynamo's graph."""
    memory = Memory(shadow.graph)
    twin = {o.node: s for s, owners in shadow.owners.items() for o in owners if o.module is module}
    known: dict[fx.Node, list[fx.Node]] = {}
    nodes = [n for n in module.graph.nodes if operator_name(n) == "quantize_1x128"]
    shared = 0
    for node in nodes:
        source = rows_of(node.args[0])
        earlier = next((k for k in known.get(source, ()) if _same(memory, twin, source, k, node)), None)
        if earlier is None or not commits.current().permitted():
            known.setdefault(source, []).append(node)
            continue
        node.replace_all_uses_with(earlier)
        commits.current().add([], [(node, earlier)])
        commits.current().erase(node)  # pure, and without readers now
        shared += 1
    settle([module] if shared else [])
    return PassRecord(NAME, note=f"{shared} of {len(nodes)} quantisations of rows shared")


def rows_of(node: fx.Node) -> fx.Node:
    """What a chain of views with the same last dimension begins with."""
    while called(node) in _FLATTENS:
        before = node.args[0]
        widths = [n.meta["example_value"].shape[-1] for n in (before, node)]
        if before.meta["example_value"].dim() == 0 or str(widths[0]) != str(widths[1]):
            break
        node = before
    return node


def _same(memory: Memory, twin: dict[fx.Node, fx.Node], source: fx.Node, first: fx.Node, second: fx.Node) -> bool:
    """True if both read the same values: the tensor is not written between the two."""
    times = [_time(memory, twin, node) for node in (first, second)]
    value = twin.get(source)
    return value is not None and None not in times and memory.unchanged(value, *times)  # type: ignore[arg-type]


def _time(memory: Memory, twin: dict[fx.Node, fx.Node], node: fx.Node) -> int | None:
    """When an operator with several results runs: at the first of them that the shadow holds."""
    held = [memory.position[twin[user]] for user in node.users if user in twin]
    return min(held) if held else None
