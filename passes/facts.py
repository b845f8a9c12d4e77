"""Exact values of mask elements, as functions of at most one unknown each.

A mask is small arithmetic over ``arange``, comparisons and ands, sometimes over a cache length or position that only
the device knows. :class:`Evaluate` computes elements of such a tensor at given coordinates with three forms:

- ``Number``: ``const + coef * x``, x an unknown integer (an element of an input tensor, named by an id);
- ``Truth``: true exactly when ``low <= x < high`` (constants: the empty or the whole interval);
- ``Pick``: ``yes`` where a Truth holds, ``no`` elsewhere (``where``, ``masked_fill``).

Every rule is exact: a comparison of two Numbers in one unknown is an interval of that unknown. What has no such form
raises :class:`Unknown`, and the mask stays an operand. Data movement is the table of ``prove.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from dscompile.passes.graph import Sizes, argument, is_tensor
from dscompile.passes.memory import Memory
from dscompile.passes.prove import Array, Coords, Points, Pull, broadcast, ravel, unravel

aten = torch.ops.aten
LOW, HIGH = -(2**62), 2**62
NO_ID = -1
DENSE_LIMIT = 1 << 22  # elements of an intermediate that is computed whole (cumsum)


class Unknown(Exception):
    """An element with no exact form; the message says which operator."""


@dataclass
class Number:
    const: Array  # int64 or float64
    coef: Array | None = None  # int64; None: no unknown
    ident: Array | None = None


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
    cond: Truth
    yes: Array
    no: Array


Value = Number | Truth | Pick


def truth(values: Array) -> Truth:
    """Constant booleans."""
    none = np.full(values.shape, NO_ID)
    return Truth(np.where(values, LOW, 0), np.where(values, HIGH, 0), none)


def _constant_bool(value: Value) -> Array:
    if isinstance(value, Truth):
        if not value.constant.all():
            raise Unknown("a number made of a comparison with an unknown")
        return value.always
    if isinstance(value, Number) and value.coef is None:
        return value.const != 0
    raise Unknown("truth of a number with an unknown")


def _number(value: Value) -> Number:
    if isinstance(value, Number):
        return value
    return Number(_constant_bool(value).astype(np.int64))


def _add(a: Number, b: Number, sign: int = 1) -> Number:
    const = a.const + sign * b.const
    if b.coef is None:
        return Number(const, a.coef, a.ident)
    if a.coef is None:
        return Number(const, sign * b.coef, b.ident)
    zero = np.broadcast_to(np.int64(0), np.shape(const))
    coef_a, coef_b = np.broadcast_to(a.coef, np.shape(const)), np.broadcast_to(sign * b.coef, np.shape(const))
    if ((a.ident != b.ident) & (coef_a != 0) & (coef_b != 0)).any():
        raise Unknown("a sum of two different unknowns")
    coef = coef_a + coef_b
    if (coef == zero).all():
        return Number(const)
    return Number(const, coef, np.where(coef_a != 0, a.ident, b.ident))


def _scale(a: Number, factor: Array) -> Number:
    return Number(a.const * factor, None if a.coef is None else a.coef * factor, a.ident)


def _at_least(d: Number) -> Truth:
    """d >= 0."""
    if d.coef is None:
        return truth(d.const >= 0)
    if not np.isin(d.coef, (-1, 0, 1)).all():
        raise Unknown("a comparison with a multiple of an unknown")
    low = np.where(d.coef == 1, -d.const, np.where((d.coef == 0) & (d.const < 0), 0, LOW))
    high = np.where(d.coef == -1, d.const + 1, np.where((d.coef == 0) & (d.const < 0), 0, HIGH))
    return Truth(low, high, np.where(d.coef == 0, NO_ID, d.ident))


def complement(t: Truth) -> Truth:
    half = ~t.constant & (t.low > LOW) & (t.high < HIGH)
    if half.any():
        raise Unknown("the complement of an interval")
    low = np.where(t.always, 0, np.where(t.never, LOW, np.where(t.low > LOW, LOW, t.high)))
    high = np.where(t.always, 0, np.where(t.never, HIGH, np.where(t.low > LOW, t.low, HIGH)))
    return Truth(low, high, t.ident)


def _and(a: Truth, b: Truth) -> Truth:
    if ((a.ident != b.ident) & ~a.constant & ~b.constant).any():
        raise Unknown("a condition on two different unknowns")
    never = a.never | b.never
    low = np.where(never, 0, np.maximum(a.low, b.low))
    high = np.where(never, 0, np.minimum(a.high, b.high))
    return Truth(low, high, np.where(a.constant, b.ident, a.ident))


def _or(a: Truth, b: Truth) -> Truth:
    return complement(_and(complement(a), complement(b)))


def _as_truth(value: Value) -> Truth:
    return value if isinstance(value, Truth) else truth(_constant_bool(value))


def _equal(d: Number) -> Truth:
    return _and(_at_least(d), _at_least(_scale(d, np.int64(-1))))


def _strict(d: Number) -> Truth:
    """d > 0, for integers d - 1 >= 0."""
    if d.coef is None:
        return truth(d.const > 0)
    return _at_least(Number(d.const - 1, d.coef, d.ident))


COMPARE: dict[str, Callable[[Number], Truth]] = {  # of d = right - left
    "le": _at_least,
    "lt": _strict,
    "ge": lambda d: _at_least(_scale(d, np.int64(-1))),
    "gt": lambda d: _strict(_scale(d, np.int64(-1))),
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
        self._dense: dict[tuple[fx.Node, int], Value] = {}
        self._inputs: dict[tuple[fx.Node, int], int] = {}

    def whole(self, node: fx.Node, time: int) -> Value:
        """All elements of a tensor, flattened."""
        shape = self.sizes.shape(node)
        count = int(np.prod(shape, dtype=np.int64))
        return self.at(node, unravel(np.arange(count), shape), count, time)

    def at(self, node: fx.Node, coords: Coords, count: int, time: int) -> Value:
        """Elements of ``node`` at ``count`` coordinates, as read at ``time``."""
        ends = self.pull.walk(Points(node, coords, np.arange(count), time))
        values = [_through_casts(self._compute(p), p) for p in ends]
        if len(ends) == 1:
            order = np.argsort(ends[0].index, kind="stable")
            return values[0] if (order == np.arange(count)).all() else _gather(values[0], order)
        return _gather(_concatenate(values), np.argsort(np.concatenate([p.index for p in ends]), kind="stable"))

    def _operand(self, node: fx.Node, position: int, name: str, p: Points) -> Value:
        value = argument(node, position, name)
        count = len(p.index)
        if is_tensor(value):
            inner = broadcast(p.coords, self.sizes.shape(value))  # type: ignore[arg-type]
            return self.at(value, inner, count, self.memory.position[node])  # type: ignore[arg-type]
        if isinstance(value, bool):
            return truth(np.full(count, value))
        if isinstance(value, float):
            return Number(np.full(count, value))
        return Number(np.full(count, self.sizes.number(value)))

    def _compute(self, p: Points) -> Value:
        node = p.node
        if node.op in ("placeholder", "get_attr"):
            return self._input(p)
        name = getattr(node.target, "_schema", None)
        name = name.name.split("::")[1] if name is not None else str(node.target)
        name = ALIASES.get(name, name)
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
        return rule(self, node, p)

    def _input(self, p: Points) -> Value:
        """An element of an input tensor: an unknown of its own (by tensor, version and flat index)."""
        value = p.node.meta["val"]
        if value.dtype.is_floating_point or value.dtype == torch.bool or value.dtype.is_complex:
            raise Unknown(f"it depends on the input `{p.node.meta.get('dynamo_name', p.node.name)}`")
        key = (self.memory.root(p.node), self.memory.version(p.node, p.time))
        base = self._inputs.setdefault(key, len(self._inputs)) << 40
        flat = ravel(p.coords, self.sizes.shape(p.node)) if p.coords else np.zeros(1, np.int64)
        count = p.index.shape
        return Number(np.zeros(count, np.int64), np.ones(count, np.int64), np.broadcast_to(base + flat, count))

    # ---- rules that need more than elementwise arithmetic

    def arange(self, node: fx.Node, p: Points) -> Value:
        args = [self.sizes.number(a) for a in node.args]
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
        return Number(start + step * p.coords[0])

    def fill(self, node: fx.Node, p: Points) -> Value:
        name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        if name in ("full", "full_like", "new_full", "scalar_tensor"):
            value = node.args[0] if name == "scalar_tensor" else argument(node, 2 if name == "new_full" else 1, "fill_value")
            value = value if isinstance(value, (bool, float)) else self.sizes.number(value)
        else:
            value = int("ones" in name)
        values = np.full(p.index.shape, value)
        return truth(values.astype(bool)) if node.meta["val"].dtype == torch.bool else Number(values)

    def arithmetic(self, node: fx.Node, p: Points) -> Value:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise Unknown(f"`{node.target}` with alpha")
        name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        a, b = _number(self._operand(node, 0, "self", p)), _number(self._operand(node, 1, "other", p))
        if name in ("add", "sub", "rsub"):
            return _add(a, b) if name == "add" else _add(a, b, -1) if name == "sub" else _add(b, a, -1)
        if a.coef is not None and b.coef is not None:
            raise Unknown("a product of two unknowns")
        return _scale(a, b.const) if b.coef is None else _scale(b, a.const)

    def negate(self, node: fx.Node, p: Points) -> Value:
        value = self._operand(node, 0, "self", p)
        if node.target is aten.neg.default:
            return _scale(_number(value), np.int64(-1))
        return complement(_as_truth(value))

    def where(self, node: fx.Node, p: Points) -> Value:
        name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        if name == "masked_fill":
            cond = _as_truth(self._operand(node, 1, "mask", p))
            yes, no = self._operand(node, 2, "value", p), self._operand(node, 0, "self", p)
        else:
            cond = _as_truth(self._operand(node, 0, "condition", p))
            yes, no = self._operand(node, 1, "self", p), self._operand(node, 2, "other", p)
        if isinstance(yes, Truth) or isinstance(no, Truth):
            yes, no = _as_truth(yes), _as_truth(no)
            return _or(_and(cond, yes), _and(complement(cond), no))
        yes, no = _number(yes), _number(no)
        if yes.coef is not None or no.coef is not None:
            raise Unknown("a choice between unknown numbers")
        if cond.constant.all():
            return Number(np.where(cond.always, yes.const, no.const))
        return Pick(cond, yes.const, no.const)

    def triangle(self, node: fx.Node, p: Points) -> Value:
        value = self.at(node.args[0], p.coords, len(p.index), self.memory.position[node])
        diagonal = self.sizes.number(argument(node, 1, "diagonal", 0))
        below = node.target is aten.tril.default
        reach = p.coords[-1] - p.coords[-2]
        keep = reach <= diagonal if below else reach >= diagonal
        if isinstance(value, Truth):
            return _and(value, truth(keep))
        number = _number(value)
        if number.coef is not None:
            raise Unknown("a triangle of unknowns")
        return Number(np.where(keep, number.const, 0))

    def index(self, node: fx.Node, p: Points) -> Value:
        source, indices = node.args[0], node.args[1]
        rank = len(self.sizes.shape(source))
        if len(indices) != rank or any(i is None for i in indices):
            raise Unknown("indexing of some dimensions")
        time = self.memory.position[node]
        coords = []
        for index, size in zip(indices, self.sizes.shape(source), strict=True):
            number = self.at(index, broadcast(p.coords, self.sizes.shape(index)), len(p.index), time)
            if not isinstance(number, Number) or number.coef is not None:
                raise Unknown("an index that only the device knows")
            coords.append(number.const % size)
        return self.at(source, tuple(coords), len(p.index), time)

    def diff(self, node: fx.Node, p: Points) -> Value:
        source = node.args[0]
        order, prepend = argument(node, 1, "n", 1), argument(node, 3, "prepend")
        if order != 1 or argument(node, 4, "append") is not None:
            raise Unknown("a difference of higher order")
        dim = int(argument(node, 2, "dim", -1)) % len(p.coords)  # type: ignore[call-overload]
        time, count = self.memory.position[node], len(p.index)
        before = self.sizes.shape(prepend)[dim] if prepend is not None else 0

        def read(position: Array) -> Number:
            coords = p.coords[:dim] + (position - before,) + p.coords[dim + 1 :]
            inside = position >= before
            value = _number(self.at(source, coords[:dim] + (np.maximum(position - before, 0),) + coords[dim + 1 :], count, time))
            if inside.all():
                return value
            first = coords[:dim] + (np.minimum(position, before - 1),) + coords[dim + 1 :]
            other = _number(self.at(prepend, first, count, time))  # type: ignore[arg-type]
            return _select_number(inside, value, other)

        return _add(read(p.coords[dim] + 1), read(p.coords[dim]), -1)

    def cumsum(self, node: fx.Node, p: Points) -> Value:
        source, shape = node.args[0], self.sizes.shape(node)
        if int(np.prod(shape, dtype=np.int64)) > DENSE_LIMIT:
            raise Unknown("a running sum over a large tensor")
        key = (node, 0)
        if key not in self._dense:
            number = _number(self.whole(source, self.memory.position[node]))
            if number.coef is not None:
                raise Unknown("a running sum of unknowns")
            dim = int(node.args[1]) % max(len(shape), 1)
            self._dense[key] = Number(number.const.reshape(shape).cumsum(dim).reshape(-1))
        return Number(self._dense[key].const[ravel(p.coords, shape)])  # type: ignore[union-attr]


def _through_casts(value: Value, p: Points) -> Value:
    """What the casts on the way do to a value; integers and truths pass unchanged."""
    if not isinstance(value, Number) or not p.casts:
        return value
    if torch.bool in p.casts:
        return _as_truth(value)
    whole = np.issubdtype(value.const.dtype, np.integer) or (np.mod(value.const, 1) == 0).all()
    if not whole and any(not d.is_floating_point for d in p.casts):
        raise Unknown("a cast that truncates")
    return value


def _select_number(inside: Array, a: Number, b: Number) -> Number:
    zero = np.zeros(inside.shape, np.int64)
    if a.coef is None and b.coef is None:
        return Number(np.where(inside, a.const, b.const))
    return Number(
        np.where(inside, a.const, b.const),
        np.where(inside, zero if a.coef is None else a.coef, zero if b.coef is None else b.coef),
        np.where(inside, NO_ID if a.ident is None else a.ident, NO_ID if b.ident is None else b.ident),
    )


def _gather(value: Value, order: Array) -> Value:
    if isinstance(value, Pick):
        return Pick(_gather(value.cond, order), value.yes[order], value.no[order])  # type: ignore[arg-type]
    if isinstance(value, Truth):
        return Truth(value.low[order], value.high[order], value.ident[order])
    coef = None if value.coef is None else value.coef[order]
    return Number(value.const[order], coef, None if value.ident is None else value.ident[order])


def _concatenate(values: list[Value]) -> Value:
    if all(isinstance(v, Truth) for v in values):
        return Truth(*(np.concatenate([getattr(v, f) for v in values]) for f in ("low", "high", "ident")))
    numbers = [_number(v) for v in values]
    const = np.concatenate([n.const for n in numbers])
    if all(n.coef is None for n in numbers):
        return Number(const)
    zeros = [np.zeros(n.const.shape, np.int64) for n in numbers]
    coef = np.concatenate([z if n.coef is None else n.coef for n, z in zip(numbers, zeros, strict=True)])
    ident = np.concatenate([z + NO_ID if n.ident is None else n.ident for n, z in zip(numbers, zeros, strict=True)])
    return Number(const, coef, ident)


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
