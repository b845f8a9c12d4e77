"""recognize_router: scores, groups, top-k and the weights' arithmetic -> ``dsinfra::route``.

Before:  logits -> softmax or sigmoid -> bias, groups -> top-k -> gather, renormalise, scale
After:   ``topk_idx, topk_weight = dsinfra::route(logits, bias, ..)``, the old operators left dead

``router_form.py`` reads what a router computes. *Exact*: computed in float32, and cast to the model's dtype behind the
operator where the model computes in less; among equal scores any choice is torch.topk's. The order of a token's experts
is descending whether or not the model asked for it, so both results are replaced together, and a router of which
another value in top-k order is read is refused. Training keeps the model's own router. A top-k that is no router (a
sampler's, an indexer's) is passed over without a word, unless its indices are the ids of an expert layer.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from dscompile.passes.emit import Emitter
from dscompile.passes.experts_bind import Binding, Place, Written, write
from dscompile.passes.experts_values import Indices, arg, name
from dscompile.passes.graph import Sizes, module_path, source_line
from dscompile.passes.memory import Memory
from dscompile.passes.recognize_experts import refused
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, UnboundValue, Unsupported
from dscompile.passes.router_form import Router, RouterReader
from dscompile.passes.shadow import Shadow

aten = torch.ops.aten
NAME = "recognize_router"


class Plan:
    """Dynamo nodes of one router's operands, and where its results are made."""

    def __init__(self, binding: Binding, router: Router):
        choice = router.choice
        self.idx, self.weight = binding.place(router.idx), binding.place(router.weight)
        if self.weight.module is not self.idx.module:
            raise UnboundValue("experts and weights are made in different regions", router.weight)
        self.logits = binding.held(self.idx, choice.logits, router.idx)
        self.bias = None if choice.bias is None else binding.held(self.idx, choice.bias, router.idx)
        groups = choice.groups
        self.arguments = (router.top_k, choice.score, groups.n_group, groups.topk_group, groups.score)
        self.weighing = (router.renormalize, router.eps, router.scale)
        self.experts = router.experts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and vars(self) == vars(other)

    def build(self, e: Emitter) -> tuple[fx.Node, list[tuple[Place, fx.Node]]]:
        """The operator and what it replaces."""
        logits, bias = self.logits, self.bias
        lead = [e.size(logits, dim) for dim in range(e.rank(logits) - 1)]
        if len(lead) != 1:
            logits = e.call(aten.reshape.default, logits, [-1, self.experts])
        if bias is not None and e.rank(bias) != 1:
            bias = e.call(aten.reshape.default, bias, [self.experts])
        node = e.call(torch.ops.dsinfra.route.default, logits, bias, *self.arguments, *self.weighing)
        results = [e.item(node, 0), e.item(node, 1)]
        if len(lead) != 1:
            results = [e.call(aten.reshape.default, r, [*lead, self.arguments[0]]) for r in results]
        return node, list(zip((self.idx, self.weight), results, strict=True))


def run(shadow: Shadow, sizes: list[Sizes], training: bool, ids: list[fx.Node]) -> tuple[PassRecord, list[Written]]:
    """Rewrites every provable router; ``ids`` are those of the expert layers, whose routers are reported if refused."""
    record = PassRecord(NAME)
    written: list[Written] = []
    if training or not sizes:
        record.note = "training keeps the model's own routers" if training else "as for the expert layers"
        return record, written
    memory = Memory(shadow.graph)
    reader, binding = RouterReader(Indices(memory, sizes)), Binding(shadow, memory)
    plans: dict[fx.Node, list[tuple[Plan, fx.Node, Site]]] = defaultdict(list)
    for topk in [node for node in shadow.graph.nodes if name(node) == "topk"]:
        try:
            router = reader.read(topk)
            site = Site("route", module_path(topk), source_line(topk), True, form=router.describe())
            plan = Plan(binding, router)
            plans[plan.idx.node].append((plan, topk, site))
        except Refusal as refusal:
            if _chooses(topk, ids):
                record.sites.append(refused(topk, refusal, kind="route"))
        except Exception as error:  # a fault of ours costs this site, not the others
            fault = Unsupported(f"the analysis raised {type(error).__name__}: {error}")
            record.sites.append(refused(topk, fault, kind="route"))
    for found in plans.values():
        sites = [site for *_, site in found]
        try:
            if any(plan != found[0][0] for plan, *_ in found):
                raise UnboundValue("the runs of one shared body bind to different values", found[0][1])
            written.append(write(found[0][0].idx, sites, found[0][0].build))
        except Refusal as refusal:
            sites = [refused(topk, refusal, site) for _, topk, site in found]
        record.sites.extend(sites)
    for module in {w.module for w in written}:
        module.graph.lint()
        module.recompile()
    return record, written


def _chooses(topk: fx.Node, ids: list[fx.Node]) -> bool:
    """Whether an expert layer's ids are the indices of this top-k."""
    return any(name(node) == "getitem" and arg(node, 0) is topk for node in ids)
