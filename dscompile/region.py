"""The original region of a rewrite once more, in wider arithmetic: what says how much of an error is rounding.

A region is what the old value was computed from, back to the values that the new operator reads. It is run again on
wider copies of those, every dtype written in it widened, outside of autocast. It can't be where it writes into a tensor
from outside, reads FP8, or calls the body of another operator: then there is no wider run, and a fixed bar decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from dscompile.measure import BARS, WIDER
from dscompile.passes.fp8_reads import FP8_DTYPES
from dscompile.passes.graph import called

_CASTS = ("float", "half", "bfloat16", "double")
_WRITES = ("setitem", "iadd", "isub", "imul", "itruediv")


def _written(node: fx.Node) -> bool:
    name = called(node)
    return name in _WRITES or name.endswith("_") and not name.endswith("__") or "out" in node.kwargs


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    values = pytree.tree_leaves([n.meta.get("example_value") for n in nodes])
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor) and v.layout is torch.strided}


def _reaches(node: fx.Node, sources: set[fx.Node], first: fx.Node) -> bool:
    """True if the node is computed from one of ``sources``, which are all at ``first`` or behind it."""
    seen, todo = set(), list(node.all_input_nodes)
    while todo:
        one = todo.pop()
        if one in sources:
            return True
        if one not in seen and first < one:
            seen.add(one)
            todo += one.all_input_nodes
    return False


def _fills(node: fx.Node, until: fx.Node) -> list[fx.Node]:
    """Calls before ``until`` that write into the node's memory, through views of it too."""
    own, seen, found, todo = _storages([node]), set(), [], [node]
    while todo:
        one = todo.pop()
        for user in one.users:
            if user in seen or not user < until:
                continue
            seen.add(user)
            if _written(user) and user.args[:1] == (one,):
                found.append(user)
            if _storages([user]) & own:
                todo.append(user)
    return found


def operands(made: Iterable[fx.Node]) -> set[fx.Node]:
    """What the nodes of a rewrite read of the graph around them."""
    made = set(made)
    return {n for new in made for n in new.all_input_nodes if n not in made}


def independent(operands: set[fx.Node]) -> set[fx.Node]:
    """Operands of which none is computed from another: one that is, is replaced by what it is computed from.

    A gradient for two values of which one depends on the other would be two different things, depending on which of
    them a form happens to read. Integers have none, and stay.
    """
    known = {n for n in operands if _floating(n)}
    while known:
        dependent = {n for n in known if _reaches(n, known - {n}, min(known))}
        if not dependent:
            break
        known = (known - dependent) | {source for n in dependent for source in n.all_input_nodes}
    return known | {n for n in operands if not _floating(n)}


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


class Region:
    """Nodes between ``leaves`` and ``old``, in program order."""

    def __init__(self, old: fx.Node, operands: set[fx.Node]):
        found, leaves, todo = set(), set(), [old]
        while todo:
            node = todo.pop()
            if node in found or node in leaves:
                continue
            if node is not old and (node in operands or node.op == "placeholder"):
                leaves.add(node)
                continue
            found.add(node)
            todo += node.all_input_nodes
            todo += _fills(node, old)  # which are no inputs of the buffer's readers, but belong to it
        self.old = old
        self.leaves = sorted(leaves)
        self.nodes = sorted(found)
        self.operands = [n for n in self.leaves if n in operands]  # what a gradient is compared for

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that the region's operands or its result are in: what its rounding is measured by."""
        values = [n.meta.get("example_value") for n in (self.old, *self.operands)]
        found = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype in BARS}
        return max(found, key=BARS.__getitem__, default=torch.float64)

    @property
    def reads_fp8(self) -> bool:
        values = pytree.tree_leaves([n.meta.get("example_value") for n in (*self.leaves, *self.nodes)])
        return any(isinstance(v, torch.Tensor) and v.dtype in FP8_DTYPES for v in values)

    def refusal(self) -> str:
        """Why there is no wider run; empty if it may be tried."""
        if self.reads_fp8:
            return "the region computes in FP8"
        if any(isinstance(n.target, torch._ops.HigherOrderOperator) or n.op == "call_module" for n in self.nodes):
            return "the region calls a body"
        outside = _storages(self.leaves)
        written = [n for n in self.nodes if _written(n)]
        if any("empty" in called(n) and not _fills(n, self.old) for n in self.nodes):
            return "the region reads a buffer that nothing fills"
        if any(_storages([a for a in n.args[:1] if isinstance(a, fx.Node)]) & outside for n in written):
            return "the region writes into a tensor from outside"
        return ""

    def wider(self, values: dict[fx.Node, Any], module: fx.GraphModule) -> tuple[Any, dict[fx.Node, Any]]:
        """(``old`` in wider arithmetic, the widened leaves); raises what an operator without a wider form raises."""
        env = {leaf: _widened(values[leaf]) for leaf in self.leaves}
        leaves = dict(env)
        devices = {v.device.type for v in pytree.tree_leaves(list(env.values())) if isinstance(v, torch.Tensor)}
        with torch.autocast(next(iter(devices), "cpu"), enabled=False):
            for node in self.nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                args, kwargs = pytree.tree_map(_wide_dtype, (args, kwargs))
                env[node] = _call(node, args, kwargs, module)
        return env[self.old], leaves


def _call(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], module: fx.GraphModule) -> Any:
    if node.op == "get_attr":
        return _widened(functools.reduce(getattr, str(node.target).split("."), module))
    if node.op == "call_method":
        name = str(node.target)
        if name in _CASTS and isinstance(args[0], torch.Tensor):
            return args[0].to(WIDER.get(_DTYPES[name], torch.float64))
        return getattr(args[0], name)(*args[1:], **kwargs)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


_DTYPES = dict(zip(_CASTS, (torch.float32, torch.float16, torch.bfloat16, torch.float64), strict=True))


def _widened(value: Any) -> Any:
    """Copies of floating tensors in the wider dtype, with gradients where the originals have them."""

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype not in WIDER:
            return x
        return x.detach().to(WIDER[x.dtype]).requires_grad_(x.requires_grad and torch.is_grad_enabled())

    return pytree.tree_map(one, value)


def _wide_dtype(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value
