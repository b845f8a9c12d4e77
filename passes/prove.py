"""Coordinate pull-back: which element of which tensor is this element?

Given elements of a node as arrays of coordinates, :class:`Pull` walks them back through views, splits, cats, expands,
copies and fills of fresh buffers, all points at once, until they rest on nodes that compute something. A proof then
reads as arithmetic on coordinates: "element (b, h, t, d) of the key is row ``offset + h * stride + d`` of this weight
times that latent at (b, t)". Each data movement is one row of the table ``MOVES``; an operator that is not in the table
ends the walk. Casts are walked through, their dtypes are recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from dscompile.passes.graph import Sizes, aliased_argument, argument
from dscompile.passes.memory import FRESH, MAYBE_COPY, Memory
from dscompile.passes.refusals import MutatedOperand, Unsupported

aten = torch.ops.aten
Array = np.ndarray
Coords = tuple[Array, ...]
Step = tuple[fx.Node, Coords, Array | None]  # source, its coordinates, which points (None: all)


@dataclass(frozen=True)
class Points:
    """Elements of one node. ``index`` says which of the caller's points these are; ``time`` when they are read."""

    node: fx.Node
    coords: Coords
    index: Array
    time: int
    casts: frozenset[torch.dtype] = frozenset()

    def spread(self) -> Points:
        """With every coordinate as long as ``index`` (rules may leave them shorter, to be broadcast)."""
        return replace(self, coords=tuple(np.broadcast_to(c, self.index.shape) for c in self.coords))

    def take(self, keep: Array) -> Points:
        spread = self.spread()
        return replace(spread, coords=tuple(c[keep] for c in spread.coords), index=self.index[keep])


def together(parts: list[Points]) -> Points:
    """Points of one node that were read alike, in the order of ``index``."""
    if len(parts) == 1:
        return parts[0]
    index = np.concatenate([p.index for p in parts])
    order = np.argsort(index, kind="stable")
    coords = tuple(np.concatenate(c)[order] for c in zip(*(p.coords for p in parts), strict=True))
    return replace(parts[0], coords=coords, index=index[order])


def ravel(coords: Coords, shape: tuple[int, ...]) -> Array:
    flat = np.zeros_like(coords[0]) if coords else np.zeros(1, np.int64)
    for c, size in zip(coords, shape, strict=True):
        flat = flat * size + c
    return flat


def unravel(flat: Array, shape: tuple[int, ...]) -> Coords:
    out: list[Array] = []
    for size in reversed(shape):
        out.append(flat % size)
        flat = flat // size
    return tuple(reversed(out))


def broadcast(coords: Coords, shape: tuple[int, ...]) -> Coords:
    """Coordinates of a broadcast result -> of an operand of this shape (right-aligned)."""
    tail = coords[len(coords) - len(shape) :]
    return tuple(np.zeros_like(c) if size == 1 else c for c, size in zip(tail, shape, strict=True))


def _set(coords: Coords, dim: int, value: Array) -> Coords:
    return coords[:dim] + (value,) + coords[dim + 1 :]


def _dim(node: fx.Node, position: int, name: str, rank: int, default: int = 0) -> int:
    return int(argument(node, position, name, default)) % max(rank, 1)  # type: ignore[call-overload]


# ------------------------------------------------------------------ the table of data movements


