"""Exact values of mask elements, as functions of at most one unknown each.

A mask is small arithmetic over ``arange``, comparisons and ands, sometimes over a cache length or position that only
the device knows. :class:`Evaluate` computes elements of such a tensor at given coordinates with three forms:

- ``Number``: ``const + coef * x``, x an unknown integer (an element of an input tensor, named by an id);
- ``Truth``: true exactly when ``low <= x < high``; ``Flag``: a constant truth;
- ``Pick``: ``yes`` where a truth holds, ``no`` elsewhere (``where``, ``masked_fill``).

Coordinates and values are arrays that broadcast against each other: what depends on the query alone stays S long and
what depends on the key alone T long, until a comparison joins them.

Every rule is exact: a comparison of two Numbers in one unknown is an interval of that unknown. What has no such form
raises :class:`Unknown`, and the mask stays an operand. Data movement is the table of ``prove.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import fx

from dscompile.passes.graph import Sizes, argument, is_tensor
from dscompile.passes.memory import Memory
from dscompile.passes.prove import Array, Coords, Points, Pull, broadcast, ravel, splits

aten = torch.ops.aten
LOW, HIGH = -(2**62), 2**62
NO_ID = -1
DENSE_LIMIT = 1 << 22  # elements of an intermediate that is computed whole (cumsum)


class Unknown(Exception):
    """An element with no exact form; the message says which operator."""


ZERO, NONE, MINUS = np.asarray(0), np.asarray(NO_ID), np.asarray(-1)


@dataclass
class Number:
    const: Array  # int64 or float64; arrays broadcast
    coef: Array = field(default_factory=lambda: ZERO)
    ident: Array = field(default_factory=lambda: NONE)

    @property
    def known(self) -> bool:
        return not self.coef.any()


@dataclass
class Flag:
    value: Array  # bool


@dataclass
class Truth:
    low: Array
    high: Array
    ident: Array

    @property
    def always(self) -> Array:
        return (self.low <= LOW) & (self.high >= HIGH)

    @property
    def never(self) -> Array:
        return self.low >= self.high

    @property
    def constant(self) -> Array:
        return self.always | self.never


@dataclass
class Pick:
    cond: Truth | Flag
    yes: Array
    no: Array


Value = Number | Truth | Flag | Pick


def interval(value: Truth | Flag) -> Truth:
    """A constant as the whole or the empty interval."""
    if isinstance(value, Truth):
        return value
    return Truth(np.where(value.value, LOW, 0), np.where(value.value, HIGH, 0), np.asarray(NO_ID))


def _constant_bool(value: Value) -> Array:
    if isinstance(value, Flag):
        return value.value
    if isinstance(value, Truth):
        if not value.constant.all():
            raise Unknown("a number made of a comparison with an unknown")
        return value.always
    if isinstance(value, Number) and value.known:
        return value.const != 0
    raise Unknown("truth of a number with an unknown")


def _number(value: Value) -> Number:
    if isinstance(value, Number):
        return value
    return Number(_constant_bool(value).astype(np.int64))


def _add(a: Number, b: Number, sign: int = 1) -> Number:
    if ((a.ident != b.ident) & (a.coef != 0) & (b.coef != 0)).any():
        raise Unknown("a sum of two different unknowns")
    coef = a.coef + sign * b.coef
    const = a.const + sign * b.const
    return Number(const, coef, np.where(a.coef != 0, a.ident, b.ident)) if coef.any() else Number(const)


def _scale(a: Number, factor: Array) -> Number:
    return Number(a.const * factor, a.coef * factor, a.ident)


def _at_least(d: Number) -> Truth | Flag:
    """d >= 0."""
    if d.known:
        return Flag(d.const >= 0)
    if not np.isin(d.coef, (-1, 0, 1)).all():
        raise Unknown("a comparison with a multiple of an unknown")
    false = (d.coef == 0) & (d.const < 0)
    low = np.where(d.coef == 1, -d.const, np.where(false, 0, LOW))
    high = np.where(d.coef == -1, d.const + 1, np.where(false, 0, HIGH))
    return Truth(low, high, np.where(d.coef == 0, NO_ID, d.ident))


def complement(t: Truth | Flag) -> Truth | Flag:
    if isinstance(t, Flag):
        return Flag(~t.value)
    if (~t.constant & (t.low > LOW) & (t.high < HIGH)).any():
        raise Unknown("the complement of an interval")
    low = np.where(t.always, 0, np.where(t.never, LOW, np.where(t.low > LOW, LOW, t.high)))
    high = np.where(t.always, 0, np.where(t.never, HIGH, np.where(t.low > LOW, t.low, HIGH)))
    return Truth(low, high, t.ident)


def _and(a: Truth | Flag, b: Truth | Flag) -> Truth | Flag:
    if isinstance(a, Flag) and isinstance(b, Flag):
        return Flag(a.value & b.value)
    a, b = interval(a), interval(b)
    if ((a.ident != b.ident) & ~a.constant & ~b.constant).any():
        raise Unknown("a condition on two different unknowns")
    never = a.never | b.never
    low = np.where(never, 0, np.maximum(a.low, b.low))
    high = np.where(never, 0, np.minimum(a.high, b.high))
    return Truth(low, high, np.where(a.constant, b.ident, a.ident))


def _or(a: Truth | Flag, b: Truth | Flag) -> Truth | Flag:
    return complement(_and(complement(a), complement(b)))


def _as_truth(value: Value) -> Truth | Flag:
    return value if isinstance(value, (Truth, Flag)) else Flag(_constant_bool(value))


def _equal(d: Number) -> Truth | Flag:
    return Flag(d.const == 0) if d.known else _and(_at_least(d), _at_least(_scale(d, MINUS)))


def _strict(d: Number) -> Truth | Flag:
    """d > 0, for integers d - 1 >= 0."""
    return Flag(d.const > 0) if d.known else _at_least(Number(d.const - 1, d.coef, d.ident))


COMPARE: dict[str, Callable[[Number], Truth | Flag]] = {  # of d = right - left
    "le": _at_least,
    "lt": _strict,
    "ge": lambda d: _at_least(_scale(d, MINUS)),
    "gt": lambda d: _strict(_scale(d, MINUS)),
    "eq": _equal,
    "ne": lambda d: complement(_equal(d)),
}
ALIASES = {"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"}
LOGIC = {
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__", "__iand__"), _and),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__", "__ior__"), _or),
}


class Evaluate:
    """Elements of tensors of one shadow graph under one size assignment."""

    def __init__(self, memory: Memory, sizes: Sizes):
        self.pull = Pull(memory, sizes)
        self.memory, self.sizes = memory, sizes
        self._dense: dict[fx.Node, Array] = {}
        self._inputs: dict[tuple[fx.Node, int], int] = {}

    def at(self, node: fx.Node, coords: Coords, shape: tuple[int, ...], time: int) -> Value:
        """Elements of ``node``, as read at ``time``; ``coords`` broadcast to ``shape``, and so does the result."""
        points = Points(node, coords, np.broadcast_to(np.int64(0), shape), time)
        while True:
            update = self._update(points)
            if update is not None:  # an in-place operator wrote the tensor last: its result is what is read
                return _through_casts(self._compute(replace(points, node=update)), points)
            if splits(points, self.memory):
                return self._parts(points)
            steps = self.pull.step(points)
            if steps is None:
                return _through_casts(self._compute(points), points)
            (points,) = steps

    def _update(self, points: Points) -> fx.Node | None:
        """The last in-place operator before the read, if it wrote the whole tensor that ``points`` are elements of."""
        node, memory = points.node, self.memory
        own = [w for w in memory.writes.get(node, ()) if memory.position[node] < w.position < points.time]
        if not own or own[-1].view is not node or own[-1].node.target is aten.copy_.default:
            return None
        return own[-1].node

    def _parts(self, points: Points) -> Value:
        """A value whose elements come from several tensors: each computed apart, then put in order."""
        shape = points.index.shape
        flat = replace(points.spread(), index=np.arange(int(np.prod(shape, dtype=np.int64))))
        flat = replace(flat, coords=tuple(c.reshape(-1) for c in flat.coords))
        ends = self.pull.walk(flat)
        values = [_through_casts(self._compute(p), p) for p in ends]
        order = np.argsort(np.concatenate([p.index for p in ends]), kind="stable")
        lengths = [len(p.index) for p in ends]
        return _map(_concatenate(values, lengths), lambda x: x[order].reshape(shape))

    def _operand(self, node: fx.Node, position: int, name: str, p: Points) -> Value:
        value = argument(node, position, name)
        if is_tensor(value):
            return self._read(value, p.coords, p, node)  # type: ignore[arg-type]
        if isinstance(value, bool):
            return Flag(np.asarray(value))
        return Number(np.asarray(value if isinstance(value, float) else self.sizes.number(value)))

    def _read(self, source: fx.Node, coords: Coords, p: Points, reader: fx.Node) -> Value:
        """Elements of an operand that ``reader`` broadcasts to its own coordinates."""
        inner = broadcast(coords, self.sizes.shape(source))
        return self.at(source, inner, p.index.shape, self.memory.position[reader])

    def _compute(self, p: Points) -> Value:
        node = p.node
        if node.op in ("placeholder", "get_attr"):
            return self._input(p)
        if not self.memory.unchanged(node, self.memory.position[node] + 1, p.time):
            raise Unknown(f"`{node.name}` is changed in place")
        name = _operator(node)
        if name in COMPARE:
            left, right = _number(self._operand(node, 0, "self", p)), _number(self._operand(node, 1, "other", p))
            return COMPARE[name](_add(right, left, -1))
        if name in LOGIC:
            return LOGIC[name](
                _as_truth(self._operand(node, 0, "self", p)), _as_truth(self._operand(node, 1, "other", p))
            )
        rule = RULES.get(name)
        if rule is None:
            raise Unknown(f"`{node.target}` has no exact form")
        return _fits(rule(self, node, p), (node.meta["val"].dtype,))

    def _input(self, p: Points) -> Value:
        """An element of an input tensor: an unknown of its own (by tensor, version and flat index)."""
        value = p.node.meta["val"]
        if value.dtype.is_floating_point or value.dtype == torch.bool or value.dtype.is_complex:
            raise Unknown(f"it depends on the input `{p.node.meta.get('dynamo_name', p.node.name)}`")
        key = (self.memory.root(p.node), self.memory.version(p.node, p.time))
        base = self._inputs.setdefault(key, len(self._inputs)) << 40
        flat = ravel(p.coords, self.sizes.shape(p.node)) if p.coords else np.int64(0)
        return Number(np.asarray(0), np.asarray(1), np.asarray(base + flat))

    # ---- rules that need more than elementwise arithmetic

    def arange(self, node: fx.Node, p: Points) -> Value:
        if any(isinstance(a, float) for a in node.args):
            raise Unknown("an arange in fractions")
        args = [self.sizes.number(a) for a in node.args]
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
        return Number(start + step * p.coords[0])

    def fill(self, node: fx.Node, p: Points) -> Value:
        name = _operator(node)
        if name in ("full", "full_like", "new_full", "scalar_tensor"):
            value = (
                node.args[0]
                if name == "scalar_tensor"
                else argument(node, 2 if name == "new_full" else 1, "fill_value")
            )
            value = value if isinstance(value, (bool, float)) else self.sizes.number(value)
        else:
            value = int("ones" in name)
        return Flag(np.asarray(bool(value))) if node.meta["val"].dtype == torch.bool else Number(np.asarray(value))

    def arithmetic(self, node: fx.Node, p: Points) -> Value:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise Unknown(f"`{node.target}` with alpha")
        name = _operator(node)
        a, b = _number(self._operand(node, 0, "self", p)), _number(self._operand(node, 1, "other", p))
        if name in ("add", "sub", "rsub"):
            return _add(a, b) if name == "add" else _add(a, b, -1) if name == "sub" else _add(b, a, -1)
        if not a.known and not b.known:
            raise Unknown("a product of two unknowns")
        return _scale(a, b.const) if b.known else _scale(b, a.const)

    def negate(self, node: fx.Node, p: Points) -> Value:
        value = self._operand(node, 0, "self", p)
        if _operator(node) == "neg":
            return _scale(_number(value), MINUS)
        return complement(_as_truth(value))

    def where(self, node: fx.Node, p: Points) -> Value:
        name = _operator(node)
        if name == "masked_fill":
            cond = _as_truth(self._operand(node, 1, "mask", p))
            yes, no = self._operand(node, 2, "value", p), self._operand(node, 0, "self", p)
        else:
            cond = _as_truth(self._operand(node, 0, "condition", p))
            yes, no = self._operand(node, 1, "self", p), self._operand(node, 2, "other", p)
        if isinstance(yes, (Truth, Flag)) or isinstance(no, (Truth, Flag)):
            yes, no = _as_truth(yes), _as_truth(no)
            return _or(_and(cond, yes), _and(complement(cond), no))
        yes, no = _number(yes), _number(no)
        if not (yes.known and no.known):
            raise Unknown("a choice between unknown numbers")
        if isinstance(cond, Flag):
            return Number(np.where(cond.value, yes.const, no.const))
        return Pick(cond, yes.const, no.const)

    def triangle(self, node: fx.Node, p: Points) -> Value:
        value = self._read(node.args[0], p.coords, p, node)
        diagonal = self.sizes.number(argument(node, 1, "diagonal", 0))
        below = _operator(node) == "tril"
        reach = p.coords[-1] - p.coords[-2]
        keep = reach <= diagonal if below else reach >= diagonal
        if isinstance(value, (Truth, Flag)):
            return _and(value, Flag(keep))
        number = _number(value)
        if not number.known:
            raise Unknown("a triangle of unknowns")
        return Number(np.where(keep, number.const, 0))

    def index(self, node: fx.Node, p: Points) -> Value:
        source, indices = node.args[0], node.args[1]
        rank = len(self.sizes.shape(source))
        if len(indices) != rank or any(i is None for i in indices):
            raise Unknown("indexing of some dimensions")
        coords = []
        for index, size in zip(indices, self.sizes.shape(source), strict=True):
            number = self._read(index, p.coords, p, node)
            if not isinstance(number, Number) or not number.known:
                raise Unknown("an index that only the device knows")
            coords.append(number.const % size)
        return self.at(source, tuple(coords), p.index.shape, self.memory.position[node])

    def diff(self, node: fx.Node, p: Points) -> Value:
        source = node.args[0]
        order, prepend = argument(node, 1, "n", 1), argument(node, 3, "prepend")
        if order != 1 or argument(node, 4, "append") is not None:
            raise Unknown("a difference of higher order")
        dim = int(argument(node, 2, "dim", -1)) % len(p.coords)  # type: ignore[call-overload]
        before = self.sizes.shape(prepend)[dim] if prepend is not None else 0

        def read(position: Array) -> Number:
            inside = position >= before
            value = _number(self._read(source, _moved(p.coords, dim, np.maximum(position - before, 0)), p, node))
            if inside.all():
                return value
            first = _moved(p.coords, dim, np.minimum(position, before - 1))
            return _choose(inside, value, _number(self._read(prepend, first, p, node)))  # type: ignore[arg-type]

        return _add(read(p.coords[dim] + 1), read(p.coords[dim]), -1)

    def cumsum(self, node: fx.Node, p: Points) -> Value:
        source, shape = node.args[0], self.sizes.shape(node)
        if int(np.prod(shape, dtype=np.int64)) > DENSE_LIMIT:
            raise Unknown("a running sum over a large tensor")
        if node not in self._dense:
            axes = np.indices(shape, sparse=True)
            number = _number(self.at(source, tuple(axes), shape, self.memory.position[node]))
            if not number.known:
                raise Unknown("a running sum of unknowns")
            dim = int(node.args[1]) % max(len(shape), 1)
            self._dense[node] = np.broadcast_to(number.const, shape).cumsum(dim)
        return Number(self._dense[node][p.coords])


def _moved(coords: Coords, dim: int, value: Array) -> Coords:
    return coords[:dim] + (value,) + coords[dim + 1 :]


def _operator(node: fx.Node) -> str:
    """Name of an ATen operator without namespace, overload and in-place underscore."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else str(node.target)
    name = name if name.startswith("__") else name.rstrip("_")
    return ALIASES.get(name, name)


