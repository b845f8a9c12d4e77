"""The expert itself: two (or three) products over rows and the gated activation between them, proved.

    h = act(x W_gate) * (x W_up)          y = h W_down

A product is one row of ``PRODUCTS``: ``_grouped_mm`` over rows sorted by expert with the ends of each expert's rows, or
a batched product with the weights of each row's expert. What stands between two products is read as one expression in
the columns of the first (sympy), so that the order of factors, casts, in-place operators and where the clamp is
written don't matter, and compared with the activations of ``dsinfra::experts``. Intermediate roundings may be lost,
never added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy
from torch import fx

from dscompile.passes.experts_meanings import Order, PerExpert
from dscompile.passes.experts_rows import Rows, Tokens, aligned
from dscompile.passes.experts_values import arg, dtype, name, option
from dscompile.passes.graph import is_tensor
from dscompile.passes.refusals import (
    ExpertActivation,
    ExpertDropout,
    ExpertWeights,
    GroupEnds,
    Refusal,
    RoutingWeights,
    RowsNotTokens,
    Unsupported,
)
from dscompile.passes.trail import Trail

SIGMOID, CLAMP = sympy.Function("sigmoid"), sympy.Function("clamp")
GELU = {"none": sympy.Function("gelu"), "tanh": sympy.Function("gelu_tanh")}


@dataclass(frozen=True)
class Weight:
    """``[E, out, in]``, or ``[E, in, out]`` if ``swapped``."""

    node: fx.Node
    swapped: bool


@dataclass(frozen=True)
class Product:
    """Each row times the weight of its expert, ids being ``source``; rows in ``order`` (None: not said by it)."""

    node: fx.Node
    rows: fx.Node
    weight: Weight
    source: fx.Node
    order: Order
    grouped: bool
    labels: str  # of the result; those of ``rows`` have the input's features for ``d``
    bias: fx.Node | None = None  # added by the product itself


@dataclass(frozen=True)
class Columns:
    """Columns ``start, start + step, ..`` of a product (plus bias), ``count`` of them."""

    product: Product
    bias: fx.Node | None
    start: int
    step: int
    count: int
    labels: str


@dataclass(frozen=True)
class Activation:
    """``kind`` as ``dsinfra::experts`` names it."""

    kind: str
    alpha: float = 1.0
    limit: float = 0.0


@dataclass
class Hidden:
    """What the second product reads: an activation of columns of ``gate`` and ``up``; ``region``: nodes in between."""

    activation: Activation
    gate: Columns
    up: Columns
    tokens: Tokens
    region: set[fx.Node] = field(default_factory=set)

    @property
    def interleaved(self) -> bool:
        return self.gate.step == 2

    @property
    def joint(self) -> bool:
        """One weight holds gate and up."""
        return self.gate.product is self.up.product


class Products:
    """Products over rows by expert of one shadow graph."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.indices = rows.indices
        self._known: dict[fx.Node, Product | Refusal] = {}

    def table(self) -> ProductTable:
        return PRODUCTS

    def find(self, node: fx.Node) -> Product | None:
        """The product that ``node`` is; None if it is none; raises a Refusal for one that can't be proved."""
        rule = self.table().get(name(node))
        if rule is None:
            return None
        if node not in self._known:
            try:
                found = rule(self, node)
            except Refusal as refusal:
                self._known[node] = refusal
                raise
            if found is None:
                return None
            self._known[node] = found
        known = self._known[node]
        if isinstance(known, Refusal):
            raise known
        return known

    def is_candidate(self, node: fx.Node) -> bool:
        """True for a product over rows by expert, proved or not."""
        try:
            return self.find(node) is not None
        except Refusal:
            return True

    def _grouped(self, node: fx.Node) -> Product | None:
        rows, weight, ends = node.args[:3]
        at = self.rows.memory.position[node]
        if not is_tensor(ends) or len(self.indices.shape(weight)) != 3 or len(self.indices.shape(rows)) != 2:
            raise Unsupported("a grouped product that is not rows by experts", node)
        if option(node, 3, "bias") is not None or option(node, 4, "out_dtype") not in (None, dtype(node)):
            raise Unsupported("a grouped product with a bias or another result dtype", node)
        found = self.indices.read(ends, at)
        groups = self.indices.shape(weight)[0]
        if not isinstance(found, PerExpert) or not found.ends:
            raise GroupEnds(f"`{ends.name}` is not the cumulative count of expert ids", ends)
        if set(groups) != {found.groups}:
            raise GroupEnds(f"{found.groups} groups for {groups[0]} experts", ends)
        self.rows.through(node)
        return Product(node, rows, self._weight(weight, at, True), found.source, None, True, "md")

    def _weight(self, node: fx.Node, at: int, swapped: bool) -> Weight:
        """Behind transposes of the last two dimensions."""
        self.indices.intact(node, at)
        while swaps(node, 3) and not self.rows.memory.stops_gradient(node):
            at, swapped = self.rows.memory.position[node], not swapped
            node = arg(node, 0)
            self.indices.intact(node, at)
        return Weight(node, swapped)

    def _batched(self, node: fx.Node) -> Product | None:
        """``bmm(W[ids], rows[.., 1])`` or ``bmm(rows[.., None, :], W[ids])``; None for a product of anything else."""
        left, right = node.args[:2]
        if len(self.indices.shape(left)) != 3 or len(self.indices.shape(right)) != 3:
            return None
        for weight, rows, swapped in ((left, right, False), (right, left, True)):
            at = self.rows.memory.position[node]
            while swaps(weight, 3) and not self.rows.memory.stops_gradient(weight):
                at, swapped = self.rows.memory.position[weight], not swapped
                weight = arg(weight, 0)
            if name(weight) not in ("index", "index_select") or not self._by_expert(weight):
                continue
            unit = self.indices.shape(rows)[2 if rows is right else 1]
            table = self.rows.table(weight, at)
            if set(unit) != {1} or table.labels != "mdd":
                raise Unsupported("a product of several rows with the weight of one expert", node)
            if dtype(table.base) != dtype(node):
                raise ExpertWeights(f"weights are converted to {dtype(node)} behind their gather", weight)
            self.rows.through(node)
            labels = "md1" if rows is right else "m1d"
            return Product(node, rows, Weight(table.base, swapped), table.source, table.order, False, labels)
        return None

    def _by_expert(self, node: fx.Node) -> bool:
        """Cheap look at a gather: entries are matrices of a three-dimensional tensor, one for each row."""
        return len(self.indices.shape(arg(node, 0))) == 3


