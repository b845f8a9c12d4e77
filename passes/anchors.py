"""Attention, however it is written: the one node that can't be missing is a softmax over keys.

:func:`find` yields each attention of a shadow graph as an :class:`Attention`: one or more bilinear score terms, a
scale, a mask, the values and the output, all with *labelled* dimensions (b, h, s, t, d), so that the provers never ask
whether it was written with ``scaled_dot_product_attention``, ``matmul`` or ``einsum``. Two score terms are DeepSeek's
absorbed form. A softmax that feeds no second product is no attention (a router): :class:`NotAttention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from dscompile.passes.graph import argument, is_tensor
from dscompile.passes.memory import Memory
from dscompile.passes.refusals import (
    AttentionDropout,
    MutatedOperand,
    NotAttention,
    NotBilinear,
    ProbabilitiesUsed,
    Refusal,
    SoftmaxSink,
    Unsupported,
)
from dscompile.passes.trail import Trail

aten = torch.ops.aten

CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
MATMUL = {aten.matmul.default, aten.bmm.default}
PRODUCTS = MATMUL | {aten.einsum.default}
CONCATENATIONS = {aten.cat.default, aten.concat.default}
SCALINGS = {getattr(getattr(aten, n), o) for n in ("mul", "mul_", "div", "div_") for o in ("Tensor", "Scalar")}
MASKINGS = {getattr(getattr(aten, n), o) for n in ("masked_fill", "masked_fill_") for o in ("Scalar", "Tensor")}
DROPOUT = {aten.dropout.default, aten.native_dropout.default, aten.dropout_.default}


@dataclass(frozen=True)
class Operand:
    """A tensor and a letter for each of its dimensions."""

    node: fx.Node
    labels: str


@dataclass(frozen=True)
class Term:
    """Scores ``sum_d left[..s..d] * right[..t..d]``, computed by ``node``."""

    left: Operand
    right: Operand
    node: fx.Node


@dataclass
class Attention:
    """``softmax(scale * sum(terms) + mask) @ value``; ``out`` holds the result, ``softmax`` anchors the report."""

    softmax: fx.Node
    out: fx.Node
    terms: list[Term]
    value: Operand
    result: str  # labels of ``out``
    scale: float
    mask: fx.Node | None = None
    mask_labels: str = "bhst"
    inverted: bool = False
    finite: bool = False  # hidden scores are set to a finite number: a row that sees nothing averages all values
    causal: bool = False
    form: str = "sdpa"
    trail: Trail = field(default_factory=Trail, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the attention computes in (under autocast its operands are cast to it)."""
        return self.out.meta["val"].dtype

    def size(self, label: str, shape_of) -> int:
        """Length of a labelled dimension; ``shape_of`` gives the shape of a node."""
        for operand in [t.left for t in self.terms] + [t.right for t in self.terms] + [self.value]:
            if label in operand.labels:
                return shape_of(operand.node)[operand.labels.index(label)]
        raise Unsupported(f"no dimension {label}", self.softmax)


Found = Attention | Refusal


def find(graph: fx.Graph, memory: Memory) -> Iterator[tuple[fx.Node, Found]]:
    """(anchor, Attention or the Refusal that explains why it isn't one) for each softmax and SDPA, in graph order."""
    for node in graph.nodes:
        trail = Trail("attention by scaled_dot_product_attention")
        try:
            if node.target is aten.scaled_dot_product_attention.default:
                yield node, _sdpa(node, trail)
            elif node.target in SOFTMAX:
                trail.closest = "attention written out around a softmax"
                yield node, _Reader(memory, trail).softmax(node)
        except Refusal as refusal:
            refusal.trail = trail
            yield node, refusal


def _sdpa(node: fx.Node, trail: Trail) -> Attention:
    q, k, v = node.args[:3]
    dropout = argument(node, 4, "dropout_p", 0.0)
    if dropout:
        raise AttentionDropout(f"dropout_p = {dropout}", node)
    ranks = {x.meta["val"].dim() for x in (q, k, v)}
    if ranks != {4}:
        raise Unsupported(f"attention over tensors of {ranks} dimensions", node)
    trail.holds("scores are scale * q.k + mask, without dropout")
    scale = argument(node, 6, "scale")
    width = q.meta["val"].shape[-1]
    return Attention(
        softmax=node,
        out=node,
        terms=[Term(Operand(q, "bhsd"), Operand(k, "bhtd"), node)],
        value=Operand(v, "bhtv"),
        result="bhsv",
        scale=float(width) ** -0.5 if scale is None else float(scale),  # type: ignore[arg-type]
        mask=argument(node, 3, "attn_mask"),  # type: ignore[arg-type]
        causal=bool(argument(node, 5, "is_causal", False)),
        trail=trail,
    )