_EXACT = {torch.bool, torch.int32, torch.int64, torch.float32, torch.float64}


def _fits(value: Value, dtypes: Iterable[torch.dtype]) -> Value:
    """The value, if it is the same number in each dtype: narrow ones round and wrap, so they may hold only 0, 1 and
    what hides a key."""
    if isinstance(value, Number) and any(d not in _EXACT for d in dtypes):
        plain = (value.const == 0) | (value.const == 1) | (value.const <= -1.0e4)
        if not value.known or not plain.all():
            raise Unknown("arithmetic in a narrow dtype")
    return value


def _through_casts(value: Value, p: Points) -> Value:
    """What the casts on the way do to a value; integers and truths pass unchanged."""
    _fits(value, p.casts)
    if not isinstance(value, Number) or not p.casts:
        return value
    if torch.bool in p.casts:
        return _as_truth(value)
    whole = np.issubdtype(value.const.dtype, np.integer) or (np.mod(value.const, 1) == 0).all()
    if not whole and any(not d.is_floating_point for d in p.casts):
        raise Unknown("a cast that truncates")
    return value


def _choose(inside: Array, a: Number, b: Number) -> Number:
    """Elements of ``a`` where ``inside``, of ``b`` elsewhere."""
    return Number(*(np.where(inside, getattr(a, f), getattr(b, f)) for f in ("const", "coef", "ident")))


