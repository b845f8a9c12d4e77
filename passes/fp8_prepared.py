"""Values made once from a graph's weights: further inputs of the compiled graph, not constants inside it.

A rewrite may want a weight in another form (in FP8, or dequantised), made once and not in every call. The value enters
the rewritten graph as an input behind Dynamo's own, and the compiled callable is given it at each call. So caches of
compiled graphs stay valid (they hold no value), prefill and decode graphs share one copy, one graph serves every layer
of a model that is compiled layer by layer, and CUDA graphs read an address that stays.

Freshness. Each call compares the version counter, the address and the storage of every weight with those its copy was
made from (about a microsecond a weight) and writes the copy anew, in place, when they differ: an optimizer
step, ``load_state_dict``, ``copy_`` and ``weight.data = ...`` are seen. Fused optimizers count no version: a hook on
optimizers' steps does. A write through ``weight.data`` leaves no trace: the next compilation sees it, for calls of
graphs that are compiled already call :func:`refresh` after it. Copies live as long as the weight.

While passes run, a prepared value is an attribute of Dynamo's graph module (Dynamo reads its own graph's inputs again
after the backend returns, so none may be added there); :meth:`Prepared.lift` makes the inputs in a copy of the graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from dscompile.lowering import inductor
from dscompile.passes.graph import called

Make = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Copy:
    """What was made from some weights, and the versions, addresses and storages it was made from."""

    others: tuple[weakref.ref, ...]  # the sources behind the first, which the store is keyed by
    stamps: tuple[tuple[int, int, int], ...]
    values: tuple[torch.Tensor, ...]
    held: tuple[StorageWeakRef, ...] = ()  # of the storages in the stamps: while these live, none has their number
    notes: dict[str, Any] = field(default_factory=dict)  # measured once, for reports
    freed: bool = False  # the sources' memory was given back: the copy is all there is


_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first source -> {(recipe, ids of the others): Copy}

_ALIVE: weakref.WeakSet[Prepared] = weakref.WeakSet()

_LOCK = threading.RLock()  # over both, and over making a copy: threads that share a weight make one


def copy_of(name: str, make: Make, sources: Sequence[torch.Tensor], *, anew: bool = False) -> Copy:
    """The copy ``name`` of these weights, made now or taken from an earlier graph; up to date.

    With ``anew``, it is made again also where nothing seems to have changed.
    """
    with _LOCK:
        return _copy_of(name, make, sources, anew)


def _copy_of(name: str, make: Make, sources: Sequence[torch.Tensor], anew: bool) -> Copy:
    first, *others = sources
    copies = _COPIES.setdefault(first, {})
    key = (name, *map(id, others))
    copy = copies.get(key)
    if copy is None and any(source.numel() and not source.untyped_storage().nbytes() for source in sources):
        raise RuntimeError(f"{name}: the weight {list(first.shape)} was given back, and has no copy of this form")
    if copy is None or any(ref() is not other for ref, other in zip(copy.others, others, strict=True)):
        copy = Copy(tuple(map(weakref.ref, others)), _stamps(sources), _make(make, sources), _held(sources))
        copies[key] = copy
    elif anew or copy.stamps != _stamps(sources):
        empty = [copy.freed and not source.untyped_storage().nbytes() for source in sources]
        if any(empty) and not all(empty):
            shapes = [list(source.shape) for source in sources]
            raise RuntimeError(f"{name}: of the weights {shapes}, which share a copy, one was given back, one is new")
        if not any(empty):
            _remake(copy, make, sources)
    return copy


def _remake(copy: Copy, make: Make, sources: Sequence[torch.Tensor]) -> None:
    """Writes a copy again; if that fails, the copy stays marked as out of date."""
    copy.stamps, stamps, held = (), _stamps(sources), _held(sources)
    made = _make(make, sources)
    if all((a.shape, a.device) == (b.shape, b.device) for a, b in zip(copy.values, made, strict=True)):
        with torch.inference_mode(False), torch.no_grad():
            for old, new in zip(copy.values, made, strict=True):
                old.copy_(new)  # in place: a captured CUDA graph reads this address
    else:
        copy.values = made
    copy.notes.clear()
    copy.freed, copy.held, copy.stamps = False, held, stamps


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Marks copies of an optimizer's parameters as out of date: fused steps leave no trace on version counters."""
    if torch.compiler.is_compiling() or not _COPIES:  # compiled steps count versions
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    with _LOCK:
        for first, copies in list(_COPIES.items()):
            for (_, *others), copy in copies.items():
                if id(first) in stepped or stepped.intersection(others):
                    copy.stamps = ()
        for prepared in list(_ALIVE):
            prepared._last = ([], [])