# ------------------------------------------------------------------ softmax written out


@dataclass
class _Scores:
    terms: list[Term] = field(default_factory=list)
    labels: str = ""
    scale: float = 1.0
    mask: fx.Node | None = None
    inverted: bool = False
    finite: bool = False


class _Reader:
    """Reads one softmax: up through the scores, down to the product with the values."""

    def __init__(self, memory: Memory, trail: Trail):
        self.memory, self.trail = memory, trail

    def softmax(self, node: fx.Node) -> Attention:
        source = node.args[0]
        rank = source.meta["val"].dim()
        out, value, result = self.consumer(node, rank)
        self.trail.holds("the softmax is multiplied with values, and nothing else reads it")
        if int(node.args[1]) % rank != rank - 1:
            raise Unsupported("softmax over another dimension than the last", node)
        scores = self.scores(source, self.memory.position[node])
        labels = scores.labels
        if len(labels) != rank:
            raise Unsupported(f"a mask of {rank} dimensions", node)
        self.trail.holds(f"scores are scale * {'q.k' if len(scores.terms) == 1 else '(q.k + q.k)'} + mask")
        return Attention(
            softmax=node,
            out=out,
            terms=scores.terms,
            value=Operand(value.node, _rename(value.labels, labels)),
            result=_rename(result, labels),
            scale=scores.scale,
            mask=scores.mask,
            mask_labels=labels,
            inverted=scores.inverted,
            finite=scores.finite,
            form="eager" if len(scores.terms) == 1 else "absorbed",
            trail=self.trail,
        )

    def intact(self, node: fx.Node, time: int) -> None:
        """Refuses a value that is changed in place between where it is made and ``time``, when it is read."""
        if not self.memory.unchanged(node, self.memory.position[node] + 1, time):
            raise MutatedOperand(f"`{node.name}` is changed in place before it is read", node)

    def consumer(self, softmax: fx.Node, rank: int) -> tuple[fx.Node, Operand, str]:
        """The product of the probabilities with the values: (node, value, labels of the result)."""
        node = softmax
        while True:
            users = [u for u in node.users if u.op != "output" or _returned(node)]
            products = [u for u in users if u.target in PRODUCTS]
            if not products and not any(u.target in CASTS | DROPOUT for u in users):
                if node is softmax and rank == 4 and softmax.args[0].target in CONCATENATIONS:
                    raise SoftmaxSink("the scores are concatenated with other columns", softmax)
                raise NotAttention("a softmax without a second product", softmax)
            if len(users) != 1:
                raise ProbabilitiesUsed(f"the attention weights have {len(users)} readers", node)
            (user,) = users
            self.intact(node, self.memory.position[user])
            if self.memory.training and user.target is aten.detach.default:
                raise ProbabilitiesUsed("no gradient flows through the attention weights", user)
            if user.target in DROPOUT:
                rate, training = argument(user, 1, "p", 0.0), argument(user, 2, "train", True)
                if rate and training:
                    raise AttentionDropout(f"dropout of {rate} on the attention weights", user)
            if user.target in PRODUCTS:
                return (user, *_second_product(user, node, rank))
            node = user

    def scores(self, node: fx.Node, time: int) -> _Scores:
        """Parses an expression for the scores, read at ``time``, down to its products."""
        self.intact(node, time)
        if self.memory.training and node.target is aten.detach.default:
            raise NotBilinear("no gradient flows through the scores", node)
        at = self.memory.position[node]
        if node.target in CASTS:
            if node.meta["val"].dtype.itemsize < node.args[0].meta["val"].dtype.itemsize:
                raise NotBilinear(f"scores are rounded to {node.meta['val'].dtype}", node)
            return self.scores(node.args[0], at)
        if node.target in PRODUCTS:
            return _product(node)
        if node.target in SCALINGS:
            return self.scaled(node, at)
        if node.target in (aten.add.Tensor, aten.add_.Tensor):
            return self.sum(node, at)
        if node.target in MASKINGS:
            return self.masked(node, node.args[0], node.args[1], node.args[2], True, at)
        if node.target is aten.where.ScalarOther:
            return self.masked(node, node.args[1], node.args[0], node.args[2], False, at)
        if node.target in CONCATENATIONS:
            raise SoftmaxSink("the scores are concatenated with other columns", node)
        raise NotBilinear(f"scores pass through `{node.target}`", node)

    def scaled(self, node: fx.Node, time: int) -> _Scores:
        left, factor = node.args[0], node.args[1]
        if isinstance(left, (int, float)):
            left, factor = factor, left
        if not isinstance(factor, (int, float)):
            raise NotBilinear("scores are scaled by a tensor", node)
        scores = self.scores(left, time)
        if scores.mask is not None:
            raise Unsupported("scaling behind a mask", node)
        scores.scale *= float(factor) if "mul" in str(node.target) else 1.0 / float(factor)
        return scores

    def sum(self, node: fx.Node, time: int) -> _Scores:
        a, b = node.args[0], node.args[1]
        if not is_tensor(a) or not is_tensor(b) or node.kwargs:
            raise NotBilinear("a constant is added to the scores", node)
        first = self.scores(a, time)
        try:
            second = self.scores(b, time)
        except Refusal:
            if first.mask is not None:
                raise Unsupported("two masks are added", node) from None
            if b.meta["val"].dtype == torch.bool:
                raise NotBilinear("a boolean is added to the scores: it hides nothing", node) from None
            first.mask = b
            return first
        if first.labels != second.labels or first.scale != second.scale or first.mask or second.mask:
            raise Unsupported("score terms of different layout, scale or mask", node)
        first.terms += second.terms
        return first

    def masked(self, node: fx.Node, source: fx.Node, mask: fx.Node, fill: object, inverted: bool, time: int) -> _Scores:
        if not isinstance(fill, (int, float)) or fill > -1.0e4:
            raise NotBilinear(f"masked scores are set to {fill}, not to minus infinity", node)
        scores = self.scores(source, time)
        if scores.mask is not None:
            raise Unsupported("two masks", node)
        scores.mask, scores.inverted, scores.finite = mask, inverted, fill > -math.inf
        return scores


