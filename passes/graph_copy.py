"""A copy of one of Dynamo's graphs, and of the bodies inside it, that later edits of the graph don't reach.

Parameters and buffers are shared, nodes are not. :func:`with_erased` also writes again what passes erased, so that a
replaced value can be computed beside its replacement.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dscompile.lowering import inductor
from dscompile.passes.commits import Commits, Link

Twins = dict[fx.Node, fx.Node]  # node -> its copy


def copied(module: fx.GraphModule) -> tuple[fx.GraphModule, Twins]:
    """The copy, which can be compiled in place of ``module``, and the copy of each node."""
    graph, twins = fx.Graph(), {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            twins[node] = inductor.copied_input(graph, node)
        else:
            twins[node] = graph.node_copy(node, twins.__getitem__)
    twin = fx.GraphModule(module, graph)
    twin.meta = module.meta
    known = {*twin.__dict__, "_graph", "_code"}
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k not in known})
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            body, inner = copied(child)
            setattr(twin, name, body)
            twins |= inner
    return twin, twins


def with_erased(module: fx.GraphModule, commits: Commits) -> tuple[fx.GraphModule, Twins]:
    """As :func:`copied`, with the nodes that the passes erased back in their places, their readers the new ones."""
    twin, twins = copied(module)
    for erased in reversed(commits.erased):  # what an erased node reads was erased after it, if at all
        later = commits.links[erased.since :]
        args, kwargs = fx.node.map_arg(
            (erased.args, erased.kwargs), lambda node, later=later: twins[_replacement(node, later)]
        )
        anchor = twins[erased.following]
        with anchor.graph.inserting_before(anchor):
            made = anchor.graph.create_node(erased.op, erased.target, args, kwargs)
        made.meta = dict(erased.meta)
        twins[erased.node] = made
    return twin, twins


def _replacement(node: fx.Node, later: Sequence[Link]) -> fx.Node:
    """What the node was replaced with by these links."""
    for link in later:
        if link.old is node:
            node = link.new
    return node
