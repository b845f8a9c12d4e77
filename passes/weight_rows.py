"""Rows of an up-projection: elements of a weight -> ``offset + head * stride + d`` of one matrix, in order of k.

A contraction with a latent uses elements ``weight[row, k]``. Shown here is that they are rows of one stored matrix,
each read from its first to its last column. All rows are looked at at some columns and all columns at some rows: among
the former are the divisors of the width, one of which any reordering by views would move.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from dscompile.passes.graph import Sizes
from dscompile.passes.prove import Array, Coords, Points, Pull, divisors, names_of, one_cast, ravel
from dscompile.passes.refusals import RowsDisagree

ROWS = 7  # rows of which every column is looked at


@dataclass(frozen=True)
class Rows:
    """Weight of shape [H, width, C]: rows ``offset + h * stride + d`` of ``node`` as a matrix with C columns.

    With ``scale``, the weight is in FP8 and its 128 x 128 blocks are multiplied with that.
    """

    node: fx.Node
    offset: int
    stride: int
    width: int
    transposed: bool
    time: int
    dtype: torch.dtype
    scale: fx.Node | None = None


@dataclass(frozen=True)
class Contraction:
    """Elements sum_k latent[.., k] * weight[.., k]; both hold k = 0, the axes say where k goes.

    ``dtype`` is that of the product (under autocast its operands are cast to it), ``scale`` of a weight in FP8.
    """

    dtype: torch.dtype
    latent: Points
    latent_axis: int
    weight: Points
    weight_axis: int
    scale: fx.Node | None = None


class WeightReader:
    """Reads the weight of contractions, ``rank`` products each."""

    def __init__(self, pull: Pull, sizes: Sizes, row: Contraction, rank: int):
        self.pull, self.sizes, self.row, self.rank = pull, sizes, row, rank

    def rows(self, heads: int, width: int) -> Rows:
        """The rows that a block [spots, width, heads] of contractions uses; raises RowsDisagree."""
        row = self.row
        count = width * heads
        coords = row.weight.spread().coords
        if any((c.reshape(-1, count) != c[None, :count]).any() for c in coords):
            raise RowsDisagree("the weight depends on the position", row.weight.node)
        first = tuple(c[:count] for c in coords)
        root, rows, transposed, time = self.column(first, 0)
        table = rows.reshape(width, heads)
        offset = int(table[0, 0])
        stride = int(table[0, 1]) - offset if heads > 1 else width
        expected = offset + np.arange(heads)[None, :] * stride + np.arange(width)[:, None]
        if (table != expected).any() or stride < width:
            raise RowsDisagree("rows are not offset + head * stride + d of one weight", row.weight.node)
        for k in divisors(self.rank):
            other = self.column(first, k)
            if other[0] is not root or other[2] != transposed or (other[1] != rows).any():
                raise RowsDisagree("columns of the weight come from different rows", row.weight.node)
        for one in np.unique(np.linspace(0, count - 1, ROWS).astype(int)):
            self.whole(tuple(c[one] for c in first), root, int(rows[one]), transposed)
        if row.scale is not None:
            shapes = {self.sizes.shape(n) for n in (root, row.weight.node)}
            if len(shapes) > 1 or transposed or (rows != first[0]).any():
                raise RowsDisagree("the FP8 weight is a part of another tensor, its scales are not", row.weight.node)
        return Rows(root, offset, stride, width, transposed, time, row.dtype, row.scale)

    def column(self, coords: Coords, k: int) -> tuple[fx.Node, Array, bool, int]:
        """(weight, rows read, transposed, time of the read) at one k."""
        at = tuple(np.full_like(c, k) if i == self.row.weight_axis else c for i, c in enumerate(coords))
        end, found = self.end(at)
        shape = self.sizes.shape(end.node)
        if len(shape) >= 2 and shape[-1] == self.rank and (found[-1] == k).all():
            return end.node, ravel(found[:-1], shape[:-1]), False, end.time
        if len(shape) == 2 and shape[0] == self.rank and (found[0] == k).all():
            return end.node, found[1], True, end.time
        raise RowsDisagree("the weight is no matrix of rows as long as the latent", end.node)

    def whole(self, coords: Coords, root: fx.Node, row: int, transposed: bool) -> None:
        """Refuses unless all columns of one row are those of the stored row, in their order."""
        k = np.arange(self.rank)
        end, found = self.end(
            tuple(k if i == self.row.weight_axis else np.full_like(k, c) for i, c in enumerate(coords))
        )
        if transposed:
            found = found[::-1]
        rows = ravel(found[:-1], self.sizes.shape(end.node)[:-1]) if not transposed else found[0]
        if end.node is not root or (found[-1] != k).any() or (rows != row).any():
            raise RowsDisagree("columns of the weight are in another order than the latent", end.node)

    def end(self, coords: Coords) -> tuple[Points, Coords]:
        """The one tensor that elements of the weight lie in, and where."""
        weight = self.row.weight
        ends = self.pull.walk(Points(weight.node, coords, np.arange(len(coords[0])), weight.time))
        if len(ends) != 1:
            raise RowsDisagree(f"the weight is put together from {names_of(ends)}", weight.node)
        (end,) = ends
        if not one_cast(end, self.row.dtype):
            raise RowsDisagree("the weight is rounded on its way", end.node)
        order = np.argsort(end.index)
        return end, tuple(c[order] for c in end.coords)
