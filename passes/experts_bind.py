"""From a proved expert layer or router to one operator in Dynamo's graph.

As ``bind.py`` does for attention: the proof names shadow nodes; each operand is read off a Dynamo node of the same
graph (or checkpoint body) that holds it unchanged at the place of the result. Everything is planned before anything is
written, and a body that runs several times is rewritten only if every run binds alike. The old region is left without
readers; AOTAutograd drops it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from dscompile.passes import commits
from dscompile.passes.bind import _layout_matters, expressions
from dscompile.passes.emit import Emitter
from dscompile.passes.experts_values import CASTS, arg, dtype, name
from dscompile.passes.graph import written_arguments
from dscompile.passes.memory import Memory
from dscompile.passes.record import Site
from dscompile.passes.refusals import MutatedOperand, Refusal, UnboundValue, Unsupported
from dscompile.passes.shadow import Owner, Shadow

aten = torch.ops.aten


@dataclass
class Written:
    """One operator in Dynamo's graph, for ``lower`` to choose its kernel; ``twins``: other runs of the same body."""

    site: Site
    module: fx.GraphModule
    node: fx.Node
    training: bool = False
    structure: None = None
    twins: list[Site] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a value is made in Dynamo's graph, and ``names``: the nodes that hold it from there on.

    ``node`` is one of them, or the assignment ``buffer[index] = value`` that has no value of its own.
    """

    module: fx.GraphModule
    node: fx.Node
    names: tuple[fx.Node, ...]


class Binding:
    """Finds values of the shadow in Dynamo's graph, and writes operators in their place."""

    def __init__(self, shadow: Shadow, memory: Memory):
        self.shadow, self.memory = shadow, memory

    def place(self, node: fx.Node) -> Place:
        """Where the value is made, to be replaced there; raises a Refusal if it has no name of its own."""
        spelled, owners = self._object(node)
        if not owners:
            raise UnboundValue(f"`{node.name}` has no tensor in Dynamo's graph", node)
        module = owners[0].module
        holders = [o.node for o in owners if o.module is module]
        changes, written = [n for n in spelled if _is_in_place(n)], _writers(holders)
        if len(changes) != len(written):
            raise UnboundValue("the result is a buffer that is filled in place", node)
        before = [n for n in changes if self.memory.position[n] <= self.memory.position[node]]
        if not before:
            return Place(module, holders[0], (holders[0],))
        if not self.memory.unchanged(node, self.memory.position[node] + 1, len(self.memory.position)):
            raise MutatedOperand("the result is a buffer that is overwritten later", node)
        made = written[len(before) - 1]
        return Place(module, made, tuple(n for n in holders if n <= made))

    def held(self, place: Place, node: fx.Node, until: fx.Node, saved: bool = True) -> fx.Node:
        """Dynamo node that holds ``node`` in front of ``place``, unchanged up to the shadow node ``until``.

        In training a value that is ``saved`` for the backward has to stay unchanged altogether.
        """
        last = len(self.memory.position) if saved and self.memory.training else self.memory.position[until]
        if not self.memory.unchanged(node, self.memory.position[node] + 1, last):
            raise MutatedOperand(f"`{node.name}` is overwritten before the layer's result, or its backward", node)
        spelled, owners = self._object(node)
        before = [o.node for o in owners if o.module is place.module and o.node < place.node]
        if not before:
            raise UnboundValue(f"`{node.name}` has no tensor in the graph of the layer", node)
        return before[-1] if any(_is_in_place(n) for n in spelled) else before[0]

    def _object(self, node: fx.Node) -> tuple[list[fx.Node], list[Owner]]:
        """(the shadow nodes that are one tensor object, the Dynamo nodes that hold it, in order).

        A cast that changes nothing and an in-place operator return the object they are given; the shadow lists the
        owners of an object at the last of its nodes.
        """
        spelled: list[fx.Node] = [node]
        while _same_object(spelled[0]) and spelled[0].args[0] not in self.shadow.owners:
            spelled.insert(0, spelled[0].args[0])
        while spelled[-1] not in self.shadow.owners:
            following = next((u for u in spelled[-1].users if _same_object(u) and u.args[0] is spelled[-1]), None)
            if following is None:
                return spelled, []
            spelled.append(following)
        return spelled, self.shadow.owners[spelled[-1]]


def _same_object(node: fx.Node) -> bool:
    """True for an operator that may return its first argument itself."""
    if not node.args or not isinstance(arg(node, 0), fx.Node):
        return False
    idle = name(node) in CASTS | {"contiguous"} and dtype(node) == dtype(arg(node, 0))
    return idle or _is_in_place(node)


def _is_in_place(node: fx.Node) -> bool:
    return any(written is arg(node, 0) for written in written_arguments(node))


def _writes(node: fx.Node) -> bool:
    """True for an in-place call of Dynamo's graph: ``x.add_()``, ``x += ..``."""
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return called.endswith("_") and not called.endswith("__") or called in _IN_PLACE


def _writers(holders: list[fx.Node]) -> list[fx.Node]:
    """Calls of Dynamo's graph that write the tensor which these nodes hold, in their order."""
    assigned = {u for n in holders for u in n.users if u.target is operator.setitem and u.args[0] is n}
    return sorted({n for n in holders if _writes(n)} | assigned)


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv"}

Build = Callable[[Emitter], tuple[fx.Node, list[tuple[Place, fx.Node]]]]


def write(place: Place, sites: list[Site], build: Build) -> Written:
    """Writes one operator at ``place``; ``build`` -> (operator, [(place of an old value, its replacement)]).

    Raises a Refusal, and then the graph is as it was. The caller recompiles the module.
    """
    commits.current().permit()
    values: dict[fx.Node, fx.Node] = {}
    emitter = Emitter(_value(place, values))
    try:
        node, replaced = build(emitter)
        replaced = [(old, _fitted(emitter, _value(old, values), new)) for old, new in replaced]
    except Exception as error:
        emitter.undo()
        for made, value in values.items():
            if value is not made:
                value.graph.erase_node(value)
        if isinstance(error, Refusal):
            raise
        raise Unsupported(f"the operator could not be written: {error}") from error
    kept = {*emitter.made, *values.values()}
    for old, new in replaced:
        behind = max(old.node, place.node)
        for held in old.names:
            held.replace_all_uses_with(new, delete_user_cb=lambda u, at=behind: at < u and u not in kept)
    commits.current().add(sites, [(values[old.node], new) for old, new in replaced], emitter.made)
    return Written(sites[0], place.module, node, twins=sites[1:])


def _value(place: Place, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node of a place, or, behind an assignment, a name for what the buffer holds then; noted in ``known``."""
    node = place.node
    if node not in known and "example_value" not in node.meta:
        buffer = place.names[-1]
        with node.graph.inserting_after(node):
            known[node] = node.graph.call_function(aten.alias.default, (buffer,))
        known[node].meta = dict(buffer.meta)
    return known.setdefault(node, node)


def _fitted(e: Emitter, old: fx.Node, new: fx.Node) -> fx.Node:
    """``new`` in the dtype of the value it replaces; refuses another shape, or strides that are relied on."""
    before = old.meta["example_value"]
    new = e.cast(new, before.dtype)
    after = new.meta["example_value"]
    if expressions(before.shape) != expressions(after.shape):
        raise Unsupported(f"the result is {list(after.shape)} instead of {list(before.shape)}")
    if expressions(before.stride()) != expressions(after.stride()) and _layout_matters(old):
        raise Unsupported("the layer's result is no contiguous tensor, and its strides are relied on")
    return new
