"""Live rebalancing: windows and triggers alone, weights between four processes, and ranks that fail on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dscompile.runtime.eplb import PlacementError
from dscompile.runtime.movement import ExpertSlots, Transfer, transfers
from dscompile.runtime.placement import Rebalancer, Trigger, Window
from tests.ranks import Ranks, ranks
from tests.runtime import placement_checks as checks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(4, Path(tmp_path_factory.mktemp("ranks")), preload=["tests.runtime.placement_checks"]) as started:
        yield started


@pytest.mark.parametrize("slots", [16, 20], ids=["no_spare_slots", "spare_slots"])
def test_outputs_stay_while_experts_move(four: Ranks, slots: int) -> None:
    found = four.run(checks.follows_the_load, slots)
    assert all(one["right"] == checks.STEPS * checks.L for one in found), "before, during and after"
    first = found[0]
    assert all(one["placement"] == first["placement"] and one["history"] == first["history"] for one in found)
    assert first["under_way"] > 0 and len(first["history"]) >= checks.L
    assert first["after"] > first["before"] + 0.05


def test_a_rank_without_memory_keeps_all_at_the_old_placement(four: Ranks) -> None:
    messages = four.run(checks.fails_on_one_rank)
    assert "rank 1 of 4 could not set memory aside (out of memory)" in messages[1]
    assert all("another rank of 4 could not set memory aside" in messages[r] for r in (0, 2, 3))
    assert all("the old placement stays in force" in message for message in messages)


def test_a_rank_killed_on_the_way_leaves_valid_placements(tmp_path: Path) -> None:
    with ranks(4, tmp_path, preload=["tests.runtime.placement_checks"]) as started:
        found = started.outcomes(checks.dies_on_the_way)
    assert found[3] == (False, "gone")
    assert all(fine and "the old placement stays in force" in message for fine, message in found[:3]), found


# ------------------------------------------------------------------ parts


def test_transfers_come_from_the_own_rank_or_the_one_that_sends_least() -> None:
    old = [0, 1, 0, 2, 3, 4]  # three ranks of two slots
    found = transfers(old, [1, 0, 0, 3, 0, 2], 3)
    assert found[:2] == [Transfer(1, 0), Transfer(0, 1)], "exchanged inside a rank"
    assert found[2] == Transfer(4, 3)
    assert found[3].source in (0, 2) and found[4] == Transfer(3, 5)
    assert transfers(old, old, 3) == []


def slots_of(counts: list[int], device: str = "cpu") -> ExpertSlots:
    E = len(counts)
    maps = torch.zeros(E, 2, dtype=torch.int64), torch.zeros(E, dtype=torch.int64)
    return ExpertSlots((torch.arange(float(E)).unsqueeze(1),), *maps, torch.tensor(counts))


def test_a_window_forgets() -> None:
    layer = slots_of([1, 2])
    window = Window([layer], 2)
    assert window.loads().tolist() == [[0, 0]]
    for reading in ([1, 2], [10, 20], [100, 200]):
        layer.counter.copy_(torch.tensor(reading))
        window.read()
        assert layer.counter.tolist() == [0, 0]
    assert window.loads().tolist() == [[110, 220]]


def test_a_trigger_has_hysteresis() -> None:
    trigger = Trigger(below=0.8, above=0.9, interval=10)
    balances = [0.85, 0.79, 0.79, 0.85, 0.85, 0.91, 0.85, 0.79]
    steps = [0, 5, 10, 15, 20, 25, 40, 41]
    #             above both limits; falls; too early; between, restless; ..; settled; between, settled; falls again
    assert [trigger.due(s, b) for s, b in zip(steps, balances)] == [False, True, False, True, False, False, False, True]


def test_a_plan_must_be_worth_its_bytes() -> None:
    trigger = Trigger(interval=100, seconds=0.01, bandwidth=1e9)
    assert trigger.worth(0.5, 1.0, 900_000_000)  # saves 1 s, costs 0.9 s
    assert not trigger.worth(0.5, 1.0, 1_100_000_000)
    assert not trigger.worth(0.9, 0.9, 0)


@pytest.mark.parametrize("wrong", [{"below": 0.0}, {"below": 0.9, "above": 0.8}, {"interval": 0}, {"bandwidth": 0.0}])
def test_triggers_that_are_none(wrong: dict) -> None:
    with pytest.raises(PlacementError, match="Give 0 < below <= above <= 1"):
        Trigger(**wrong)


def test_a_plan_that_raises_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise ZeroDivisionError("no plan")

    layer = slots_of([4, 1])
    trigger = Trigger(below=1.0, above=1.0, interval=1)
    rebalancer = Rebalancer([layer], torch.tensor([[0, 1]]), trigger=trigger, every=1, plan_steps=1, plan=broken)
    rebalancer.balance = lambda *_: 0.5  # type: ignore[method-assign]
    for _ in range(4):
        assert rebalancer.step() is None
    rebalancer.close()
    assert caplog.text.count("no placement could be planned; the old one stays") == 2
    assert rebalancer.phy2log.tolist() == [[0, 1]]
