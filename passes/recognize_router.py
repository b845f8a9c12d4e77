"""recognize_router: scores, groups, top-k and the weights' arithmetic -> ``dsinfra::route``.

Before:  logits -> softmax or sigmoid -> bias, groups -> top-k -> gather, renormalise, scale
After:   ``topk_idx, topk_weight = dsinfra::route(logits, bias, ..)``, the old operators left dead

``router_form.py`` reads what a router computes. *Exact*: computed in float32, and cast to the model's dtype behind the
operator where the model computes in less; among equal scores any choice is torch.topk's. The order of a token's experts
is descending whether or not the model asked for it, so both results are replaced together, and a router of which
another value in top-k order is read is refused; so are weights whose gradient is cut off, in training. A top-k that is
no router is no site, unless its indices are the ids of an expert layer: one over a softmax or sigmoid is a near miss,
any other (a sampler's, an indexer's) is kept in the JSON record alone.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from dscompile.passes.emit import Emitter
from dscompile.passes.experts_bind import Binding, Place, Written, write
from dscompile.passes.experts_values import Indices, arg, name
from dscompile.passes.graph import Sizes, called, is_tensor, module_path, settle, source_line
from dscompile.passes.memory import Memory
from dscompile.passes.recognize_experts import refused
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import IntermediateUsed, Refusal, UnboundValue, Unsupported
from dscompile.passes.router_form import Router, RouterReader
from dscompile.passes.shadow import Shadow
from dscompile.passes.trail import Trail

aten = torch.ops.aten
NAME = "recognize_router"
_SCORES = ("softmax", "_softmax", "sigmoid")
_FAR = 8  # operators between the scores and the top-k: casts, a bias, a mask of groups


class Plan:
    """Dynamo nodes of one router's operands, and where its results are made."""

    def __init__(self, binding: Binding, router: Router):
        choice = router.choice
        self.idx, self.weight = binding.place(router.idx), binding.place(router.weight)
        if self.weight.module is not self.idx.module:
            raise UnboundValue("experts and weights are made in different regions", router.weight)
        self.place, until = self.idx, router.idx
        if binding.memory.stops_gradient(router.idx):  # chosen under no_grad, where the weights would get no gradient
            self.place, until = self.weight, router.weight
            if not _read_only_for(self.idx, self.weight):
                raise IntermediateUsed("experts chosen under no_grad are read before their weights are made", until)
        self.logits = binding.held(self.place, choice.logits, until)
        self.bias = None if choice.bias is None else binding.held(self.place, choice.bias, until, saved=False)
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
        if bias is not None:
            bias = e.call(aten.detach.default, bias)  # it takes part in the choice alone, which has no gradient
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
    if not sizes:
        record.note = "as for the expert layers"
        return record, written
    memory = Memory(shadow.graph, training)
    reader, binding = RouterReader(Indices(memory, sizes)), Binding(shadow, memory)
    plans: dict[fx.Node, list[tuple[Plan, fx.Node, Site]]] = defaultdict(list)
    others: dict[fx.Node, Site] = {}  # top-ks that are no routers
    for topk in [node for node in shadow.graph.nodes if name(node) == "topk"]:
        trail = Trail("a router: scores, a top-k, weights of the chosen")
        try:
            router = reader.read(topk, trail)
            site = Site("route", module_path(topk), source_line(topk), True, form=router.describe())
            plan = Plan(binding, router)
            trail.holds("every operand can be read, unchanged, where the experts are chosen")
            trail.into(site)
            plans[plan.idx.node].append((plan, topk, site))
            others = {node: other for node, other in others.items() if node not in _choice_of(router)}
        except Refusal as refusal:
            site = trail.into(refused(topk, refusal, kind="route"))
            if _chooses(topk, ids):
                record.sites.append(site)
            else:
                others[topk] = site
        except Exception as error:  # a fault of ours costs this site, not the others
            fault = Unsupported(f"the analysis raised {type(error).__name__}: {error}")
            record.sites.append(refused(topk, fault, kind="route"))
    for topk, site in others.items():
        (record.near_misses if _scored(topk) else record.passed_over).append(site)
    for found in plans.values():
        sites = [site for *_, site in found]
        try:
            if any(plan != found[0][0] for plan, *_ in found):
                raise UnboundValue("the runs of one shared body bind to different values", found[0][1])
            written.append(write(found[0][0].place, sites, found[0][0].build))
        except Refusal as refusal:
            sites = [refused(topk, refusal, site) for _, topk, site in found]
        record.sites.extend(sites)
    settle(w.module for w in written)
    return record, written


def _read_only_for(idx: Place, weight: Place) -> bool:
    """Whether all that is read of the chosen experts in front of their weights goes into these weights alone."""
    todo, seen = list(idx.names), {*idx.names, *weight.names}
    while todo:
        for user in todo.pop().users:
            if user in seen or user > weight.node:
                continue
            if not user.users or called(user).endswith("_"):  # it may be there for what it does
                return False
            seen.add(user)
            todo.append(user)
    return not any(weight.node < user for node in seen - {*idx.names, *weight.names} for user in node.users)


def _choice_of(router: Router) -> set[fx.Node]:
    """What a router computes between its logits and the chosen experts: one of groups has a top-k of its own."""
    todo, seen = [router.idx], {router.choice.logits}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


def _scored(topk: fx.Node) -> bool:
    """Whether a top-k chooses by a softmax or sigmoid, or one is taken of what it chose: a router in another form."""
    before, steps = arg(topk, 0), 0
    while is_tensor(before) and name(before) not in _SCORES and before.args and steps < _FAR:
        before, steps = arg(before, 0), steps + 1
    return name(before) in _SCORES or any(name(u) in _SCORES for user in topk.users for u in user.users)


def _chooses(topk: fx.Node, ids: list[fx.Node]) -> bool:
    """Whether an expert layer's ids are the indices of this top-k."""
    return any(name(node) == "getitem" and arg(node, 0) is topk for node in ids)
