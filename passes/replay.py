"""A proof found for one layer, replayed on the next: graph isomorphism instead of a second proof.

A proof looks at a set of nodes (every node that a coordinate was pulled through). If the next attention's cone has the
same operators, arguments, shapes, dtypes, strides and order of writes over that set, the same proof holds with its
nodes renamed. :func:`correspond` finds that renaming or returns None, and then the layer is proved from scratch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import fx

from dscompile.passes.memory import Memory

T = TypeVar("T")


def correspond(
    memory: Memory, seen: set[fx.Node], pairs: list[tuple[fx.Node, fx.Node]]
) -> dict[fx.Node, fx.Node] | None:
    """Renaming of the proof's nodes, given (old, new) roots, or None if the cones differ."""
    renamed: dict[fx.Node, fx.Node] = {}
    taken: dict[fx.Node, fx.Node] = {}
    todo = list(pairs)
    while todo:
        old, new = todo.pop()
        if old in renamed or new in taken:
            if renamed.get(old) is not new:
                return None
            continue
        if not _same_value(old, new):
            return None
        renamed[old], taken[new] = new, old
        olds, news = memory.writes.get(old, []), memory.writes.get(new, [])
        if len(olds) != len(news):
            return None
        todo += [(a.node, b.node) for a, b in zip(olds, news, strict=True)]
        if old not in seen:
            continue
        if old.op != new.op or old.target != new.target and old.op == "call_function":
            return None
        inner: list[tuple[fx.Node, fx.Node]] = []
        if old.op == "call_function" and not _same_arguments(old, new, inner):
            return None
        todo.extend(inner)
    in_order = sorted(renamed, key=memory.position.__getitem__)
    times = [memory.position[renamed[n]] for n in in_order if n.op == "call_function"]
    return renamed if times == sorted(times) else None


def _same_value(old: fx.Node, new: fx.Node) -> bool:
    a, b = old.meta.get("val"), new.meta.get("val")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and _text(a.shape) == _text(b.shape) and _text(a.stride()) == _text(b.stride())
    return type(a) is type(b) and (not isinstance(a, (int, torch.SymInt)) or str(a) == str(b))


def _text(sizes: Iterable[int | torch.SymInt]) -> list[str]:
    """Sizes as text: comparing symbolic sizes with == would install guards."""
    return [str(s) for s in sizes]


def _same_arguments(old: fx.Node, new: fx.Node, pairs: list[tuple[fx.Node, fx.Node]]) -> bool:
    def same(a: object, b: object) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            pairs.append((a, b))
            return True
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        return type(a) is type(b) and a == b

    return same(old.args, new.args) and same(old.kwargs, new.kwargs)


def rename(value: T, renamed: dict[fx.Node, fx.Node], memory: Memory, positions: dict[int, int]) -> T:
    """A proof (nested dataclasses, tuples) with its nodes renamed and its times moved (``positions``)."""
    if isinstance(value, fx.Node):
        return renamed[value]  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(rename(v, renamed, memory, positions) for v in value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: rename(getattr(value, f.name), renamed, memory, positions) for f in fields(value)}
        if "time" in changes:
            changes["time"] = positions[changes["time"]]
        return replace(value, **changes)
    return value
