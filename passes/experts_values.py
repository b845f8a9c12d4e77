"""What the index tensors of an expert layer are: ids, sorts of them, tokens, inverses, counts, group ends.

A *row* of an expert layer is a pair (token t, choice k). In *flat* order row p is pair ``(p // K, p % K)``; a sort of
the flat expert ids puts rows in *sorted* order. Every index tensor that takes part is one of the meanings below, read
by a table with one rule an operator; a tensor without a rule has no meaning (None). The facts used are

- ``sort(ids)`` and ``argsort(ids)``: whichever permutation, rows of one expert stay together, experts ascending;
- ``argsort(perm)``, ``empty[perm] = arange`` and ``scatter(perm, arange)``: the inverse of ``perm``;
- ``histc(ids, E, 0, E - 1)``, sums of ``one_hot`` or ``ids == arange(E)``, ``scatter_add`` of ones: counts of each id;
- sums of ones that a ``scatter`` sets at the ids of a top-k, which differ within a row: the same counts;
- ``cumsum(counts)`` and ``searchsorted(sorted ids, arange(E), right=True)``: the end of each expert's rows.

An id is a number of an expert, 0 or more; ids at or past E belong to no expert. Nothing here is evaluated: a meaning
holds for every size and every value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dscompile.passes.experts_meanings import (
    Arange,
    Chosen,
    Extent,
    Ids,
    Inverse,
    IsExpert,
    Meaning,
    Outside,
    PerExpert,
    Perm,
    Token,
    Within,
)
from dscompile.passes.graph import Sizes, argument, assignments, is_tensor
from dscompile.passes.memory import FRESH, Memory
from dscompile.passes.refusals import MutatedOperand

# Operators whose result holds the same elements in the same order.
VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"}
COPIES = {"contiguous", "clone", "alias", "detach", "lift_fresh_copy"}
CASTS = {"to", "_to_copy", "type_as"}

# ``out.scatter_add(0, index, src)`` in an order that is the same each time; the operator's sum has a fixed order, too.
DETERMINISTIC_SCATTER_ADD = "torchtitan::deterministic_scatter_add"


def name(node: object) -> str:
    """An ATen operator's name without overload and the mark of in-place operators; others with their namespace."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    if node.target is torch.ops.aten.view.dtype:
        return "view_dtype"  # other numbers in the same bits
    return node.target._schema.name.removeprefix("aten::").removesuffix("_")


def arg(node: fx.Node, position: int) -> Any:
    """Positional argument of a call whose schema says what it is."""
    return node.args[position]


def option(node: fx.Node, position: int, named: str, default: object = None) -> Any:
    """Positional or keyword argument of a call."""
    return argument(node, position, named, default)


def dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def sizes_of(graph: fx.Graph) -> list[Sizes]:
    """The size assignments of a graph, with numbers for sizes that are known at run time only (rows of an expert).

    Empty if the graph's guards allow none that a proof could be tried at.
    """
    try:
        found = assignments(graph)
    except ValueError:
        return []
    symbols: set[Any] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    late = sorted(symbols - set(found[0].assignment), key=str)
    return [Sizes({**s.assignment, **{u: 4099 + 2 * i for i, u in enumerate(late)}}) for s in found]


