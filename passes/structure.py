"""The proof that an attention is multi-head latent attention: coordinates of keys, values and queries.

For every head and column, at several (request, position) points, elements are pulled back to the up-projection and its
latent. The identity shown is

    key[b, h, t, :]   = [ W_uk[h] c[b, t] | k_rope[b, t] ]      (or the other way round)
    value[b, h, t, :] =   W_uv[h] c[b, t]

with one latent ``c``, rows ``offset + h * stride + d`` of a weight for ``W_uk`` and ``W_uv``, and a rotated part that
does not depend on the head. Whether and how it was rotated is no part of the proof: ``rope.py`` reports it.
The result names shadow nodes and how to read them (:class:`Slot`); it refers to no size, so that proofs at two size
assignments can be compared for equality.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from dscompile.passes.anchors import Attention, Operand
from dscompile.passes.fp8_reads import Fp8Operands, fp8_operands
from dscompile.passes.graph import Sizes
from dscompile.passes.memory import Memory
from dscompile.passes.prove import Array, Coords, Points, Pull, names_of, one_cast, sample_spots
from dscompile.passes.refusals import (
    DifferentLatents,
    GroupedHeads,
    KeyLayout,
    NarrowedPrecision,
    NoUpProjection,
    PerHeadRopeKey,
    Unsupported,
    UpProjectionBias,
)
from dscompile.passes.weight_rows import Contraction, Rows, WeightReader

aten = torch.ops.aten


@dataclass(frozen=True)
class Slot:
    """How to read a value off a node: a label for each dimension ('1' = drop it), ``cuts`` (label, start) where the
    value is a part of that dimension, ``time`` when the model reads it, ``dtype`` that it casts it to before use."""

    node: fx.Node
    labels: str
    cuts: tuple[tuple[str, int], ...]
    time: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Pages:
    """A latent that lies in pages: ``pool[table]``; ``offset`` is its first column in a pool row.

    ``packed``: the rows are bytes, (float8 latents, other columns, their dtype) as ``mla_read_fp8`` reads them, and
    ``offset`` counts in columns of what it returns, put side by side.
    """

    pool: fx.Node
    table: fx.Node
    offset: int
    time: int
    packed: tuple[int, int, torch.dtype] | None = None


@dataclass(frozen=True)
class Structure:
    """What was proved. Slots list where each value can be read, best choice first."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int
    rope_first: bool
    keys: tuple[fx.Node, int]  # a node and the dimension that is T long
    q_nope: tuple[Slot, ...]
    q_rope: tuple[Slot, ...]
    latent: tuple[Slot, ...]
    k_rope: tuple[Slot, ...]
    w_uk: Rows
    w_uv: Rows
    latent_pages: Pages | None
    rope_pages: Pages | None

    def describe(self) -> str:
        order = "rope first, " if self.rope_first else ""
        return f"H {self.heads}, {order}N {self.nope} + R {self.rope}, V {self.value}, C {self.rank}"


def labelled(coords: dict[str, Array], labels: str) -> Coords:
    return tuple(coords[c] for c in labels)


