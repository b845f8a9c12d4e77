"""Pipeline schedules as data: for each rank, the ordered list of what it computes. Pure functions, no tensors.

A micro-batch passes the stages of a model in order, forward (F), and comes back (B). B may be taken apart into I, the
gradient of a stage's input, which the stage before waits for, and W, the gradients of its weights, which nobody waits
for. F&B is a forward of one micro-batch and a backward of another that run as one, computation of either beside
communication of the other. A schedule is valid (:func:`check`) if every rank comes to an end when each action waits for
its inputs; what is sent is implied, and :func:`with_transfers` writes it down in an order that can't deadlock.

    name         stages a rank   source
    1f1b         v, in a loop    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters"
    zbv          2, in a V       Qi et al. 2024, "Pipeline Parallelism with Controllable Memory"
    dualpipe     2, crossing     DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.2.1
    dualpipev    2, in a V       DeepSeek-AI 2025, DualPipe's repository: DualPipe cut in half

In a V, rank r of R holds the stages r and 2R - 1 - r. DualPipe has R stages and holds r and R - 1 - r: each stage lies
on two ranks, and half of the micro-batches enters at either end.

Refused: numbers of ranks or micro-batches for which a schedule isn't defined.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule isn't defined for these numbers, or what was given as one can't be carried out."""


class Op(NamedTuple):
    """One computation of one stage: ``kind`` F, B, I or W. Printed as ``F2.7``: stage 2, micro-batch 7."""

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro}"


class Pair(NamedTuple):
    """A forward and a backward that overlap; of different micro-batches, so neither waits for the other."""

    forward: Op
    backward: Op

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


class Transfer(NamedTuple):
    """``kind`` send or recv: the output of ``op`` between this rank and ``peer``."""

    kind: str
    op: Op
    peer: int

    def __str__(self) -> str:
        return f"{self.kind}({self.op}, {self.peer})"


Action = Op | Pair


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order.

    Attributes:
        ranks: the actions of each.
        place: (stage, micro-batch) -> the rank that computes it.
    """

    name: str
    stages: int
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]
    place: dict[tuple[int, int], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        place = {(op.stage, op.micro): r for r, row in enumerate(self.ranks) for op in ops(row) if op.kind == "F"}
        object.__setattr__(self, "place", place)

    def held(self, rank: int) -> list[int]:
        """The stages that a rank needs the weights of, in order."""
        return sorted({op.stage for op in ops(self.ranks[rank])})

    def forward_only(self) -> Schedule:
        """The same for inference: every backward left out."""
        rows = (tuple(op for op in ops(row) if op.kind == "F") for row in self.ranks)
        return Schedule(self.name, self.stages, self.micro_batches, tuple(rows))


def ops(actions: Iterable[Action]) -> Iterator[Op]:
    """A rank's actions with pairs taken apart."""
    for action in actions:
        yield from (action.forward, action.backward) if isinstance(action, Pair) else (action,)


# ------------------------------------------------------------------ the schedules


def one_f_one_b(ranks: int, micro_batches: int, stages_per_rank: int = 1) -> Schedule:
    """Each rank alternates F and B once it is warm; with v stages a rank, stage s lies on rank s mod R (interleaved).

    Raises:
        ScheduleError: no micro-batch, or with v > 1 a number of them that R doesn't divide.
    """
    _at_least("1f1b", ranks, 1, micro_batches, 1)
    v = stages_per_rank
    if v > 1 and micro_batches % ranks:
        raise ScheduleError(
            f"1f1b: {micro_batches} micro-batches, {ranks} ranks with {v} stages each. Interleaved stages take "
            f"micro-batches in turns of one a rank. Give a multiple of {ranks} micro-batches, or one stage a rank."
        )
    turn = ranks if v > 1 else micro_batches
    order = [(m, c) for t in range(0, micro_batches, turn) for c in range(v) for m in range(t, t + turn)]
    rows = []
    for r in range(ranks):
        forward = [Op("F", c * ranks + r, m) for m, c in order]
        backward = [Op("B", (v - 1 - c) * ranks + r, m) for m, c in order]
        warm = ranks - r - 1 if v == 1 else (v - 1) * ranks + 2 * (ranks - r - 1)
        warm = min(warm, len(order))
        steady = [op for pair in zip(forward[warm:], backward) for op in pair]
        rows.append((*forward[:warm], *steady, *backward[len(order) - warm :]))
    return Schedule("1f1b", v * ranks, micro_batches, tuple(rows))