class Indices:
    """Reads the meaning of index tensors of one shadow graph."""

    def __init__(self, memory: Memory, sizes: list[Sizes]):
        self.memory = memory
        self.sizes = sizes
        self._known: dict[fx.Node, Meaning | None] = {}
        self._repeated: set[fx.Node] = set()  # hold each row's meaning several times, along later dimensions

    # ---- sizes and versions

    def shape(self, node: fx.Node) -> tuple[Extent, ...]:
        """Each dimension under every assignment of the symbolic sizes."""
        return tuple(zip(*(s.shape(node) for s in self.sizes), strict=True))

    def extent(self, size: object) -> Extent:
        return tuple(s.number(size) for s in self.sizes)

    def count(self, node: fx.Node) -> Extent:
        """Number of elements."""
        total = (1,) * len(self.sizes)
        for size in self.shape(node):
            total = tuple(a * b for a, b in zip(total, size, strict=True))
        return total

    def intact(self, node: fx.Node, time: int) -> None:
        """Refuses a value that is overwritten between where it is made and ``time``, when it is read."""
        if not self.memory.unchanged(node, self.memory.position[node] + 1, time):
            raise MutatedOperand(f"`{node.name}` is changed in place before it is read", node)

    # ---- reading

    def read(self, node: object, time: int) -> Meaning | None:
        """What ``node`` is when it is read at ``time``; None if nothing is known of it. Raises MutatedOperand."""
        if not is_tensor(node):
            return None
        assert isinstance(node, fx.Node)
        self.intact(node, time)
        if node not in self._known:
            self._known[node] = None  # also what a cycle would read
            rule = _RULES.get(name(node))
            found = rule(self, node, self.memory.position[node]) if rule is not None else None
            rounded = isinstance(found, PerExpert) and not _survives(found, dtype(node))
            self._known[node] = None if rounded else found
        return self._known[node]

    def ids(self, node: object, time: int) -> Ids | None:
        """``node`` as expert ids: those of a known order, or any other integers, taken to be in flat order."""
        meaning = self.read(node, time)
        if node in self._repeated:
            return None
        if meaning is None and is_tensor(node) and _holds_integers(dtype(node)):
            return Ids(self.base(node), None)
        return meaning if isinstance(meaning, Ids) else None

    def repeats(self, node: fx.Node) -> bool:
        """True for a tensor, read before, that holds each row's meaning several times, along later dimensions."""
        return node in self._repeated

    def base(self, node: fx.Node) -> fx.Node:
        """The first tensor that holds the same integers in the same order, behind views, copies and casts."""
        while name(node) in VIEWS | COPIES | CASTS:
            source = arg(node, 0)
            if not is_tensor(source) or not _holds_integers(dtype(source)):
                break
            self.intact(source, self.memory.position[node])
            node = source
        return node

    def below(self, source: fx.Node, groups: int) -> bool:
        """True if the ids are proved to be less than ``groups``: they number the last dimension of a tensor."""
        if name(source) == "getitem" and name(arg(source, 0)) == "topk" and arg(source, 1) == 1:
            shape = self.shape(arg(arg(source, 0), 0))
            last = option(arg(source, 0), 2, "dim", -1) % len(shape) == len(shape) - 1
            return last and all(s <= groups for s in shape[-1])
        if name(source) in ("clamp", "clamp_max"):
            most = bounds(source)[1]
            return most is not None and most < groups
        return False

    def natural(self, source: fx.Node) -> bool:
        """True if the ids are proved to be 0 or more."""
        if name(source) == "clamp":
            low = bounds(source)[0]
            return low is not None and low >= 0
        return name(source) == "getitem" and name(arg(source, 0)) == "topk" and arg(source, 1) == 1

    # ---- rules, one an operator; ``at`` is when it reads its arguments

    def same(self, node: fx.Node, at: int) -> Meaning | None:
        """Views, copies and casts keep a meaning; elements may be repeated behind the rows, and then stay so."""
        source = arg(node, 0)
        meaning = self.read(source, at)
        if meaning is None or source in self._repeated and name(node) in VIEWS:
            return None
        if name(node) in CASTS and not _survives(meaning, dtype(node)):
            return None
        if isinstance(meaning, (PerExpert, IsExpert, Chosen)) and self.shape(node)[-1:] != self.shape(source)[-1:]:
            return None
        if self.count(node) != self.count(source) or source in self._repeated:
            if self.shape(node)[:1] != self.shape(source)[:1] or len(self.shape(node)) != len(self.shape(source)):
                return None
            self._repeated.add(node)
        return meaning

    def whole(self, node: fx.Node, at: int) -> Meaning | None:
        """A slice of everything, as ``mask[:, None]`` makes."""
        return self.same(node, at) if self.shape(node) == self.shape(arg(node, 0)) else None

    def item(self, node: fx.Node, at: int) -> Meaning | None:
        made, which = node.args
        if name(made) != "sort":
            return None
        found = self.sorting(made, self.memory.position[made])
        if which == 1 or isinstance(found, Inverse):
            return found if which == 1 else None
        ids = self.ids(arg(made, 0), self.memory.position[made])
        return replace(ids, order=made) if isinstance(found, Perm) and ids is not None else None

    def sorting(self, node: fx.Node, at: int) -> Meaning | None:
        """argsort, or the indices of sort: ascending, over one dimension."""
        source = arg(node, 0)
        if len(self.shape(source)) != 1 or option(node, 2, "descending", False):
            return None
        if isinstance(found := self.read(source, at), Perm):
            return Inverse(found.order)
        ids = self.ids(source, at)
        return Perm(node) if ids is not None and ids.order is None else None

    def sorted_ids(self, order: fx.Node) -> Ids:
        """The ids that a sort put in order."""
        ids = self.ids(order.args[0], self.memory.position[order])
        assert ids is not None, "an order is made from ids"
        return ids

    def divide(self, node: fx.Node, at: int) -> Meaning | None:
        by = arg(node, 1)
        mode = node.kwargs.get("rounding_mode", arg(node, 2) if len(node.args) > 2 else None)
        if not isinstance(by, int) or name(node) == "div" and mode not in ("floor", "trunc"):
            return None
        rows = self.read(arg(node, 0), at)
        if isinstance(rows, Perm):
            return Token(rows.order, by)
        return Token(None, by) if isinstance(rows, Arange) else None

    def gather(self, node: fx.Node, at: int) -> Meaning | None:
        """``source[index]`` over the first dimension."""
        source = arg(node, 0)
        taken = index_of(node)
        if taken is None or dtype(source).is_floating_point or len(self.shape(source)) != 1:
            return None
        index, values = self.read(taken, at), self.read(source, at)
        if isinstance(values, Arange):
            return index
        if not isinstance(index, Perm):
            return None
        if isinstance(values, (Ids, Token)) and values.order is None:
            return replace(values, order=index.order)
        if values is None and self.count(source) == self.count(index.order.args[0]):
            return Ids(self.base(source), index.order)
        return None

    def scatter(self, node: fx.Node, at: int) -> Meaning | None:
        """``buffer[perm] = arange``: the inverse; ``zeros.scatter_add(ids, ones)``: counts."""
        placed = placed_values(node)
        if placed is None:
            return self.chosen(node, at)
        where, values, adds = placed
        index = self.read(where, at)
        if isinstance(index, Perm) and not adds and isinstance(self.read(values, at), Arange):
            whole = self.count(node) == self.count(where)
            return Inverse(index.order) if whole else None
        ids = self.ids(where, at)
        ones = name(values) in ("ones", "ones_like", "new_ones", "full_like") and _filled_with(values) == 1
        if adds and ids is not None and ids.most is None and ones and self.zeros(arg(node, 0), at):
            groups = set(self.count(node))
            return PerExpert(ids.source, groups.pop()) if len(groups) == 1 == len(self.shape(node)) else None
        return None

    def chosen(self, node: fx.Node, at: int) -> Meaning | None:
        """``zeros[.., E].scatter(-1, ids[.., K], 1)`` of the ids of a top-k: those of one row differ."""
        if name(node) != "scatter" or len(node.args) != 4 or node.kwargs:
            return None
        buffer, dim, index, value = (arg(node, i) for i in range(4))
        if not self.zeros(buffer, at) or is_tensor(value) or value not in (True, 1):
            return None
        ids, wide = self.ids(index, at), self.shape(node)
        if ids is None or ids.order is not None or ids.most is not None or dim % len(wide) != len(wide) - 1:
            return None
        rows = self.shape(index)[-1:] == self.shape(ids.source)[-1:] and len(set(wide[-1])) == 1
        return Chosen(ids.source, wide[-1][0]) if rows and self.below(ids.source, wide[-1][0]) else None

    def zeros(self, node: object, time: int) -> bool:
        """True for a fresh buffer of zeros that nothing wrote before ``time``."""
        fresh = name(node) in ("zeros", "zeros_like", "new_zeros")
        return fresh and not self.memory.version(node, time)

    def histogram(self, node: fx.Node, at: int) -> Meaning | None:
        """Bins of equal width: id e falls into bin e if the top edge is E - 1, or E where no id is E or more."""
        groups, low, high = (option(node, i, n, 0) for i, n in ((1, "bins"), (2, "min"), (3, "max")))
        ids = self.ids(self.integers(arg(node, 0), at), at)
        if ids is None or ids.most is not None or low != 0 or not isinstance(groups, int):
            return None
        below = self.below(ids.source, groups)
        fits = high == groups - 1 and (high > 0 or below) or high == groups and below  # edges 0, 0: the ids' own
        return PerExpert(ids.source, groups) if fits else None

    def integers(self, node: object, at: int) -> object:
        """Through casts of integers to a floating dtype (an expert's number is exact in all of them)."""
        while name(node) in CASTS and dtype(node) in (torch.float32, torch.float64):
            source = arg(node, 0)
            self.intact(source, self.memory.position[node])
            node = source
        return node

    def one_hot(self, node: fx.Node, at: int) -> Meaning | None:
        ids, groups = self.ids(arg(node, 0), at), arg(node, 1)
        proper = ids is not None and ids.most is None and isinstance(groups, int) and groups > 0
        return IsExpert(ids.source, groups) if proper else None

    def equals(self, node: fx.Node, at: int) -> Meaning | None:
        """``ids[:, None] == arange(E)``."""
        left, right = arg(node, 0), arg(node, 1)
        experts = self.read(right, at)
        ids = self.ids(left, at) if isinstance(experts, Arange) else None
        if ids is None or ids.most is not None or len(set(experts.extent)) != 1:
            return None
        apart = set(self.shape(left)[-1]) == {1}
        return IsExpert(ids.source, experts.extent[0]) if apart else None

    def total(self, node: fx.Node, at: int) -> Meaning | None:
        """The sum of one-hot rows, or of those of each token, over every row."""
        hot = None if arg(node, 0) in self._repeated else self.read(arg(node, 0), at)
        kept = self.shape(node)
        whole = isinstance(hot, (IsExpert, Chosen)) and len(kept) == 1 and set(kept[0]) == {hot.groups}
        rank = len(self.shape(arg(node, 0)))
        dims = {int(d) % rank for d in (option(node, 1, "dim") or [])}
        return PerExpert(hot.source, hot.groups) if whole and rank - 1 not in dims else None

    def running(self, node: fx.Node, at: int) -> Meaning | None:
        counts = self.read(arg(node, 0), at)
        if not isinstance(counts, PerExpert) or counts.ends or len(self.shape(node)) != 1:
            return None
        return replace(counts, ends=True) if _survives(counts, dtype(node)) else None

    def search(self, node: fx.Node, at: int) -> Meaning | None:
        ids, experts = self.read(arg(node, 0), at), self.read(arg(node, 1), at)
        right = node.kwargs.get("right") is True or node.kwargs.get("side") == "right"
        sorted_ = isinstance(ids, Ids) and ids.order is not None and ids.most is None
        sorted_ = sorted_ and self.sorted_ids(ids.order).source is ids.source and node.kwargs.get("sorter") is None
        if not sorted_ or not right or not isinstance(experts, Arange) or len(set(experts.extent)) != 1:
            return None
        return PerExpert(ids.source, experts.extent[0], ends=True)

    def arange(self, node: fx.Node, at: int) -> Meaning | None:
        start, step = 0, 1
        if len(node.args) > 1:
            start, step = arg(node, 0), arg(node, 2) if len(node.args) > 2 else 1
        return Arange(self.count(node)) if (start, step) == (0, 1) and not dtype(node).is_floating_point else None

    def clamp(self, node: fx.Node, at: int) -> Meaning | None:
        """A clamp that changes no id is none; sorted ids note it, flat ids begin anew."""
        ids = self.ids(arg(node, 0), at)
        low, most = bounds(node)
        if ids is None or most is None or low not in (None, 0):
            return None
        raises = low is not None and not self.natural(ids.source)
        if self.below(ids.source, most + 1) and not raises:
            return ids
        if ids.order is not None:
            return None if raises else replace(ids, most=min(most, ids.most or most))
        return Ids(node, None)

    def at_least(self, node: fx.Node, at: int) -> Meaning | None:
        ids, bound = self.ids(arg(node, 0), at), arg(node, 1)
        if ids is None or ids.most is not None or not isinstance(bound, int):
            return None
        return Outside(ids.source, ids.order, bound + (name(node) == "gt"))

    def less(self, node: fx.Node, at: int) -> Meaning | None:
        ids, bound = self.ids(arg(node, 0), at), arg(node, 1)
        if ids is None or ids.most is not None or not isinstance(bound, int):
            return None
        return Within(ids.source, ids.order, bound + (name(node) == "le"))

    def opposite(self, node: fx.Node, at: int) -> Meaning | None:
        found = self.read(arg(node, 0), at)
        if not isinstance(found, (Outside, Within)) or dtype(arg(node, 0)) != torch.bool:
            return None
        if arg(node, 0) in self._repeated:
            self._repeated.add(node)
        kind = Within if isinstance(found, Outside) else Outside
        return kind(found.source, found.order, found.groups)

    def repeated(self, node: fx.Node, at: int) -> Meaning | None:
        """Each token's number K times."""
        times, tokens = arg(node, 1), self.read(arg(node, 0), at)
        dim = option(node, 2, "dim")
        one = len(self.shape(node)) == 1 and dim in (None, 0, -1)
        return Token(None, times) if isinstance(tokens, Arange) and isinstance(times, int) and one else None


