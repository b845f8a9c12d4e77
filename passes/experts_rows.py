"""Rows of an expert layer: which tensor each row of a value comes from, and how its dimensions lie.

A value over rows has a letter for each dimension: ``m`` rows in one dimension, ``t`` ``k`` rows as tokens by choices,
``d`` one feature dimension, ``1`` a dimension of size 1. Three kinds of values enter an expert layer from outside:

- :class:`Tokens`: row (t, k) is ``x[t]``: gathered by token, repeated K times, or broadcast over the choices;
- :class:`Own`: row (t, k) is element (t, k) of a tensor of its own: the routing weights;
- :class:`Table`: row (t, k) is entry ``id(t, k)`` of a tensor: a bias, or a weight gathered by expert.

Rows of no expert (ids at or past E) may be anything: the operator leaves them out, and a mask that zeroes them is read
as if it were not there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import fx

from dscompile.passes.experts_meanings import Extent, Ids, Inverse, Order, Outside, Perm, Token
from dscompile.passes.experts_sentinels import by_row
from dscompile.passes.experts_values import (
    CASTS,
    COPIES,
    VIEWS,
    Indices,
    arg,
    dtype,
    index_of,
    name,
    option,
)
from dscompile.passes.graph import is_tensor
from dscompile.passes.refusals import CombineForm, ExpertWeights, RoutingWeights, RowsNotTokens, Unsupported

Shape = tuple[Extent, ...]


@dataclass(frozen=True)
class Tokens:
    """``x[token of the row]``; ``top_k`` is how many rows a token has."""

    x: fx.Node
    order: Order
    top_k: int
    labels: str


@dataclass(frozen=True)
class Own:
    """Element p of ``base`` (as a flat tensor) for the row with flat number p."""

    base: fx.Node
    order: Order
    labels: str


@dataclass(frozen=True)
class Table:
    """``base[id of the row]``, ids being ``source`` in ``order``; ``clamped``: rows of no expert read the last."""

    base: fx.Node
    source: fx.Node
    order: Order
    labels: str
    clamped: bool = False


def moved(labels: str, before: Shape, after: Shape) -> str | None:
    """Letters behind a view, or None if it tears a row apart. ``m`` may become ``t`` ``k`` and back.

    With one token or one choice a row the letters are not unique; rows are in the same order either way.
    """
    ones = (1,) * len((*before, *after, ())[0])
    out, i, rest = "", 0, None  # rest: how many choices the second half of a split row dimension must have
    for j, size in enumerate(after):
        following = next((s for s in after[j + 1 :] if s != ones), ones)
        if labels[i : i + 2] == "tk" and times(before[i], before[i + 1]) == size:
            out, i = out + "m", i + 2
            continue
        while i < len(labels) and before[i] == ones and size != ones:
            i += 1  # a dimension of size 1 is dropped
        # No rows are as many as no tokens: a dimension more tells that they were split.
        splits = i < len(before) and (size != before[i] or (not any(size) and len(after) > len(before)))
        if rest is not None and size == rest:
            out, i, rest = out + "k", i + 1, None
        elif rest is None and labels[i : i + 1] == "m" and splits and times(size, following) == before[i]:
            out, rest = out + "t", following
        elif rest is None and i < len(labels) and size == before[i]:
            out, i = out + labels[i], i + 1
        elif size == ones:
            out += "1"
        else:
            return None
    return out if rest is None and all(size == ones for size in before[i:]) else None


def times(a: Extent, b: Extent) -> Extent:
    return tuple(x * y for x, y in zip(a, b, strict=True))


def aligned(a: str, b: str) -> str | None:
    """Letters of an elementwise result of two values, aligned at the last dimension, or None if they disagree."""
    width = max(len(a), len(b))
    pairs = list(zip(a.rjust(width, "1"), b.rjust(width, "1"), strict=True))
    agree = all(x == y or "1" in (x, y) for x, y in pairs)
    return "".join(y if x == "1" else x for x, y in pairs) if agree else None


class Rows:
    """Reads values over rows."""

    def __init__(self, indices: Indices):
        self.indices = indices
        self.memory = indices.memory
        self.left_out: list[Outside] = []  # the masks that were read as if they were not there

    def through(self, node: fx.Node) -> None:
        """Refuses an operator inside the layer that stops the gradient."""
        if self.memory.stops_gradient(node) and dtype(node).is_floating_point:
            raise Unsupported(f"no gradient flows through `{node.name}`", node)

    def relabel(self, node: fx.Node, labels: str) -> str:
        """Letters of a view, copy or cast of its first argument, which has ``labels``."""
        kind, source = name(node), arg(node, 0)
        if kind in ("unsqueeze", "squeeze", "select") and isinstance(option(node, 1, "dim"), int):
            rank = len(labels) + (kind == "unsqueeze")
            dim = arg(node, 1) % rank
            if kind == "unsqueeze":
                return labels[:dim] + "1" + labels[dim:]
            return labels[:dim] + labels[dim + 1 :] if set(self.indices.shape(source)[dim]) == {1} else labels
        found = moved(labels, self.indices.shape(source), self.indices.shape(node))
        if found is None:
            raise Unsupported(f"`{node.name}` takes rows apart", node)
        return found

    def passes(self, node: fx.Node) -> bool:
        """True for views, copies and casts between floating dtypes: one element in, the same element out.

        A cast to a byte is no rounding that may be left out, but a quantiser of the model.
        """
        kind = name(node)
        if kind in CASTS:
            return _is_wide(dtype(node)) and _is_wide(dtype(arg(node, 0)))
        if kind == "select":  # of a dimension of size 1: the same elements
            return set(self.indices.shape(arg(node, 0))[arg(node, 1)]) == {1}
        if kind == "slice":  # of all, however long: `x[:, None]` of a symbolic length
            start, end, step = option(node, 2, "start"), option(node, 3, "end"), option(node, 4, "step", 1)
            return start in (None, 0) and end in (None, sys.maxsize) and step == 1
        return kind in VIEWS | COPIES

    def leaves_out(self, node: fx.Node, order: Order) -> bool:
        """True for a mask that only zeroes rows of no expert."""
        if name(node) != "masked_fill" or arg(node, 2) != 0:
            return False
        outside = self.indices.read(arg(node, 1), self.memory.position[node])
        if not isinstance(outside, Outside) or outside.order is not order:
            return False
        if not by_row(self.indices, arg(node, 1), outside, node):
            return False
        self.left_out.append(outside)
        return True

    def row_labels(self, index: fx.Node) -> str:
        """Letters of an index tensor: rows, then dimensions of size 1 (or repetition, read as ``d``)."""
        shape = self.indices.shape(index)
        return "tk" if len(shape) == 2 and set(shape[1]) != {1} else "m" + "1" * (len(shape) - 1)

    # ---- rows of x

    def tokens(self, node: fx.Node, time: int) -> Tokens:
        """``node`` as rows of x; raises RowsNotTokens."""
        self.indices.intact(node, time)
        self.through(node)
        at = self.memory.position[node]
        source = arg(node, 0) if node.args else None
        if is_tensor(source):
            if self.passes(node):
                inner = self.tokens(arg(node, 0), at)
                return replace(inner, labels=self.relabel(node, inner.labels))
            if name(node) == "masked_fill":
                inner = self.tokens(arg(node, 0), at)
                if self.leaves_out(node, inner.order):
                    return inner
                raise RowsNotTokens("tokens are masked", node)
            if (found := self._gathered(node, at) or self._repeated(node, at)) is not None:
                return found
        if name(node) in ("mul", "div"):
            raise RoutingWeights("tokens are scaled before the experts, and the activation is not linear", node)
        raise RowsNotTokens(f"the experts' rows are `{node.target}`, not tokens gathered by expert", node)

    def _gathered(self, node: fx.Node, at: int) -> Tokens | None:
        index = index_of(node)
        if index is None:
            return None
        x, taken = arg(node, 0), self.indices.read(index, at)
        self.indices.intact(x, at)
        if len(self.indices.shape(x)) != 2 or len(self.indices.shape(node)) != 2:
            return None
        if name(node) == "gather" and not self._repeats(index, x):
            return None
        if isinstance(taken, Token):
            return self._checked(node, Tokens(x, taken.order, taken.top_k, "md"))
        if not isinstance(taken, Perm):
            return None
        try:
            flat = self.tokens(x, at)
        except (RowsNotTokens, RoutingWeights):  # one choice a token: rows are tokens
            if not self._one_choice(self.indices.sorted_ids(taken.order).source):
                raise
            return self._checked(node, Tokens(x, taken.order, 1, "md"))
        return replace(flat, order=taken.order) if flat.order is None and flat.labels == "md" else None

    def themselves(self, rows: fx.Node, source: fx.Node, at: int) -> Tokens | None:
        """``rows`` as x itself, row t being token t: with one id a token, ``source``, as many as there are rows."""
        while name(rows) in VIEWS | COPIES and len(self.indices.shape(rows)) != 2:
            self.indices.intact(rows, at)
            self.through(rows)
            at, rows = self.memory.position[rows], arg(rows, 0)
        shape = self.indices.shape(rows)
        if not self._one_choice(source) or len(shape) != 2 or shape[0] != self.indices.count(source):
            return None
        self.indices.intact(rows, at)
        return Tokens(rows, None, 1, "md")

    def _one_choice(self, ids: fx.Node) -> bool:
        """Whether there is one id a token: [T], [T, 1]."""
        return all(set(size) == {1} for size in self.indices.shape(ids)[1:])

    def _repeats(self, index: fx.Node, x: fx.Node) -> bool:
        """Whether the index of a ``gather`` is one number a row, repeated over x's columns."""
        while name(index) in COPIES | CASTS:
            index = arg(index, 0)
        wide = self.indices.shape(index)[1:] == self.indices.shape(x)[1:]
        return name(index) == "expand" and wide and set(self.indices.shape(arg(index, 0))[-1]) == {1}

    def _repeated(self, node: fx.Node, at: int) -> Tokens | None:
        if name(node) == "repeat_interleave" and isinstance(arg(node, 1), int) and option(node, 2, "dim") == 0:
            self.indices.intact(arg(node, 0), at)
            flat = len(self.indices.shape(arg(node, 0))) == 2
            return Tokens(arg(node, 0), None, arg(node, 1), "md") if flat else None
        one = arg(node, 0)
        if name(node) == "expand" and name(one) == "unsqueeze" and arg(one, 1) in (1, -2):
            self.indices.intact(arg(one, 0), self.memory.position[one])
            shape = self.indices.shape(node)
            if (*shape[:1], *shape[2:]) == self.indices.shape(arg(one, 0)) and len(shape) == 3 == 2 + len({*shape[1]}):
                return Tokens(arg(one, 0), None, shape[1][0], "tkd")
        return None

    def _checked(self, node: fx.Node, found: Tokens) -> Tokens | None:
        """The number of rows is the number of tokens times their choices."""
        rows = times(self.indices.shape(found.x)[0], (found.top_k,) * len(self.indices.sizes))
        return found if self.indices.shape(node)[0] == rows else None

    # ---- values of rows' own

    def own(self, node: fx.Node, time: int, rows: Extent) -> Own:
        """``node`` as one number a row, ``rows`` of them; raises RoutingWeights."""
        self.indices.intact(node, time)
        at = self.memory.position[node]
        same = self.passes(node) and not self.memory.stops_gradient(node) and not _narrows(node)
        if same and self._rows_below(node, rows):
            inner = self.own(arg(node, 0), at, rows)
            return replace(inner, labels=self.relabel(node, inner.labels))
        if name(node) == "masked_fill":
            inner = self.own(arg(node, 0), at, rows)
            if self.leaves_out(node, inner.order):
                return inner
        index = index_of(node)
        taken = self.indices.read(index, at) if index is not None and name(node) != "gather" else None
        if isinstance(taken, (Perm, Inverse)):
            self.through(node)
            inner = self.own(arg(node, 0), at, rows)
            before, after = (None, taken.order) if isinstance(taken, Perm) else (taken.order, None)
            if inner.order is not before or inner.labels not in ("m", "m1") or len(self.indices.shape(index)) != 1:
                raise RoutingWeights("routing weights are permuted by another order than their own", node)
            return replace(inner, order=after)
        return Own(node, None, self._flat_labels(node, rows))

    def _rows_below(self, node: fx.Node, rows: Extent) -> bool:
        """Whether the source of a view has rows in a dimension, or two, of its own."""
        try:
            self._flat_labels(arg(node, 0), rows)
        except RoutingWeights:
            return False
        return True

    def _flat_labels(self, node: fx.Node, rows: Extent) -> str:
        shape, ones = self.indices.shape(node), (1,) * len(rows)
        if shape[:1] == (rows,) and all(size == ones for size in shape[1:]):
            return "m" + "1" * (len(shape) - 1)
        if len(shape) >= 2 and times(*shape[:2]) == rows and all(size == ones for size in shape[2:]):
            return "tk" + "1" * (len(shape) - 2)
        raise RoutingWeights(f"`{node.name}` is not one number for each row of the experts", node)

    # ---- values of an expert

    def table(self, node: fx.Node, time: int) -> Table:
        """``node`` as ``base[ids]``; raises ExpertWeights."""
        self.indices.intact(node, time)
        self.through(node)
        at = self.memory.position[node]
        if self.passes(node):
            inner = self.table(arg(node, 0), at)
            return replace(inner, labels=self.relabel(node, inner.labels))
        index = index_of(node)
        if index is None or name(node) == "gather":
            raise ExpertWeights(f"`{node.name}` is not indexed by expert", node)
        ids, base = self.indices.ids(index, at), arg(node, 0)
        self.indices.intact(base, at)
        experts = self.indices.shape(base)[0]
        if not isinstance(ids, Ids) or ids.most is not None and any(ids.most < e - 1 for e in experts):
            raise ExpertWeights(f"`{node.name}` is not indexed by expert", node)
        rest = len(self.indices.shape(base)) - 1
        return Table(base, ids.source, ids.order, self.row_labels(index) + "d" * rest, ids.most is not None)


def sums_choices(node: fx.Node, labels: str) -> str:
    """Letters behind a sum over the choices; raises CombineForm for any other reduction."""
    rank = len(labels)
    dims = option(node, 1, "dim")
    dims = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if dims is not None else []
    if [labels[d] for d in dims] != ["k"]:
        what = ", ".join(labels[d] for d in dims) or "everything"
        raise CombineForm(f"the results are summed over {what} (letters {labels}), not over each token's choices", node)
    keep = bool(option(node, 2, "keepdim", False))
    return labels.replace("k", "1" if keep else "")


def _narrows(node: fx.Node) -> bool:
    """True for a cast that rounds."""
    before, after = dtype(arg(node, 0)), dtype(node)
    return before != after and torch.promote_types(before, after) != after


def _is_wide(kind: torch.dtype) -> bool:
    return kind.is_floating_point and kind.itemsize > 1