ProductTable: TypeAlias = "dict[str, Callable[[Any, fx.Node], Product | None]]"
PRODUCTS: ProductTable = {
    "_grouped_mm": Products._grouped,
    "transformers::grouped_mm_fallback": Products._grouped,  # where torch's has no kernel for the dtype
    "bmm": Products._batched,
    "matmul": Products._batched,
}


def swaps(node: fx.Node, rank: int) -> bool:
    kind = name(node)
    if kind in ("mT", "adjoint", "matrix_H"):
        return kind == "mT"
    if kind in ("transpose", "swapaxes", "swapdims"):
        return {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}
    return kind == "permute" and [d % rank for d in arg(node, 1)] == [*range(rank - 2), rank - 1, rank - 2]


class Reader:
    """Reads the hidden rows of one second product as an expression in columns of the first."""

    def __init__(self, products: Products, trail: Trail | None = None):
        self.products, self.rows, self.indices = products, products.rows, products.indices
        self.trail = trail or Trail()
        self.region: set[fx.Node] = set()
        self.symbols: dict[sympy.Symbol, Columns] = {}
        self._tokens: dict[fx.Node, Tokens] = {}

    def hidden(self, down: Product) -> Hidden:
        """Activation, gate and up of what ``down`` multiplies; raises a Refusal."""
        expression, labels = self.expression(down.rows, self.rows.memory.position[down.node])
        if labels.replace("1", "") not in ("md", "tkd"):
            raise ExpertActivation(f"the second product reads rows laid out {labels}", down.node)
        activation, gate, up = self.activation(expression, down.node)
        self.trail.holds(f"between the products stands the activation {activation.kind} of gate, times up")
        for columns in (gate, up):
            if columns.product.source is not down.source:
                raise GroupEnds("the products of one expert layer use different ids", down.node)
        self.halves(gate, up, down.node)
        self.trail.holds("gate and up are halves of one product, or two products, by the same ids")
        tokens = self.tokens(gate.product)
        self.trail.holds("its rows are the tokens, each for one of its experts")
        if self.tokens(up.product) != tokens:
            raise ExpertActivation("gate and up are products of different rows", up.product.node)
        return Hidden(activation, gate, up, tokens, self.region)

    def tokens(self, product: Product) -> Tokens:
        """The rows of x that a first product reads, in the order that its groups need."""
        if product.node in self._tokens:
            return self._tokens[product.node]
        tokens = self._rows_of(product)
        if product.grouped:
            ids = self.indices.sorted_ids(tokens.order).source if tokens.order is not None else None
        else:
            ids = product.source if tokens.order is product.order else None
        if ids is not product.source:
            raise GroupEnds("rows are not in the order of the ids that give each row its expert", product.node)
        self._tokens[product.node] = replace(tokens, labels="")
        return self._tokens[product.node]

    def _rows_of(self, product: Product) -> Tokens:
        """Where one id a token chooses a weight for each row, rows may be x itself, whatever made it."""
        at = self.rows.memory.position[product.node]
        try:
            return self.rows.tokens(product.rows, at)
        except (RowsNotTokens, RoutingWeights):
            itself = None
            if not product.grouped and product.order is None:
                itself = self.rows.themselves(product.rows, product.source, at)
            if itself is None:
                raise
            return itself

    # ---- columns of a product

    def columns(self, node: fx.Node, time: int) -> Columns | None:
        """``node`` as columns of a product, or None."""
        self.indices.intact(node, time)
        product = self.products.find(node)
        if product is not None:
            self.region.add(node)
            width = self.indices.shape(node)[product.labels.index("d")]
            return Columns(product, product.bias, 0, 1, width[0], product.labels)
        kind, at = name(node), self.rows.memory.position[node]
        if kind == "getitem":
            return self.part(node, at)
        if not node.args or not is_tensor(arg(node, 0)) or kind not in _COLUMN_RULES and not self.rows.passes(node):
            return None
        inner = self.columns(arg(node, 0), at)
        if inner is None:
            return None
        self.rows.through(node)
        found = _COLUMN_RULES.get(kind, Reader.same)(self, node, inner)
        if found is not None:
            self.region.add(node)
        return found

    def same(self, node: fx.Node, inner: Columns) -> Columns | None:
        return replace(inner, labels=self.rows.relabel(node, inner.labels))

    def biased(self, node: fx.Node, inner: Columns) -> Columns | None:
        """The whole product plus ``bias[ids]``."""
        if not is_tensor(arg(node, 1)) or option(node, 2, "alpha", 1) != 1:
            return None
        table = self.rows.table(arg(node, 1), self.rows.memory.position[node])
        order = inner.product.order if not inner.product.grouped else self.tokens(inner.product).order
        fits = aligned(inner.labels, table.labels) == inner.labels and inner.labels.endswith("d")
        if table.source is not inner.product.source or table.order is not order or not fits:
            raise ExpertWeights("the bias is not that of the row's expert", node)
        whole = inner.start == 0 and inner.step == 1 and inner.bias is None
        same = self.indices.shape(node) == self.indices.shape(arg(node, 0))
        if not whole or not same:
            raise ExpertWeights("a bias is added to a part of the columns", node)
        return replace(inner, bias=table.base)

    def masked(self, node: fx.Node, inner: Columns) -> Columns | None:
        order = inner.product.order if not inner.product.grouped else self.tokens(inner.product).order
        return inner if self.rows.leaves_out(node, order) else None

    def sliced(self, node: fx.Node, inner: Columns) -> Columns | None:
        dim = int(option(node, 1, "dim", 0)) % len(inner.labels)
        if inner.labels[dim] != "d":
            return inner if self.indices.shape(node) == self.indices.shape(arg(node, 0)) else None
        length = inner.count
        start = option(node, 2, "start") or 0
        step = option(node, 4, "step", 1)
        if not isinstance(start, int) or not isinstance(step, int):
            return None
        start = max(start + length, 0) if start < 0 else min(start, length)
        return self.cut(node, inner, start, step, dim)

    def cut(self, node: fx.Node, inner: Columns, start: int, step: int, dim: int) -> Columns:
        count = self.indices.shape(node)[dim][0]
        return replace(inner, start=inner.start + start * inner.step, step=inner.step * step, count=count)

    def part(self, node: fx.Node, at: int) -> Columns | None:
        """An item of a split along the columns."""
        made, which = node.args
        if name(made) not in ("chunk", "split", "split_with_sizes", "tensor_split") or not isinstance(which, int):
            return None
        inner = self.columns(arg(made, 0), self.rows.memory.position[made])
        if inner is None:
            return None
        self.rows.through(node)
        dim = int(option(made, 2, "dim", 0)) % len(inner.labels)
        if inner.labels[dim] != "d":
            return None
        self.region |= {made, node}
        before = sum(int(part.shape[dim]) for part in made.meta["val"][:which])
        return self.cut(node, inner, before, 1, dim)

    # ---- expressions in columns

    def expression(self, node: object, time: int) -> tuple[sympy.Expr, str]:
        """(expression, letters) of a value between the products."""
        if isinstance(node, (int, float)):
            return sympy.sympify(node), ""
        if not is_tensor(node):
            raise ExpertActivation(f"an opaque argument {node}")
        assert isinstance(node, fx.Node)
        columns = self.columns(node, time)
        if columns is not None:
            for symbol, known in self.symbols.items():
                if replace(known, labels=columns.labels) == columns:
                    return symbol, columns.labels
            symbol = sympy.Symbol(f"c{len(self.symbols)}", real=True)
            self.symbols[symbol] = columns
            return symbol, columns.labels
        rule, at = ARITHMETIC.get(name(node)), self.rows.memory.position[node]
        if rule is None and not self.rows.passes(node) and name(node) != "masked_fill":
            raise ExpertActivation(f"`{node.target}` stands between the products of an expert", node)
        self.rows.through(node)
        self.region.add(node)
        if rule is None:
            inner, labels = self.expression(arg(node, 0), at)
            if name(node) == "masked_fill":
                orders = {self.tokens(c.product).order for c in self.symbols.values()}
                if len(orders) != 1 or not self.rows.leaves_out(node, orders.pop()):
                    raise ExpertActivation("values between the products are masked", node)
                return inner, labels
            return inner, self.rows.relabel(node, labels)
        return rule(self, node, at)

    def activation(self, found: sympy.Expr, node: fx.Node) -> tuple[Activation, Columns, Columns]:
        """Which activation the expression is, and of which columns."""
        symbols = sorted(found.free_symbols, key=str)
        if len(symbols) == 2:
            for gate, up in (symbols, symbols[::-1]):
                for candidate, wanted in _candidates(found, gate, up):
                    if sympy.expand(found - wanted) == 0:
                        return candidate, self.symbols[gate], self.symbols[up]
        shown = str(found) if len(str(found)) < 120 else str(found)[:117] + "..."
        raise ExpertActivation(f"the activation is {shown} of columns {', '.join(map(str, symbols))}", node)

    def halves(self, gate: Columns, up: Columns, node: fx.Node) -> None:
        """Gate and up are the halves, or the even and odd columns, of one product, or two whole products."""
        if gate.product is not up.product:
            whole = all(c.start == 0 and c.step == 1 and c.count == self.width(c) for c in (gate, up))
            if whole and gate.count == up.count:
                return
        elif (gate.start, gate.step, up.start, up.step) in ((0, 1, gate.count, 1), (0, 2, 1, 2)):
            if gate.count == up.count and 2 * gate.count == self.width(gate) and gate.bias is up.bias:
                return
        raise ExpertActivation(
            f"gate reads columns {gate.start}::{gate.step} and up {up.start}::{up.step} of {self.width(gate)}, "
            "neither the first and second half nor even and odd",
            node,
        )

    def width(self, columns: Columns) -> int:
        return self.indices.shape(columns.product.node)[columns.product.labels.index("d")][0]


