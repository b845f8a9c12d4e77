"""absorb: ``dsinfra::mla`` -> two small products around ``dsinfra::mla_decode``, where that is cheaper.

Before:  o = mla(q_nope, q_rope, c, k_rope, W_uk, W_uv)               keys and values expanded for all T positions
After:   o = W_uv mla_decode(W_uk^T q_nope, q_rope, c, k_rope)         attention over the latent itself

because q . (W_uk c) = (W_uk^T q) . c and sum_t p_t (W_uv c_t) = W_uv (sum_t p_t c_t). *Exact* in real arithmetic; the
rounding differs as that of any reordered product. The rule is a cost: predicted seconds of both forms on the card at
the sizes at hand, printed in the decision. Training keeps the expanded form. A cache is read where it lies: a static
cache's tensors with their strides, or the pages of a paged one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dscompile.lowering import heuristics
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


def run(bound: list[Bindings]) -> PassRecord:
    """Absorbs every bound site where it pays; the others keep ``mla`` with the reason in their decision."""
    record = PassRecord(NAME)
    lengths: dict[tuple, tuple[fx.Node | None, fx.Node]] = {}
    try:
        for site in bound:
            if isinstance(site.structure, Structure):
                record.sites.append(site.site)
                _decide(site, lengths)
    finally:  # also what was written before a failure
        settle(site.module for site in bound)
    return record


def _decide(site: Bindings, lengths: dict[tuple, tuple[fx.Node | None, fx.Node]]) -> None:
    try:
        reason = _refuse(site)
        better, why = (False, reason) if reason else _cheaper(site)
        site.site.decision = f"mla: {why}"
        if better:
            _absorb(site, lengths)
            pages = ", pages read in place" if site.pages is not None else ""
            site.site.decision = f"mla_decode: {why}{pages}"
    except Refusal as refusal:
        site.site.decision = f"mla: expanded, {refusal.found}"


def _refuse(site: Bindings) -> str:
    if site.training:
        return "expanded: training needs the backward of the expanded form"
    if site.mask.kind == "operand" and not site.mask.boolean:
        return "expanded: an additive mask has no absorbed form"
    return ""


def _cheaper(site: Bindings) -> tuple[bool, str]:
    q_nope, q_rope, latent, _, w_uk, w_uv = (n.meta["example_value"] for n in site.node.args[:6])
    batch, heads, queries, nope = (hint(s) for s in q_nope.shape)
    keys, rank = hint(latent.shape[1]), hint(latent.shape[2])
    sizes: dict[str, Any] = dict(
        B=batch,
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


def _absorb(site: Bindings, lengths: dict[tuple, tuple[fx.Node | None, fx.Node]]) -> None:
    """Writes the absorbed form behind the operator and lets its readers use it."""
    commits.current().permit()
    q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal = site.node.args
    e = Emitter(site.node)
    try:
        table = None
        if site.pages is not None:
            assert isinstance(site.structure, Structure)
            latent, k_rope, table = _paged(e, site.pages, site.structure)
        key = (mask, site.mask_version, site.mask.kind)
        counted = lengths.get(key) or decode_mask(e, site.mask, mask, site.node.args[2])
        operand, seqlens = counted
        if operand is not None:
            operand = e.call(aten.expand.default, operand, [-1, e.size(q_nope, 2), -1])
        q_latent = e.call(aten.einsum.default, "bhsn,hnc->bshc", [q_nope, w_uk])
        q_turned = e.call(aten.transpose.int, q_rope, 1, 2)
        decode = torch.ops.dsinfra.mla_decode.default
        node = e.call(decode, q_latent, q_turned, latent, k_rope, seqlens, operand, table, scale, causal)
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


def _paged(e: Emitter, pages: tuple[Read, Read], structure: Structure) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(latent [P, 64, C], rope key [P, 64, R], table) as slices of the pools."""
    out = []
    for read, width in zip(pages, (structure.rank, structure.rope), strict=True):
        node, slot = read.node, read.slot
        assert isinstance(slot, Pages)
        while e.rank(node) > 3:
            node = e.call(aten.squeeze.dim, node, 2)
        last = e.rank(node) - 1
        out.append(e.call(aten.slice.Tensor, node, last, slot.offset, slot.offset + width))
    if pages[0].table is not pages[1].table:
        raise Unsupported("latent and rope key are paged by different tables")
    return out[0], out[1], pages[0].table  # type: ignore[return-value]
