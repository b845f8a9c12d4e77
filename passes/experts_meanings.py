"""What an index tensor of an expert layer can mean; ``experts_values`` reads which of these a tensor is.

A *row* of an expert layer is a pair (token t, choice k). In *flat* order row p is pair ``(p // K, p % K)``; a sort of
the flat expert ids puts rows in *sorted* order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

Order: TypeAlias = "fx.Node | None"  # of rows: None is flat order, a node is the sort that made the order
Extent: TypeAlias = "tuple[int, ...]"  # a size under each assignment of the symbolic sizes


@dataclass(frozen=True)
class Ids:
    """Expert of each row, ``source`` [.., K] holding them in flat order; ``most``: clamped to at most this."""

    source: fx.Node
    order: Order
    most: int | None = None


@dataclass(frozen=True)
class Perm:
    """Flat number of each row of an order."""

    order: fx.Node


@dataclass(frozen=True)
class Inverse:
    """Place in an order of each flat row."""

    order: fx.Node


@dataclass(frozen=True)
class Token:
    """Token of each row."""

    order: Order
    top_k: int


@dataclass(frozen=True)
class Arange:
    """0, 1, 2, ... as long as ``extent``."""

    extent: Extent


@dataclass(frozen=True)
class PerExpert:
    """``[E]``: how often each id occurs in ``source``, or (``ends``) the end of each expert's rows in sorted order."""

    source: fx.Node
    groups: int
    ends: bool = False


@dataclass(frozen=True)
class IsExpert:
    """``[.., E]``: whether the row's id is this expert (a one-hot row, of any order)."""

    source: fx.Node
    groups: int


@dataclass(frozen=True)
class Chosen:
    """``[.., E]``: whether a token's row of ``source`` [.., K] names this expert, and none of its ids occurs twice."""

    source: fx.Node
    groups: int


@dataclass(frozen=True)
class Outside:
    """Whether the row's id is ``groups`` or more: a row of no expert if there are no more experts than that."""

    source: fx.Node
    order: Order
    groups: int


@dataclass(frozen=True)
class Within:
    """Whether the row's id is less than ``groups``: the opposite of :class:`Outside`."""

    source: fx.Node
    order: Order
    groups: int


Meaning: TypeAlias = Ids | Perm | Inverse | Token | Arange | PerExpert | IsExpert | Chosen | Outside | Within
