"""From a proof to operators in Dynamo's graph: choose where each value is read, check that it may be, write the call.

A proof names shadow nodes; a value can be read only off a Dynamo node of the graph (or checkpoint body) that holds the
attention, only if nothing overwrites it in between, and only in a dtype at least as wide as the model computes in.
Everything is planned first; if a plan fails nothing has been touched. A body that runs several times is rewritten only
if every run binds to the same nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from dscompile.passes import commits, fp8_values
from dscompile.passes.absorbed_form import AbsorbedForm
from dscompile.passes.emit import Emitter, window
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.masks import Mask
from dscompile.passes.memory import Memory
from dscompile.passes.record import Site
from dscompile.passes.refusals import (
    MutatedOperand,
    NarrowedPrecision,
    Refusal,
    RowsDisagree,
    UnboundValue,
    Unsupported,
)
from dscompile.passes.shadow import Owner, Shadow
from dscompile.passes.structure import Pages, Rows, Slot, Structure

if TYPE_CHECKING:
    from dscompile.passes.recognize_mla import Match

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """A Dynamo node and how to read the value off it."""

    node: fx.Node
    slot: Slot | Rows | Pages | int  # an int: the dimension to measure
    table: fx.Node | None = None


@dataclass
class Bindings:
    """One rewritten site: the operator's node in Dynamo's graph and what later passes need to know of it."""

    site: Site
    module: fx.GraphModule
    node: fx.Node  # the operator
    out: fx.Node  # its first result, in the operator's own layout
    mask: Mask
    mask_node: fx.Node | None
    structure: Structure | AbsorbedForm
    pages: tuple[Read, Read] | None = None
    fused: fx.Node | None = None  # the weight [H * (N + V), C] that holds both up-projections, if one does
    training: bool = False
    mask_version: int = 0  # two sites share a count of the mask only if nothing wrote it in between
    twins: list[Site] = field(default_factory=list)  # other runs of the same body
    up_projections: tuple[fx.Node, ...] = ()  # the weights that the latent is contracted with, as the model holds them


class Binder:
    """Writes the matches of one shadow into Dynamo's graph."""

    def __init__(self, shadow: Shadow, memory: Memory, training: bool, prepared: Prepared | None = None):
        self.shadow, self.memory, self.training, self.prepared = shadow, memory, training, prepared
        self._order: dict[fx.GraphModule, dict[fx.Node, int]] = {}

    def write(self, owner: Owner, matches: list[Match]) -> Bindings:
        """Replaces the Dynamo node ``owner`` of one or more (identical) matches; raises a Refusal, graph untouched.

        The caller recompiles the module (:func:`dscompile.passes.graph.settle`).
        """
        plans = [self._plan(owner, match) for match in matches]
        kinds = {(m.mask.kind, m.attention.scale, m.attention.result, m.attention.inverted) for m in matches}
        if len(kinds) > 1 or any(plan != plans[0] for plan in plans):
            raise UnboundValue("the runs of one shared body bind to different values", matches[0].anchor)
        for match in matches:
            match.attention.trail.holds("every operand can be read, unchanged, where the attention is")
        match, plan = matches[0], plans[0]
        commits.current().permit()
        emitter = Emitter(owner.node)
        try:
            if isinstance(match.structure, AbsorbedForm):
                bound = self._absorbed(emitter, owner, match, plan)
            else:
                bound = self._expanded(emitter, owner, match, plan)
            replacement = self._result(emitter, owner, match, bound)
        except Refusal:
            emitter.undo()
            raise
        except Exception as error:
            emitter.undo()
            raise Unsupported(f"the operator could not be written: {error}", match.anchor) from error
        owner.node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in emitter.made)
        commits.current().add([m.site for m in matches], [(owner.node, replacement)], emitter.made)
        bound.twins = [m.site for m in matches[1:]]
        return bound

    # ---- planning

    def _plan(self, owner: Owner, match: Match) -> dict[str, Read]:
        structure, time = match.structure, self.memory.position[match.attention.out]
        names = ("q_latent", "q_rope", "latent", "k_rope")
        if isinstance(structure, Structure):
            names = ("q_nope", *names[1:])
        plan = {n: self._choose(owner, n, getattr(structure, n), time) for n in names if getattr(structure, n)}
        if isinstance(structure, Structure):
            plan["w_uk"] = self._rows(owner, "w_uk", structure.w_uk, time)
            plan["w_uv"] = self._rows(owner, "w_uv", structure.w_uv, time)
            for name in ("latent_pages", "rope_pages"):
                read = self._page_read(owner, getattr(structure, name), time)
                if read is not None:
                    plan[name] = read
        if any(label == "t" for name in names for label, _ in _cuts(plan.get(name))):
            held = self._held(owner, structure.keys[0])
            if held is None:
                raise UnboundValue("the key has no tensor in the graph of the attention", structure.keys[0])
            plan["keys"] = Read(held, structure.keys[1])
        if self.training and not self.memory.unchanged(match.attention.out, time + 1, self._until(time)):
            raise MutatedOperand("the result is changed in place, and the backward reads it", match.attention.out)
        if match.mask.kind in ("length", "operand"):
            softmax = self.memory.position[match.attention.softmax]
            node = match.mask.node
            plan["mask"] = self._choose(owner, "mask", (Slot(node, "", (), softmax, node.meta["val"].dtype),), time)
        return plan

    def _held(self, owner: Owner, node: fx.Node) -> fx.Node | None:
        """Dynamo node of the owner's graph that holds a shadow value, if it comes before the anchor."""
        if owner.module not in self._order:
            self._order[owner.module] = {n: i for i, n in enumerate(owner.module.graph.nodes)}
        order = self._order[owner.module]
        held = self.shadow.owner_in(node, owner.module)
        if held is None or order.get(held, -1) > order[owner.node]:
            return None
        return held

    def _until(self, time: int) -> int:
        """When an operand is read last: at the attention, or in its backward, behind every write of the graph."""
        return len(self.memory.position) if self.training else time

    @property
    def _last(self) -> str:
        return "attention's backward" if self.training else "attention"

    def _choose(self, owner: Owner, name: str, slots: tuple[Slot, ...], time: int) -> Read:
        overwritten = None
        for slot in slots:
            held = self._held(owner, slot.node)
            if held is None:
                continue
            if self.memory.unchanged(slot.node, slot.time, self._until(time)):
                return Read(held, replace(slot, node=held, time=0))
            overwritten = slot.node
        if overwritten is not None:
            raise MutatedOperand(f"`{name}` is overwritten between its use and the {self._last}", overwritten)
        raise UnboundValue(f"`{name}` has no tensor in the graph of the attention", slots[0].node)

    def _rows(self, owner: Owner, name: str, rows: Rows, time: int) -> Read:
        held = self._held(owner, rows.node)
        if held is None:
            raise UnboundValue(f"the weight `{name}` has no tensor in the graph of the attention", rows.node)
        if not self.memory.unchanged(rows.node, rows.time, self._until(time)):
            raise MutatedOperand(f"the weight `{name}` is overwritten before the {self._last}", rows.node)
        scale = None
        if rows.scale is not None:
            scale = self._held(owner, rows.scale)
            if scale is None or not self.memory.unchanged(rows.scale, rows.time, time):
                raise UnboundValue(f"the scales of the FP8 weight `{name}` can't be read at the attention", rows.scale)
        # Two runs of one body read alike at different times.
        return Read(held, replace(rows, node=held, scale=scale, time=0))

    def _page_read(self, owner: Owner, pages: Pages | None, time: int) -> Read | None:
        if pages is None:
            return None
        pool, table = self._held(owner, pages.pool), self._held(owner, pages.table)
        safe = all(self.memory.unchanged(n, pages.time, time) for n in (pages.pool, pages.table))
        return Read(pool, replace(pages, pool=pool, table=table, time=0), table) if pool and table and safe else None

    # ---- writing

    def _value(
        self, e: Emitter, plan: dict[str, Read], name: str, wanted: str, width: int, dtype: torch.dtype
    ) -> fx.Node:
        """A value as the model uses it, in the dtype the attention computes in."""
        read = plan[name]
        assert isinstance(read.slot, Slot)
        lengths: dict[str, fx.Node | int] = {"d": width}
        if any(label == "t" for label, _ in read.slot.cuts):
            keys = plan["keys"]
            lengths["t"] = e.size(keys.node, keys.slot)  # type: ignore[arg-type]
        return self._cast(e, e.read(read.node, read.slot, wanted, lengths), read.slot.dtype, dtype)

    def _cast(self, e: Emitter, node: fx.Node, used: torch.dtype, dtype: torch.dtype) -> fx.Node:
        if used.itemsize > dtype.itemsize:
            raise NarrowedPrecision(f"`{node.name}` is used in {used}, the attention computes in {dtype}")
        return e.cast(e.cast(node, used), dtype)

    def _expanded(self, e: Emitter, owner: Owner, match: Match, plan: dict[str, Read]) -> Bindings:
        s = match.structure
        assert isinstance(s, Structure)
        sources = tuple(plan[n].node for n in ("w_uk", "w_uv"))
        dtype, plan = match.attention.dtype, self._dequantized(e, plan)
        q_nope = self._value(e, plan, "q_nope", "bhsd", s.nope, dtype)
        latent = self._value(e, plan, "latent", "btd", s.rank, dtype)
        if s.rope:
            q_rope = self._value(e, plan, "q_rope", "bhsd", s.rope, dtype)
            k_rope = self._value(e, plan, "k_rope", "btd", s.rope, dtype)
        else:
            q_rope, k_rope = (e.call(aten.slice.Tensor, x, -1, 0, 0) for x in (q_nope, latent))
        weights = [self._weight(e, plan[n], s.heads, dtype) for n in ("w_uk", "w_uv")]
        mask = self._mask(e, match, plan)
        causal = match.mask.kind == "causal"
        node = e.call(
            torch.ops.dsinfra.mla.default, q_nope, q_rope, latent, k_rope, *weights, mask, match.attention.scale, causal
        )
        pages = (plan["latent_pages"], plan["rope_pages"]) if {"latent_pages", "rope_pages"} <= plan.keys() else None
        out = e.item(node, 0)
        fused = self._fused(plan, s, dtype)
        version = 0
        if match.mask.node is not None:
            version = self.memory.version(match.mask.node, self.memory.position[match.attention.softmax])
        bound = Bindings(match.site, owner.module, node, out, match.mask, mask, s, pages, fused, self.training, version)
        bound.up_projections = sources
        return bound

    def _dequantized(self, e: Emitter, plan: dict[str, Read]) -> dict[str, Read]:
        """The plan with FP8 up-projections read from their dequantised values."""
        made: dict[tuple, fx.Node] = {}
        for name in ("w_uk", "w_uv"):
            rows = plan[name].slot
            assert isinstance(rows, Rows)
            if rows.scale is not None:
                key = (rows.node, rows.scale, rows.dtype)
                node = made.get(key) or fp8_values.dequantized(e, self.prepared, *key)
                made[key] = node
                plan = {**plan, name: Read(node, replace(rows, node=node, scale=None))}
        return plan

    def _fused(self, plan: dict[str, Read], s: Structure, dtype: torch.dtype) -> fx.Node | None:
        """The matrix whose rows are exactly the heads' blocks of both up-projections."""
        node = plan["w_uk"].node
        value = node.meta["example_value"]
        blocks = sorted([(s.w_uk.offset, s.nope), (s.w_uv.offset, s.value)])
        stacked = blocks[0][0] == 0 and blocks[1][0] == blocks[0][1]
        stride = s.nope + s.value
        whole = (
            stacked and s.w_uk.stride == s.w_uv.stride == stride and tuple(value.shape) == (s.heads * stride, s.rank)
        )
        plain = node is plan["w_uv"].node and not s.w_uk.transposed and value.dtype == s.w_uk.dtype == dtype
        return node if whole and plain else None

    def _weight(self, e: Emitter, read: Read, heads: int, dtype: torch.dtype) -> fx.Node:
        rows = read.slot
        assert isinstance(rows, Rows)
        shape = read.node.meta["example_value"].shape
        count = shape[1] if rows.transposed else int(torch.Size(shape[:-1]).numel())
        if window(rows) + heads * rows.stride > count:
            raise RowsDisagree(f"the last head's block of {rows.stride} rows ends behind row {count}", rows.node)
        return self._cast(e, e.weight(read.node, rows, heads), rows.dtype, dtype)

    def _absorbed(self, e: Emitter, owner: Owner, match: Match, plan: dict[str, Read]) -> Bindings:
        s = match.structure
        assert isinstance(s, AbsorbedForm)
        if self.training:
            raise Unsupported("the absorbed form has no backward here: train the expanded form", match.anchor)
        dtype = match.attention.dtype
        q_latent = self._value(e, plan, "q_latent", "bshd", s.rank, dtype)
        q_rope = self._value(e, plan, "q_rope", "bshd", s.rope, dtype)
        latent = self._value(e, plan, "latent", "btd", s.rank, dtype)
        k_rope = self._value(e, plan, "k_rope", "btd", s.rope, dtype)
        mask = self._mask(e, match, plan)
        mask, lengths = decode_mask(e, match.mask, mask, latent)
        causal = match.mask.kind == "causal"
        node = e.call(
            torch.ops.dsinfra.mla_decode.default,
            *(q_latent, q_rope, latent, k_rope, lengths, mask, None, match.attention.scale, causal),
        )
        match.site.decision = "mla_decode: the model's own absorbed form"
        out = e.call(aten.permute.default, e.item(node, 0), [0, 2, 1, 3])
        return Bindings(match.site, owner.module, node, out, match.mask, mask, s, training=self.training)

    def _mask(self, e: Emitter, match: Match, plan: dict[str, Read]) -> fx.Node | None:
        """The mask as an operand [B, H, S, T] (broadcastable; True = visible), or None if it was proved."""
        if "mask" not in plan:
            return None
        mask, labels = plan["mask"].node, match.attention.mask_labels
        if match.attention.inverted:
            mask = e.call(aten.logical_not.default, mask)
        if labels != "bhst":
            while e.rank(mask) < 4:
                mask = e.call(aten.unsqueeze.default, mask, 0)
            mask = e.call(aten.permute.default, mask, [labels.index(c) for c in "bhst"])
        return mask

    def _result(self, e: Emitter, owner: Owner, match: Match, bound: Bindings) -> fx.Node:
        """``bound.out`` ([B, H, S, V]) in the layout and dtype of the node it replaces."""
        out, labels = bound.out, match.attention.result
        if labels != "bhsv":
            out = e.call(aten.permute.default, out, ["bhsv".index(c) for c in labels])
        before, after = owner.node.meta["example_value"], out.meta["example_value"]
        out = e.cast(out, before.dtype)
        if expressions(before.stride()) != expressions(after.stride()) and _layout_matters(owner.node):
            out = self._laid_out(e, out, before)
        return out

    def _laid_out(self, e: Emitter, out: fx.Node, like: torch.Tensor) -> fx.Node:
        """``out`` copied into the strides of ``like``, if those are a dense tensor's with its dimensions permuted."""
        for order in itertools.permutations(range(like.dim())):
            if expressions(like.stride(i) for i in order) == packed([like.shape[i] for i in order]):
                dense = e.call(aten.contiguous.default, e.call(aten.permute.default, out, order))
                return e.call(aten.permute.default, dense, [order.index(i) for i in range(like.dim())])
        raise Unsupported("the attention's result is no dense tensor, and its strides are relied on")


