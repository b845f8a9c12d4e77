"""absorb: ``dsinfra::mla`` -> two small products around ``dsinfra::mla_decode``, where that is cheaper.

Before:  o = mla(q_nope, q_rope, c, k_rope, W_uk, W_uv)               keys and values expanded for all T positions
After:   o = W_uv mla_decode(W_uk^T q_nope, q_rope, c, k_rope)         attention over the latent itself

because q . (W_uk c) = (W_uk^T q) . c and sum_t p_t (W_uv c_t) = W_uv (sum_t p_t c_t). *Exact* in real arithmetic; the
rounding differs as that of any reordered product. The rule is a cost: predicted seconds of both forms on the card at
the sizes at hand, printed in the decision. Training keeps the expanded form. A cache is read where it lies: a static
cache's tensors with their strides, or the pages of a paged one, also of float8 rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dscompile.lowering import heuristics
from dscompile.lowering.ops import mla_cache
from dscompile.passes import commits
from dscompile.passes.bind import Bindings, Read, decode_mask
from dscompile.passes.emit import Emitter
from dscompile.passes.graph import settle
from dscompile.passes.record import PassRecord
from dscompile.passes.refusals import Refusal, Unsupported
from dscompile.passes.structure import Pages, Structure

aten = torch.ops.aten
NAME = "absorb"


def hint(size: int | torch.SymInt) -> int:
    """A size for the cost model: the number, or Dynamo's example of a symbolic one. Installs no guard."""
    return size if isinstance(size, int) else int(size.node.hint if size.node.has_hint() else 1)


def run(bound: list[Bindings], batch_invariant: bool = False) -> PassRecord:
    """Absorbs every bound site where it pays; the others keep ``mla`` with the reason in their decision.

    With ``batch_invariant``, ``mla_decode`` is asked for results that don't depend on a request's neighbours, and the
    cost rule for the sizes of one request.
    """
    record = PassRecord(NAME)
    lengths: dict[tuple, tuple[fx.Node | None, fx.Node]] = {}
    try:
        for site in bound:
            if isinstance(site.structure, Structure):
                record.sites.append(site.site)
                _decide(site, lengths, batch_invariant)
            elif batch_invariant:  # the model's own absorbed form
                site.node.args = (*site.node.args, None, True)
    finally:  # also what was written before a failure
        settle(site.module for site in bound)
    return record


def _decide(site: Bindings, lengths: dict[tuple, tuple[fx.Node | None, fx.Node]], batch_invariant: bool) -> None:
    try:
        reason = _refuse(site)
        better, why = (False, reason) if reason else _cheaper(site, batch_invariant)
        site.site.decision = f"mla: {why}"
        if better:
            pages = _pages(site)
            _absorb(site, lengths, batch_invariant)
            site.site.decision = f"mla_decode: {why}{pages}"
    except Refusal as refusal:
        site.site.decision = f"mla: expanded, {refusal.found}"


def _pages(site: Bindings) -> str:
    """What becomes of a paged cache, for the report; where its pages can't be read in place, the copy is read."""
    structure = site.structure
    assert isinstance(structure, Structure)
    if structure.latent_pages is None or structure.rope_pages is None:
        return ""
    reason = _why_copied(site, structure)
    if reason:
        site.pages = None
        return f", pages copied because {reason}"
    return ", pages read in place"


def _why_copied(site: Bindings, structure: Structure) -> str:
    if site.pages is None:
        return "the pool or its table is written, or has no tensor in the graph, where the attention is"
    latent, rope = (read.slot for read in site.pages)
    assert isinstance(latent, Pages) and isinstance(rope, Pages)
    if site.pages[0].table is not site.pages[1].table:
        return "latent and rope key are paged by different tables"
    used, (pool, other) = site.node.args[0].meta["example_value"].dtype, (read.node for read in site.pages)
    if latent.packed is None and rope.packed is None:
        stored = {node.meta["example_value"].dtype for node in (pool, other)}
        return "" if stored == {used} else f"they hold {', '.join(map(str, stored))} and the attention is in {used}"
    if latent.packed != rope.packed or pool is not other or latent.packed is None:
        return "latent and rope key are in different pools, one of them float8"
    rank, width, dtype = latent.packed
    if (latent.offset, rope.offset, structure.rank, structure.rope) != (0, rank, rank, width):
        return f"the attention reads parts of rows of {rank} float8 and {width} other columns"
    return "" if dtype == used else f"their rope columns are {dtype} and the attention is in {used}"