def _rename(labels: str, scores: str) -> str:
    """The second product's labels (digits: dimensions of the probabilities, v: the value's own) in the scores'."""
    return "".join(scores[int(c)] if c.isdigit() else c for c in labels)


def _returned(node: fx.Node) -> bool:
    """The shadow returns every value; a value counts as returned only if Dynamo's graph returns it."""
    return bool(node.meta.get("dsinfra_returned"))


def _second_product(node: fx.Node, probabilities: fx.Node, rank: int) -> tuple[Operand, str]:
    if node.target is aten.einsum.default:
        left, right, result = _equation(node)
        operands = node.args[1]
        if operands[1] is probabilities:
            left, right, operands = right, left, (operands[1], operands[0])
        if operands[0] is not probabilities or len(left) != rank:
            raise Unsupported("the probabilities are not one operand of the product", node)
        key = {c: str(i) for i, c in enumerate(left)}
        own = [c for c in right if c not in key]
        if len(own) != 1 or left[-1] in result:
            raise NotAttention("no product over the keys", node)
        key[own[0]] = "v"
        return Operand(operands[1], "".join(key[c] for c in right)), "".join(key[c] for c in result)
    if node.args[0] is not probabilities:
        raise Unsupported("the probabilities are the right factor of the product", node)
    lead = "".join(str(i) for i in range(rank - 2))
    return Operand(node.args[1], f"{lead}{rank - 1}v"), f"{lead}{rank - 2}v"


def _product(node: fx.Node) -> _Scores:
    if node.target is not aten.einsum.default:
        rank = node.args[0].meta["val"].dim()
        if rank != 4 or node.args[1].meta["val"].dim() != 4:
            raise Unsupported("scores over batched 3-dimensional tensors", node)
        return _Scores([Term(Operand(node.args[0], "bhsd"), Operand(node.args[1], "bhdt"), node)], "bhst")
    left, right, result = _equation(node)
    operands = list(node.args[1])
    if result[-1] not in right:
        left, right, operands = right, left, operands[::-1]
    summed = (set(left) & set(right)) - set(result)
    shared = [c for c in result if c in left and c in right]
    own = [c for c in result if c in left and c not in right]
    if len(summed) != 1 or result[-1] not in right or len(shared) + len(own) != 3 or len(result) != 4:
        raise Unsupported(f"scores by einsum {node.args[0]}", node)
    names = {summed.pop(): "d", result[-1]: "t", shared[0]: "b"}
    rest = [c for c in result[:-1] if c not in names]
    if len(shared) == 2:
        names |= {shared[1]: "h", own[0]: "s"}
    else:  # a key without heads: the query's own dimensions, in the order of the result
        names |= {rest[0]: "s", rest[1]: "h"}

    def label(text: str) -> str:
        return "".join(names[c] for c in text)

    return _Scores([Term(Operand(operands[0], label(left)), Operand(operands[1], label(right)), node)], label(result))


def _equation(node: fx.Node) -> tuple[str, str, str]:
    equation = str(node.args[0]).replace(" ", "")
    if "->" not in equation or "." in equation or len(node.args[1]) != 2:
        raise Unsupported(f"einsum {equation}", node)
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    return left, right, result
