"""The Gluon GEMM's way through its work: which tiles a program makes, found on the device from the groups' bounds.

A group's rows are cut into tiles of BM, its columns into `tiles_n`. Tiles are numbered through all groups, a group's in
blocks of `raster` row tiles, rows fastest; program p makes tiles p, p + P, p + 2 P and so on. So programs beside each
other multiply the same weights at the same time, and memory delivers them once. That is worth more than equal shares
of work: half-filled tiles taken two at a time were fairer, but put programs out of step by more than the L2 cache
bridges, and each fetched the weights for itself (64 groups of 384 rows on average, n 2816, k 2048, bfloat16, on an H100
80GB HBM3: 875 us instead of 505).

    rows 0..127      0   3   6             300 rows, 3 columns of tiles
    rows 128..255    1   4   7
    rows 256..299    2   5   8
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dscompile.kernels.launch import aggregate


@aggregate
class Problem:
    """What every role must know of the launch."""

    bounds: gl.tensor
    limit: gl.tensor  # groups, and one more for the rows behind the last group's end
    groups: gl.tensor
    capacity: gl.tensor
    rows: gl.tensor
    n: gl.tensor  # columns of y
    tiles_n: gl.tensor
    k_steps: gl.tensor
    scale_stride: gl.tensor  # rows_pad
    raster: gl.tensor


@aggregate
class Tile:
    """A role's place in the work: a tile, and the group that it lies in."""

    number: gl.tensor
    group: gl.tensor  # `limit` when there is no work left
    base: gl.tensor  # the group's first tile
    start: gl.tensor  # the group's first row
    end: gl.tensor  # and the row behind its last
    row: gl.tensor  # the tile's first
    column: gl.tensor  # in tiles


@gluon.jit
def _rows_of(group, end_before, g, LAYOUT: gl.constexpr):
    """First row of a group and the row behind its last; a group at `limit` reads nothing that isn't there."""
    if LAYOUT == "dense":
        start = group * g.rows
        end = g.rows
    elif LAYOUT == "ends":
        start = end_before
        bound = gl.load(g.bounds + gl.minimum(group, g.groups - 1))
        end = gl.where(group < g.groups, gl.minimum(gl.maximum(bound, start), g.rows), g.rows)
    else:
        start = group * g.capacity
        count = gl.load(g.bounds + gl.minimum(group, g.groups - 1))
        end = start + gl.minimum(gl.maximum(count, 0), g.capacity)
    return start, end


@gluon.jit
def _tile(number, group, base, start, end, g, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """The tile of that number, by a walk from a group whose first tile is `base`, not behind it."""
    tiles_m = gl.cdiv(end - start, BM)
    while (group < g.limit) & (number >= base + tiles_m * g.tiles_n):
        base += tiles_m * g.tiles_n
        group += 1
        start, end = _rows_of(group, end, g, LAYOUT)
        tiles_m = gl.cdiv(end - start, BM)
    block = (number - base) // (g.raster * g.tiles_n)
    rest = number - base - block * (g.raster * g.tiles_n)
    height = gl.maximum(gl.minimum(tiles_m - block * g.raster, g.raster), 1)  # 0 when there is no work left
    column = rest // height
    row = start + (block * g.raster + rest - column * height) * BM
    return Tile(number, group, base, start, end, row, column)


@gluon.jit
def first_tile(g, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """Where a role begins."""
    zero = gl.to_tensor(0)
    start, end = _rows_of(zero, zero, g, LAYOUT)
    return _tile(gl.program_id(0), zero, zero, start, end, g, BM, LAYOUT)


@gluon.jit
def next_tile(t, g, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """And where it goes on."""
    return _tile(t.number + gl.num_programs(0), t.group, t.base, t.start, t.end, g, BM, LAYOUT)
