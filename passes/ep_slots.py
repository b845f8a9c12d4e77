"""Slots of the exchange's arena: which layers of a graph may use the same memory, decided at compile time.

A layer holds its slot from the start of its dispatch to the end of its combine; layers whose exchanges are open at the
same time (micro-batches that overlap) get different slots, others the smallest that is free. That a peer may write a
slot again needs no acknowledgement of its own then: exchanges of one graph follow one another, and a peer starts the
next dispatch only behind the combine that needed what this rank read. The backward uses its layer's slot again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

SLOT = -1  # the last argument of every operator of an exchange
Exchange = tuple[fx.Node, ...]  # dispatch_start, dispatch_wait, combine_start and combine_wait of a layer


def assign(exchanges: Sequence[Exchange]) -> int:
    """Writes the slots of one graph's layers into their operators; -> how many slots there are."""
    held: list[fx.Node] = []  # by slot: the last node that holds it
    for nodes in sorted(exchanges, key=lambda nodes: nodes[0]):
        free = [slot for slot, until in enumerate(held) if until < nodes[0]]
        slot = free[0] if free else len(held)
        held[slot : slot + 1] = [nodes[-1]]
        for node in nodes:
            node.args = (*node.args[:SLOT], slot)
    return len(held)
