"""The ring of the CUDA FP8 kernel as a model: every order in which its parts can run, deadlocks and early reuse found.

A device can't show that a barrier protocol is right, only that it has not failed yet. The model has what
cuda/fp8_gemm.cu has: per CTA a producer and multiplying warps, per slot a full and an empty barrier with counts and
phases, and copies that finish in any order, into both CTAs where they are multicast. All its states are visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Protocol:
    """One configuration. The last three are how the kernel does it; tests break them one at a time."""

    ctas: int = 2
    slots: int = 2
    steps: tuple[int, ...] = (4, 4)  # of each CTA
    warps: int = 1  # multiplying warps of a CTA
    release_to_peer: bool = True
    arrivals_of_peer: bool = True
    release_after_reading: bool = True

    @property
    def empty_count(self) -> int:
        return self.warps * (self.ctas if self.arrivals_of_peer else 1)


# A state is a tuple of tuples, so that it can be remembered:
#   producers  per CTA: steps issued
#   readers    per CTA and warp: (step, stage); stages: 0 waits, 1 reads, 2 has read and tells CTA 0, 3 tells CTA 1
#   full       per CTA and slot: (phase, arrivals missing, copies expected minus copies done)
#   empty      per CTA and slot: (phase, arrivals missing)
#   memory     per CTA, slot and part: the step whose bytes are there, -1 at first
#   flying     copies under way: (cta they write to, slot, part, step)


def initial(p: Protocol) -> tuple:
    return (
        (0,) * p.ctas,
        ((0, 0),) * (p.ctas * p.warps),
        ((0, 1, 0),) * (p.ctas * p.slots),
        ((0, p.empty_count),) * (p.ctas * p.slots),
        (-1,) * (p.ctas * p.slots * p.ctas),
        frozenset(),
    )


def put(items: tuple, index: int, value: object) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


def complete(barrier: tuple) -> tuple:
    """A full barrier whose arrivals and bytes are all there goes to its next phase."""
    phase, missing, pending = barrier
    return (phase ^ 1, 1, 0) if missing == 0 and pending == 0 else barrier


def arrive_empty(p: Protocol, empty: tuple, index: int) -> tuple:
    phase, missing = empty[index]
    return put(empty, index, (phase ^ 1, p.empty_count) if missing == 1 else (phase, missing - 1))


def produced(p: Protocol, state: tuple, cta: int) -> tuple | None:
    """The state after this CTA's producer takes a step, None while it waits."""
    producers, readers, full, empty, memory, flying = state
    step = producers[cta]
    slot, round_ = step % p.slots, step // p.slots
    at = cta * p.slots + slot
    if step == p.steps[cta] or not passed(empty[at][0], round_):
        return None
    phase, missing, pending = full[at]
    # Part i of a slot comes from CTA i, which sends it to every CTA; so each CTA expects one part from each.
    full = put(full, at, complete((phase, missing - 1, pending + p.ctas)))
    copies = {(to, slot, cta, step) for to in range(p.ctas)}
    return put(producers, cta, step + 1), readers, full, empty, memory, flying | copies


def passed(phase: int, round_: int) -> bool:
    """Whether a wait of the producer in its round-th use of a slot returns: for the phase before, done at the start."""
    return phase == round_ & 1


def landed(p: Protocol, state: tuple, copy: tuple) -> tuple:
    """The state after a copy's bytes have arrived. Asserts that nobody still needs what it overwrites."""
    producers, readers, full, empty, memory, flying = state
    cta, slot, part, step = copy
    for warp in range(p.warps):
        reading, stage = readers[cta * p.warps + warp]
        done = reading + (stage >= 2)  # steps that this warp has read
        what = f"step {step} of CTA {part} overwrites slot {slot} of CTA {cta}"
        assert done > step - p.slots, f"{what} before it was read"
    at = cta * p.slots + slot
    phase, missing, pending = full[at]
    full = put(full, at, complete((phase, missing, pending - 1)))
    memory = put(memory, at * p.ctas + part, step)
    return producers, readers, full, empty, memory, flying - {copy}


