"""Which tensor a value lives in, and which version of it a reader sees.

The shadow graph is almost functional: what remains are fills of fresh buffers (``new_empty`` then slice copies) and
updates of caches in place. :class:`Memory` reads both off the operators' schemas: every view chain ends in a *root*,
every write to a root is listed with its position, and the *version* of a root at a time is the number of writes
before it. Two reads of one root see the same numbers exactly when their versions are equal.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from dscompile.passes.graph import aliased_argument, written_arguments

aten = torch.ops.aten

FRESH = {
    aten.new_empty.default,
    aten.empty_like.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.zeros_like.default,
    aten.zeros.default,
}

# The schema says "may alias": whether they copy depends on strides and dtypes.
MAYBE_COPY = {
    aten.contiguous.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.flatten.using_ints,
}


@dataclass(frozen=True)
class Write:
    position: int
    node: fx.Node  # the operator that writes
    view: fx.Node  # the argument it writes through


class Memory:
    """Roots, writes and versions of one shadow graph."""

    def __init__(self, graph: fx.Graph, training: bool = False):
        self.training = training  # then a value behind a detach is not the value before it
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[Write]] = defaultdict(list)
        inputs: dict[int, fx.Node] = {}
        for node in graph.nodes:
            source = aliased_argument(node)
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, torch.Tensor):
                first = inputs.setdefault(value.untyped_storage()._cdata, node)  # inputs may be views of one buffer
                source = first if first is not node else None
            self._root[node] = self._root[source] if source is not None else node
            for view in written_arguments(node):
                self.writes[self.root(view)].append(Write(self.position[node], node, view))

    def stops_gradient(self, node: fx.Node) -> bool:
        """True in training for an operator behind which there is no gradient."""
        return self.training and bool(node.target is aten.detach.default or node.meta.get("dsinfra_no_grad"))

    def root(self, node: fx.Node) -> fx.Node:
        """Node whose storage ``node`` shares (itself if it owns its storage)."""
        return self._root.get(node, node)

    def version(self, node: fx.Node, time: int) -> int:
        """Number of writes to the node's storage before ``time``."""
        return sum(write.position < time for write in self.writes.get(self.root(node), ()))

    def unchanged(self, node: fx.Node, since: int, until: int) -> bool:
        """True if nothing writes the node's storage between the two times."""
        return self.version(node, since) == self.version(node, until)
