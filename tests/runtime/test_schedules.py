"""Schedules are valid, are what their authors' are, and cost what is published of them. All times are simulated."""

from __future__ import annotations

import dataclasses

import pytest
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleZBVZeroBubble

from dscompile.runtime.schedules import (
    SCHEDULES,
    Op,
    Schedule,
    ScheduleError,
    Transfer,
    check,
    dualpipe,
    dualpipev,
    one_f_one_b,
    ops,
    with_transfers,
    zbv,
)
from dscompile.runtime.schedules_simulate import Costs, in_flight, simulate

SIZES = [(r, m) for r in (1, 2, 3, 4, 6, 8) for m in (2 * r, 2 * r + 1, 2 * r + 2, 5 * r)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_valid_or_refused(name: str) -> None:
    valid = 0
    for ranks, micro_batches in SIZES:
        if name == "dualpipe" and (ranks % 2 or micro_batches % 2):
            with pytest.raises(ScheduleError):
                dualpipe(ranks, micro_batches)
            continue
        schedule = SCHEDULES[name](ranks, micro_batches)
        check(schedule)
        check(schedule.forward_only())
        valid += 1
    assert valid >= 8


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 4), (4, 8), (4, 11), (8, 20)])
@pytest.mark.parametrize(("ours", "theirs"), [(dualpipev, ScheduleDualPipeV), (zbv, ScheduleZBVZeroBubble)])
def test_actions_are_those_of_torch(ours, theirs, ranks: int, micro_batches: int) -> None:
    their = object.__new__(theirs)  # its lists depend on these alone
    their.pp_group_size, their._n_microbatches, their.num_stages = ranks, micro_batches, 2 * ranks
    for rank, row in enumerate(ours(ranks, micro_batches).ranks):
        listed = [a for a in their._calculate_single_rank_operations(rank) if a is not None]
        assert [_written(action) for action in row] == [_theirs(action) for action in listed]


def _written(action) -> str:
    return "&".join(f"{op.stage}{op.kind}{op.micro}" for op in ops([action]))


def _theirs(action) -> str:
    return "&".join(str(part) for part in action.sub_actions or (action,))


@pytest.mark.parametrize("pair", [None, 2.4])
def test_bubble_of_dualpipe_is_the_published_one(pair: float | None) -> None:
    costs = Costs(pair=pair)
    for stages in range(2, 17, 2):
        expected = (stages / 2 - 1) * (costs.together + costs.backward - 3 * costs.weight)
        for micro_batches in (2 * stages, 2 * stages + 2, 8 * stages):
            for schedule in (dualpipe(stages, micro_batches), dualpipev(stages // 2, micro_batches)):
                assert simulate(schedule, costs).bubble == pytest.approx(expected, abs=1e-9), schedule.name


@pytest.mark.parametrize(
    ("schedule", "pair", "total", "bubble"),
    [
        (one_f_one_b(4, 16, 2), None, 105, 9),
        (zbv(4, 16), None, 99, 3),
        (dualpipev(4, 16), None, 102, 6),
        (dualpipev(4, 16), 2.4, 86.4, None),
        (dualpipe(8, 32), None, 102, 6),
        (one_f_one_b(2, 8, 2), None, 51, 3),
        (zbv(2, 8), None, 49, 1),
        (dualpipev(2, 8), None, 50, 2),
        (dualpipev(2, 8), 2.4, 42.8, None),
        (dualpipev(4, 8), None, 54, 6),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else str(value),
)
def test_step_times(schedule: Schedule, pair: float | None, total: float, bubble: float | None) -> None:
    found = simulate(schedule, Costs(pair=pair))
    assert found.total == pytest.approx(total)
    assert bubble is None or found.bubble == pytest.approx(bubble)
    assert str(found).endswith("simulated")


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bubble_of_1f1b_is_the_published_one(ranks: int) -> None:
    costs = Costs(2, 4, 2)  # one stage a rank, as long as two of the others
    assert simulate(one_f_one_b(ranks, 3 * ranks), costs).bubble == pytest.approx((ranks - 1) * 6)


def test_transfers_cost_time_and_activations_are_counted() -> None:
    schedule = dualpipev(4, 16)
    assert simulate(schedule, Costs(transfer=0.1)).total > simulate(schedule).total
    assert in_flight(schedule) == [9] * 4  # PP + 1 of the paper, with PP = 8 stages
    assert in_flight(dualpipe(8, 32)) == [9] * 8
    assert in_flight(one_f_one_b(4, 16)) == [4, 3, 2, 1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_transfers_pair_up_in_order_and_none_waits_for_another(name: str) -> None:
    """Even if a send waits until its receive is reached, as over NCCL."""
    rows = [list(row) for row in with_transfers(SCHEDULES[name](4, 8))]
    while any(rows):
        heads = {r: row[0] for r, row in enumerate(rows) if row}
        compute = [r for r, head in heads.items() if not isinstance(head, Transfer)]
        met = [
            (r, head.peer)
            for r, head in heads.items()
            if isinstance(head, Transfer)
            and head.kind == "send"
            and heads.get(head.peer) == Transfer("recv", head.op, r)
        ]
        assert compute or met, heads
        for r in {*compute, *(r for pair in met[:1] for r in pair)}:
            rows[r].pop(0)


def test_what_a_rank_holds() -> None:
    assert [dualpipe(4, 8).held(r) for r in range(4)] == [[0, 3], [1, 2], [1, 2], [0, 3]]
    assert [dualpipev(2, 4).held(r) for r in range(2)] == [[0, 3], [1, 2]]
    assert str(dualpipev(2, 4).ranks[1][6]) == "F2.2&B1.0"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: dualpipe(4, 6), "6 micro-batches on 4 ranks.*Cut the batch into 8"),
        (lambda: dualpipe(3, 8), "3 ranks.*even number"),
        (lambda: dualpipe(4, 9), "9 micro-batches.*even number"),
        (lambda: dualpipev(4, 7), "7 micro-batches"),
        (lambda: zbv(2, 3), "3 micro-batches"),
        (lambda: one_f_one_b(2, 0), "0 micro-batches"),
        (lambda: one_f_one_b(4, 6, 2), "multiple of 4"),
        (lambda: Costs(weight=3.0), "W takes longer"),
    ],
)
def test_refusals(make, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        make()


def _changed(schedule: Schedule, rank: int, row: list) -> Schedule:
    return dataclasses.replace(schedule, ranks=(*schedule.ranks[:rank], tuple(row), *schedule.ranks[rank + 1 :]))


def test_the_check_sees_what_is_wrong() -> None:
    schedule = dualpipev(2, 4)
    outer, inner = map(list, schedule.ranks)
    for rank, row, said in (
        (1, inner[:-1], "F, I for micro-batch"),
        (1, [*inner, Op("F", 1, 0)], "F1.0 is done on rank 1 and again on rank 1"),
        (1, inner[::-1], "no rank can go on: rank 0 at F0.2 waits for.*|rank 1 at W.* waits for I"),
        (0, [*outer, inner[-1]], "done on rank 0 and again on rank 1"),
    ):
        with pytest.raises(ScheduleError, match=said):
            check(_changed(schedule, rank, row))
    with pytest.raises(ScheduleError, match=r"is on ranks \[0, 1\]"):
        check(_changed(_changed(schedule, 1, inner[:-1]), 0, [*outer, inner[-1]]))