_COLUMN_RULES: dict[str, Callable[[Reader, fx.Node, Columns], Columns | None]] = {
    "add": Reader.biased,
    "masked_fill": Reader.masked,
    "slice": Reader.sliced,
}


def _candidates(found: sympy.Expr, gate: sympy.Symbol, up: sympy.Symbol):
    """(activation, its expression) of each activation that this one could be."""
    yield Activation("silu"), gate * SIGMOID(gate) * up
    yield Activation("gelu"), GELU["none"](gate) * up
    yield Activation("gelu_tanh"), GELU["tanh"](gate) * up
    sigmoids = [f for f in found.atoms(sympy.Function) if f.func == SIGMOID]
    if len(sigmoids) != 1:
        return
    alpha, inner = sigmoids[0].args[0].as_coeff_Mul()
    clamped = inner.func == CLAMP
    limit = inner.args[2] if clamped else sympy.Integer(0)
    held, kept = (CLAMP(gate, -sympy.oo, limit), CLAMP(up, -limit, limit)) if clamped else (gate, up)
    if alpha.is_number and limit.is_finite and (not clamped or limit > 0):
        yield Activation("swiglu_oai", float(alpha), float(limit)), (kept + 1) * held * SIGMOID(alpha * held)


# ------------------------------------------------------------------ arithmetic between the products


