"""The ring of the CUDA kernel of 16-bit products as a model: every order in which its parts can run.

What differs from the FP8 kernel's (test_gemm_cuda_pipeline.py): a step's products run while the next is awaited, a CTA
may load only part of a step, and warpgroups may take turns, each leaving word where the ring stands. Barriers have what
the device's have, a parity: a wait that comes a whole round late passes too early, and the model shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Protocol:
    """One configuration. The last three are how the kernel does it; tests break them one at a time.

    tiles: steps of each tile, the same for all CTAs of a cluster. lone: CTA 1 lies outside the result: it loads its
    half of what both share and nothing else, and multiplies nothing.
    """

    ctas: int = 1
    slots: int = 2
    tiles: tuple[int, ...] = (2, 2, 1)
    warps: int = 1  # of each of the two warpgroups
    turns: bool = True
    lone: bool = False
    every_warp_passes: bool = True
    pass_after_waiting: bool = True
    release_after_products: bool = True

    @property
    def readers(self) -> int:
        return self.ctas * self.warps * (1 if self.turns else 2)

    @property
    def steps(self) -> int:
        """Of the ring: the tiles', and one that says that none follows."""
        return sum(self.tiles) + 1

    def tile_at(self, step: int) -> int | None:
        """Index of the tile whose first step this is; None for the end."""
        first = 0
        for index, steps in enumerate(self.tiles):
            if first == step:
                return index
            first += steps
        assert step == first, f"step {step} is not a tile's first"
        return None


# A state is a tuple of these, all tuples, so that it can be remembered:
#   producers  per CTA: steps issued
#   warps      per CTA, warpgroup and warp: (what it does, step of the ring, steps left of the tile, turns taken,
#              the step whose products may still run or -1)
#   full       per CTA and slot: (completed, arrivals missing, copies missing)
#   empty      per CTA and slot: (completed, arrivals missing)
#   turn       per CTA and warpgroup: (completed, arrivals missing, word)
#   memory     per CTA and slot: the step that each part belongs to
#   flying     copies under way: (CTA, slot, part, step)
# `completed` counts, but a wait sees its parity only.


