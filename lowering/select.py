"""Which implementation runs an operator: one table an operator, in priority order.

An implementation is a name, a check `supports(*args) -> Decision` and a callable of the operator's own arguments. A
table tries its implementations in their order and takes the first that agrees; the last one is the reference, which
supports everything. Checks read metadata only (shapes, strides, dtypes, devices), so `choose` answers for fake tensors
too and a compile-time report can name the kernel and say why each better one was skipped. Symbolic sizes are judged at
their hint, without a guard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.lowering.errors import DuplicateImplementation, NotSupported, UnknownImplementation

# A symbolic size without a hint (a data-dependent one) is judged as if it were this long.
ASSUMED_SIZE = 4096


@dataclass(frozen=True)
class Decision:
    """The answer of a check: `ok`, or not with a `reason` written for the user. True exactly when `ok`."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Decision(True)


def no(reason: str) -> Decision:
    """A refusal with its reason."""
    return Decision(False, reason)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator. `supports` and `run` both take its arguments, by position, in schema order."""

    name: str
    supports: Callable[..., Decision]
    run: Callable[..., Any]


class Table:
    """The implementations of one operator, best first.

    Raises DuplicateImplementation when a name is registered twice, and UnknownImplementation, listing the known names,
    when one is asked for that doesn't exist.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self._implementations: dict[str, Implementation] = {}
        self._forced: Implementation | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._implementations)

    def register(
        self, name: str, supports: Callable[..., Decision], run: Callable[..., Any], *, before: str | None = None
    ) -> None:
        """Append an implementation, or insert it in front of the one named `before`."""
        if name in self._implementations:
            raise DuplicateImplementation(
                f"{self.op}: an implementation named {name!r} exists already, among {list(self.names)}",
                "A name must pick one implementation",
                "Register under another name",
            )
        entries = list(self._implementations.items())
        position = len(entries) if before is None else self.names.index(self.get(before).name)
        entries.insert(position, (name, Implementation(name, supports, run)))
        self._implementations = dict(entries)

    def get(self, name: str) -> Implementation:
        """The implementation of that name."""
        try:
            return self._implementations[name]
        except KeyError:
            raise UnknownImplementation(
                f"{self.op}: no implementation is named {name!r}",
                "Only registered implementations can be chosen",
                f"Use one of {list(self.names)}",
            ) from None

    def choose(self, args: tuple) -> tuple[Implementation, list[tuple[str, str]]]:
        """-> the implementation for `args`, and (name, reason) of each one in front of it that was skipped."""
        skipped: list[tuple[str, str]] = []
        if self._forced is not None:
            decision = self._forced.supports(*args)
            if not decision:
                raise NotSupported(
                    f"{self.op}: {self._forced.name!r} is forced but {decision.reason}",
                    "A forced implementation isn't replaced silently",
                    "Leave the choice to the table, or change the arguments",
                )
            return self._forced, skipped
        for implementation in self._implementations.values():
            decision = implementation.supports(*args)
            if decision.ok:
                return implementation, skipped
            skipped.append((implementation.name, decision.reason))
        raise NotSupported(
            f"{self.op}: none of {list(self.names)} takes these arguments ({'; '.join(': '.join(s) for s in skipped)})",
            "The table of this operator has no implementation that supports everything",
            "Register the reference last",
        )

    def run(self, *args: Any) -> Any:
        """Choose and call."""
        return self.choose(args)[0].run(*args)


_TABLES: dict[str, Table] = {}


def table(op: str) -> Table:
    """The table of an operator, made at its first use: `op` is the name without its namespace, such as "mla"."""
    if op not in _TABLES:
        _TABLES[op] = Table(op)
    return _TABLES[op]


def _known_table(op: str) -> Table:
    if op not in _TABLES:
        raise UnknownImplementation(
            f"no operator named {op!r} has a table",
            "Only operators that choose at run time have one",
            f"Use one of {sorted(_TABLES)}",
        )
    return _TABLES[op]


def choose(op: str, args: tuple) -> tuple[Implementation, list[tuple[str, str]]]:
    """What `op` would run for `args` (real or fake tensors): -> (implementation, [(name, reason) of the skipped])."""
    return _known_table(op).choose(args)


@contextlib.contextmanager
def force(op: str, name: str) -> Iterator[None]:
    """Use one implementation of `op` in this block, in every thread: for tests, benchmarks and bisection.

    Raises NotSupported at a call whose arguments that implementation refuses.
    """
    chosen = _known_table(op)
    previous, chosen._forced = chosen._forced, chosen.get(name)
    try:
        yield
    finally:
        chosen._forced = previous


def size(value: int | torch.SymInt) -> int:
    """A dimension or stride as a plain int: itself, or the hint of a symbolic one, so that asking installs no guard."""
    if isinstance(value, int):
        return value
    node = value.node
    return int(node.hint) if node.has_hint() else ASSUMED_SIZE


def is_real(tensor: torch.Tensor) -> bool:
    """Whether the tensor holds data: not fake, not a tracing wrapper, not on the meta device."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
