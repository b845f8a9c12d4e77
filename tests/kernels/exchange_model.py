"""The flags of an exchange as state machines over a weak memory, every interleaving explored.

A rank runs the CTAs of its sending kernel at the same time, and its receiver. A data word stands for all that a CTA
writes into a peer. Memory is weak: a store is pending until it reaches memory, at any later moment and in any order; a
release waits until the stores that it follows are there: the writer's own, and those whose count it has acquired. A
relaxed flag waits for nothing. A load behind an acquire reads memory as it is; one that no acquire protects may
return any value that the word has held since the last one. Exchanges go round several times on one slot.

    Sender CTA e    await freed[peer] >= e - 1 of every peer; store data (e) to every peer; count arrival; the last
                    one raises ready[me] = e on every peer.
    Receiver e      await ready[peer] >= e of every peer; read every word, which must be of e; raise freed[me] = e.

`Rules` leaves parts out; `explore` gives the first violation with its trace, or the number of states.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["Rules", "Result", "explore"]


@dataclass(frozen=True)
class Rules:
    """What a correct exchange does. ranks, senders: CTAs a rank. exchanges: rounds on one slot.

    release: flags are raised after the stores that they speak of. counts: arrival is counted with release and acquire,
    so that the last CTA's flag speaks for all. acquire: a receiver's reads come after the flag it has seen. back_flags:
    senders wait for what their peers have read. frees_after: a receiver says so after its reads, not before. last: the
    last CTA raises the flags, not the first. paired: the next exchange begins after this rank's own receive. one_way:
    rank 0 alone sends, which keeps the states few.
    """

    ranks: int = 2
    senders: int = 2
    exchanges: int = 2
    release: bool = True
    counts: bool = True
    acquire: bool = True
    back_flags: bool = True
    frees_after: bool = True
    last: bool = True
    paired: bool = False
    one_way: bool = False


@dataclass(frozen=True)
class Result:
    """states explored; violation: None or what went wrong; trace: the steps that led there."""

    states: int
    violation: str | None
    trace: tuple[str, ...] = ()


# A state is (counters, memory, pending, old, arrived), all plain and hashable:
#   counters   exchange and position of each agent: senders of all ranks, then receivers
#   memory     sorted ((word, value), ...), words absent are 0
#   pending    set of (name, word, value, after): `after` names those that must land first
#   old        (word, value) that a reader without acquire may still see
#   arrived    ((rank, exchange), stores of the CTA that counted itself), sorted
State = tuple


class _Machine:
    """Steps of one configuration."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.sending = [0] if rules.one_way else list(range(rules.ranks))
        senders = [("send", rank, cta) for rank in self.sending for cta in range(rules.senders)]
        self.agents = senders + [("receive", rank) for rank in range(rules.ranks) if not rules.one_way or rank]

    def start(self) -> State:
        return tuple((1, 0) for _ in self.agents), (), frozenset(), frozenset(), ()

    def peers(self, rank: int) -> list[int]:
        return [peer for peer in range(self.rules.ranks) if peer != rank]

    def steps(self, state: State) -> list[tuple[str, State | str]]:
        """(what happens, the next state or a violation)."""
        found: list[tuple[str, State | str]] = []
        for i, agent in enumerate(self.agents):
            found += self._send(state, i, *agent[1:]) if agent[0] == "send" else self._receive(state, i, agent[1])
        return found + self._land(state)

    # Memory

    def _land(self, state: State) -> list[tuple[str, State | str]]:
        """A pending store reaches memory once those that it follows have."""
        counters, memory, pending, old, arrived = state
        numbers = {store[0] for store in pending}
        found: list[tuple[str, State | str]] = []
        for store in sorted(pending):
            _, word, value, after = store
            if numbers & set(after):
                continue
            words = dict(memory)
            before = words.get(word, 0)
            words[word] = max(before, value) if word[0] != "data" else value
            kept = old | {(word, before)} if not self.rules.acquire else old
            found.append((f"{word} = {value}", (counters, _sorted(words), pending - {store}, kept, arrived)))
        return found

    @staticmethod
    def _put(pending: frozenset, agent: int, exchange: int, stores: list, after: tuple) -> frozenset:
        """Stores of an agent join the pending ones, named so that a release can follow them."""
        return pending | {((agent, exchange, *word), word, value, after) for word, value in stores}

    # Agents

    def _send(self, state: State, i: int, rank: int, cta: int) -> list[tuple[str, State | str]]:
        rules = self.rules
        counters, memory, pending, old, arrived = state
        exchange, at = counters[i]
        if exchange > rules.exchanges:
            return []
        words, peers, name = dict(memory), self.peers(rank), f"sender {rank}.{cta} of {exchange}"
        if at == 0:  # a kernel begins when the one before on its stream has ended, and the slot is free
            siblings = [j for j, agent in enumerate(self.agents) if agent[0] == "send" and agent[1] == rank]
            behind = rules.paired and counters[self.agents.index(("receive", rank))][0] < exchange
            if behind or any(counters[j][0] < exchange for j in siblings):
                return []
            if rules.back_flags and any(words.get(("freed", rank, peer), 0) < exchange - 1 for peer in peers):
                return []
            data = [(("data", peer, rank, cta), exchange) for peer in peers]
            return [(f"{name} stores", self._next(state, i, 1, self._put(pending, i, exchange, data, ())))]
        if at == 1:  # counts itself; what it counts with may be its turn to raise the flags
            mine = tuple(store[0] for store in pending if store[0][0] == i)
            before = [entry for entry in arrived if entry[0] == (rank, exchange)]
            turn = len(before) == (rules.senders - 1 if rules.last else 0)
            follows = mine + (tuple(n for entry in before for n in entry[1]) if rules.counts else ())
            counted = (*(entry for entry in arrived if entry[0][1] >= exchange - 1), ((rank, exchange), mine))
            if not turn:
                return [(f"{name} counts", self._next(state, i, 0, pending, counted))]
            flags = [(("ready", peer, rank), exchange) for peer in peers]
            raised = self._put(pending, i, exchange, flags, follows if rules.release else ())
            return [(f"{name} raises flags", self._next(state, i, 0, raised, counted))]
        raise AssertionError(at)

    def _receive(self, state: State, i: int, rank: int) -> list[tuple[str, State | str]]:
        rules = self.rules
        counters, memory, pending, old, _ = state
        exchange, at = counters[i]
        if exchange > rules.exchanges:
            return []
        words, name = dict(memory), f"receiver {rank} of {exchange}"
        peers = [peer for peer in self.sending if peer != rank]
        sources = [("data", rank, peer, cta) for peer in peers for cta in range(rules.senders)]
        if at == 0:
            if any(words.get(("ready", rank, peer), 0) < exchange for peer in peers):
                return []
            if rules.frees_after:
                return [(f"{name} sees flags", self._next(state, i, 1, pending))]
            freed = [(("freed", peer, rank), exchange) for peer in peers]
            return [(f"{name} frees early", self._next(state, i, 1, self._put(pending, i, exchange, freed, ())))]
        if at <= len(sources):  # one word a step: others move in between
            word = sources[at - 1]
            values = {words.get(word, 0)} | {value for w, value in old if w == word}
            wrong = [value for value in sorted(values) if value != exchange]
            if wrong:
                return [(f"{name} reads {word}", f"{name} reads {word[2]}.{word[3]} of exchange {wrong[0]}")]
            return [(f"{name} reads {word}", self._next(state, i, at + 1, pending))]
        freed = [(("freed", peer, rank), exchange) for peer in peers] if rules.frees_after else []
        mine = tuple(store[0] for store in pending if store[0][0] == i)
        kept = frozenset(entry for entry in old if entry[0][:2] != ("data", rank))
        done = self._next(state, i, 0, self._put(pending, i, exchange, freed, mine))
        return [(f"{name} frees", (*done[:3], kept, done[4]))]

    @staticmethod
    def _next(state: State, i: int, at: int, pending: frozenset, arrived: tuple | None = None) -> State:
        counters, memory, _, old, before = state
        exchange = counters[i][0] + (at == 0)
        moved = (*counters[:i], (exchange, at), *counters[i + 1 :])
        return moved, memory, pending, old, tuple(sorted(before if arrived is None else arrived))


def _sorted(words: dict) -> tuple:
    return tuple(sorted(words.items()))


def explore(rules: Rules, most: int = 300_000) -> Result:
    """All states in order of distance, until a read of a wrong exchange, or a standstill before the end.

    Raises RuntimeError where there are more than `most` states.
    """
    machine = _Machine(rules)
    first = machine.start()
    came_from: dict[State, tuple[State | None, str]] = {first: (None, "")}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        steps = machine.steps(state)
        if not steps and any(exchange <= rules.exchanges for exchange, _ in state[0]):
            return Result(len(came_from), "nobody can go on", _trace(came_from, state))
        for what, then in steps:
            if isinstance(then, str):
                return Result(len(came_from), then, (*_trace(came_from, state), what))
            if then not in came_from:
                came_from[then] = state, what
                queue.append(then)
        if len(came_from) > most:
            raise RuntimeError(f"{rules} has more than {most} states: fewer ranks, senders or exchanges")
    return Result(len(came_from), None)


def _trace(came_from: dict, state: State | None) -> tuple[str, ...]:
    steps = []
    while state is not None:
        state, what = came_from[state]
        steps.append(what)
    return tuple(reversed(steps[:-1]))