def index_of(node: fx.Node) -> fx.Node | None:
    """The index of ``index``, ``index_select`` or ``gather`` that picks whole entries of the first dimension."""
    kind = name(node)
    if kind == "index":
        indices = arg(node, 1)
        return indices[0] if len(indices) == 1 and is_tensor(indices[0]) else None
    if kind in ("index_select", "gather") and arg(node, 1) == 0:
        return arg(node, 2)
    return None


def placed_values(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(index, values, whether they are added) of an operator that writes values at an index of the first dimension."""
    kind = name(node)
    if kind == "index_put":
        indices = arg(node, 1)
        if len(indices) != 1 or not is_tensor(indices[0]):
            return None
        return indices[0], arg(node, 2), bool(option(node, 3, "accumulate", False))
    plain = len(node.args) == 4 and not node.kwargs and arg(node, 1) == 0 and is_tensor(arg(node, 3))
    if kind in ("scatter", "scatter_add", "index_copy", "index_add") and plain:
        return arg(node, 2), arg(node, 3), kind.endswith("add")
    if kind == DETERMINISTIC_SCATTER_ADD:
        return arg(node, 1), arg(node, 2), True
    return None


# Operators that read a tensor's shape, dtype or device only.
_METADATA = {"zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "sym_size"}


def readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read the values of ``node``; the shadow's own output, which lists every value, is none."""
    return [user for user in node.users if user.op != "output" and name(user) not in _METADATA]


def is_fresh(node: object) -> bool:
    """True for a buffer that was made to be filled."""
    return isinstance(node, fx.Node) and node.target in FRESH


def bounds(node: fx.Node) -> tuple[int | None, int | None]:
    if name(node) == "clamp_max":
        return None, arg(node, 1) if isinstance(arg(node, 1), int) else None
    low, most = option(node, 1, "min"), option(node, 2, "max")
    return (low, most) if all(b is None or isinstance(b, int) for b in (low, most)) else (None, None)


def _holds_integers(kind: torch.dtype) -> bool:
    return kind in (torch.int16, torch.int32, torch.int64)


def _survives(meaning: Meaning, kind: torch.dtype) -> bool:
    """Whether a cast to ``kind`` changes none of the values."""
    if isinstance(meaning, (Outside, Within, IsExpert, Chosen)):
        return kind not in (torch.int8, torch.uint8)
    if isinstance(meaning, PerExpert):
        return kind in (torch.int32, torch.int64, torch.float32, torch.float64)
    return _holds_integers(kind)


def _filled_with(node: fx.Node) -> object:
    return arg(node, 1) if name(node) == "full_like" else 1


Rule = Callable[[Indices, fx.Node, int], Meaning | None]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS | COPIES | CASTS | {"expand"}, Indices.same),
    "slice": Indices.whole,
    "getitem": Indices.item,
    "argsort": Indices.sorting,
    **dict.fromkeys(("floor_divide", "div"), Indices.divide),
    **dict.fromkeys(("index", "index_select", "gather"), Indices.gather),
    **dict.fromkeys(("index_put", "scatter", "scatter_add", "index_copy", "index_add"), Indices.scatter),
    "histc": Indices.histogram,
    "one_hot": Indices.one_hot,
    "eq": Indices.equals,
    "sum": Indices.total,
    "cumsum": Indices.running,
    "searchsorted": Indices.search,
    "arange": Indices.arange,
    **dict.fromkeys(("clamp", "clamp_max"), Indices.clamp),
    **dict.fromkeys(("ge", "gt"), Indices.at_least),
    **dict.fromkeys(("lt", "le"), Indices.less),
    **dict.fromkeys(("logical_not", "bitwise_not"), Indices.opposite),
    "repeat_interleave": Indices.repeated,
}
