"""The Gluon GEMM's way through its work, run on the CPU: every output is made once, by tiles in the order meant.

The device functions that number tiles are ordinary Python but for a few calls, for which stand-ins on integers suffice.
"""

import itertools
import random
from types import SimpleNamespace

import pytest

from dscompile.kernels import launch

if not launch.has_gluon() or launch.interpreting():
    pytest.skip("compile_only: Gluon is not installed, or this process interprets", allow_module_level=True)

from dscompile.kernels import gemm_gluon_items


class Int(int):
    """An integer with what device integers have; results of arithmetic and comparisons are such again."""

    def to(self, dtype: object) -> "Int":
        return self


def _lift(name: str) -> None:
    plain = getattr(int, name)
    setattr(Int, name, lambda self, *others: Int(plain(self, *map(int, others))))


for _name in ("add", "sub", "mul", "floordiv", "radd", "rsub", "rmul", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"):
    _lift(f"__{_name}__")
Int.__hash__ = int.__hash__


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(program=0, programs=1)
    gl = SimpleNamespace(
        int32=None,
        minimum=lambda a, b: Int(min(a, b)),
        maximum=lambda a, b: Int(max(a, b)),
        where=lambda c, a, b: Int(a if c else b),
        cdiv=lambda a, b: Int(-(-a // b)),
        load=lambda pointer: Int(pointer[0]),
        to_tensor=Int,
        program_id=lambda axis: Int(state.program),
        num_programs=lambda axis: Int(state.programs),
    )
    monkeypatch.setattr(gemm_gluon_items, "gl", gl)
    for name in ("_rows_of", "_tile", "first_tile", "next_tile"):
        monkeypatch.setattr(gemm_gluon_items, name, getattr(gemm_gluon_items, name).fn)
    fields = ("number", "group", "base", "start", "end", "row", "column")
    monkeypatch.setattr(gemm_gluon_items, "Tile", lambda *values: SimpleNamespace(**dict(zip(fields, values))))
    return state


class Pointer:
    """What `load` reads entry 0 of, after an offset was added."""

    def __init__(self, values: list[int], at: int = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, offset: int) -> "Pointer":
        return Pointer(self.values, self.at + offset)

    def __getitem__(self, index: int) -> int:
        assert 0 <= self.at < len(self.values), f"read of bounds[{self.at}] of {len(self.values)}"
        return self.values[self.at]


def work(state: SimpleNamespace, sizes: list[int], tail: int, tiles_n: int, bm: int, raster: int, layout: str) -> list:
    """Of each program, its tiles as (group, row, end, column)."""
    capacity = max(sizes) + 3
    bounds = sizes if layout == "masked" else list(itertools.accumulate(sizes))
    rows = capacity * len(sizes) if layout == "masked" else sum(sizes) + tail
    groups = len(sizes)
    g = SimpleNamespace(
        bounds=Pointer(bounds),
        limit=Int(groups + (layout == "ends")),
        groups=Int(groups),
        capacity=Int(capacity),
        rows=Int(rows),
        tiles_n=Int(tiles_n),
        raster=Int(raster),
    )
    found = []
    for program in range(state.programs):
        state.program = program
        tiles = []
        t = gemm_gluon_items.first_tile(g, bm, layout)
        while t.group < g.limit:
            tiles.append((int(t.group), int(t.row), int(t.end), int(t.column)))
            t = gemm_gluon_items.next_tile(t, g, bm, layout)
        found.append(tiles)
    return found


@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
@pytest.mark.parametrize("seed", range(12))
def test_every_output_is_made_once(seed: int, layout: str, stand_ins: SimpleNamespace) -> None:
    rng = random.Random(seed)
    groups = 1 if layout == "dense" else rng.randint(1, 7)
    sizes = [rng.choice((0, 1, 63, 64, 65, 127, 128, 129, 192, 193, 300, 1100)) for _ in range(groups)]
    tail = rng.choice((0, 1, 64, 200)) if layout == "ends" else 0
    bm, tiles_n, raster = rng.choice((64, 128)), rng.randint(1, 5), rng.randint(1, 5)
    stand_ins.programs = rng.randint(1, 9)
    tiles = [t for p in work(stand_ins, sizes, tail, tiles_n, bm, raster, layout) for t in p]
    starts = [g * (max(sizes) + 3) for g in range(groups)]
    if layout != "masked":
        starts = list(itertools.accumulate([0, *sizes]))
    want = set()
    for group, size in enumerate([*sizes, tail] if layout == "ends" else sizes):
        rows = range(starts[group], starts[group] + size, bm)
        want |= {(group, row, starts[group] + size, column) for row in rows for column in range(tiles_n)}
    assert len(tiles) == len(set(tiles)) and set(tiles) == want


def test_row_tiles_of_a_column_follow_each_other(stand_ins: SimpleNamespace) -> None:
    """So that programs beside each other read the same weights; in blocks of `raster`."""
    (tiles,) = work(stand_ins, [300, 0, 100], 0, 2, 128, 2, "ends")
    assert [(group, row, column) for group, row, _, column in tiles] == [
        (0, 0, 0),
        (0, 128, 0),
        (0, 0, 1),
        (0, 128, 1),
        (0, 256, 0),
        (0, 256, 1),
        (2, 300, 0),
        (2, 300, 1),
    ]