register_optimizer_step_post_hook(_after_step)


def refresh() -> None:
    """Make every copy anew at its next use: for weights written through ``.data``, which no version counter sees."""
    with _LOCK:
        for copies in list(_COPIES.values()):
            for copy in copies.values():
                copy.stamps = ()
        for prepared in list(_ALIVE):
            prepared._last = ([], [])


def _stamps(sources: Sequence[torch.Tensor]) -> tuple[tuple[int, int, int], ...]:
    return tuple((source._version, source.data_ptr(), source.untyped_storage()._cdata) for source in sources)


def _held(sources: Sequence[torch.Tensor]) -> tuple[StorageWeakRef, ...]:
    return tuple(StorageWeakRef(source.untyped_storage()) for source in sources)


def _make(make: Make, sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False), torch.no_grad():  # not inference tensors: they are written in place later
        return tuple(value.clone() if value.is_inference() else value for value in make(*sources))


def written_storages(module: fx.GraphModule) -> set[int]:
    """Storages that Dynamo's graph, or a body inside it, writes in place: a copy made beforehand would miss that."""
    found: set[int] = set()
    for node in (n for m in module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes):
        name, schema = called(node), getattr(node.target, "_schema", None)
        in_place = name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
        if in_place and node.all_input_nodes:
            written = [a for a in node.args[:1] if isinstance(a, fx.Node)] or node.all_input_nodes
        elif "out" in node.kwargs or name.startswith("triton_kernel_wrapper") or getattr(schema, "is_mutable", False):
            written = node.all_input_nodes
        else:
            continue
        values = pytree.tree_leaves([n.meta.get("example_value") for n in written])
        found |= {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}
    return found


# Calls without a trailing underscore that write their first argument; `x += y` is `operator.iadd`.
_WRITERS = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"}


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
        # What the last call's weights were, and its values: replaced as one, since threads may call at once.
        self._last: tuple[list[tuple[int, weakref.ref, int, int, StorageWeakRef]], list[torch.Tensor]] = ([], [])
        self._made: set[tuple[str, tuple[int, ...]]] = set()  # copies that this compilation made or made anew
        self._written: set[int] | None = None
        self._nodes: dict[tuple[str, tuple[int, ...]], tuple[fx.Node, ...]] = {}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._position = {node: i for i, node in enumerate(placeholders)}
        self._anchor = placeholders[-1] if placeholders else None
        with _LOCK:
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
            if self._written is None:
                self._written = written_storages(self.module)
            if node.meta["example_value"].untyped_storage()._cdata in self._written:
                return f"`{node.name}` is written by the graph itself"
        return ""

    def copy(self, name: str, make: Make, sources: Sequence[fx.Node]) -> Copy:
        """The copy itself (for its notes and shapes); :meth:`refusal` must be empty."""
        positions = tuple(self._position[n] for n in sources)
        # Once a compilation, whatever the stamps say: writes through `.data` since the last one (merged adapters).
        anew = (name, positions) not in self._made
        found = copy_of(name, make, self._tensors(self.inputs, positions), anew=anew)
        self._made.add((name, positions))
        return found

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
        last, current = self._last
        for position, seen, version, pointer, storage in last:  # decode passes here for every token: nothing else
            weight = args[position]
            if weight is not seen() or weight._version != version or weight.data_ptr() != pointer:
                break
            if weight.untyped_storage()._cdata != storage.cdata:  # another one at the same address
                break
        else:
            if last:
                return current
        self._release()
        read = sorted({i for slot in self.slots for i in slot.positions})
        last = [
            (i, weakref.ref(args[i]), args[i]._version, args[i].data_ptr(), *_held([args[i]])) for i in read
        ]  # before the copies: a weight that another thread writes meanwhile is seen at the next call
        current = []
        for slot in self.slots:
            current += copy_of(slot.name, slot.make, self._tensors(args, slot.positions)).values
        self._last = (last, current)
        return current

    def _release(self) -> None:
        """Lets go of what only the compilation needed: the first call's arguments would live as long as its code."""
        self.inputs.clear()
        for slot in self.slots:
            for name in slot.attributes:
                self.module._buffers.pop(name, None)

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