def decode_mask(e: Emitter, mask: Mask, node: fx.Node | None, latent: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """(mask operand or None, seqlens [B] int32) of ``mla_decode`` for a mask [B, H, S, T].

    A proved length is the number of visible keys of the one query row. For any other mask the length is only an upper
    bound (last key that some query sees, plus one), and the mask itself stays an operand.
    """
    batch, keys = e.size(latent, 0), e.size(latent, 1)
    if node is None:
        return None, e.call(aten.full.default, [batch], keys, dtype=torch.int32, device=_device(latent))
    if node.meta["example_value"].dtype != torch.bool:
        if mask.kind != "length":
            raise Unsupported("an additive mask has no absorbed form", mask.node)
        node = e.call(aten.eq.Scalar, node, 0)  # proved to be 0 where visible, else below -1e4
    while e.rank(node) < 4:
        node = e.call(aten.unsqueeze.default, node, 0)
    if node.meta["example_value"].shape[1] != 1:
        raise Unsupported("a mask that differs between heads", mask.node)
    node = e.call(aten.squeeze.dim, node, 1)
    queries = node.meta["example_value"].shape[1]
    if mask.kind == "length":
        row = e.call(aten.select.int, node, 1, queries - 1)
        counted = e.call(aten.sum.dim_IntList, row, [-1], dtype=torch.int32)
        return None, e.call(aten.expand.default, counted, [batch])
    row = e.call(aten.any.dim, node, 1)
    one = e.call(aten.arange.start, 1, e.plus(keys, 1), dtype=torch.int32, device=_device(latent))
    ends = e.call(aten.mul.Tensor, e.call(aten.to.dtype, row, torch.int32), one)
    bound = e.call(aten.amax.default, ends, [-1])
    return node, e.call(aten.expand.default, bound, [batch])


def _cuts(read: Read | None) -> tuple[tuple[str, int], ...]:
    return read.slot.cuts if read is not None and isinstance(read.slot, Slot) else ()


def _device(node: fx.Node) -> torch.device:
    return node.meta["example_value"].device


def _expr(size: int | torch.SymInt) -> object:
    """A size to compare: symbolic ones as expressions, since comparing them as integers would install guards."""
    return size if isinstance(size, int) else size.node.expr


def expressions(sizes: Iterable[int | torch.SymInt]) -> list[object]:
    """Sizes or strides, to compare without installing guards."""
    return [_expr(s) for s in sizes]


def packed(shape: Sequence[int | torch.SymInt]) -> list[object]:
    """Strides of a contiguous tensor of this shape."""
    strides: list[object] = []
    step: object = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * _expr(torch.sym_max(size, 1))  # type: ignore[operator]
    return strides


# Readers to which strides are all the same, and operators whose result keeps some of them.
_INDIFFERENT = {"contiguous", "linear", "matmul"}
_KEEPING = {"transpose", "permute", "getitem", "unsqueeze", "squeeze", "select", "narrow", "reshape", "flatten"}


def _layout_matters(node: fx.Node) -> bool:
    """False if the result is read only by operators that take any strides, directly or through views."""
    todo, seen = [node], set()
    while todo:
        for user in todo.pop().users:
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
            if user in seen or name in _INDIFFERENT:
                continue
            seen.add(user)
            if name not in _KEEPING:
                return True
            todo.append(user)
    return False
