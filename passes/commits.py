"""Every rewrite of a graph is committed here: it is counted, may be forbidden, and is remembered.

*Fuel*: with ``options={"fuel": n}`` only the first n rewrites of the process are applied. They are counted in the order
in which passes commit them, over all graphs since the process started or ``torch._dynamo.reset()``; one commit is one
unit, whatever it writes. A pass asks :meth:`Commits.permit` before it writes anything, so that a site without fuel
stays exactly as it was.
*Memory*: the self-check compares what each rewrite replaced with what replaced it; :class:`Link` holds both, and
:meth:`Commits.erase` keeps what is needed to make an erased node again.

The compilation at hand is found by :func:`current`; outside of one, everything is permitted and nothing is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from dscompile.passes.graph import called, module_path, source_line
from dscompile.passes.record import Site
from dscompile.passes.refusals import OutOfFuel

_LOCK = threading.Lock()
_COUNT = 0


def count() -> int:
    """Rewrites committed since the process started or the last :func:`restart`."""
    return _COUNT


def restart() -> None:
    """Count from 0 again, as ``torch._dynamo.reset()`` does."""
    global _COUNT
    with _LOCK:
        _COUNT = 0


@dataclass(frozen=True)
class Rewrite:
    """One rewrite for the report: its ``number`` is the fuel that applies it last. ``name`` is the pass's."""

    number: int
    name: str
    kind: str
    module_path: str
    source: str
    replaced: str
    operator: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Link:
    """``new`` took the place of ``old``; ``made`` are the nodes written for it. ``sites`` share one rewritten body."""

    rewrite: Rewrite
    sites: tuple[Site, ...]
    old: fx.Node
    new: fx.Node
    made: frozenset[fx.Node]


@dataclass(frozen=True)
class Erased:
    """What an erased node was: enough to write it again in front of ``following``. ``since``: links made before."""

    node: fx.Node
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    following: fx.Node
    since: int


class Commits:
    """The rewrites of one compilation; ``name`` is the pass that runs."""

    def __init__(self, fuel: int | None = None):
        self.fuel = fuel
        self.name = ""
        self.rewrites: list[Rewrite] = []
        self.links: list[Link] = []
        self.erased: list[Erased] = []

    def permitted(self) -> bool:
        """True if one more rewrite may be applied."""
        return self.fuel is None or _COUNT < self.fuel

    def permit(self) -> None:
        """Raises OutOfFuel if no more rewrite may be applied; to be called before anything is written."""
        if not self.permitted():
            raise OutOfFuel(f"the {self.fuel} rewrites that the fuel allows were applied")

    def add(
        self, sites: Sequence[Site], replaced: Sequence[tuple[fx.Node, fx.Node]], made: Sequence[fx.Node] = ()
    ) -> None:
        """One rewrite is done: of each (old, new) the readers were given the new node."""
        global _COUNT
        with _LOCK:
            _COUNT += 1
            number = _COUNT
        old, new = replaced[0]
        kind = sites[0].kind if sites else ""
        written = [called(n) for n in made if "dsinfra" in str(n.target)] or [called(new)]
        rewrite = Rewrite(number, self.name, kind, module_path(old), source_line(old), called(old), written[-1])
        self.rewrites.append(rewrite)
        self.links += [Link(rewrite, tuple(sites), old, new, frozenset(made)) for old, new in replaced]

    def erase(self, node: fx.Node) -> None:
        """Takes a node without readers out of its graph, and remembers it."""
        meta = dict(node.meta)
        self.erased.append(
            Erased(node, node.op, node.target, node.args, dict(node.kwargs), meta, node.next, len(self.links))
        )
        node.graph.erase_node(node)


_CURRENT: ContextVar[Commits | None] = ContextVar("dsinfra_commits", default=None)


def current() -> Commits:
    """That of the compilation at hand."""
    return _CURRENT.get() or Commits()


@contextmanager
def committing(commits: Commits) -> Iterator[Commits]:
    """Passes that run inside commit to ``commits``."""
    token = _CURRENT.set(commits)
    try:
        yield commits
    finally:
        _CURRENT.reset(token)
