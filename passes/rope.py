"""Which rotation was applied to the rotated columns: a fact for the report, never a condition of a match.

Elements are read as sympy expressions over their sources; a rotation by position is pairs ``x cos a - y sin a`` and
``y cos a + x sin a``. The name tells how pairs lie: ``half`` (i, i + R/2), ``interleaved`` (2i, 2i + 1), ``interleaved
to half`` (read interleaved, written in halves), ``none``. What is no rotation, or hides its tables, is ``unproven``.
"""

from __future__ import annotations

import numpy as np
import sympy
import torch
from torch import fx

from dscompile.passes.graph import is_tensor
from dscompile.passes.prove import Points, Pull, broadcast
from dscompile.passes.refusals import Refusal

aten = torch.ops.aten
COS, SIN = sympy.Function("cos_"), sympy.Function("sin_")
DEPTH = 16


class _NotRotation(Exception):
    pass


class _Element:
    """Sympy expression of single elements."""

    def __init__(self, pull: Pull):
        self.pull = pull
        self._known: dict[tuple, sympy.Expr] = {}  # both columns of a pair read the same elements

    def at(self, node: fx.Node, coords: tuple[int, ...], time: int, depth: int = 0) -> sympy.Expr:
        start = Points(node, tuple(np.array([c]) for c in coords), np.zeros(1, np.int64), time)
        (end,) = self.pull.walk(start)
        node, at = end.node, tuple(int(c[0]) for c in end.coords)
        rule = _RULES.get(node.target) if node.op == "call_function" and depth < DEPTH else None
        if rule is None:
            return sympy.Symbol(f"{node.name}{list(at)}", real=True)
        key = (node, at, depth)
        if key not in self._known:
            self._known[key] = rule(self, node, at, depth + 1)
        return self._known[key]

    def operand(self, node: fx.Node, value: object, at: tuple[int, ...], depth: int) -> sympy.Expr:
        if isinstance(value, (int, float)):
            return sympy.sympify(value)
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), (int, torch.SymInt)):
            return sympy.Integer(self.pull.sizes.number(value))
        if not is_tensor(value):
            raise _NotRotation(f"an opaque argument of {node.target}")
        shape = self.pull.sizes.shape(value)  # type: ignore[arg-type]
        inner = broadcast(tuple(np.array([c]) for c in at), shape)
        return self.at(value, tuple(int(c[0]) for c in inner), self.pull.memory.position[node], depth)  # type: ignore[arg-type]

    def parts(self, z: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        real, imaginary = sympy.expand(z).as_real_imag()
        return real, imaginary


def _binary(combine):
    def rule(e: _Element, node: fx.Node, at: tuple[int, ...], depth: int) -> sympy.Expr:
        if node.kwargs:
            raise _NotRotation("scaled addition")
        return combine(e.operand(node, node.args[0], at, depth), e.operand(node, node.args[1], at, depth))

    return rule


def _view_as_real(e: _Element, node: fx.Node, at: tuple[int, ...], depth: int) -> sympy.Expr:
    real, imaginary = e.parts(e.operand(node, node.args[0], at[:-1], depth))
    return imaginary if at[-1] else real


def _view_as_complex(e: _Element, node: fx.Node, at: tuple[int, ...], depth: int) -> sympy.Expr:
    real, imaginary = (e.operand(node, node.args[0], at + (k,), depth) for k in (0, 1))
    return real + sympy.I * imaginary


def _polar(e: _Element, node: fx.Node, at: tuple[int, ...], depth: int) -> sympy.Expr:
    size, angle = (e.operand(node, node.args[k], at, depth) for k in (0, 1))
    return size * (sympy.Function("cos_", real=True)(angle) + sympy.I * sympy.Function("sin_", real=True)(angle))


def _unary(function):
    return lambda e, node, at, depth: function(e.operand(node, node.args[0], at, depth))


_RULES = {
    aten.mul.Tensor: _binary(lambda a, b: a * b),
    aten.add.Tensor: _binary(lambda a, b: a + b),
    aten.sub.Tensor: _binary(lambda a, b: a - b),
    aten.neg.default: _unary(lambda x: -x),
    aten.cos.default: _unary(lambda x: sympy.Function("cos_", real=True)(x)),
    aten.sin.default: _unary(lambda x: sympy.Function("sin_", real=True)(x)),
    aten.polar.default: _polar,
    aten.complex.default: _binary(lambda a, b: a + sympy.I * b),
    aten.view_as_complex.default: _view_as_complex,
    aten.view_as_real.default: _view_as_real,
    aten.ones_like.default: lambda e, node, at, depth: sympy.Integer(1),
}


def kind(pull: Pull, node: fx.Node, coords: list[tuple[int, ...]], time: int) -> str:
    """Name of the rotation of the columns at ``coords`` (one row's, in order)."""
    try:
        element = _Element(pull)
        return _name({i: _terms(element.at(node, coords[i], time)) for i in _columns(len(coords))}, len(coords))
    except (_NotRotation, Refusal) as why:
        return f"unproven ({why})"


def _columns(width: int) -> list[int]:
    """Those that are read: the outer two pairs of both halves, in whichever way columns are paired."""
    half = width // 2
    if width <= 8 or width % 4:
        return list(range(width))
    return [0, 1, half - 2, half - 1, half, half + 1, width - 2, width - 1]


def _terms(expr: sympy.Expr) -> dict[str, tuple[sympy.Expr, sympy.Expr, int]]:
    """{'cos_' / 'sin_': (angle, source element, sign)}; empty for a bare element."""
    expr = sympy.expand(expr)
    if expr.is_Symbol:
        return {}
    found = {}
    for term in sympy.Add.make_args(expr):
        turns = [f for f in sympy.Mul.make_args(term) if f.func.__name__ in ("cos_", "sin_")]
        sources = [f for f in sympy.Mul.make_args(term) if f.is_Symbol]
        if len(turns) != 1 or not sources:
            raise _NotRotation("its cos and sin tables are not computed in this graph")
        sign = -1 if sympy.Mul(*[f for f in sympy.Mul.make_args(term) if f.is_number]) < 0 else 1
        found[turns[0].func.__name__] = (turns[0].args[0], sympy.Mul(*sources), sign)
    if set(found) != {"cos_", "sin_"} or found["cos_"][0] != found["sin_"][0]:
        raise _NotRotation("not a sum of one cosine and one sine of the same angle")
    return found


def _name(terms: dict[int, dict], width: int) -> str:
    """The name by the terms of some columns, of ``width`` in all."""
    if not any(terms.values()):
        return "none"
    if not all(terms.values()):
        raise _NotRotation("only some columns are rotated")
    order = {t["cos_"][1]: i for i, t in terms.items()}  # source element -> the column that it stays in
    if len(order) != len(terms):
        raise _NotRotation("two columns rotate the same element")
    pairs = []
    for i, t in terms.items():
        j = order.get(t["sin_"][1])
        if j is None or terms[j]["sin_"][1] != t["cos_"][1] or t["sin_"][2] * terms[j]["sin_"][2] != -1:
            raise _NotRotation("columns are not rotated in pairs")
        if i < j:
            pairs.append((i, j, _column(t["cos_"][1]), _column(terms[j]["cos_"][1])))
    written = {j - i for i, j, _, _ in pairs}
    read = {b - a for _, _, a, b in pairs}
    if written == {width // 2} and read == {width // 2}:
        return "half"
    if written == {1} and read == {1}:
        return "interleaved"
    if written == {width // 2} and read == {1}:
        return "interleaved to half"
    return "rotation in unnamed order"


def _column(source: sympy.Expr) -> int:
    symbol = sorted(source.free_symbols, key=str)[0]
    return int(str(symbol).rstrip("]").split(",")[-1].split("[")[-1])