class Model:
    def __init__(self, p: Protocol) -> None:
        self.p = p

    def initial(self) -> tuple:
        p = self.p
        warps = tuple(("take", 0, 0, 0, -1) for _ in range(2 * p.ctas * p.warps))
        slots = p.ctas * p.slots
        turn = ((0, p.warps if p.every_warp_passes else 1, 0),) * (2 * p.ctas)
        return (
            (0,) * p.ctas,
            warps,
            ((0, 1, 0),) * slots,
            ((0, p.readers),) * slots,
            turn,
            ((-1, -1),) * slots,
            (),
        )

    def passed(self, completed: int, parity: int) -> bool:
        """try_wait.parity: whether the last phase that completed has this parity; before the first, 1."""
        return (completed - 1) & 1 == parity

    def parts(self, cta: int, step: int) -> dict[int, tuple[int, ...]]:
        """Parts of the slot that this CTA's producer loads, and into which CTAs. Part 0 is shared by the cluster."""
        p = self.p
        if step == p.steps - 1:
            return {}
        if p.ctas == 1:
            return {0: (0,), 1: (0,)}
        # Each CTA sends its half of what both share; the halves are parts 0 and 1 of both. What only one uses is left
        # out of the model: its copy fails in no way in which these don't.
        return {cta: (0, 1)}

    def produce(self, state: tuple, cta: int) -> tuple | None:
        producers, warps, full, empty, turn, memory, flying = state
        p, step = self.p, producers[cta]
        if step == p.steps:
            return None
        slot, round_ = step % p.slots, step // p.slots
        at = cta * p.slots + slot
        if not self.passed(empty[at][0], (round_ & 1) ^ 1):
            return None
        mine = self.parts(cta, step)
        expected = 0 if not mine else 2
        full = put(full, at, settled((full[at][0], full[at][1] - 1, full[at][2] + expected)))
        copies = tuple((to, slot, part, step) for part, targets in mine.items() for to in targets)
        return put(producers, cta, step + 1), warps, full, empty, turn, memory, flying + copies

    def land(self, state: tuple, index: int) -> tuple:
        producers, warps, full, empty, turn, memory, flying = state
        p = self.p
        cta, slot, part, step = flying[index]
        at = cta * p.slots + slot
        old = memory[at][part]
        if old >= 0:
            assert self.is_read(state, cta, old), f"step {step} overwrites {old} in CTA {cta} before it was read"
        full = put(full, at, settled((full[at][0], full[at][1], full[at][2] - 1)))
        memory = put(memory, at, put(memory[at], part, step))
        return producers, warps, full, empty, turn, memory, flying[:index] + flying[index + 1 :]

    def of(self, warps: tuple, cta: int) -> tuple:
        each = 2 * self.p.warps
        return warps[cta * each : (cta + 1) * each]

    def is_read(self, state: tuple, cta: int, step: int) -> bool:
        """Whether every warp that reads a step has done so."""
        p, first, owner = self.p, 0, 0
        for index, steps in enumerate(p.tiles):
            if first <= step < first + steps:
                owner = index % 2
            first += steps
        for i, (_, at, _, _, running) in enumerate(self.of(state[1], cta)):
            if (not p.turns or i // p.warps == owner) and (at <= step or running == step):
                return False
        return True

    def consume(self, state: tuple, me: int) -> tuple | None:
        """One event of a warp: it takes its turn, waits through and starts a step, releases, passes, stops."""
        p, (doing, step, left, taken, running) = self.p, state[1][me]
        cta, warpgroup, warp = me // (2 * p.warps), me // p.warps % 2, me % p.warps
        if doing == "take":
            if not p.turns:
                return self.moved(state, me, ("first", step, 0, 0, -1))
            completed, _, word = state[4][2 * cta + warpgroup]
            if not self.passed(completed, (taken & 1) ^ (warpgroup == 0)):
                return None
            return self.moved(state, me, ("first", word, 0, taken + 1, -1))
        if doing in ("first", "wait"):
            return self.waited(state, me, cta, warpgroup, warp)
        if doing == "read":  # products of this step run; those of the step before are awaited and released
            if running >= 0 and p.release_after_products:
                state = self.released(state, cta, running)
            following = "wait" if left > 1 else "pass"
            return self.moved(state, me, (following, step + 1, left - 1, taken, step))
        if doing == "pass":
            if p.turns:
                state = self.turned(state, cta, warpgroup, warp, step)
            return self.moved(state, me, ("last", step, 0, taken, running))
        if doing == "last":
            if running >= 0 and p.release_after_products:
                state = self.released(state, cta, running)
            return self.moved(state, me, ("take", step, 0, taken, -1))
        return None

    def waited(self, state: tuple, me: int, cta: int, warpgroup: int, warp: int) -> tuple | None:
        p, (doing, step, left, taken, running) = self.p, state[1][me]
        slot, round_ = step % p.slots, step // p.slots
        at = cta * p.slots + slot
        if not self.passed(state[2][at][0], round_ & 1):
            return None
        assert state[2][at][0] == round_ + 1, f"a wait for step {step} passes in round {state[2][at][0] - 1}"
        if doing == "first":
            tile = p.tile_at(step)
            if tile is None:
                if p.turns:
                    state = self.turned(state, cta, warpgroup, warp, step)
                return self.moved(state, me, ("done", step, 0, taken, -1))
            assert not p.turns or tile % 2 == warpgroup, f"warpgroup {warpgroup} takes tile {tile}"
            left = p.tiles[tile]
            if p.turns and not p.pass_after_waiting:
                state = self.turned(state, cta, warpgroup, warp, step + left)
        assert set(state[5][at]) == {step}, f"step {step} finds {state[5][at]}"
        if not p.release_after_products:
            state = self.released(state, cta, step)
        if p.lone and cta == 1:  # nothing to multiply: released at once
            state = self.released(state, cta, step)
            return self.moved(state, me, ("wait" if left > 1 else "pass", step + 1, left - 1, taken, -1))
        return self.moved(state, me, ("read", step, left, taken, running))

    def moved(self, state: tuple, me: int, warp: tuple) -> tuple:
        return (state[0], put(state[1], me, warp), *state[2:])

    def released(self, state: tuple, cta: int, step: int) -> tuple:
        p, empty = self.p, state[3]
        for to in range(p.ctas):
            at = to * p.slots + step % p.slots
            completed, missing = empty[at]
            empty = put(empty, at, (completed + 1, p.readers) if missing == 1 else (completed, missing - 1))
        return (*state[:3], empty, *state[4:])

    def turned(self, state: tuple, cta: int, warpgroup: int, warp: int, word: int) -> tuple:
        p, turn = self.p, state[4]
        if warp > 0 and not p.every_warp_passes:
            return state
        at = 2 * cta + (warpgroup ^ 1)
        completed, missing, old = turn[at]
        word = word if warp == 0 else old
        count = p.warps if p.every_warp_passes else 1
        turn = put(turn, at, (completed + 1, count, word) if missing == 1 else (completed, missing - 1, word))
        return (*state[:4], turn, *state[5:])

    def explore(self) -> int:
        """Number of states that can be reached. Raises AssertionError on what must not happen, a deadlock included."""
        p, start = self.p, self.initial()
        seen, stack = {start}, [start]
        while stack:
            state = stack.pop()
            following = [self.produce(state, cta) for cta in range(p.ctas)]
            following += [self.consume(state, me) for me in range(len(state[1]))]
            following += [self.land(state, index) for index in range(len(state[6]))]
            following = [new for new in following if new is not None]
            if not following:
                done = all(warp[0] == "done" for warp in state[1]) and not state[6]
                assert done and state[0] == (p.steps,) * p.ctas, f"deadlock in {state[:2]}"
            for new in following:
                new = (*new[:6], tuple(sorted(new[6])))
                if new not in seen:
                    seen.add(new)
                    stack.append(new)
        return len(seen)


def put(items: tuple, index: int, value: object) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


def settled(barrier: tuple) -> tuple:
    """A full barrier whose arrivals and bytes are all there completes its phase."""
    completed, missing, copies = barrier
    return (completed + 1, 1, 0) if missing == 0 and copies == 0 else barrier


WHOLE = [
    Protocol(tiles=(2, 3, 1), slots=2),
    Protocol(tiles=(1, 1, 1, 1), slots=3, warps=2),
    Protocol(tiles=(3, 2), slots=3, warps=2),
    Protocol(tiles=(2, 2, 1), slots=2, turns=False),
    Protocol(tiles=(), slots=2),
    Protocol(tiles=(5,), slots=2, warps=2),
    Protocol(tiles=(2, 2), slots=2, ctas=2),
    Protocol(tiles=(1, 1, 1), slots=3, ctas=2),
    Protocol(tiles=(2, 1), slots=2, ctas=2, lone=True),
    Protocol(tiles=(2, 1), slots=2, ctas=2, turns=False),
]


@pytest.mark.parametrize("protocol", WHOLE, ids=lambda p: f"{p.ctas}ctas-{p.slots}slots-{p.tiles}-turns={p.turns}")
def test_no_order_of_events_fails(protocol: Protocol) -> None:
    assert Model(protocol).explore() > 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # A warpgroup that waits for steps far ahead takes the parity of a round before for its own.
        ({"tiles": (4, 2), "pass_after_waiting": False}, "passes in round"),
        # A warp that sleeps through two turns of its warpgroup finds the wrong word, or never wakes.
        ({"tiles": (1, 1, 1, 1, 1), "slots": 4, "warps": 2, "every_warp_passes": False}, "."),
        ({"tiles": (3, 2), "release_after_products": False}, "overwrites"),
        # One slot can't hold the running products' step and the one that is awaited.
        ({"tiles": (2, 2), "slots": 1}, "deadlock"),
    ],
    ids=["early-pass", "one-warp-passes", "early-release", "one-slot"],
)
def test_what_would_break_it_is_found(change: dict, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        Model(Protocol(**change)).explore()
