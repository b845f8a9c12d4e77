"""What each operator does to the axis of requests: one rule for each family of operators.

A rule gets a :class:`Call` and returns the state of the result and the arguments with which the same operator computes
half of the requests: sizes that count requests are halved, shared tensors that span all requests are read by half. It
raises :class:`Mixes` where requests meet: a sum over the axis, a product along it, a slice of it. An operator without a
rule is refused. Arguments are those of the operators' schemas in ATen and `lowering/ops`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from dscompile.passes.overlap import draws
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.separable import Applied, Axis, Half, Mixes, Private, half, value

aten = torch.ops.aten
Rule = Callable[["Call"], Applied]


class Call:
    """One node under its rule."""

    def __init__(self, node: fx.Node, states: Mapping[fx.Node, Any], batch: int):
        self.node, self.states, self.batch = node, states, batch
        self.args, self.kwargs = list(node.args), dict(node.kwargs)
        self.name = operator_name(node) or str(getattr(node.target, "_overloadpacket", "")).removeprefix("aten.")

    def mixes(self, how: str) -> Mixes:
        return Mixes(f"`{self.node.name}` ({self.name or self.node.target}) {how}", self.node)

    def state(self, arg: object) -> Any:
        return self.states[arg] if isinstance(arg, fx.Node) else None

    def axis(self, position: int) -> Axis:
        """Of an argument that must have one."""
        found = self.state(self.args[position])
        if not isinstance(found, Axis):
            raise self.mixes(f"has no requests in argument {position}, and has some in another")
        return found

    def shape(self, arg: Any = None) -> torch.Size:
        return value(self.node if arg is None else arg).shape

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def done(self, state: Any) -> Applied:
        """The state is that of every result, if there are several."""
        if isinstance(value(self.node), (tuple, list)) and not isinstance(state, tuple):
            state = (state,) * len(value(self.node))
        return Applied(state, tuple(self.args), self.kwargs)

    def align(self, arg: Any, wanted: Axis, rank: int) -> Any:
        """An operand that is broadcast to `rank` dimensions, of which `wanted` has the requests."""
        if isinstance(arg, (list, tuple)):
            return type(arg)(self.align(a, wanted, rank) for a in arg)
        if not isinstance(arg, fx.Node) or not isinstance(value(arg), torch.Tensor):
            return arg
        dim = wanted.dim - (rank - len(self.shape(arg)))
        own = Axis(dim, wanted.before, wanted.after)
        state = self.state(arg)
        if isinstance(state, Axis):
            if state != own:
                raise self.mixes(f"reads requests in dimensions {dim} and {state.dim} of its operands at once")
            return arg
        if isinstance(state, Private):
            raise self.mixes("reads rows that were dispatched beside tokens that were not")
        if dim < 0 or self.shape(arg)[dim] == 1:
            return arg
        if wanted.before != 1:
            raise self.mixes("reads a shared operand whose requests lie apart")
        return Half(arg, own)

    def first(self) -> Axis | Private | None:
        """The first axis among the operands, as one of the result that they are broadcast to."""
        rank = max((len(self.shape(n)) for n in self._tensors()), default=0)
        for n in self._tensors():
            state = self.state(n)
            if isinstance(state, Axis):
                return Axis(state.dim + rank - len(self.shape(n)), state.before, state.after)
            if isinstance(state, Private):
                return state
        return None

    def _tensors(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if isinstance(value(n), torch.Tensor)]

    def align_all(self, wanted: Axis, rank: int) -> None:
        self.args = [self.align(a, wanted, rank) for a in self.args]
        self.kwargs = {name: self.align(a, wanted, rank) for name, a in self.kwargs.items()}


def apply(node: fx.Node, states: Mapping[fx.Node, Any], batch: int) -> Applied:
    """The rule of a node that reads something with an axis; raises Mixes."""
    call = Call(node, states, batch)
    tags = getattr(node.target, "tags", ())
    if draws(node):
        raise call.mixes("draws random numbers, whose order would change")
    if node.target is operator.getitem:
        return _item(call)
    rule = _RULES.get(call.name) or (_pointwise if torch.Tag.pointwise in tags else None)
    if rule is None:
        raise call.mixes("has no rule that shows that it keeps requests apart")
    return rule(call)


def _item(c: Call) -> Applied:
    whole = c.states[c.args[0]]
    state = whole if isinstance(whole, Mixes) else whole[c.args[1]]
    if isinstance(state, Mixes):
        raise state
    return Applied(state, tuple(c.args), c.kwargs)


# ------------------------------------------------------------------ elementwise, and along another dimension


def _pointwise(c: Call) -> Applied:
    state, rank = c.first(), len(c.shape())
    if isinstance(state, Private):
        lead = c.shape()[:1]
        rows = [n for n in c.node.all_input_nodes if c.state(n) is not None]
        if any(c.state(n) != state or c.shape(n)[:1] != lead or len(c.shape(n)) != rank for n in rows):
            raise c.mixes("reads rows that were dispatched beside tokens that were not")
        return c.done(state)
    assert state is not None
    c.align_all(state, rank)
    return c.done(state)


def _dims(c: Call, dims: Any, rank: int) -> set[int]:
    given = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return {d % rank for d in given}


def _reduction(c: Call) -> Applied:
    """sum, mean, max: (x, dim(s), keepdim)."""
    axis, rank = c.axis(0), len(c.shape(c.args[0]))
    dims = _dims(c, c.argument(1, "dim"), rank) if c.node.target not in _WHOLE else set(range(rank))
    if axis.dim in dims:
        raise c.mixes(f"reduces dimension {axis.dim}, which counts requests")
    result = value(c.node)
    result = result if isinstance(result, torch.Tensor) else result[0]
    lost = 0 if result.dim() == rank else sum(d < axis.dim for d in dims)
    return c.done(Axis(axis.dim - lost, axis.before, axis.after))


_WHOLE = {aten.max.default, aten.min.default, aten.sum.default, aten.mean.default, aten.any.default, aten.all.default}


def _along(position: int, default: int | None = None) -> Rule:
    """Keeps the shape or shortens one dimension, along which it computes: softmax, cumsum, sort, topk."""

    def rule(c: Call) -> Applied:
        axis, dim = c.axis(0), c.argument(position, "dim", default)
        if dim is None or dim % len(c.shape(c.args[0])) == axis.dim:
            raise c.mixes(f"computes along dimension {axis.dim}, which counts requests")
        return c.done(axis)

    return rule


def _layer_norm(c: Call) -> Applied:
    axis = c.axis(0)
    if axis.dim >= len(c.shape(c.args[0])) - len(c.args[1]):
        raise c.mixes(f"normalises over dimension {axis.dim}, which counts requests")
    return c.done(axis)


# ------------------------------------------------------------------ views


def _reshape(c: Call) -> Applied:
    """Whatever keeps the order of elements: the axis is where as many of them stand in front of it."""
    axis, old, new = c.axis(0), c.shape(c.args[0]), c.shape()
    outer = axis.before
    for size in old[: axis.dim]:
        outer *= size
    for dim, size in enumerate(new):
        if outer % size == 0 and outer >= size:  # wholly in front of the axis
            outer //= size
            continue
        if size % (outer * c.batch):
            break
        found = Axis(dim, outer, size // (outer * c.batch))
        if c.name == "unflatten":
            inside = c.args[1] % len(old)
            c.args[2] = half(new, found)[inside : inside + len(c.args[2])]
        elif c.name in ("view", "_unsafe_view", "reshape"):
            c.args[1] = half(new, found)
        return c.done(found)
    raise c.mixes(f"regroups {list(old)} as {list(new)}, where no dimension counts whole requests")


def _expand(c: Call) -> Applied:
    axis = c.axis(0)
    found = Axis(axis.dim + len(c.shape()) - len(c.shape(c.args[0])), axis.before, axis.after)
    c.args[1] = half(c.shape(), found)
    return c.done(found)


def _permutation(order: Callable[[Call, int], list[int]]) -> Rule:
    def rule(c: Call) -> Applied:
        axis, rank = c.axis(0), len(c.shape())
        return c.done(Axis([d % rank for d in order(c, rank)].index(axis.dim), axis.before, axis.after))

    return rule


def _swapped(first: int, second: int, rank: int) -> list[int]:
    found = list(range(rank))
    found[first], found[second] = found[second], found[first]
    return found


def _cut(c: Call) -> Applied:
    """slice, narrow, select, split: of another dimension, or the whole of this one."""
    axis, shape = c.axis(0), c.shape(c.args[0])
    first = c.name in ("slice", "select", "narrow", "unbind")
    dim = (c.argument(1, "dim", 0) if first else c.argument(2, "dim", 0)) % len(shape)
    if dim == axis.dim:
        if c.name == "slice" and c.shape() == shape:
            c.args = [c.args[0], dim]  # from 0 to the end, in steps of 1
            return c.done(axis)
        raise c.mixes(f"takes a part of dimension {dim}, which counts requests")
    lost = c.name in ("select", "unbind") and dim < axis.dim
    return c.done(Axis(axis.dim - lost, axis.before, axis.after))


def _joined(c: Call) -> Applied:
    """cat and stack of tensors with the same axis, or shared ones."""
    rank = len(c.shape(c.args[0][0]))
    dim = c.argument(1, "dim", 0) % (rank + (c.name == "stack"))
    axis = next(s for s in map(c.state, c.args[0]) if s is not None)
    if not isinstance(axis, Axis) or (c.name == "cat" and axis.dim == dim):
        raise c.mixes(f"joins tensors in dimension {dim}, which counts requests")
    c.args[0] = [c.align(x, axis, rank) for x in c.args[0]]
    return c.done(Axis(axis.dim + (c.name == "stack" and dim <= axis.dim), axis.before, axis.after))


def _pad(c: Call) -> Applied:
    axis, rank = c.axis(0), len(c.shape())
    if any(c.args[1][2 * (rank - 1 - axis.dim) : 2 * (rank - axis.dim)]):
        raise c.mixes(f"pads dimension {axis.dim}, which counts requests")
    return c.done(axis)


# ------------------------------------------------------------------ look-ups


def _embedding(c: Call) -> Applied:
    if c.state(c.args[0]) is not None:
        raise c.mixes("looks up rows among those of several requests")
    return c.done(c.axis(1))


def _gather(c: Call) -> Applied:
    """gather, scatter: (x, dim, index, ...) with the axis in another dimension of each."""
    rank, dim = len(c.shape(c.args[0])), c.args[1] % len(c.shape(c.args[0]))
    axis = next(s for s in map(c.state, c.node.all_input_nodes) if s is not None)
    if not isinstance(axis, Axis) or axis.dim == dim:
        raise c.mixes(f"looks up along dimension {dim}, which counts requests")
    c.align_all(axis, rank)
    return c.done(axis)


def _slice_scatter(c: Call) -> Applied:
    rank, dim = len(c.shape(c.args[0])), c.argument(2, "dim", 0) % len(c.shape(c.args[0]))
    axis = next(s for s in map(c.state, c.args[:2]) if s is not None)
    if not isinstance(axis, Axis) or axis.dim == dim:
        raise c.mixes(f"writes a part of dimension {dim}, which counts requests")
    c.args[:2] = [c.align(x, axis, rank) for x in c.args[:2]]
    return c.done(axis)


def _index(c: Call) -> Applied:
    """x[i, j, ...] with index tensors for the first dimensions, beside each other."""
    x, indices = c.args
    given = [i for i in indices if i is not None]
    shift = indices.index(given[0])
    if indices[shift : shift + len(given)] != given:
        raise c.mixes("is indexed by tensors that don't stand beside each other")
    rank = max(len(c.shape(i)) for i in given)
    own = c.state(x)
    if own is None:
        i = next(i for i in given if c.state(i) is not None)
        state = c.state(i)
        if not isinstance(state, Axis):
            raise c.mixes("looks up by rows that were dispatched")
        wanted = Axis(state.dim + rank - len(c.shape(i)), state.before, state.after)
        c.args[1] = [c.align(i, wanted, rank) for i in indices]
        return c.done(Axis(wanted.dim + shift, wanted.before, wanted.after))
    if not isinstance(own, Axis) or any(c.state(i) is not None for i in given):
        raise c.mixes("looks up rows of requests by requests")
    if own.dim < shift:
        return c.done(own)
    if own.dim >= shift + len(given):
        return c.done(Axis(own.dim - len(given) + rank, own.before, own.after))
    return _each_its_own(c, own, shift, rank)


def _each_its_own(c: Call, own: Axis, shift: int, rank: int) -> Applied:
    """x[r, ...] where r is 0, 1, .. B-1: request b reads what is its own. Both halves read rows 0 to B/2 of theirs."""
    x, indices = c.args
    which = indices[own.dim]
    dim = next((d for d, size in enumerate(c.shape(which)) if size != 1), None)
    if dim is None or own.before != 1 or own.after != 1 or not _counts_up(which, c.batch):
        raise c.mixes(f"looks up along dimension {own.dim}, which counts requests")
    wanted = Axis(dim + rank - len(c.shape(which)))
    c.args[1] = [i if i is None else c.align(i, wanted, rank) for i in indices]
    c.args[1][own.dim] = First(which, Axis(dim))
    return c.done(Axis(wanted.dim + shift))


class First(Half):
    """As Half, and the first half also for the second."""


def _counts_up(node: fx.Node, count: int) -> bool:
    """True if the values are 0, 1, .. count-1 whatever the inputs are."""
    order, seen, todo = [], set(), [node]
    while todo:
        n = todo.pop()
        if n.op != "call_function":
            return False
        if n not in seen:
            seen.add(n)
            order.append(n)
            todo += n.all_input_nodes
    with torch.no_grad():
        made: dict[fx.Node, Any] = {}
        for n in sorted(order):
            args, kwargs = fx.node.map_arg((n.args, {k: v for k, v in n.kwargs.items() if k != "device"}), made.get)
            made[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    return torch.equal(made[node].flatten().cpu(), torch.arange(count, dtype=made[node].dtype))


# ------------------------------------------------------------------ products


def _product(c: Call) -> Applied:
    """mm, bmm, addmm, baddbmm: rows or batches of the first factor, columns or batches of the second."""
    first = 1 if c.name in ("addmm", "baddbmm") else 0
    a, b = c.args[first : first + 2]
    rank = len(c.shape())
    for factor, kept in ((a, rank - 2), (b, rank - 1)):
        axis = c.state(factor)
        if axis is None:
            continue
        if not isinstance(axis, Axis) or (axis.dim >= rank - 2 and axis.dim != kept):
            raise c.mixes("sums over requests")
        other = b if factor is a else a
        if axis.dim < rank - 2:  # a batch of both
            c.args[first : first + 2] = [c.align(a, axis, rank), c.align(b, axis, rank)]
        elif c.state(other) is not None:
            raise c.mixes("multiplies requests with requests")
        if first:
            c.args[0] = c.align(c.args[0], axis, rank)
        return c.done(axis)
    raise c.mixes("adds requests to what has none")


def _rows(c: Call) -> Applied:
    """(x [.., K], weights): each row by itself."""
    axis = c.axis(0)
    if axis.dim == len(c.shape(c.args[0])) - 1 or any(c.state(a) is not None for a in c.args[1:]):
        raise c.mixes("multiplies requests with requests")
    return c.done(axis)


def _attention(c: Call) -> Applied:
    """Queries, keys and values [B, H, S, _], and a mask: requests are the first dimension of all of them."""
    batch = Axis(0)
    if any(c.state(x) != batch for x in c.args[:3]):
        raise c.mixes("reads keys of several requests")
    c.args[3:] = [c.align(x, batch, 4) for x in c.args[3:]]
    c.kwargs = {name: c.align(x, batch, 4) for name, x in c.kwargs.items()}
    results = value(c.node)
    if isinstance(results, torch.Tensor):
        return c.done(batch)
    states = [batch, batch, *(c.mixes("counts over all requests") for _ in results[2:])]
    return c.done(tuple(states))


# Of our operators: dimensions with the requests by argument; a negative one, of a mask that is broadcast to as many.
_OWN: dict[str, dict[int, int]] = {
    "mla": {0: 0, 1: 0, 2: 0, 3: 0, 6: -4},
    "mla_decode": {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: -3},
    "route": {0: 0},
    "experts": {0: 0, 1: 0, 2: 0},
}


def _own(c: Call) -> Applied:
    known = _OWN[c.name]
    if all(isinstance(c.state(a), Private) or c.state(a) is None for a in c.args) and c.name == "experts":
        return c.done(c.state(c.args[0]))
    wanted = Axis(0, 1, c.axis(0).after)
    for position, arg in enumerate(c.args):
        dim = known.get(position)
        if dim is None and c.state(arg) is not None:
            raise c.mixes(f"has requests in argument {position}")
        if dim == 0 and c.state(arg) not in (wanted, None):
            raise c.mixes(f"reads requests in argument {position} in another dimension than its first")
        if dim is not None:
            c.args[position] = c.align(arg, wanted, -dim if dim else len(c.shape(arg)))
    return c.done(wanted)


# ------------------------------------------------------------------ exchanges

CAPACITY, SLOT = -2, -1  # the last two arguments of every operator of an exchange


def _exchange(c: Call) -> Applied:
    """A half sends its own tokens, in an exchange of its own with half of the room."""
    c.args[CAPACITY] = max(c.args[CAPACITY] // 2, 1)
    if c.name == "dispatch_start":
        tokens = c.axis(0)
        if any(c.state(a) != tokens for a in c.args[:3]) or tokens.dim != 0 or tokens.before != 1:
            raise c.mixes("sends tokens, ids and weights that don't belong to the same requests")
        return c.done(Private(tokens))
    private = next((c.state(a) for a in c.args if isinstance(c.state(a), Private)), None)
    if private is None or any(c.state(a) not in (None, private, private.tokens) for a in c.args):
        raise c.mixes("exchanges rows of different dispatches")
    return c.done(private.tokens if c.name == "combine_wait" else private)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var", "std"), _reduction),
    **dict.fromkeys(("argmax", "argmin", "logsumexp"), _reduction),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"), _along(1)),
    **dict.fromkeys(("cumsum", "cumprod"), _along(1)),
    "sort": _along(1, -1),
    "topk": _along(2, -1),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    "expand": _expand,
    "permute": _permutation(lambda c, rank: list(c.args[1])),
    "transpose": _permutation(lambda c, rank: _swapped(c.args[1], c.args[2], rank)),
    "t": _permutation(lambda c, rank: list(reversed(range(rank)))),
    **dict.fromkeys(("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"), _cut),
    **dict.fromkeys(("clone", "_to_copy", "detach", "alias", "lift_fresh_copy", "copy"), _pointwise),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "masked_fill"), _pointwise),
    "cat": _joined,
    "stack": _joined,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    **dict.fromkeys(("gather", "scatter", "scatter_add"), _gather),
    "slice_scatter": _slice_scatter,
    "index": _index,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    "linear": _rows,
    "mixed_linear": _rows,
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
    **dict.fromkeys(_OWN, _own),
    **dict.fromkeys(("dispatch_start", "dispatch_wait", "combine_start", "combine_wait"), _exchange),
}
