"""What a linear layer is for, read off Dynamo's graph: router, head, up-projection of MLA, or none of them.

No names are asked. A router's scores reach a top-k through elementwise operations; a head's result leaves the graph
through nothing but views, casts and constants; an up-projection is what a proved MLA site contracts its latent with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from dscompile.passes.bind import Bindings
from dscompile.passes.graph import called

_SHAPES = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "contiguous"),
    *("getitem", "slice", "select", "expand", "chunk", "split", "to", "float", "bfloat16", "half", "type"),
    *("clone", "detach"),
}
_BY_CONSTANT = {
    *("add", "sub", "mul", "div", "truediv", "add_", "mul_", "div_", "iadd", "imul", "itruediv", "tanh", "neg"),
}
_SCORES = {
    *("softmax", "_softmax", "log_softmax", "sigmoid", "sigmoid_", "masked_fill", "masked_fill_", "sqrt", "softplus"),
}
_CHOICES = {"topk", "sort", "argsort", "argmax", "route", "kthvalue", "multinomial"}
_WRITERS = {"setitem", "triton_kernel_wrapper_mutation"}


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output or a write in place depends on."""
    live: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op == "output" or _writes(node)]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(node.all_input_nodes)
    return live


def _writes(node: fx.Node) -> bool:
    name = called(node)
    schema = getattr(node.target, "_schema", None)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITERS or (schema is not None and schema.is_mutable) or "out" in node.kwargs


def feeds_topk(node: fx.Node) -> bool:
    """True if a top-k chooses among the node's elements."""
    return any(called(user) in _CHOICES for user in _behind(node, _SHAPES | _SCORES))


def feeds_output(node: fx.Node) -> bool:
    """True if the node's elements leave the graph."""
    return any(user.op == "output" for user in _behind(node, _SHAPES))


def _behind(node: fx.Node, passed: set[str]) -> Iterable[fx.Node]:
    """Readers of the node's elements, also behind operations of these names and arithmetic with constants."""
    todo, seen = [node], {node}
    while todo:
        source = todo.pop()
        for user in source.users:
            if user in seen:
                continue
            seen.add(user)
            yield user
            if called(user) in passed or (called(user) in _BY_CONSTANT and _constant_else(user, source)):
                todo.append(user)


def _constant_else(user: fx.Node, source: fx.Node) -> bool:
    """True if all that meets ``source`` in a call are weights, buffers and numbers."""
    return all(other is source or _is_weight(other) for other in user.all_input_nodes)


def _is_weight(node: fx.Node) -> bool:
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return node.op == "get_attr" or bool(static) or isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def up_projections(bound: Iterable[object]) -> set[fx.Node]:
    """Weights that the proved MLA sites contract their latents with."""
    return {weight_of(node) for site in bound if isinstance(site, Bindings) for node in site.up_projections}


def weight_of(node: fx.Node) -> fx.Node:
    """The input of the graph that a chain of views and casts begins with."""
    while node.op not in ("placeholder", "get_attr") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
