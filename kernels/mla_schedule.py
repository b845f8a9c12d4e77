"""How MLA decode deals requests of unequal lengths to a fixed number of programs: the rule, on the host.

The kernels follow the rule on the device, from the lengths as they are at that moment (mla_schedule_device.py): nothing
is read on the host, and a captured graph serves every length. This file is the rule in plain Python, for tests and for
whoever wants to know what a batch will do; it holds the numbers that both use, and what the launch must know of it.

All requests stand in one row, each as long as its pages plus SEGMENT, and every program ("part") takes the stretch from
its own start to the next part's. There are two ways to place the starts:

    even    each request cut into the same number of equal parts, or whole requests, the same number to each part.
            Nothing is cut that needn't be: right for lengths that are alike.
    fair    equal stretches of the row, wherever that cuts. A start closer to a request's end than a partial result is
            worth moves there. Right for ragged lengths: parts differ by less than two such moves.

The one that promises to end first is taken. A piece that is a whole request is final; others are partial results, which
a second kernel joins in the order of their keys. Where results must not depend on the batch, requests are cut into
pieces of a length that follows from the cache's capacity alone, and only whole pieces are dealt ("fair", nothing cut).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 64  # keys of a page
SEGMENT = 2  # pages that a part could read while it changes from one request to the next
PART_ROWS = 4096  # rows of partial results that are still joined faster than more parts save time
PART_PAGES = 8  # pages of a part from which on its partial result is cheap, however many rows there are
MAX_PLANNED = 2048  # pieces that a program can weigh against each other
PIECES = 16  # pieces of a request at the most, where pieces must not depend on the batch


@dataclass(frozen=True)
class Deal:
    """What the launch fixes: programs and pieces. `rows` are the query rows of a request, `tiles` programs share them.

    pieces, piece_pages: each request is cut beforehand into at most so many pieces of so many pages; (1, everything)
    unless results must not depend on the batch.
    """

    requests: int
    rows: int
    tiles: int
    parts: int
    pieces: int
    piece_pages: int

    @property
    def items(self) -> int:
        return self.requests * self.pieces

    @property
    def slots(self) -> int:
        """Places for partial results. Along the row, the place of piece `item` in `part` is item + part."""
        return self.items + self.parts if self.pieces == 1 else self.items


@dataclass(frozen=True)
class Segment:
    """Pages first .. end - 1 of a request, computed at once; `slot` is None where they are all that it has."""

    request: int
    first: int
    end: int
    slot: int | None


def deal(requests: int, rows: int, tiles: int, capacity: int, programs: int, batch_invariant: bool) -> Deal:
    """The launch for `programs` programs over a cache of `capacity` keys a request."""
    pages = max(1, -(-capacity // PAGE))
    pieces, piece_pages = 1, pages
    if batch_invariant:
        piece_pages = max(PIECES, -(-pages // PIECES))
        pieces = max(2, -(-pages // piece_pages))  # one piece a request would mean that it may be cut anywhere
    return Deal(requests, rows, tiles, max(1, programs // tiles), pieces, piece_pages)


def partial_cost(rows: int) -> int:
    """Pages that could be read while one program's float32 results are written and read once more."""
    return 1 + 3 * min(rows, 64) // 64


def schedule(lengths: Sequence[int], capacity: int, d: Deal) -> list[list[Segment]]:
    """-> the segments of each part, in their order."""
    whole = [max(0, -(-min(length, capacity) // PAGE)) for length in lengths]
    pages = [min(max(n - i * d.piece_pages, 0), d.piece_pages) for n in whole for i in range(d.pieces)]
    cost = [n + SEGMENT if n > 0 or item % d.pieces == 0 else 0 for item, n in enumerate(pages)]
    splits, used = choose(sum(cost), max(pages, default=0), d)
    starts = [
        _even_start(part, pages, splits, d) if splits else _fair_start(part, pages, cost, used, d)
        for part in range(d.parts + 1)
    ]
    return [list(_walk(part, starts[part], starts[part + 1], pages, whole, d)) for part in range(d.parts)]


def choose(total: int, longest: int, d: Deal) -> tuple[int, int]:
    """-> (parts of each request, 0) for "even", (0, parts that get a stretch) for "fair".

    A time is that of the slowest part, or of the memory, if that is later: one tile of rows leaves a program waiting
    for memory a third of the time, and it speeds up when others have nothing left to read.
    """
    partial = partial_cost(d.rows)
    used = max(1, min(d.parts, max(PART_ROWS // d.rows, total // PART_PAGES)))
    fair = -(-total // used) + 2 * partial
    if d.pieces > 1:
        return 0, used
    memory, speed = -(-total // d.parts), 2 if d.tiles == 1 else 3
    group = -(-d.requests // d.parts)
    uncut = max(memory, group * (longest + SEGMENT) * speed // 3)
    most = min(d.parts // d.requests, max(4, PART_ROWS // (d.requests * d.rows), longest // PART_PAGES))
    per = -(-longest // max(most, 1))
    cut = max(memory + partial, (per + SEGMENT + partial) * speed // 3)
    if most <= 1 or uncut <= cut:
        return (1, 0) if uncut <= fair else (0, used)
    return (-(-longest // per), 0) if cut <= fair else (0, used)


def _even_start(part: int, pages: Sequence[int], splits: int, d: Deal) -> tuple[int, int]:
    group = -(-d.requests // d.parts)
    item, i = part // splits * group, part % splits
    if item >= d.items:
        return d.items, 0
    first = i * -(-pages[item] // splits)
    return (item + 1, 0) if i > 0 and first >= pages[item] else (item, first)


def _fair_start(part: int, pages: Sequence[int], cost: Sequence[int], used: int, d: Deal) -> tuple[int, int]:
    if part >= used:
        return d.items, 0
    place, item = part * sum(cost) // used, 0
    while cost[item] <= place:
        place -= cost[item]
        item += 1
    before = max(place - SEGMENT, 0)
    behind = pages[item] - before
    near = partial_cost(d.rows) if d.pieces == 1 else d.piece_pages
    if min(before, behind) <= near:
        return (item, 0) if before <= behind else (item + 1, 0)
    return item, before


def _walk(part: int, start: tuple, stop: tuple, pages: Sequence[int], whole: Sequence[int], d: Deal):
    for item in range(start[0], stop[0] + (stop[1] > 0)):
        request, i = divmod(item, d.pieces)
        if i > 0 and pages[item] == 0:
            continue
        base = i * d.piece_pages
        first = base + (start[1] if item == start[0] else 0)
        end = base + (stop[1] if item == stop[0] else pages[item])
        final = first == 0 and end == whole[request]
        yield Segment(request, first, end, None if final else item + (part if d.pieces == 1 else 0))
