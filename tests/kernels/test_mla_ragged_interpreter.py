"""Ragged batches in Triton's interpreter: the rule on the device against the rule in Python, and whole results."""

import random

import pytest
import torch

from dscompile.kernels import launch, mla_decode
from dscompile.kernels.mla_schedule import Deal, deal, schedule
from tests.kernels.mla_decode_cases import Case, expected, make, problems

pytestmark = pytest.mark.interpreter

SMALL = Case(lengths=(0, 1, 700, 150, 64, 0), heads=5, latent=32, rope=16, capacity=700, dtype=torch.float16)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "sm_count", lambda device: 3)


def starts(lengths: list[int], capacity: int, d: Deal) -> list[tuple[int, int]]:
    """Of every part, as the device finds them."""
    from tests.kernels.mla_schedule_starts import starts_kernel

    out = torch.empty(d.parts + 1, 2, dtype=torch.int32)
    starts_kernel[(d.parts + 1,)](
        torch.tensor(lengths, dtype=torch.int32),
        out,
        capacity,
        d.requests,
        d.rows,
        d.tiles,
        d.parts,
        d.pieces,
        d.piece_pages,
        LANES=128,
    )
    return [tuple(row) for row in out.tolist()]


def segments(lengths: list[int], capacity: int, d: Deal) -> list[list[tuple[int, int, int]]]:
    """Request, first page and end of each segment, from the device's starts."""
    found, at = [], starts(lengths, capacity, d)
    pages = [max(0, -(-min(n, capacity) // 64)) for n in lengths]
    for (item, begin), (last, stop) in zip(at, at[1:]):
        found.append([])
        for i in range(item, last + (stop > 0)):
            request, piece = divmod(i, d.pieces)
            base = piece * d.piece_pages
            held = min(max(pages[request] - base, 0), d.piece_pages)
            if piece == 0 or held:
                found[-1].append((request, base + begin * (i == item), base + (stop if i == last else held)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_device_follows_the_rule(seed: int) -> None:
    draw = random.Random(seed)
    requests, capacity = draw.choice([1, 5, 30, 100]), draw.choice([100, 2000, 50000])
    if seed % 3 == 0:
        lengths = [draw.randrange(capacity)] * requests
    else:
        lengths = [min(2**31 - 1, int(draw.lognormvariate(0, 2) * capacity / 10)) for _ in range(requests)]
    rows, invariant = draw.choice([1, 16, 64, 200]), requests < 100 and draw.random() < 0.4
    d = deal(requests, rows, -(-rows // 64), capacity, draw.choice([3, 9]), invariant)
    if d.items > 128:
        d = deal(requests, rows, -(-rows // 64), capacity, 9, False)
    want = [[(s.request, s.first, s.end) for s in part] for part in schedule(lengths, capacity, d)]
    assert segments(lengths, capacity, d) == want


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize(("layout", "s_q", "heads"), [("paged", 1, 5), ("plain", 3, 5), ("sliced", 1, 40)])
def test_ragged_batches(layout: str, s_q: int, heads: int, invariant: bool) -> None:
    args = make(SMALL.with_(layout=layout, s_q=s_q, heads=heads), "cpu")
    got = mla_decode.mla_decode(*args, impl="triton", batch_invariant=invariant)
    assert not problems(got, expected(args))


@pytest.mark.parametrize("lengths", [(0, 0, 0), (64,) * 8, (700,), (700, 0, 0, 0, 0, 1)], ids=str)
def test_other_batches(lengths: tuple[int, ...]) -> None:
    args = make(SMALL.with_(lengths=lengths), "cpu")
    assert not problems(mla_decode.mla_decode(*args, impl="triton"), expected(args))


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    args = make(SMALL.with_(lengths=(3, 1100), capacity=1100, heads=1), "cpu")
    o, lse = mla_decode.mla_decode(*args, impl="triton", batch_invariant=True)
    q_latent, q_rope, latent, k_rope, seqlens, _, table, *rest = args
    for b in range(2):
        one = slice(b, b + 1)
        alone = q_latent[one], q_rope[one], latent, k_rope, seqlens[one], None, table[one]
        o_b, lse_b = mla_decode.mla_decode(*alone, *rest, impl="triton", batch_invariant=True)
        assert torch.equal(o_b[0], o[b]) and torch.equal(lse_b[0], lse[b])


def test_independence_of_more_requests_than_can_be_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go in groups, each with its own mask, cache and lengths; bits are those of one launch."""
    args = make(SMALL.with_(lengths=(3, 1030, 64), capacity=1030, heads=1, layout="plain", mask=(3, 1)), "cpu")
    want = mla_decode.mla_decode(*args, impl="triton", batch_invariant=True)
    monkeypatch.setattr(mla_decode, "MAX_PLANNED", 5)  # pieces: two requests of two each
    got = mla_decode.mla_decode(*args, impl="triton", batch_invariant=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert not problems(got, expected(args))


def test_more_requests_than_can_be_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_decode, "MAX_PLANNED", 3)
    args = make(SMALL.with_(lengths=(3, 0, 90, 64), capacity=90, layout="plain", heads=1), "cpu")
    assert not problems(mla_decode.mla_decode(*args, impl="triton"), expected(args))
