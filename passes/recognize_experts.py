"""recognize_experts: two products by expert with a gated activation between them -> ``dsinfra::experts``.

Before:  sort ids -> gather tokens -> product by expert -> act(gate) * up -> product by expert -> weigh, unsort, sum
After:   ``dsinfra::experts(x, topk_idx, topk_weight, w_gate_up, w_down, biases, activation, ..)``, the rest left dead

    y[t] = sum_k topk_weight[t, k] * W_down[e] act(W_gate_up[e] x[t])          e = topk_idx[t, k]

because rows of one expert may be computed in any order and place, as long as each comes back to its (token, choice).
What the index tensors are is read by ``experts_values``, where rows come from by ``experts_rows``, the expert's own
arithmetic by ``experts_mlp``, the way to the result by ``experts_combine``. *Exact*: the same products in the same
dtypes; the sum over choices is accumulated in float32 and rounded once, where the model rounds as much or more.

A loop over experts is proved by ``experts_loop``. Each proof reads every node of a layer once and evaluates nothing, so
that layers are not replayed but proved one by one, at all assignments of symbolic sizes together. Refuses: another
permutation, padding or capacity, weights before the second product, another activation, dropout, values with a second
reader, weights kept apart where joining them doesn't pay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import fx

from dscompile.passes.experts_bind import Binding, Written, write
from dscompile.passes.experts_combine import Combine
from dscompile.passes.experts_joined import Joiner
from dscompile.passes.experts_loop import Loop, Loops
from dscompile.passes.experts_mlp import ARITHMETIC, Products, Reader
from dscompile.passes.experts_plan import LoopPlan, Match, Plan
from dscompile.passes.experts_rows import Rows
from dscompile.passes.experts_sentinels import routed_ids
from dscompile.passes.experts_values import CASTS, COPIES, VIEWS, Indices, arg, name, readers
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.graph import Sizes, is_tensor, module_path, settle, source_line
from dscompile.passes.memory import Memory
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import (
    CombineForm,
    DataDependentLoop,
    IntermediateUsed,
    Refusal,
    UnboundValue,
    Unsupported,
)
from dscompile.passes.shadow import Shadow
from dscompile.passes.trail import Trail

aten = torch.ops.aten
NAME = "recognize_experts"


class Recognizer:
    """Proves the expert layers of one shadow."""

    def __init__(self, shadow: Shadow, sizes: list[Sizes], training: bool):
        self.memory = Memory(shadow.graph, training)
        self.rows = Rows(Indices(self.memory, sizes))
        self.products = Products(self.rows)

    def candidates(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, Callable[[], Match | Loop], Trail]]:
        """(anchor of the report, its proof, how far that came) of everything that could be an expert layer."""
        for anchor in self.second_products(graph):
            how = "grouped by expert" if "grouped" in name(anchor) else "batched, with the weights of each row's expert"
            trail = Trail(f"an expert layer of products {how}")
            yield anchor, partial(self.match, anchor, trail), trail
        loops = Loops(self.rows)
        for ids, masks in loops.find(graph):
            trail = Trail("an expert layer as a loop over its experts")
            yield masks[min(masks)], partial(loops.prove, ids, masks, trail), trail

    def broken_loops(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Where a graph ends with the question which experts were hit: ``one_hot(idx).sum(..) > 0`` is its result."""
        for node in graph.nodes:
            if name(node) in ("greater", "gt", "ne") and node.meta.get("dsinfra_returned"):
                while name(node) in ("greater", "gt", "ne", "sum", "permute", "transpose"):
                    node = arg(node, 0)
                if name(node) == "one_hot":
                    yield node

    def second_products(self, graph: fx.Graph) -> list[fx.Node]:
        """Products by expert whose rows come from another one, and those that feed none: all but the first of pairs."""
        candidates = [n for n in graph.nodes if self.products.is_candidate(n)]
        known = set(candidates)
        feeding = {n: self._sources(n, known) for n in candidates}
        first = set().union(*feeding.values()) if feeding else set()
        return [n for n in candidates if feeding[n] or n not in first]

    def _sources(self, product: fx.Node, candidates: set[fx.Node]) -> set[fx.Node]:
        """Products that the rows of this one are computed from, through elementwise operators and views."""
        found, seen, todo = set(), set(), [a for a in product.args[:2] if is_tensor(a)]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in candidates:
                found.add(node)
            elif name(node) in _BETWEEN:
                todo += node.all_input_nodes
        return found

    def match(self, anchor: fx.Node, trail: Trail) -> Match:
        """The layer that ends in the second product ``anchor``; raises a Refusal."""
        down = self.products.find(anchor)
        assert down is not None
        self.rows.left_out.clear()
        trail.holds("each row meets the weight of its expert in the second product")
        hidden = Reader(self.products, trail).hidden(down)
        before = len(self.rows.left_out)
        combine = Combine(self.rows, down, hidden)
        combined = combine.walk(trail)
        _enclosed(hidden.region | combine.region, combined.out)
        if (hidden.gate.bias is None) != (hidden.up.bias is None):
            raise Unsupported("only one of gate and up has a bias", anchor)
        experts = self.rows.indices.shape(down.weight.node)[0][0]
        zeroed = self.rows.left_out[before:] if combined.bias is None else []
        ids = routed_ids(self.rows.indices, down.source, experts, combined.returned, zeroed)
        if any(mask.source not in (down.source, ids) or mask.groups < experts for mask in self.rows.left_out):
            raise CombineForm("rows of experts are masked, not only rows of none", anchor)
        if ids is None and combined.returned is not None:
            raise CombineForm("tokens are returned for other ids than those past the last expert", combined.out)
        wraps = not down.grouped and not self.rows.indices.natural(down.source)
        return Match(down, hidden, combined, experts, wraps and ids in (None, down.source), ids)


