"""The rule that deals ragged requests to programs: nothing twice, nothing left out, even loads."""

import random

import pytest

from dscompile.kernels.mla_schedule import PIECES, SEGMENT, Deal, choose, deal, partial_cost, schedule

SMS = 132


def lognormal(requests: int, mean: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [max(1, round(draw.lognormvariate(-0.5, 1.0) * mean)) for _ in range(requests)]


def batches() -> list[tuple[str, list[int], int]]:
    draw = random.Random(0)
    found = [
        (f"lognormal-{n}x{mean}", lognormal(n, mean, n), 16 * mean)
        for n in (1, 4, 16, 64, 128)
        for mean in (1024, 8192)
    ]
    found += [(f"uniform-{n}", [4096] * n, 4096) for n in (1, 7, 64, 100, 128, 132, 133, 300)]
    found += [
        ("empty", [0] * 9, 640),
        ("empty-and-full", [0, 4096] * 20, 4096),
        ("one-long", [0] * 50 + [9999] + [1] * 50, 9999),
    ]
    found += [
        ("over-capacity", [5000, -3, 64, 65, 63], 4096),
        ("short", [draw.randrange(130) for _ in range(200)], 130),
    ]
    return found


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 256])
@pytest.mark.parametrize(("lengths", "capacity"), [pytest.param(b, c, id=name) for name, b, c in batches()])
def test_every_page_is_dealt_once(lengths: list[int], capacity: int, rows: int, invariant: bool) -> None:
    d = deal(len(lengths), rows, -(-rows // 64), capacity, SMS, invariant)
    plan = schedule(lengths, capacity, d)
    assert len(plan) == d.parts
    found: dict[int, list] = {b: [] for b in range(len(lengths))}
    for part in plan:
        for segment in part:
            found[segment.request].append(segment)
    taken = [s.slot for segments in found.values() for s in segments if s.slot is not None]
    assert len(taken) == len(set(taken)) and all(0 <= slot < d.slots for slot in taken)
    for b, segments in found.items():
        pages = -(-max(0, min(lengths[b], capacity)) // 64)
        assert [s.first for s in segments] == [0, *(s.end for s in segments[:-1])] and segments[-1].end == pages
        slots = [s.slot for s in segments]
        assert slots == ([None] if len(slots) == 1 else list(range(slots[0], slots[0] + len(slots))))


def loads(plan: list, d: Deal) -> list[int]:
    return [sum(s.end - s.first + SEGMENT for s in part) for part in plan]


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("mean", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("requests", [64, 128])
def test_ragged_loads_are_even(requests: int, mean: int, rows: int) -> None:
    """No part is longer than a fair share by more than a cut's two ends."""
    lengths = lognormal(requests, mean, 1)
    d = deal(requests, rows, -(-rows // 64), max(lengths), SMS, False)
    got = loads(schedule(lengths, max(lengths), d), d)
    fair = sum(-(-n // 64) + SEGMENT for n in lengths) / d.parts
    assert max(got) <= fair + 2 * partial_cost(rows) + SEGMENT + 1


@pytest.mark.parametrize(
    ("requests", "pages", "splits"), [(128, 64, 1), (132, 64, 1), (64, 64, 2), (64, 128, 2), (16, 64, 8), (1, 64, 64)]
)
def test_equal_lengths_are_cut_evenly_or_not_at_all(requests: int, pages: int, splits: int) -> None:
    d = deal(requests, 16, 1, pages * 64, SMS, False)
    assert choose(requests * (pages + SEGMENT), pages, d) == (splits, 0)
    parts = [part for part in schedule([pages * 64] * requests, pages * 64, d) if part]
    assert len(parts) == requests * splits and all(len(part) == 1 for part in parts)


def test_what_a_request_is_cut_into_does_not_depend_on_the_others() -> None:
    alone, among = [5000], [100, 5000, 0, 8000, 77]
    cuts = []
    for lengths in (alone, among):
        d = deal(len(lengths), 16, 1, 8192, SMS, True)
        assert d.pieces <= PIECES
        plan = schedule(lengths, 8192, d)
        cuts.append([(s.first, s.end) for part in plan for s in part if lengths[s.request] == 5000])
    assert cuts[0] == cuts[1] and len(cuts[0]) == 5