def _map(value: Value, change: Callable[[Array], Array]) -> Value:
    """A value with each of its arrays changed."""
    if isinstance(value, Pick):
        return Pick(_map(value.cond, change), change(value.yes), change(value.no))  # type: ignore[arg-type]
    return type(value)(*(change(getattr(value, f.name)) for f in fields(value)))


def _concatenate(values: list[Value], lengths: list[int]) -> Value:
    """Values of consecutive runs of elements as one."""
    truths = [interval(v) for v in values if isinstance(v, (Truth, Flag))]
    parts: list[Truth] | list[Number] = truths if len(truths) == len(values) else [_number(v) for v in values]
    full = [
        [np.broadcast_to(getattr(v, f.name), (k,)) for v, k in zip(parts, lengths, strict=True)]
        for f in fields(parts[0])
    ]
    return type(parts[0])(*(np.concatenate(runs) for runs in full))


RULES: dict[str, Callable[[Evaluate, fx.Node, Points], Value]] = {
    "arange": Evaluate.arange,
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor", "ones", "ones_like", "new_ones"), Evaluate.fill),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), Evaluate.fill),
    **dict.fromkeys(("add", "sub", "rsub", "mul"), Evaluate.arithmetic),
    **dict.fromkeys(("neg", "logical_not", "bitwise_not", "__invert__"), Evaluate.negate),
    **dict.fromkeys(("where", "masked_fill"), Evaluate.where),
    **dict.fromkeys(("tril", "triu"), Evaluate.triangle),
    "index": Evaluate.index,
    "diff": Evaluate.diff,
    "cumsum": Evaluate.cumsum,
}