def _reshape(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    source = node.args[0]
    before, after = sizes.shape(source), sizes.shape(node)
    kept = [x for x, size in zip(c, after, strict=True) if size != 1]
    if [n for n in before if n != 1] == [n for n in after if n != 1]:  # only dimensions of size 1 come or go
        rest = iter(kept)
        yield source, tuple(np.zeros(1, np.int64) if size == 1 else next(rest) for size in before), None
        return
    flat = ravel(c, after) if c else np.zeros(1, np.int64)
    yield source, unravel(flat, before), None


def _same(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    yield node.args[0], c, None


def _transpose(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    i, j = int(node.args[1]) % len(c), int(node.args[2]) % len(c)
    swapped = list(c)
    swapped[i], swapped[j] = c[j], c[i]
    yield node.args[0], tuple(swapped), None


def _t(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    yield node.args[0], tuple(reversed(c)), None


def _permute(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    out: list[Array] = list(c)
    for k, dim in enumerate(node.args[1]):
        out[dim % len(c)] = c[k]
    yield node.args[0], tuple(out), None


def _slice(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    source = node.args[0]
    dim = _dim(node, 1, "dim", len(c))
    length = sizes.shape(source)[dim]
    start = argument(node, 2, "start")
    first = 0 if start is None else sizes.number(start)
    first = max(first + length, 0) if first < 0 else min(first, length)
    step = argument(node, 4, "step", 1)
    yield source, _set(c, dim, first + c[dim] * sizes.number(step)), None


def _narrow(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    dim = _dim(node, 1, "dim", len(c))
    yield node.args[0], _set(c, dim, c[dim] + sizes.number(node.args[2])), None


def _select(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    source = node.args[0]
    shape = sizes.shape(source)
    dim = _dim(node, 1, "dim", len(shape))
    index = sizes.number(node.args[2]) % shape[dim]
    some = c[0] if c else np.zeros(1, np.int64)
    yield source, c[:dim] + (np.full_like(some, index),) + c[dim:], None


def _expand(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    yield node.args[0], broadcast(c, sizes.shape(node.args[0])), None


def _repeat(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    shape = sizes.shape(node.args[0])
    tail = c[len(c) - len(shape) :]
    yield node.args[0], tuple(x % size for x, size in zip(tail, shape, strict=True)), None


def _repeat_interleave(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    dim = argument(node, 2, "dim")
    if dim is None:
        raise Unsupported("repeat_interleave over the flattened tensor", node)
    dim = int(dim) % len(c)  # type: ignore[call-overload]
    yield node.args[0], _set(c, dim, c[dim] // sizes.number(node.args[1])), None


def _getitem(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    parts, which = node.args
    if not isinstance(parts, fx.Node) or parts.target not in _SPLITS:
        return
    source = parts.args[0]
    shape = sizes.shape(source)
    if parts.target is aten.unbind.int:
        dim = _dim(parts, 1, "dim", len(shape))
        some = c[0] if c else np.zeros(1, np.int64)
        yield source, c[:dim] + (np.full_like(some, which),) + c[dim:], None
        return
    dim = _dim(parts, 2, "dim", len(shape))
    size = parts.args[1]
    if parts.target in (aten.tensor_split.indices, aten.tensor_split.sections):
        offset = _tensor_split_start(parts, which, shape[dim], sizes)
    elif isinstance(size, (list, tuple)):
        offset = sum(sizes.number(s) for s in size[:which])
    elif parts.target is aten.split.Tensor:
        offset = sizes.number(size) * which
    else:
        offset = -(-shape[dim] // sizes.number(size)) * which
    yield source, _set(c, dim, c[dim] + offset), None


def _tensor_split_start(node: fx.Node, which: int, length: int, sizes: Sizes) -> int:
    """First element of one part: cuts as Python's slices read them, or a number of parts, the first ones longer."""
    cuts = node.args[1]
    if isinstance(cuts, (list, tuple)):
        cut = sizes.number(cuts[which - 1]) if which else 0
        return max(cut + length, 0) if cut < 0 else min(cut, length)
    parts = sizes.number(cuts)
    return which * (length // parts) + min(which, length % parts)


_SPLITS = {
    aten.tensor_split.indices,
    aten.tensor_split.sections,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.chunk.default,
    aten.unbind.int,
}


def _cat(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    dim = _dim(node, 1, "dim", len(c))
    offset = 0
    for part in node.args[0]:
        shape = sizes.shape(part)
        if len(shape) != len(c):  # torch.cat skips empty one-dimensional tensors
            continue
        keep = (c[dim] >= offset) & (c[dim] < offset + shape[dim])
        if keep.any():
            yield part, _set(c, dim, c[dim] - offset), keep
        offset += shape[dim]


def _stack(node: fx.Node, c: Coords, sizes: Sizes) -> Iterator[Step]:
    dim = _dim(node, 1, "dim", len(c))
    for k, part in enumerate(node.args[0]):
        keep = c[dim] == k
        if keep.any():
            yield part, c[:dim] + c[dim + 1 :], keep


MOVES: dict[object, Callable[[fx.Node, Coords, Sizes], Iterator[Step]]] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten._reshape_alias.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.squeeze.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.view_as.default: _reshape,
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.t.default: _t,
    aten.numpy_T.default: _t,
    aten.mT.default: lambda n, c, s: iter([(n.args[0], c[:-2] + (c[-1], c[-2]), None)]),
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.stack.default: _stack,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.to.dtype: _same,
    aten.to.dtype_layout: _same,
    aten.to.device: _same,
    aten.to.other: _same,
    aten._to_copy.default: _same,
    aten.type_as.default: _same,
}


def splits(points: Points, memory: Memory) -> bool:
    """True if one step from these points may lead to several sources."""
    return points.node.target in (aten.cat.default, aten.concat.default, aten.stack.default) or filled(points, memory)


def filled(points: Points, memory: Memory) -> bool:
    """True if the points lie in a fresh buffer that was written before they are read."""
    fresh = points.node.target in FRESH
    return fresh and any(w.position < points.time for w in memory.writes.get(points.node, ()))


_JOINS = {aten.cat.default, aten.concat.default, aten.stack.default}


class Pull:
    """Walks elements of one graph back, under one size assignment."""

    def __init__(self, memory: Memory, sizes: Sizes):
        self.memory = memory
        self.sizes = sizes
        self.seen: set[fx.Node] = set()  # every node a proof looked at, for its replay on other layers

    def points(self, node: fx.Node, coords: Coords, time: int) -> Points:
        count = len(coords[0]) if coords else 1
        return Points(node, coords, np.arange(count), time)

    def walk(self, start: Points) -> list[Points]:
        """Points at the nodes where the walk ends, in no particular order; those that met again are one."""
        done: dict[tuple, list[Points]] = {}
        todo = [start]
        while todo:
            points = todo.pop()
            steps = self.step(points)
            if steps is None:
                done.setdefault((points.node, points.time, points.casts), []).append(points.spread())
            else:
                todo.extend(steps)
        return [together(parts) for parts in done.values()]

    def trail(self, start: Points) -> Iterator[Points]:
        """The nodes that hold *all* points on the way back, nearest first, up to where the walk splits or ends."""
        points: Points | None = start
        while points is not None:
            yield points.spread()
            steps = self.step(points)
            points = steps[0] if steps is not None and len(steps) == 1 else None

    def step(self, points: Points) -> list[Points] | None:
        """One data movement back; None if the node computes its elements (or is an input)."""
        node, coords = points.node, points.coords
        self.seen.add(node)
        if filled(points, self.memory):
            return self._fills(points)
        move = MOVES.get(node.target) if node.op == "call_function" else None
        if move is None:
            source = aliased_argument(node)
            if source is not None and any(w.node is node for w in self.memory.writes.get(self.memory.root(node), ())):
                return [replace(points, node=source)]  # the result of an in-place operator is its argument
            self._check_intact(points)
            return None
        if self.memory.stops_gradient(node):
            raise Unsupported(f"no gradient flows through `{node.name}`", node)
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            self.seen.add(node.args[0])
        time = self._read_time(points)
        out = []
        for source, moved, keep in move(node, coords, self.sizes):
            keep = None if keep is None else np.broadcast_to(keep, points.index.shape)
            kept = points if keep is None else points.take(keep)
            moved = moved if keep is None else tuple(np.broadcast_to(c, points.index.shape)[keep] for c in moved)
            casts = points.casts
            if source.meta["val"].dtype != node.meta["val"].dtype:
                casts = casts | {source.meta["val"].dtype, node.meta["val"].dtype}
            out.append(replace(kept, node=source, coords=moved, time=time, casts=casts))
        if node.target in _JOINS:
            self._check_every_part(points, out)
        return out or None

    def _check_every_part(self, points: Points, hit: list[Points]) -> None:
        """Refuses if between the points lies a part of a concatenation that none of them is in."""
        node, spread = points.node, points.spread()
        rank = len(self.sizes.shape(node))
        along = spread.coords[_dim(node, 1, "dim", rank)]
        offset, met = 0, {p.node for p in hit}
        for part in node.args[0]:
            shape = self.sizes.shape(part)
            length = (
                1
                if node.target is aten.stack.default
                else shape[_dim(node, 1, "dim", rank)]
                if len(shape) == rank
                else 0
            )
            inside = length and offset <= along.max() and offset + length > along.min()
            if inside and part not in met:
                raise Unsupported(f"`{part.name}`, a part of `{node.name}`, was not looked at", node)
            offset += length

    def _check_intact(self, points: Points) -> None:
        """Refuses a computed value that is overwritten in place before it is read (an input has versions instead)."""
        node, memory = points.node, self.memory
        if node.op not in ("placeholder", "get_attr") and not memory.unchanged(
            node, memory.position[node], points.time
        ):
            raise MutatedOperand(f"`{node.name}` is changed in place before it is read", node)

    def _read_time(self, points: Points) -> int:
        """When the node's source is read: with the reader if the node is a view, at the node itself if it copies."""
        node = points.node
        if aliased_argument(node) is None:
            self._check_intact(points)
            return self.memory.position[node]
        if node.target in MAYBE_COPY and not self.memory.unchanged(node, self.memory.position[node], points.time):
            raise MutatedOperand(f"`{node.name}` may or may not be a copy of a tensor that is overwritten later", node)
        return points.time

    def _fills(self, points: Points) -> list[Points] | None:
        """Elements of a fresh buffer -> elements of what was copied into it last before the read."""
        left, out = points.spread(), []
        for write in reversed(self.memory.writes[points.node]):
            if write.position >= points.time or not len(left.index):
                continue
            if write.node.target is not aten.copy_.default:
                return None  # a tensor of its own, like an input: its versions tell its values apart
            coords, hit = self._invert(write.view, points.node, left.coords)
            if not hit.any():
                continue
            self.seen.add(write.node)
            source = write.node.args[1]
            inside = left.take(hit)
            moved = broadcast(tuple(c[hit] for c in coords), self.sizes.shape(source))
            casts = inside.casts
            if source.meta["val"].dtype != points.node.meta["val"].dtype:
                casts = casts | {source.meta["val"].dtype, points.node.meta["val"].dtype}
            out.append(replace(inside, node=source, coords=moved, time=write.position, casts=casts))
            left = left.take(~hit)
        if len(left.index):
            raise MutatedOperand(f"a part of `{points.node.name}` is read that nothing was copied into", points.node)
        return out

    def _check_dense(self, node: fx.Node, coords: Coords) -> None:
        """Refuses a write to a part of a dimension in which the points leave out positions: it may hit those."""
        if node.target in (aten.slice.Tensor, aten.select.int):
            source = self.sizes.shape(node.args[0])
            dim = _dim(node, 1, "dim", len(source))
            whole = node.target is aten.slice.Tensor and self.sizes.shape(node)[dim] == source[dim]
            present = np.unique(coords[dim])
            if not whole and len(present) and present[-1] - present[0] + 1 != len(present):
                raise Unsupported(f"a buffer is filled in parts along a dimension of {source[dim]}", node)

    def _invert(self, view: fx.Node, root: fx.Node, coords: Coords) -> tuple[Coords, Array]:
        """Coordinates of ``root`` -> those of a chain of slices and selects of it, and which of them it covers."""
        chain = []
        while view is not root:
            chain.append(view)
            view = view.args[0]
        hit = np.ones(len(coords[0]), bool)
        for node in reversed(chain):
            self.seen.add(node)
            self._check_dense(node, coords)
            if node.target is aten.slice.Tensor:
                dim = _dim(node, 1, "dim", len(coords))
                (_, origin, _) = next(_slice(node, tuple(np.zeros_like(c) for c in coords), self.sizes))
                step = self.sizes.number(argument(node, 4, "step", 1))
                offset = coords[dim] - origin[dim]
                hit &= (offset >= 0) & (offset % step == 0) & (offset // step < self.sizes.shape(node)[dim])
                coords = _set(coords, dim, offset // step)
            elif node.target is aten.select.int:
                shape = self.sizes.shape(node.args[0])
                dim = _dim(node, 1, "dim", len(shape))
                hit &= coords[dim] == self.sizes.number(node.args[2]) % shape[dim]
                coords = coords[:dim] + coords[dim + 1 :]
            elif node.target is not aten.alias.default and not node.target._schema.is_mutable:
                raise Unsupported(f"buffer filled through `{node.target}`", node)
        return coords, hit


def one_cast(points: Points, dtype: torch.dtype) -> bool:
    """True if the node's elements become the value by at most one conversion to ``dtype``."""
    own = points.node.meta["val"].dtype
    return not points.casts if own == dtype else points.casts <= {own, dtype}


def names_of(ends: list[Points]) -> str:
    return ", ".join(sorted({f"`{e.node.name}`" for e in ends}))


MOST = 32  # divisors of a length that are looked at, the smallest: all of them where it is a power of two


def divisors(number: int) -> list[int]:
    """Divisors of a length below it, and its last index: some of these move under any reordering by views.

    A view splits an index into digits, and a permutation of digits moves the place value of one of them, a divisor.
    """
    found = {d for low in range(1, int(number**0.5) + 1) if number % low == 0 for d in (low, number // low)}
    return sorted({*sorted(found - {number})[:MOST], number - 1})


def sample_spots(batch: int, length: int) -> Array:
    """(request, position) pairs to look at: corners, place values of any view, and a few in between, distinct."""
    rng = np.random.default_rng(0)
    pairs = [(0, 0), (batch - 1, length - 1), (0, length - 1), (batch - 1, 0), (0, min(1, length - 1))]
    pairs += [(int(rng.integers(batch)), int(rng.integers(length))) for _ in range(3)]
    pairs += [divmod(place, length) for place in divisors(batch * length)]
    return np.array(sorted(set(pairs)))
