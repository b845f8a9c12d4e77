"""How long a schedule takes if each action takes as long as it is said to: step time and bubble, simulated.

Nothing is measured here. A rank does its actions in order, each as soon as the outputs of other ranks that it needs
are there; what it does not do in that time is its bubble. ``Costs`` are per stage, so that schedules with two stages
a rank are compared on one model: a stage of 1F1B with one stage a rank costs twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.runtime.schedules import Action, Op, Pair, Schedule, ScheduleError, needs, ops, order


@dataclass(frozen=True)
class Costs:
    """Of one micro-batch in one stage, in any unit of time.

    Attributes:
        forward, backward: F and B, the latter with its W.
        weight: W alone; I takes what is left of B.
        pair: F&B; None: as long as F and B one after the other.
        transfer: from the end of an action until a neighbour has its output.
    """

    forward: float = 1.0
    backward: float = 2.0
    weight: float = 1.0
    pair: float | None = None
    transfer: float = 0.0

    def __post_init__(self) -> None:
        if min(self.forward, self.weight, self.transfer, self.backward - self.weight) < 0:
            raise ScheduleError(f"{self}: a time is negative, or W takes longer than the B it is a part of.")

    @property
    def together(self) -> float:
        return self.forward + self.backward if self.pair is None else self.pair

    def of(self, action: Action) -> float:
        if isinstance(action, Pair):
            return self.together
        times = {"F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight}
        return times[action.kind]


@dataclass(frozen=True)
class Simulated:
    """A simulated step.

    Attributes:
        schedule: what was simulated.
        spans: of each rank, (start, end) of each of its actions.
    """

    schedule: Schedule
    spans: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def total(self) -> float:
        """Until the last rank is done."""
        return max(end for row in self.spans for _, end in row)

    @property
    def busy(self) -> list[float]:
        """Of each rank."""
        return [sum(end - start for start, end in row) for row in self.spans]

    @property
    def bubble(self) -> float:
        """Of the rank that waits the longest.

        Where F = I = W and B <= F&B <= F + B, that of DualPipe's R stages is (R/2 - 1)(F&B + B - 3W), and DualPipeV's
        on R ranks the same with R for R/2.
        """
        return self.total - min(self.busy)

    def __str__(self) -> str:
        share = 100 * self.bubble / self.total
        return f"{self.schedule.name}: {self.total:g}, bubble {self.bubble:g} ({share:.1f} %), simulated"


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulated:
    """Raises ScheduleError if the schedule doesn't come to an end."""
    costs = costs or Costs()
    kinds = {(op.stage, op.micro): op.kind for row in schedule.ranks for op in ops(row) if op.kind in "BI"}
    free = [0.0] * len(schedule.ranks)
    done: dict[Op, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in schedule.ranks]
    for r, action in order(schedule):
        start = free[r]
        for op in ops([action]):
            for need in needs(op, schedule.stages, kinds):
                away = schedule.place[need.stage, need.micro] != r
                start = max(start, done[need] + away * costs.transfer)
        free[r] = start + costs.of(action)
        spans[r].append((start, free[r]))
        done.update(dict.fromkeys(ops([action]), free[r]))
    return Simulated(schedule, tuple(map(tuple, spans)))


def in_flight(schedule: Schedule) -> list[int]:
    """The most micro-batches of all its stages that each rank keeps activations of at once."""
    found = []
    for row in schedule.ranks:
        held = most = 0
        for op in ops(row):
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[op.kind]
            most = max(most, held)
        found.append(most)
    return found