# Operators that lead from the first product's columns to the second product's rows.
_BETWEEN = VIEWS | COPIES | CASTS | set(ARITHMETIC)
_BETWEEN |= {"getitem", "chunk", "split", "split_with_sizes", "tensor_split", "slice", "select"}
_BETWEEN |= {"masked_fill", "tanh", "relu"}


def _enclosed(region: set[fx.Node], out: fx.Node) -> None:
    """Refuses a layer of which a value is read outside it: the operator does not keep it."""
    for node in region:
        if node.meta.get("dsinfra_returned") or any(u not in region and u is not out for u in readers(node)):
            raise IntermediateUsed(f"`{node.name}` inside the expert layer is used outside it", node)


def run(
    shadow: Shadow, sizes: list[Sizes], training: bool, prepared: Prepared | None = None
) -> tuple[PassRecord, list[Written], list[fx.Node]]:
    """Rewrites every provable expert layer; -> the record, what was written, and the ids of all layers looked at.

    ``sizes``: what proofs have to hold for (``sizes_of``), read before any rewrite could narrow them by a guard.
    """
    record = PassRecord(NAME)
    written: list[Written] = []
    ids: list[fx.Node] = []
    if not sizes:
        record.note = "the guards on symbolic sizes allow none that a proof is tried at"
        return record, written, ids
    recognizer = Recognizer(shadow, sizes, training)
    binding, joiner = Binding(shadow, recognizer.memory), Joiner(prepared, training)
    plans: dict[fx.Node, list[tuple[Plan | LoopPlan, fx.Node, Site]]] = defaultdict(list)
    for anchor, prove, trail in recognizer.candidates(shadow.graph):
        try:
            match = prove()
            ids.append(match.ids)
            place = binding.place(match.out)
            plan = (Plan if isinstance(match, Match) else LoopPlan)(binding, place, match, joiner)  # type: ignore[arg-type]
            trail.holds("every operand can be read, unchanged, where the result is made")
            site = trail.into(Site("experts", module_path(anchor), source_line(anchor), True, form=match.describe()))
            plans[place.node].append((plan, anchor, site))
        except Refusal as refusal:
            record.sites.append(trail.into(refused(anchor, refusal)))
        except Exception as error:  # a fault of ours costs this site, not the others
            record.sites.append(refused(anchor, Unsupported(f"the analysis raised {type(error).__name__}: {error}")))
    for anchor in recognizer.broken_loops(shadow.graph):
        broken = DataDependentLoop("a loop over the experts that were hit ends the graph here", anchor)
        trail = Trail("an expert layer as a loop over the experts that were hit")
        record.sites.append(trail.into(refused(anchor, broken)))
    for found in plans.values():
        (plan, anchor, _), sites = found[0], [site for *_, site in found]
        try:
            if any(other != plan for other, *_ in found):
                raise UnboundValue("the runs of one shared body bind to different values", anchor)
            written.append(write(plan.place, sites, plan.build))
            for site in sites:
                site.decision = joiner.said.get(plan.place.node, "")
        except Refusal as refusal:
            sites = [refused(anchor, refusal, site) for _, anchor, site in found]
        record.sites.extend(sites)
    settle(w.module for w in written)
    return record, written, ids


def refused(anchor: fx.Node, refusal: Refusal, site: Site | None = None, kind: str = "experts") -> Site:
    """Report line of a site that stays as it was."""
    site = site or Site(kind, module_path(anchor), "", False)
    site.matched = False
    site.source, site.node = refusal.source(anchor), refusal.place(anchor)
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint
    site.decision = "left to Inductor"
    return site
