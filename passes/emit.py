"""Writes operators into Dynamo's graph, in front of a node, with the metadata that later stages read.

Every new node gets an ``example_value`` (computed on the fake tensors of its arguments: a wrong shape fails here,
before anything is replaced) and the source line and module of the node it serves. Only ATen and ``dsinfra`` overloads
and ``operator.getitem`` are written, so that AOTAutograd's cache accepts the graph. Nothing is ever removed:
dead code in Dynamo's graph may still mutate, and AOTAutograd drops the rest.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dscompile.passes.structure import Rows, Slot

aten = torch.ops.aten
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


def example(value: object) -> object:
    """Fake value of an argument."""
    return value.meta["example_value"] if isinstance(value, fx.Node) else value


class Emitter:
    """Inserts calls before ``anchor`` in its graph; :meth:`undo` takes them all back."""

    def __init__(self, anchor: fx.Node):
        self.anchor = anchor
        self.graph = anchor.graph
        self.made: list[fx.Node] = []
        # Dynamo's own fake mode: the tracing context holds a later one, and values of two modes don't mix.
        values = pytree.tree_leaves(anchor.meta["example_value"])
        self.mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), contextlib.nullcontext())

    def call(self, target: Callable, *args: object, **kwargs: object) -> fx.Node:
        fakes, fake_kwargs = fx.node.map_arg((args, kwargs), example)
        with self.mode:
            value = target(*fakes, **fake_kwargs)
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.anchor.meta.items() if k in _KEPT_META}
        node.meta["example_value"] = value
        self.made.append(node)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def undo(self) -> None:
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()

    def rank(self, node: fx.Node) -> int:
        return node.meta["example_value"].dim()

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """A dimension: the number if it is static, else a node that reads it."""
        value = node.meta["example_value"].shape[dim]
        return value if isinstance(value, int) else self.call(aten.sym_size.int, node, dim)

    def narrow(self, node: fx.Node, dim: int, start: int, length: int) -> fx.Node:
        if node.meta["example_value"].shape[dim] == length:
            return node
        return self.call(aten.slice.Tensor, node, dim, start, start + length)

    def plus(self, size: fx.Node | int, number: int) -> fx.Node | int:
        if isinstance(size, int) or number == 0:
            return size + number if isinstance(size, int) else size
        return self.call(operator.add, size, number)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["example_value"].dtype == dtype else self.call(aten.to.dtype, node, dtype)

    def read(self, node: fx.Node, slot: Slot, wanted: str, lengths: dict[str, fx.Node | int]) -> fx.Node:
        """The value that ``slot`` describes as a view with dimensions ``wanted``; ``lengths`` of those that are cut."""
        labels = slot.labels
        for dim in reversed(range(len(labels))):
            if labels[dim] == "1":
                node = self.call(aten.squeeze.dim, node, dim)
        labels = labels.replace("1", "")
        for label, start in slot.cuts:
            node = self.call(aten.slice.Tensor, node, labels.index(label), start, self.plus(lengths[label], start))
        order = [labels.index(c) for c in wanted if c in labels]
        if order != sorted(order):
            node = self.call(aten.permute.default, node, order)
        for dim, label in enumerate(wanted):
            if label not in labels:
                node = self.call(aten.unsqueeze.default, node, dim)
        return node

    def weight(self, node: fx.Node, rows: Rows, heads: int) -> fx.Node:
        """[heads, width, C] view of a weight's rows; ``rows`` was checked to fit (:func:`window`)."""
        if self.rank(node) > 2:
            node = self.call(aten.flatten.using_ints, node, 0, self.rank(node) - 2)
        if rows.transposed:
            node = self.call(aten.t.default, node)
        start = window(rows)
        node = self.narrow(node, 0, start, heads * rows.stride)
        node = self.call(aten.unflatten.int, node, 0, [heads, rows.stride])
        return self.narrow(node, 1, rows.offset - start, rows.width)


def window(rows: Rows) -> int:
    """First row of the block [heads, stride] that holds every row used: the heads' blocks start there."""
    return max(0, rows.offset + rows.width - rows.stride)
