"""Values made once from a graph's weights: further inputs of the compiled graph, not constants inside it.

A rewrite may want a weight in another form (in FP8, or dequantised), made once and not in every call. The value enters
the rewritten graph as an input behind Dynamo's own, and the compiled callable is given it at each call. So caches of
compiled graphs stay valid (they hold no value), prefill and decode graphs share one copy, one graph serves every layer
of a model that is compiled layer by layer, and CUDA graphs read an address that stays.

Freshness. Each call compares the version counter and the address of every weight with those its copy was made from
(about a microsecond in ten weights) and writes the copy anew, in place, when they differ: an optimizer step,
``load_state_dict`` and ``copy_`` are seen. A write through ``weight.data`` leaves no trace on the counter: call
:func:`refresh` after it. Copies live as long as the weight.

While passes run, a prepared value is an attribute of Dynamo's graph module (Dynamo reads its own graph's inputs again
after the backend returns, so none may be added there); :meth:`Prepared.lift` makes the inputs in a copy of the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from dscompile.lowering import inductor

Make = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Copy:
    """What was made from some weights, and the versions and addresses it was made from."""

    others: tuple[weakref.ref, ...]  # the sources behind the first, which the store is keyed by
    stamps: tuple[tuple[int, int], ...]
    values: tuple[torch.Tensor, ...]
    notes: dict[str, Any] = field(default_factory=dict)  # measured once, for reports
    freed: bool = False  # the sources' memory was given back: the copy is all there is


_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first source -> {(recipe, ids of the others): Copy}

_ALIVE: weakref.WeakSet[Prepared] = weakref.WeakSet()


def copy_of(name: str, make: Make, sources: Sequence[torch.Tensor]) -> Copy:
    """The copy ``name`` of these weights, made now or taken from an earlier graph; up to date."""
    first, *others = sources
    copies = _COPIES.setdefault(first, {})
    key = (name, *map(id, others))
    copy = copies.get(key)
    if copy is None and any(source.numel() and not source.untyped_storage().nbytes() for source in sources):
        raise RuntimeError(f"{name}: the weight {list(first.shape)} was given back, and has no copy of this form")
    if copy is None or any(ref() is not other for ref, other in zip(copy.others, others, strict=True)):
        copy = Copy(tuple(map(weakref.ref, others)), _stamps(sources), _make(make, sources))
        copies[key] = copy
    elif copy.stamps != _stamps(sources) and not (copy.freed and first.untyped_storage().nbytes() == 0):
        copy.stamps, copy.freed = _stamps(sources), False
        with torch.inference_mode(False), torch.no_grad():
            for old, new in zip(copy.values, _make(make, sources), strict=True):
                old.copy_(new)  # in place: a captured CUDA graph reads this address
    return copy


def refresh() -> None:
    """Make every copy anew at its next use: for weights written through ``.data``, which no version counter sees."""
    for copies in _COPIES.values():
        for copy in copies.values():
            copy.stamps = ()
    for prepared in _ALIVE:
        prepared._seen = []


def _stamps(sources: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((source._version, source.data_ptr()) for source in sources)


def _make(make: Make, sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False), torch.no_grad():  # not inference tensors: they are written in place later
        return tuple(value.clone() if value.is_inference() else value for value in make(*sources))


@dataclass(frozen=True)
class Slot:
    """One recipe of a graph: which of its inputs are read, and the attributes that hold the results."""

    name: str
    make: Make
    positions: tuple[int, ...]
    attributes: tuple[str, ...]


class Prepared:
    """The prepared values of one of Dynamo's graphs."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[object]):
        self.module, self.inputs = module, list(inputs)
        self.slots: list[Slot] = []
        self._seen: list[tuple[int, weakref.ref, int, int]] = []  # what the last call's weights were
        self._current: list[torch.Tensor] = []
        self._nodes: dict[tuple[str, tuple[int, ...]], tuple[fx.Node, ...]] = {}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._position = {node: i for i, node in enumerate(placeholders)}
        self._anchor = placeholders[-1] if placeholders else None
        _ALIVE.add(self)

    def refusal(self, sources: Sequence[fx.Node]) -> str:
        """Why no copy of these nodes can be kept; empty if it can."""
        for node in sources:
            if node not in self._position:
                return f"`{node.name}` is no input of the graph"
            value = self.inputs[self._position[node]]
            if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
                return f"`{node.name}` is no tensor with values at compile time"
            static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
            if not isinstance(value, torch.nn.Parameter) and not static:
                return f"`{node.name}` is an argument of the call, not a weight of a module"
            if value.is_inference():
                return f"`{node.name}` was made in inference mode, where changes are not counted"
            if type(value) not in (torch.Tensor, torch.nn.Parameter):
                return f"`{node.name}` is a {type(value).__name__}"
        return ""

    def copy(self, name: str, make: Make, sources: Sequence[fx.Node]) -> Copy:
        """The copy itself (for its notes and shapes); :meth:`refusal` must be empty."""
        return copy_of(name, make, self._tensors(self.inputs, tuple(self._position[n] for n in sources)))

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The weight that an input of the graph holds at compile time."""
        value = self.inputs[self._position[node]]
        assert isinstance(value, torch.Tensor)
        return value

    def weights(self, slot: Slot) -> list[torch.Tensor]:
        """What a slot is made from, at compile time."""
        return self._tensors(self.inputs, slot.positions)

    def add(self, name: str, make: Make, sources: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """Nodes that hold ``make(*weights)``; the same ones for the same name and weights."""
        positions = tuple(self._position[node] for node in sources)
        if (name, positions) not in self._nodes:
            values = self.copy(name, make, sources).values
            attributes = tuple(f"dsinfra_{name}_{len(self.slots)}_{i}" for i in range(len(values)))
            nodes = tuple(self._attribute(a, v, sources[0]) for a, v in zip(attributes, values, strict=True))
            self.slots.append(Slot(name, make, positions, attributes))
            self._nodes[name, positions] = nodes
        return self._nodes[name, positions]

    def _attribute(self, name: str, value: torch.Tensor, like: fx.Node) -> fx.Node:
        self.module.register_buffer(name, value, persistent=False)
        with self.module.graph.inserting_after(self._anchor):
            node = self.module.graph.get_attr(name)
        self._anchor = node
        mode = like.meta["example_value"].fake_mode
        node.meta["example_value"] = mode.from_tensor(value, static_shapes=True)
        return node

    def _tensors(self, args: Sequence[Any], positions: tuple[int, ...]) -> list[torch.Tensor]:
        return [args[i] for i in positions]

    def values(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The prepared values for a call with these arguments, in the order of the added inputs."""
        for position, seen, version, pointer in self._seen:  # decode passes here for every token: nothing else
            weight = args[position]
            if weight is not seen() or weight._version != version or weight.data_ptr() != pointer:
                break
        else:
            if self._seen:
                return self._current
        self._current = []
        for slot in self.slots:
            self._current += copy_of(slot.name, slot.make, self._tensors(args, slot.positions)).values
        read = sorted({i for slot in self.slots for i in slot.positions})
        self._seen = [(i, weakref.ref(args[i]), args[i]._version, args[i].data_ptr()) for i in read]
        return self._current

    def lift(self) -> tuple[fx.GraphModule, list[Any]]:
        """A copy of the graph module whose prepared values are inputs behind Dynamo's own; and its example inputs."""
        names = [name for slot in self.slots for name in slot.attributes]
        graph, env = fx.Graph(), {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                env[node] = inductor.copied_input(graph, node)
        attributes = {n.target: n for n in self.module.graph.nodes if n.op == "get_attr"}
        for name in names:
            like = attributes[name]
            env[like] = inductor.static_input(graph, name, like.meta, getattr(self.module, name))
        for node in self.module.graph.nodes:
            if node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        lifted = fx.GraphModule(self.module, graph)
        lifted.meta = self.module.meta
        known = {*lifted.__dict__, "_graph", "_code"}
        lifted.__dict__.update({k: v for k, v in self.module.__dict__.items() if k not in known})
        return lifted, [*self.inputs, *(getattr(self.module, name) for name in names)]

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The callable Dynamo gets: takes its arguments and adds the prepared values."""

        def call(*args: Any) -> Any:
            return compiled(*args, *self.values(args))

        return call