class Prover:
    """Proves one attention under one size assignment."""

    def __init__(self, memory: Memory, sizes: Sizes):
        self.memory, self.sizes = memory, sizes
        self.pull = Pull(memory, sizes)
        self._lengths: dict[str, int] = {}  # of the dimensions b, h, s, t of the attention at hand

    def prove(self, attention: Attention) -> Structure:
        """The structure of an attention with one score term; raises a Refusal."""
        (term,) = attention.terms
        shape = self.sizes.shape
        self.lengths(attention)
        batch, heads, keys, width = (attention.size(c, shape) for c in "bhtd")
        queries, value_width = attention.size("s", shape), attention.size("v", shape)
        for operand in (term.right, attention.value):
            own = shape(operand.node)[operand.labels.index("h")] if "h" in operand.labels else 1
            if own != heads:
                raise GroupedHeads(f"{own} key heads for {heads} query heads", operand.node)
        holds = attention.trail.holds
        holds("there are as many key heads as query heads")
        time = self.memory.position[term.node]
        spots = sample_spots(batch, keys)
        value = self._rows(attention.value, spots, heads, "v", value_width, self.memory.position[attention.out])
        latent = self._latent(value, spots, heads, value_width, attention.value.node)
        w_uv = self._weight(value, heads, value_width)
        holds("values are an up-projection of one latent")
        nope, rope_first = self._split_key(term.right, latent, spots, heads, width, time)
        rope = width - nope
        first, rest = (rope, 0) if rope_first else (0, nope)
        key = self._rows(term.right, spots, heads, "d", nope, time, first)
        if not self.same(latent[0][0], self._latent(key, spots, heads, nope, term.right.node)[0][0]):
            raise DifferentLatents("keys and values read different elements of the latent", term.right.node)
        w_uk = self._weight(key, heads, nope)
        rank = self._rank(value)
        holds("keys are an up-projection of the same latent, behind or before shared columns")
        if rope == 0 and rank >= heads * nope:  # a shared rotated part is MLA at any width (tensor-parallel shards)
            raise NoUpProjection(
                f"the source of keys and values is {rank} wide, no narrower than {heads} heads x {nope}: "
                "plain multi-head attention",
                term.right.node,
            )
        k_rope = self._shared(term.right, spots, heads, rope, rest, time)
        holds("the other columns of the keys are one key for all heads" if rope else "keys have no other columns")
        dtype = attention.dtype
        q_spots = sample_spots(batch, queries)
        return Structure(
            heads=heads,
            nope=nope,
            rope=rope,
            value=value_width,
            rank=rank,
            rope_first=rope_first,
            keys=(term.right.node, term.right.labels.index("t")),
            q_nope=self.slots(self._grid(term.left, q_spots, "s", heads, nope, first, time), "bhsd", dtype),
            q_rope=self.slots(self._grid(term.left, q_spots, "s", heads, rope, rest, time), "bhsd", dtype)
            if rope
            else (),
            latent=self.slots(*latent, value.dtype),
            k_rope=self.slots(*k_rope, dtype) if rope else (),
            w_uk=w_uk,
            w_uv=w_uv,
            latent_pages=self._pages(*latent),
            rope_pages=self._pages(*k_rope) if rope else None,
        )

    def _rank(self, row: Contraction) -> int:
        return self.sizes.shape(row.latent.node)[row.latent_axis]

    def lengths(self, attention: Attention) -> None:
        """Notes the lengths of the attention's dimensions: a slot may cut a longer dimension down to them."""
        self._lengths = {c: attention.size(c, self.sizes.shape) for c in "bhst"}
        self._dtype = attention.dtype

    # ---- points

    def grid(
        self, operand: Operand, batch: int, length: int, position: str, heads: int, width: int, time: int
    ) -> tuple[Points, dict[str, Array]]:
        """All columns (of all heads) of an operand at a few (request, position) spots."""
        return self._grid(operand, sample_spots(batch, length), position, heads, width, 0, time)

    def _grid(
        self, operand: Operand, spots: Array, position: str, heads: int, width: int, first: int, time: int
    ) -> tuple[Points, dict[str, Array]]:
        """All (spot, column, head) of an operand, heads fastest; ``first`` is the first column."""
        spot, d, h = (
            x.reshape(-1) for x in np.meshgrid(np.arange(len(spots)), np.arange(width), np.arange(heads), indexing="ij")
        )
        names = {"b": spots[spot, 0], position: spots[spot, 1], "h": h, "d": d + first}
        coords = labelled({**names, "v": names["d"]}, operand.labels)
        wanted = {"b": names["b"], position: names[position], "h": h, "d": d}
        return Points(operand.node, coords, np.arange(len(d)), time), wanted

    # ---- the up-projection

    def _rows(
        self, operand: Operand, spots: Array, heads: int, label: str, width: int, time: int, first: int = 0
    ) -> Contraction:
        """Every element of a block of columns as a contraction; refuses if one is something else."""
        points, _ = self._grid(operand, spots, "t", heads, width, first, time)
        ends = self.pull.walk(points)
        if len(ends) != 1:
            raise NoUpProjection(f"columns come from {len(ends)} tensors: {names_of(ends)}", ends[0].node)
        if not one_cast(ends[0], self._dtype):
            raise NarrowedPrecision(
                "keys or values are rounded between the up-projection and the attention", operand.node
            )
        row = self.contraction(ends[0])
        if row is None:
            raise NoUpProjection(f"columns are `{ends[0].node.target}`, not an up-projection", ends[0].node)
        return row

    def contraction(self, p: Points) -> Contraction | None:
        """Points as products of a latent with a weight, or None."""
        node, order = p.node, np.argsort(p.index)
        coords = tuple(c[order] for c in p.coords)
        if node.target in (aten.addmm.default, aten.baddbmm.default):
            raise UpProjectionBias("the up-projection adds a bias", node)
        bias = {aten.linear.default: 2, torch.ops.dsinfra.fp8_linear.default: 4}.get(node.target, len(node.args))
        if len(node.args) > bias and node.args[bias] is not None:
            raise UpProjectionBias("the up-projection adds a bias", node)
        sides = self._factors(node, coords)
        if sides is None:
            return None
        self.pull.seen.add(node)
        time, index = self.memory.position[node], np.arange(len(p.index))
        (latent, at, axis), (weight, at_weight, axis_weight) = sides
        return Contraction(
            node.meta["val"].dtype,
            Points(latent, at, index, time),
            axis,
            Points(weight, at_weight, index, time),
            axis_weight,
            quantised.scale if (quantised := fp8_operands(node)) is not None else None,
        )

    def _factors(self, node: fx.Node, coords: Coords) -> list[tuple[fx.Node, Coords, int]] | None:
        """[(latent, coordinates at k = 0, k's axis), (weight, ...)]."""
        if node.target is aten.einsum.default:
            return self._einsum(node, coords)
        if (quantised := fp8_operands(node)) is not None:
            return self._fp8(node, quantised, coords)
        if node.target not in (aten.linear.default, aten.matmul.default, aten.mm.default):
            return None
        left, right = node.args[0], node.args[1]
        if len(self.sizes.shape(right)) != 2:
            return None
        k = np.zeros_like(coords[0])
        linear = node.target is aten.linear.default
        weight = (right, (coords[-1], k), 1) if linear else (right, (k, coords[-1]), 0)
        return [(left, coords[:-1] + (k,), len(coords) - 1), weight]

    def _fp8(self, node: fx.Node, found: Fp8Operands, coords: Coords) -> list[tuple[fx.Node, Coords, int]]:
        """Of ``fp8_linear(quantize_1x128(x), W)``: x itself, which is the same contraction with one rounding less."""
        self.pull.seen |= {found.quantize, *node.args[:2]}
        if not self.memory.unchanged(found.x, *(self.memory.position[n] for n in (found.quantize, node))):
            raise Unsupported("the latent is overwritten between its quantisation and the up-projection", node)
        k = np.zeros_like(coords[0])
        return [(found.x, coords[:-1] + (k,), 1), (found.weight, (coords[-1], k), 1)]

    def _einsum(self, node: fx.Node, coords: Coords) -> list[tuple[fx.Node, Coords, int]] | None:
        inputs, _, result = str(node.args[0]).replace(" ", "").partition("->")
        names = inputs.split(",")
        summed = set("".join(names)) - set(result)
        if len(names) != 2 or len(summed) != 1 or "." in inputs:
            return None
        k = summed.pop()
        at = dict(zip(result, coords, strict=True)) | {k: np.zeros_like(coords[0])}
        sides = [(n, labelled(at, names[i]), names[i].index(k)) for i, n in enumerate(node.args[1])]
        if self._is_weight(sides[0][0]) and not self._is_weight(sides[1][0]):
            sides.reverse()
        return sides

    def _is_weight(self, node: fx.Node) -> bool:
        root = self.memory.root(node)
        return root.op in ("placeholder", "get_attr") and isinstance(root.meta["val"], torch.nn.Parameter)

    def _weight(self, row: Contraction, heads: int, width: int) -> Rows:
        return WeightReader(self.pull, self.sizes, row, self._rank(row)).rows(heads, width)

    # ---- latent and rope key

    def _latent(
        self, row: Contraction, spots: Array, heads: int, width: int, node: fx.Node
    ) -> tuple[tuple[Points, dict[str, Array]], str]:
        """Points of the whole latent at each spot; refuses if it depends on head or column."""
        coords = tuple(c.reshape(len(spots), width * heads) for c in row.latent.coords)
        if any((c != c[:, :1]).any() for c in coords):
            raise DifferentLatents("heads or columns read different latents", node)
        rank = self._rank(row)
        k = np.tile(np.arange(rank), len(spots))
        at = tuple(k if i == row.latent_axis else np.repeat(c[:, 0], rank) for i, c in enumerate(coords))
        wanted = {"b": np.repeat(spots[:, 0], rank), "t": np.repeat(spots[:, 1], rank), "d": k}
        return (Points(row.latent.node, at, np.arange(len(k)), row.latent.time), wanted), "btd"

    def same(self, a: Points, b: Points) -> bool:
        """True if both read the same elements of the same versions."""
        return self._identity(a) == self._identity(b)

    def _identity(self, points: Points) -> tuple:
        """Where the points lie, as far back as they stay together, and which version they read."""
        *_, end = self.pull.trail(points)
        order = np.argsort(end.index)
        return self._version(end), tuple(c[order].tobytes() for c in end.coords)

    def _source(self, point: Points) -> tuple:
        """As `_identity`, of one point, without the coordinates: the tensor it is an element of."""
        *_, end = self.pull.trail(point)
        return self._version(end)

    def _version(self, end: Points) -> tuple[fx.Node, int]:
        return end.node, self.memory.version(end.node, end.time)

    def _split_key(
        self, key: Operand, latent: tuple, spots: Array, heads: int, width: int, time: int
    ) -> tuple[int, bool]:
        """(number of up-projected columns, whether the rotated ones come first)."""
        points, wanted = self._grid(key, spots[:1], "t", heads, width, 0, time)
        projected = np.zeros(len(points.index), bool)
        other: fx.Node | None = None
        source = self._source(latent[0][0].take(np.array([0])))
        for end in self.pull.walk(points):
            row = self.contraction(end)
            if row is None:
                continue
            first = replace(row.latent.take(np.array([0])), index=np.zeros(1, np.int64))
            if self._source(first) != source:
                other = end.node
                continue
            projected[end.index] = True
        columns = projected.reshape(width, heads)
        if (columns != columns[:, :1]).any():
            raise KeyLayout("some heads' columns are up-projected, others not", key.node)
        flags = columns[:, 0]
        nope = int(flags.sum())
        if nope == 0 and other is not None:
            raise DifferentLatents("keys and values are up-projected from different latents", other)
        if nope == 0:
            raise NoUpProjection("no column of the key is an up-projection of the values' latent", key.node)
        rope_first = not flags[0]
        expected = np.arange(width) >= width - nope if rope_first else np.arange(width) < nope
        if (flags != expected).any():
            raise KeyLayout("up-projected and shared columns of the key are interleaved", key.node)
        return nope, rope_first

    def _shared(
        self, key: Operand, spots: Array, heads: int, rope: int, first: int, time: int
    ) -> tuple[tuple[Points, dict[str, Array]], str]:
        """Points of the rotated key part (head 0); refuses if another head reads another element."""
        if rope == 0:
            return self._grid(key, spots, "t", 1, 0, first, time), "btd"
        points, _ = self._grid(key, spots, "t", heads, rope, first, time)
        for end in self.pull.walk(points):
            order = np.argsort(end.index)
            index = end.index[order]
            whole = (
                len(index) % heads == 0 and (index.reshape(-1, heads) // heads == index[::heads, None] // heads).all()
            )
            if not whole or any((c[order].reshape(-1, heads) != c[order][::heads, None]).any() for c in end.coords):
                raise PerHeadRopeKey(
                    "the part of the key behind the up-projected columns differs between heads", end.node
                )
        return self._grid(key, spots, "t", 1, rope, first, time), "btd"

    # ---- where to read a value

    def slots(self, grid: tuple[Points, dict[str, Array]], labels: str, dtype: torch.dtype) -> tuple[Slot, ...]:
        """Nodes on the way back that hold the whole value, deepest first, those that need no slicing before others.

        ``dtype`` is the one the value is used in; a node behind more than one cast is no place to read it.
        """
        points, wanted = grid
        self._extent = {**self._lengths, "d": int(wanted["d"].max()) + 1}
        found: list[Slot] = []
        own = points.node.meta["val"].dtype
        for step in self.pull.trail(points if own == dtype else replace(points, casts=frozenset({own, dtype}))):
            if not one_cast(step, dtype):
                break
            slot = self._slot(step, wanted, labels, dtype)
            if slot is not None:
                found.insert(0, slot)
        if not found:
            raise Unsupported(f"no tensor holds the value `{labels}` whole", points.node)
        return tuple(sorted(found, key=lambda slot: len(slot.cuts)))

    def _slot(self, step: Points, wanted: dict[str, Array], labels: str, dtype: torch.dtype) -> Slot | None:
        """How to read the value off the node of ``step``, or None if a dimension is not one of the value's."""
        order = np.argsort(step.index)
        names, cuts = "", []
        for size, c in zip(self.sizes.shape(step.node), (c[order] for c in step.coords), strict=True):
            label, start = self._label(c, size, wanted, labels, names) if size != 1 else ("1", 0)
            if label is None:
                return None
            names += label
            if label != "1" and size != self._extent[label]:
                cuts.append((label, start))
        missing = [k for k in labels if k not in names and wanted[k].any()]
        if missing or any(label not in "dt" for label, _ in cuts):
            return None
        return Slot(step.node, names, tuple(cuts), step.time, dtype)

    def _label(self, c: Array, size: int, wanted: dict[str, Array], labels: str, used: str) -> tuple[str | None, int]:
        """(label, start) of a dimension whose coordinates are one of the value's, moved by a constant."""
        for label in labels:
            start = int(c[0] - wanted[label][0])
            fits = 0 <= start <= size - self._extent[label]
            if label not in used and fits and (c - wanted[label] == start).all():
                return label, start
        return None, 0

    def _pages(self, grid: tuple[Points, dict[str, Array]], labels: str) -> Pages | None:
        """The value as ``pool[table]`` with 64-token pages, if that is where the trail ends."""
        points, wanted = grid
        *_, last = self.pull.trail(points)
        if last.node.target is operator.getitem:
            return self._packed_pages(last, wanted)
        if last.node.target is not aten.index.Tensor:
            return None
        pool, indices = last.node.args
        if len(indices) != 1 or len(self.sizes.shape(indices[0])) != 2 or len(last.coords) < 4:
            return None
        self.pull.seen.add(last.node)
        order = np.argsort(last.index)
        request, page, row, *middle, column = (c[order] for c in last.coords)
        size = self.sizes.shape(last.node)[2]
        fits = (request == wanted["b"]).all() and (page * size + row == wanted["t"]).all()
        offset = column - wanted["d"]
        if size != 64 or not fits or any(m.any() for m in middle) or len({*offset}) != 1:
            return None
        return Pages(pool, indices[0], int(offset[0]), self.memory.position[last.node])

    def _packed_pages(self, last: Points, wanted: dict[str, Array]) -> Pages | None:
        """The value as a result of ``mla_read_fp8``, which unpacks the float8 rows of a pool's pages."""
        read, item = last.node.args
        if not isinstance(read, fx.Node) or read.target is not torch.ops.dsinfra.mla_read_fp8.default:
            return None
        self.pull.seen |= {last.node, read}
        order = np.argsort(last.index)
        request, position, column = (c[order] for c in last.spread().coords)
        offset = column - wanted["d"]
        fits = (request == wanted["b"]).all() and (position == wanted["t"]).all()
        if not fits or len({*offset}) != 1:
            return None
        pool, table, rank, rope, dtype = read.args
        packed = (int(rank), int(rope), dtype)
        return Pages(pool, table, int(offset[0]) + packed[0] * int(item), self.memory.position[read], packed)