Rule = Callable[[Reader, fx.Node, int], "tuple[sympy.Expr, str]"]


def _binary(combine: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, at: int) -> tuple[sympy.Expr, str]:
        if option(node, 2, "alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise ExpertActivation(f"a scaled or rounded `{node.target}`", node)
        (a, left), (b, right) = (reader.expression(operand, at) for operand in node.args[:2])
        labels = aligned(left, right)
        if labels is None:
            raise ExpertActivation(f"rows laid out {left} and {right} are combined", node)
        return combine(a, b), labels

    return rule


def _unary(function: Callable[[sympy.Expr], sympy.Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, at: int) -> tuple[sympy.Expr, str]:
        inner, labels = reader.expression(arg(node, 0), at)
        return function(inner), labels

    return rule


def _gelu(reader: Reader, node: fx.Node, at: int) -> tuple[sympy.Expr, str]:
    inner, labels = reader.expression(arg(node, 0), at)
    return GELU[str(option(node, 1, "approximate", "none"))](inner), labels


def _clamp(reader: Reader, node: fx.Node, at: int) -> tuple[sympy.Expr, str]:
    inner, labels = reader.expression(arg(node, 0), at)
    kind = name(node)
    low = option(node, 1, "min") if kind != "clamp_max" else None
    high = option(node, 2, "max") if kind == "clamp" else option(node, 1, "max") if kind == "clamp_max" else None
    if any(bound is not None and not isinstance(bound, (int, float)) for bound in (low, high)):
        raise ExpertActivation("a clamp by a tensor", node)
    bounds = (-sympy.oo if low is None else sympy.sympify(low), sympy.oo if high is None else sympy.sympify(high))
    return CLAMP(inner, *bounds), labels


def _dropout(reader: Reader, node: fx.Node, at: int) -> tuple[sympy.Expr, str]:
    check_dropout(node)
    return reader.expression(arg(node, 0), at)


def check_dropout(node: fx.Node) -> None:
    """Refuses an active dropout."""
    rate, training = option(node, 1, "p", 0.0), option(node, 2, "train", True)
    if rate and training:
        raise ExpertDropout(f"dropout of {rate} inside the expert layer", node)


ARITHMETIC: dict[str, Rule] = {
    "mul": _binary(lambda a, b: a * b),
    "add": _binary(lambda a, b: a + b),
    "sub": _binary(lambda a, b: a - b),
    "div": _binary(lambda a, b: a / b),
    "neg": _unary(lambda a: -a),
    "sigmoid": _unary(SIGMOID),
    "silu": _unary(lambda a: a * SIGMOID(a)),
    "gelu": _gelu,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("dropout", "native_dropout"), _dropout),
}
