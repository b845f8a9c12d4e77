"""Gives back the memory of weights that FP8 copies replaced, by ``options={"fp8": "block", "fp8_free": True}``.

A parameter belongs to the user's module, and Dynamo guards on its shape, strides and dtype: so the parameter stays what
it is and only its storage is emptied. Compiled graphs never read it (it is an input without a reader), recompiled ones
find the FP8 copy by the parameter. The module raises :class:`WeightFreed` when it is called uncompiled, in
``state_dict``, and when it is copied or pickled. Other reads of the bare tensor (``module.half()``, arithmetic) are not
guarded: torch refuses some of them, and others end the process. New values bring the memory back: ``load_state_dict``
does, and assigning ``parameter.data``; the FP8 copy follows.

Kept: weights that the graph reads in another place too, and those that share memory with another tensor of a module.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dscompile.passes.fp8_prepared import Prepared, copy_of
from dscompile.passes.fp8_roles import live_nodes
from dscompile.passes.quantize_weights import NAME as QUANTIZE
from dscompile.passes.quantize_weights import PAIR as JOINED
from dscompile.passes.record import PassRecord

NAME = "fp8_free"


class WeightFreed(RuntimeError):
    """A weight whose memory was given back is needed outside of compiled code."""


def run(prepared: Prepared) -> PassRecord:
    """Empties the storage of every quantised weight that nothing else reads; call it when the graph is compiled."""
    graph = prepared.module.graph
    live, placeholders = live_nodes(graph), [n for n in graph.nodes if n.op == "placeholder"]
    slots = [slot for slot in prepared.slots if slot.name in (QUANTIZE, JOINED)]
    candidates = {id(w): w for slot in slots for w in prepared.weights(slot)}
    read = {id(prepared.inputs[i]) for i, node in enumerate(placeholders) if live & set(node.users)}
    owners, sharing = _modules(candidates)
    given, freed = 0, set()
    for key, weight in candidates.items():
        storage = weight.untyped_storage()
        if key in read or key not in owners or sharing[storage.data_ptr()] > 1 or storage.nbytes() != weight.nbytes:
            continue
        freed.add(key)
    for slot in slots:
        weights = prepared.weights(slot)
        if all(id(weight) in freed for weight in weights):
            copy_of(slot.name, slot.make, weights).freed = True
        else:
            freed -= set(map(id, weights))
    for key in freed:
        storage = candidates[key].untyped_storage()
        given += storage.nbytes()
        storage.resize_(0)
        for module, name in owners[key]:
            _guard(module, name)
    kept = len(candidates) - len(freed)
    note = f"{given / 2**20:.1f} MiB of {len(freed)} weights given back" + (f", {kept} kept" if kept else "")
    return PassRecord(NAME, note=note)


def check(module: fx.GraphModule, inputs: Sequence[object]) -> None:
    """Raises WeightFreed if a graph reads a weight that was given back: no copy of it has the form needed there."""
    live = live_nodes(module.graph)
    for node, value in zip((n for n in module.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        if not isinstance(value, nn.Parameter) or type(value) is not nn.Parameter:
            continue
        empty = value.layout is torch.strided and value.numel() and not value.untyped_storage().nbytes()
        if empty and live & set(node.users):
            raise WeightFreed(
                f"`{node.name}` {list(value.shape)} is read by a graph that has no FP8 copy of it, and was given back "
                'for another one (options={"fp8_free": True}). Compile all graphs of a model with the same options, or '
                "load the model again."
            )


def _modules(candidates: dict[int, torch.Tensor]) -> tuple[dict[int, list[tuple[nn.Module, str]]], Counter[int]]:
    """(modules that hold each candidate, how many distinct tensors of modules lie in each storage)."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    lying: dict[int, int] = {}
    for module in (found for found in gc.get_objects() if issubclass(type(found), nn.Module)):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) in (nn.Parameter, torch.Tensor) and tensor.layout is torch.strided:
                lying[id(tensor)] = tensor.untyped_storage().data_ptr()
                if id(tensor) in candidates:
                    owners.setdefault(id(tensor), []).append((module, name))
    return owners, Counter(lying.values())


def _guard(module: nn.Module, name: str) -> None:
    """Makes the module say what happened where it would read the weight; compiled code runs no hooks."""
    refuse = _Refuse(name)
    module.register_forward_pre_hook(refuse)
    module.register_state_dict_pre_hook(refuse)
    module.register_load_state_dict_pre_hook(_Restore(name))
    weight = module._parameters[name]
    if weight is not None:
        # On the parameter, which both find before its class's: torch would read the memory that is gone.
        weight.__deepcopy__ = _Copied(weakref.ref(weight), type(module).__name__, name)  # type: ignore[method-assign]
        weight.__reduce_ex__ = _Pickled(weakref.ref(weight), type(module).__name__, name)  # type: ignore[method-assign]


def _raise_if_freed(weight: torch.Tensor | None, name: str, owner: str) -> None:
    if torch.compiler.is_compiling() or weight is None or weight.untyped_storage().nbytes():
        return
    raise WeightFreed(
        f"The weight `{name}` {list(weight.shape)} of a {owner} was given back when its FP8 copy replaced it "
        '(options={"fp8_free": True}). It can be neither computed with nor copied or saved. Call the compiled model, '
        "compile without fp8_free, or load the model again."
    )


@dataclass(frozen=True)
class _Refuse:
    """A hook in front of a module's forward and state_dict. Hooks are pickled with their module, so no closure."""

    name: str

    def __call__(self, owner: nn.Module, *_: Any) -> None:
        _raise_if_freed(owner._parameters.get(self.name), self.name, type(owner).__name__)


@dataclass(frozen=True)
class _Restore:
    """A hook in front of load_state_dict: memory for what will be copied into the weight."""

    name: str

    def __call__(self, owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        weight, new = owner._parameters.get(self.name), state.get(prefix + self.name)
        if weight is None or not isinstance(new, torch.Tensor) or weight.untyped_storage().nbytes():
            return
        if new.shape == weight.shape and not new.is_meta and new.data_ptr() != 0:  # otherwise nothing is copied
            weight.untyped_storage().resize_(weight.nbytes)


@dataclass(frozen=True)
class _Copied:
    """``__deepcopy__`` of one freed parameter: as its class's, once it has values again."""

    weight: weakref.ref
    owner: str
    name: str

    def __call__(self, memo: dict[int, Any]) -> Any:
        weight = self._values()
        return type(weight).__deepcopy__(weight, memo)

    def _values(self) -> torch.Tensor:
        weight = self.weight()
        assert weight is not None  # it is the one being copied
        _raise_if_freed(weight, self.name, self.owner)
        for name in ("__deepcopy__", "__reduce_ex__"):
            weight.__dict__.pop(name, None)
        return weight


class _Pickled(_Copied):
    """``__reduce_ex__`` of one freed parameter."""

    def __call__(self, protocol: Any) -> Any:
        weight = self._values()
        return type(weight).__reduce_ex__(weight, protocol)  # type: ignore[call-arg]