def consumed(p: Protocol, state: tuple, cta: int, warp: int) -> tuple | None:
    """The state after a warp waits through, reads, or tells one CTA that it has read."""
    producers, readers, full, empty, memory, flying = state
    me = cta * p.warps + warp
    step, stage = readers[me]
    slot, round_ = step % p.slots, step // p.slots
    at = cta * p.slots + slot
    if step == p.steps[cta]:
        return None
    if stage == 0:
        if full[at][0] == round_ & 1:
            return None
        if not p.release_after_reading:
            empty = arrive_empty(p, empty, at)
        return producers, put(readers, me, (step, 1)), full, empty, memory, flying
    if stage == 1:
        found = memory[at * p.ctas : (at + 1) * p.ctas]
        assert found == (step,) * p.ctas, f"CTA {cta} reads steps {found} in slot {slot}, not {step}"
        return producers, put(readers, me, (step, 2)), full, empty, memory, flying
    target = stage - 2
    skip = (target != cta and not p.release_to_peer) or not p.release_after_reading
    if not skip:
        empty = arrive_empty(p, empty, target * p.slots + slot)
    following = (step, stage + 1) if target + 1 < p.ctas else (step + 1, 0)
    return producers, put(readers, me, following), full, empty, memory, flying


def explore(p: Protocol) -> int:
    """Number of states that can be reached. Raises AssertionError on early reuse, wrong bytes or a deadlock."""
    start = initial(p)
    seen, stack = {start}, [start]
    while stack:
        state = stack.pop()
        following = [produced(p, state, cta) for cta in range(p.ctas)]
        following += [consumed(p, state, cta, warp) for cta in range(p.ctas) for warp in range(p.warps)]
        following += [landed(p, state, copy) for copy in state[5]]
        following = [new for new in following if new is not None]
        if not following:
            ends = tuple((p.steps[cta], 0) for cta in range(p.ctas) for _ in range(p.warps))
            assert state[0] == p.steps and state[1] == ends and not state[5], f"deadlock in {state[:2]}"
        for new in following:
            if new not in seen:
                seen.add(new)
                stack.append(new)
    return len(seen)


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(ctas=1, steps=(7,), slots=3, warps=2),
        Protocol(ctas=1, steps=(6,), slots=1, warps=2),
        Protocol(ctas=2, steps=(5, 5), slots=2),
        Protocol(ctas=2, steps=(3, 3), slots=1, warps=2),
        Protocol(ctas=2, steps=(3, 3), slots=2, warps=2),
    ],
    ids=lambda p: f"{p.ctas}ctas-{p.slots}slots-{p.warps}warps",
)
def test_no_order_of_events_fails(protocol: Protocol) -> None:
    assert explore(protocol) > 20


def test_a_release_that_the_peer_does_not_wait_for_is_found() -> None:
    """With one CTA's arrivals only, a multicast may overwrite what the other still reads."""
    with pytest.raises(AssertionError, match="before it was read"):
        explore(Protocol(release_to_peer=False, arrivals_of_peer=False))


def test_a_release_that_does_not_reach_the_peer_is_found() -> None:
    with pytest.raises(AssertionError, match="deadlock"):
        explore(Protocol(release_to_peer=False))


def test_a_release_before_reading_is_found() -> None:
    with pytest.raises(AssertionError, match="before it was read"):
        explore(Protocol(ctas=1, steps=(4,), release_after_reading=False))


def test_ctas_that_disagree_on_the_number_of_steps_are_found() -> None:
    """Why both CTAs of a cluster walk the same units, a tile outside the result included."""
    with pytest.raises(AssertionError, match="deadlock"):
        explore(Protocol(steps=(4, 3)))