def _refuse(site: Bindings) -> str:
    if site.training:
        return "expanded: training needs the backward of the expanded form"
    if site.mask.kind == "operand" and not site.mask.boolean:
        return "expanded: an additive mask has no absorbed form"
    return ""


def _cheaper(site: Bindings, batch_invariant: bool) -> tuple[bool, str]:
    q_nope, q_rope, latent, _, w_uk, w_uv = (n.meta["example_value"] for n in site.node.args[:6])
    batch, heads, queries, nope = (hint(s) for s in q_nope.shape)
    keys, rank = hint(latent.shape[1]), hint(latent.shape[2])
    sizes: dict[str, Any] = dict(
        B=1 if batch_invariant else batch,
        S=queries,
        T=keys,
        H=heads,
        N=nope,
        R=hint(q_rope.shape[-1]),
        V=hint(w_uv.shape[1]),
        C=rank,
        dtype_bytes=q_nope.dtype.itemsize,
        masked=site.mask.kind == "operand",
        length=site.mask.kind == "length",
        causal=site.mask.kind == "causal",
        card=heuristics.card_for(q_nope.device),
    )
    site.site.predicted = heuristics.mla_costs(**sizes)
    return heuristics.prefer_absorbed(**sizes)


def _absorb(site: Bindings, lengths: dict[tuple, tuple[fx.Node | None, fx.Node]], batch_invariant: bool) -> None:
    """Writes the absorbed form behind the operator and lets its readers use it."""
    commits.current().permit()
    q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal = site.node.args
    e = Emitter(site.node)
    try:
        table, rest = None, []
        if site.pages is not None:
            assert isinstance(site.structure, Structure)
            latent, k_rope, *rest = _paged(e, site.pages, site.structure)
            table = site.pages[0].table
        key = (mask, site.mask_version, site.mask.kind)
        counted = lengths.get(key) or decode_mask(e, site.mask, mask, site.node.args[2])
        operand, seqlens = counted
        if operand is not None:
            operand = e.call(aten.expand.default, operand, [-1, e.size(q_nope, 2), -1])
        q_latent = e.call(aten.einsum.default, "bhsn,hnc->bshc", [q_nope, w_uk])
        q_turned = e.call(aten.transpose.int, q_rope, 1, 2)
        decode = torch.ops.dsinfra.mla_decode.default
        equal = table is not None and (site.mask.kind in ("full", "causal") or site.mask.same_for_all)
        if batch_invariant or equal:
            rest = [*(rest or [None]), batch_invariant, *([True] if equal else [])]
        node = e.call(decode, q_latent, q_turned, latent, k_rope, seqlens, operand, table, scale, causal, *rest)
        o = e.call(aten.einsum.default, "bshc,hvc->bshv", [e.item(node, 0), w_uv])
        o = e.call(aten.transpose.int, o, 1, 2)
    except Refusal:
        e.undo()
        raise
    except Exception as error:
        e.undo()
        raise Unsupported(f"the absorbed form could not be written: {error}") from error
    if mask is not None:
        lengths[key] = counted
    site.out.replace_all_uses_with(o)
    commits.current().add([site.site, *site.twins], [(site.out, o)], e.made)
    for dead in (site.out, site.node):  # ours, pure, and without readers now
        commits.current().erase(dead)
    site.node, site.out = node, o


def _paged(e: Emitter, pages: tuple[Read, Read], structure: Structure) -> tuple[fx.Node, ...]:
    """latent [P, 64, C], rope key [P, 64, R], and for float8 rows scales [P, 64, C / 128], as slices of the pools."""
    pools, slots = [], [read.slot for read in pages]
    for read in pages:
        pools.append(read.node)
        while e.rank(pools[-1]) > 3:
            pools[-1] = e.call(aten.squeeze.dim, pools[-1], 2)
    if slots[0].packed is None:  # type: ignore[union-attr]
        return tuple(
            e.call(aten.slice.Tensor, pool, 2, slot.offset, slot.offset + width)  # type: ignore[union-attr]
            for pool, slot, width in zip(pools, slots, (structure.rank, structure.rope), strict=True)
        )
    rank, rope, dtype = slots[0].packed  # type: ignore[union-attr]
    return tuple(
        e.call(aten.slice.Tensor, e.call(aten.view.dtype, pools[0], part), 2, first, end)
        for part, first, end in mla_cache.columns(rank, rope, dtype)
    )