def zbv(ranks: int, micro_batches: int) -> Schedule:
    """Stages in a V, every backward taken apart, so that W fills what would be a bubble.

    Raises:
        ScheduleError: fewer than 2R micro-batches.
    """
    _at_least("zbv", ranks, 1, micro_batches, 2 * ranks)

    def row(r: int) -> list[str]:
        cold = ranks - r
        return [
            *["F0"] * (2 * cold - 1),
            *["F1", "F0"] * r,
            *["F1", "I1", "W1"] * cold,
            *["F0", "I0", "W0", "F1", "I1", "W1"] * (micro_batches - ranks - cold + 1),
            *["I0", "W0", "F1", "I1", "W1"] * (cold - 1),
            *["I0", "I1"] * r,
            *["I0", "W0"] * cold,
            *["W1"] * r,
            *["W0"] * r,
        ]

    return _from_words("zbv", 2 * ranks, micro_batches, [row(r) for r in range(ranks)], _in_a_v(ranks))


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """Two pipelines of R stages through the same ranks, in opposite directions, half of the micro-batches in each.

    The first half of the micro-batches enters at rank 0. Rank r is, seen from the nearer end, number
    h = min(r, R - 1 - r) of N = R/2, and phase 0 is what entered there.

    Raises:
        ScheduleError: an odd number of ranks or micro-batches, or fewer than 2R micro-batches.
    """
    _at_least("dualpipe", ranks, 2, micro_batches, 2 * ranks)
    for what, count in (("ranks", ranks), ("micro-batches", micro_batches)):
        if count % 2:
            raise ScheduleError(
                f"dualpipe: {count} {what}. Half of the {what} belong to each of the two directions. "
                f"Give an even number, or take dualpipev, which has one direction."
            )
    half = micro_batches // 2
    words = [_eight_steps(ranks // 2, min(r, ranks - 1 - r), half) for r in range(ranks)]

    def stage(r: int, phase: int) -> tuple[int, int]:
        backwards = phase ^ (r >= ranks // 2)
        return (ranks - 1 - r, half) if backwards else (r, 0)

    return _from_words("dualpipe", ranks, micro_batches, words, stage)


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe without the second copy of the weights: phase 0 goes down the V, phase 1 up.

    Raises:
        ScheduleError: fewer than 2R micro-batches.
    """
    _at_least("dualpipev", ranks, 1, micro_batches, 2 * ranks)
    words = [_eight_steps(ranks, r, micro_batches) for r in range(ranks)]
    return _from_words("dualpipev", 2 * ranks, micro_batches, words, _in_a_v(ranks))


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zbv": zbv,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def _eight_steps(n: int, h: int, chunks: int) -> list[str]:
    """DualPipe and DualPipeV for number ``h`` of ``n``, 0 the outermost, in words: F0 is a forward of phase 0.

    In step 6 the second half of the backwards is taken apart; what they leave of W fills steps 7 and 8.
    """
    outer, main = n - h - 1, chunks - 2 * n + h + 1
    innermost = not outer
    ending = [f"{'B' if i <= h else 'I'}{1 - i % 2}" for i in range(2 * (h + 1))]
    return [
        *["F0"] * (2 * outer),
        *["F0", "F1"] * (h + 1),
        *["I1", "W", "F1"] * outer,
        *(["F0", "B1"] if innermost else ["F0&B1"]),  # apart, the innermost hands on its forward sooner
        *["F1&B0", "F0&B1"] * (main - 1),
        "F1&B0",
        *["B1", "F1&B0"] * outer,
        *ending,
        *["W", "I0"] * outer,
        *["W"] * (h + 1),
    ]


def _from_words(
    name: str, stages: int, micro_batches: int, rows: list[list[str]], stage: Callable[[int, int], tuple[int, int]]
) -> Schedule:
    """Words to actions: the k-th F0 of a rank is of micro-batch ``first`` + k, ``(stage, first) = stage(rank, phase)``.

    A plain W is that of the oldest I that has none yet.
    """
    found = []
    for r, words in enumerate(rows):
        counts: Counter[str] = Counter()
        waiting: deque[Op] = deque()

        def op(word: str, r: int = r, counts: Counter[str] = counts, waiting: deque[Op] = waiting) -> Op:
            if word == "W":
                oldest = waiting.popleft()
                return Op("W", oldest.stage, oldest.micro)
            kind, phase = word[0], int(word[1])
            number = f"{'B' if kind == 'I' else kind}{phase}"  # B and I share their numbers
            index, first = stage(r, phase)
            made = Op(kind, index, first + counts[number])
            counts[number] += 1
            if kind == "I":
                waiting.append(made)
            return made

        parts = [[op(word) for word in action.split("&")] for action in words]
        found.append(tuple(Pair(*part) if len(part) == 2 else part[0] for part in parts))
    return Schedule(name, stages, micro_batches, tuple(found))


def _in_a_v(ranks: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda r, phase: (2 * ranks - 1 - r if phase else r, 0)


def _at_least(name: str, ranks: int, fewest_ranks: int, micro_batches: int, fewest: int) -> None:
    if ranks < fewest_ranks:
        raise ScheduleError(f"{name}: {ranks} ranks. It is defined for {fewest_ranks} or more. Start more ranks.")
    if micro_batches < fewest:
        raise ScheduleError(
            f"{name}: {micro_batches} micro-batches on {ranks} ranks. Until the first comes back, the first rank has "
            f"{fewest} to begin. Cut the batch into {fewest} or more."
        )


# ------------------------------------------------------------------ validity


def needs(op: Op, stages: int, kinds: dict[tuple[int, int], str]) -> Iterator[Op]:
    """What ``op`` waits for. ``kinds``: of each (stage, micro-batch) B or I, whichever its backward is."""
    s, m = op.stage, op.micro
    if op.kind == "F":
        if s:
            yield Op("F", s - 1, m)
    elif op.kind == "W":
        yield Op("I", s, m)
    else:
        yield Op("F", s, m)
        if s + 1 < stages:
            yield Op(kinds[s + 1, m], s + 1, m)


def order(schedule: Schedule) -> list[tuple[int, Action]]:
    """(rank, action) in one order in which all of them can be carried out, ranks taking turns.

    Raises:
        ScheduleError: there is none; names what each rank waits for.
    """
    kinds = {(op.stage, op.micro): op.kind for row in schedule.ranks for op in ops(row) if op.kind in "BI"}
    done: set[Op] = set()
    at = [0] * len(schedule.ranks)
    found: list[tuple[int, Action]] = []

    def missing(action: Action) -> Iterator[Op]:
        for op in ops([action]):
            yield from (need for need in needs(op, schedule.stages, kinds) if need not in done)

    while left := [(r, row[at[r]]) for r, row in enumerate(schedule.ranks) if at[r] < len(row)]:
        ready = [(r, action) for r, action in left if next(missing(action), None) is None]
        if not ready:
            said = "; ".join(f"rank {r} at {a} waits for {', '.join(map(str, missing(a)))}" for r, a in left)
            raise ScheduleError(f"{schedule.name}: no rank can go on: {said}. Put what they wait for earlier.")
        for r, action in ready:
            found.append((r, action))
            done.update(ops([action]))
            at[r] += 1
    return found


def check(schedule: Schedule) -> None:
    """Every stage sees every micro-batch once forward and once back, on one rank, in an order that comes to an end.

    Raises:
        ScheduleError: names the first action that is missing, double, on another rank, or waits for ever.
    """
    backward = any(op.kind != "F" for row in schedule.ranks for op in ops(row))
    where: dict[Op, int] = {}
    for r, row in enumerate(schedule.ranks):
        for op in ops(row):
            if op in where:
                raise ScheduleError(
                    f"{schedule.name}: {op} is done on rank {where[op]} and again on rank {r}. A micro-batch passes a "
                    "stage once. Leave one out."
                )
            where[op] = r
    for s in range(schedule.stages):
        for m in range(schedule.micro_batches):
            kinds = "".join(kind for kind in "FBIW" if Op(kind, s, m) in where)
            if kinds not in (("FB", "FIW") if backward else ("F",)):
                raise ScheduleError(
                    f"{schedule.name}: stage {s} does {', '.join(kinds) or 'nothing'} for micro-batch {m}. "
                    "Give it one F, and one B or one I and one W."
                )
            ranks = {where[Op(kind, s, m)] for kind in kinds}
            if len(ranks) > 1:
                raise ScheduleError(
                    f"{schedule.name}: micro-batch {m} in stage {s} is on ranks {sorted(ranks)}. What F saves is where "
                    "F was. Put them on one rank."
                )
    order(schedule)


def with_transfers(schedule: Schedule) -> list[list[Action | Transfer]]:
    """Each rank's actions with its sends and receives.

    All are written down in one global order in which a send stands beside its receive. So ranks that carry out their
    own part in order, even with transfers that wait for their other half, never wait for each other in a circle; and
    between two ranks messages come in the order in which they are expected.
    """
    rows: list[list[Action | Transfer]] = [[] for _ in schedule.ranks]
    last = schedule.stages - 1
    for r, action in order(schedule):
        rows[r].append(action)
        for op in ops([action]):
            onward = op.stage + 1 if op.kind == "F" else op.stage - 1
            if op.kind == "W" or not 0 <= onward <= last:
                continue
            peer = schedule.place[onward, op.micro]
            if peer != r:
                rows[r].append(Transfer("send", op, peer))
                rows[peer].append(Transfer("recv", op, r))
    return rows
