"""What a router computes, read off its final top-k: scores, groups, bias, renormalisation, scale.

    s = softmax(logits) | sigmoid(logits)        c = s + bias, experts outside the best groups set to -inf or 0
    idx = top-k of c        w = s[idx]        w = w / (sum w + eps)        w = w * scale

Backward from the top-k each operator of the choice is one rule; forward from the chosen scores the walk ends where no
rule applies: what follows stays in the graph. Where no bias takes part, a score is 0 at least, so that experts set to 0
are chosen only among equals (whose order no top-k promises): then 0 and -inf are the same choice. The operator computes
in float32, the model in that or narrower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from dscompile.passes.experts_values import CASTS, COPIES, VIEWS, Indices, arg, dtype, name, option, readers
from dscompile.passes.graph import is_tensor
from dscompile.passes.refusals import IntermediateUsed, NarrowedPrecision, RouterForm
from dscompile.passes.trail import Trail

_SPREADING = CASTS | VIEWS | COPIES | {"expand"}


@dataclass(frozen=True)
class Groups:
    """``topk_group`` of ``n_group`` groups can be chosen from; ``score`` as ``dsinfra::route`` names it."""

    n_group: int = 1
    topk_group: int = 1
    score: str = "max"


@dataclass(frozen=True)
class Choice:
    """What the top-k chooses from: ``scores`` [T, E] (None: the logits themselves) plus ``bias``."""

    logits: fx.Node
    scores: fx.Node | None
    score: str
    bias: fx.Node | None = None
    groups: Groups = Groups()
    fill: float = -math.inf

    def describe(self) -> str:
        """What is chosen by, in words."""
        limit = f", in {self.groups.topk_group} of {self.groups.n_group} groups" if self.groups.n_group > 1 else ""
        plain = "logits" if self.scores is None else self.score
        return plain + (" + bias" if self.bias is not None else "") + limit


@dataclass(frozen=True)
class Router:
    """``idx`` and ``weight`` are the values to replace; the rest is as ``dsinfra::route`` takes it."""

    choice: Choice
    top_k: int
    idx: fx.Node
    weight: fx.Node
    experts: int
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0

    @property
    def group_score(self) -> str:
        return self.choice.groups.score

    def describe(self) -> str:
        c, g = self.choice, self.choice.groups
        parts = [c.score + (" + bias" if c.bias is not None else ""), f"top-{self.top_k} of {self.experts}"]
        parts += [f"{g.topk_group} of {g.n_group} groups by {g.score}"] if g.n_group > 1 else []
        parts += ["renormalised"] if self.renormalize else []
        return ", ".join(parts + ([f"x {self.scale:g}"] if self.scale != 1.0 else []))


class RouterReader:
    """Reads the routers of one shadow graph."""

    def __init__(self, indices: Indices):
        self.indices = indices
        self.memory = indices.memory

    def read(self, topk: fx.Node, trail: Trail) -> Router:
        """The router whose experts ``topk`` chooses; raises a Refusal."""
        source, top_k = topk.args[0], topk.args[1]
        rank = len(self.indices.shape(source))
        last = int(option(topk, 2, "dim", -1)) % rank == rank - 1
        if not last or not option(topk, 3, "largest", True) or not isinstance(top_k, int):
            raise RouterForm("a top-k of another dimension, or of the smallest", topk)
        choice = self.choice(source, self.memory.position[topk])
        trail.holds(f"experts are the largest by {choice.describe()}")
        items = {user.args[1]: user for user in topk.users if name(user) == "getitem"}
        if 1 not in items:
            raise RouterForm("the chosen experts are not used", topk)
        start = self.chosen_scores(choice, items)
        trail.holds("weights begin as the chosen scores")
        choice = self.plain(choice, gathered=name(start) == "gather")
        experts = self.indices.shape(source)[-1][0]
        router = self.weights(Router(choice, top_k, items[1], start, experts))
        if dtype(choice.logits) != torch.float64 and torch.float64 in (dtype(source), dtype(router.weight)):
            raise NarrowedPrecision("the router computes in float64", topk)
        if 0 in items and items[0] is not start:
            self.unread(items[0], set())
        if self.memory.training:
            self.differentiable(router)
        return router

    def differentiable(self, router: Router) -> None:
        """Refuses weights whose gradient does not reach the logits on every way: the operator's does."""
        todo, seen = [router.weight], {router.choice.logits}
        while todo:
            node = todo.pop()
            if node in seen or is_tensor(node) and not dtype(node).is_floating_point:
                continue
            seen.add(node)
            if self.memory.stops_gradient(node):
                raise RouterForm(f"no gradient flows through `{node.name}`", node)
            todo.extend(node.all_input_nodes)

    # ---- backward: what is chosen from

    def choice(self, node: fx.Node, time: int) -> Choice:
        """``node`` as scores, biased and limited to groups as they may be; raises RouterForm."""
        self.indices.intact(node, time)
        kind, at = name(node), self.memory.position[node]
        if kind in CASTS | COPIES or kind in VIEWS and self._same_shape(node):
            self._widens(node)
            return self.choice(arg(node, 0), at)
        if kind in ("softmax", "_softmax", "sigmoid"):
            return self._scores(node, at)
        if kind == "add":
            return self._biased(node, at)
        if kind == "masked_fill":
            return self._limited(node, at)
        if kind in ("linear", "addmm", "mm", "matmul", "view", "reshape") or node.op == "placeholder":
            return Choice(node, None, "softmax_topk")
        raise RouterForm(f"experts are chosen from the result of `{node.target}`", node)

    def _same_shape(self, node: fx.Node) -> bool:
        return self.indices.shape(node) == self.indices.shape(arg(node, 0))

    def _widens(self, node: fx.Node) -> None:
        before, after = dtype(arg(node, 0)), dtype(node)
        if not after.is_floating_point or torch.promote_types(before, after) != after:
            raise RouterForm(f"scores are rounded from {before} to {after} before the choice", node)

    def _scores(self, node: fx.Node, at: int) -> Choice:
        source = arg(node, 0)
        rank = len(self.indices.shape(source))
        if name(node) != "sigmoid" and int(arg(node, 1)) % rank != rank - 1:
            raise RouterForm("a softmax over another dimension than the experts", node)
        self.indices.intact(source, at)
        logits = source
        while name(logits) in CASTS and torch.promote_types(dtype(arg(logits, 0)), dtype(logits)) == dtype(logits):
            at = self.memory.position[logits]
            logits = arg(logits, 0)
            self.indices.intact(logits, at)
        return Choice(logits, node, "sigmoid" if name(node) == "sigmoid" else "softmax")

    def _biased(self, node: fx.Node, at: int) -> Choice:
        bias, experts = arg(node, 1), self.indices.shape(node)[-1]
        if not is_tensor(bias) or option(node, 2, "alpha", 1) != 1:
            raise RouterForm("a constant is added to the scores", node)
        assert isinstance(bias, fx.Node)
        self.indices.intact(bias, at)
        inner = self.choice(arg(node, 0), at)
        one_row = self.indices.count(bias) == experts and self.indices.shape(bias)[-1] == experts
        if inner.scores is None or inner.bias is not None or inner.groups.n_group > 1 or not one_row:
            raise RouterForm("what is added to the scores is not one number for each expert", node)
        return Choice(inner.logits, inner.scores, inner.score, bias)

    def _limited(self, node: fx.Node, at: int) -> Choice:
        """Scores outside the best groups set to a constant."""
        source, mask, fill = node.args[:3]
        inner = self.choice(source, at)
        if fill not in (-math.inf, 0, 0.0) or inner.scores is None or inner.groups.n_group > 1:
            raise RouterForm(f"experts outside the groups are set to {fill}", node)
        if name(mask) not in ("bitwise_not", "logical_not"):
            raise RouterForm("experts are masked by something else than groups that were not chosen", node)
        self.indices.intact(mask, at)
        kept = self._strip(arg(mask, 0), self.memory.position[mask], _SPREADING)
        n_group = self.indices.shape(kept)[-1][0]
        each = self.indices.shape(node)[-1][0] // n_group
        self._spread(arg(mask, 0), n_group, each)
        groups = self._groups(kept, source, n_group, each)
        return Choice(inner.logits, inner.scores, inner.score, inner.bias, groups, float(fill))

    def _strip(self, node: fx.Node, time: int, kinds: set[str]) -> fx.Node:
        self.indices.intact(node, time)
        while name(node) in kinds:
            time = self.memory.position[node]
            node = arg(node, 0)
            self.indices.intact(node, time)
        return node

    def _spread(self, node: fx.Node, n_group: int, each: int) -> None:
        """The mask [T, G] spread over each group's experts: unsqueezed, expanded, and flattened to [T, E]."""
        kinds = []
        while name(node) in _SPREADING:
            if name(node) not in CASTS | COPIES:
                kinds.append((name(node), [s[0] for s in self.indices.shape(node)][1:]))
            node = arg(node, 0)
        shapes = [shape for _, shape in reversed(kinds)]
        if shapes != [[n_group, 1], [n_group, each], [n_group * each]]:
            raise RouterForm("the mask of groups is not spread over each group's experts", node)

    def _groups(self, kept: fx.Node, choice: fx.Node, n_group: int, each: int) -> Groups:
        """``zeros.scatter(1, topk(group scores), 1)``, group scores being those of ``choice``."""
        if name(kept) != "scatter" or arg(kept, 1) not in (1, -1) or arg(kept, 3) != 1 or len(kept.args) != 4:
            raise RouterForm("the mask of groups is not ones scattered into zeros", kept)
        if not self.indices.zeros(arg(kept, 0), self.memory.position[kept]):
            raise RouterForm("the mask of groups is not scattered into zeros", kept)
        item = arg(kept, 2)
        best = arg(item, 0) if name(item) == "getitem" and arg(item, 1) == 1 else None
        if name(best) != "topk" or option(best, 2, "dim", -1) not in (-1, 1) or not option(best, 3, "largest", True):
            raise RouterForm("groups are not chosen by a top-k", kept)
        scores, at = arg(best, 0), self.memory.position[best]
        self.indices.intact(scores, at)
        kind, grouped = self._group_scores(scores)
        time = self.memory.position[grouped]
        if name(grouped) not in VIEWS or [s[0] for s in self.indices.shape(grouped)[1:]] != [n_group, each]:
            raise RouterForm("group scores are not those of consecutive experts", grouped)
        self.indices.intact(arg(grouped, 0), time)
        if arg(grouped, 0) is not choice:
            raise RouterForm("groups are scored by something else than what experts are chosen from", grouped)
        return Groups(n_group, int(arg(best, 1)), kind)

    def _group_scores(self, node: fx.Node) -> tuple[str, fx.Node]:
        """(kind, the scores as [T, G, E / G])."""
        at = self.memory.position[node]
        if name(node) == "amax" and list(arg(node, 1)) in ([-1], [2]):
            return "max", arg(node, 0)
        if name(node) == "getitem" and name(arg(node, 0)) == "max" and arg(node, 1) == 0:
            most = arg(node, 0)
            if option(most, 1, "dim") in (-1, 2):
                return "max", arg(most, 0)
        if name(node) == "sum" and list(option(node, 1, "dim") or ()) in ([-1], [2]):
            item = arg(node, 0)
            best = arg(item, 0) if name(item) == "getitem" and arg(item, 1) == 0 else None
            self.indices.intact(item, at)
            two = name(best) == "topk" and arg(best, 1) == 2 and option(best, 2, "dim", -1) in (-1, 2)
            if two and option(best, 3, "largest", True):
                return "top2", arg(best, 0)
        raise RouterForm("groups are scored by neither their best nor the sum of their two best experts", node)

    # ---- forward: the weights

    def chosen_scores(self, choice: Choice, items: dict[object, fx.Node]) -> fx.Node:
        """The scores of the chosen experts: the top-k's values, or gathered from the scores."""
        gathered = [u for u in readers(items[1]) if name(u) == "gather" and arg(u, 2) is items[1]]
        if choice.scores is not None and len(gathered) == 1:
            scores, at = arg(gathered[0], 0), self.memory.position[gathered[0]]
            rank = len(self.indices.shape(scores))
            if self._strip(scores, at, COPIES) is choice.scores and arg(gathered[0], 1) in (rank - 1, -1):
                return gathered[0]
            raise RouterForm("weights are gathered from something else than the scores", gathered[0])
        if choice.bias is not None:
            raise RouterForm("weights are not gathered from the scores without their bias", items[1])
        if 0 not in items or not readers(items[0]):
            raise RouterForm("the chosen scores are not used", items[1])
        return items[0]

    def plain(self, choice: Choice, gathered: bool) -> Choice:
        """With the group score's name: experts set to 0 compete with others only where a bias makes scores negative."""
        groups = choice.groups
        if groups.n_group == groups.topk_group:
            groups = Groups()
        elif choice.fill == 0 and choice.bias is not None and gathered:
            groups = Groups(groups.n_group, groups.topk_group, groups.score + "_zero")
        return replace(choice, groups=groups)

    def weights(self, router: Router) -> Router:
        """With ``weight`` moved from the chosen scores to the last value that has a rule."""
        if router.choice.score == "softmax_topk":
            router = self._softmax(router)
        while True:
            following = self._quotient(router) or self._scaled(router)
            if following is None:
                return router
            router = following

    def _softmax(self, router: Router) -> Router:
        found = readers(router.weight)
        rank = len(self.indices.shape(router.weight))
        if len(found) != 1 or name(found[0]) not in ("softmax", "_softmax") or int(arg(found[0], 1)) % rank != rank - 1:
            raise RouterForm("logits are chosen, and no softmax of the chosen follows", router.weight)
        self.unread(router.weight, {found[0]})
        return replace(router, weight=found[0])

    def _quotient(self, router: Router) -> Router | None:
        """``w / (w.sum(-1, keepdim) + eps)``."""
        node = router.weight
        found = readers(node)
        quotients = [u for u in found if name(u) == "div" and arg(u, 0) is node and len(u.args) == 2 and not u.kwargs]
        if len(quotients) != 1 or not is_tensor(arg(quotients[0], 1)) or router.renormalize or router.scale != 1.0:
            return None
        total, eps, helpers = arg(quotients[0], 1), 0.0, {quotients[0]}
        self.indices.intact(total, self.memory.position[quotients[0]])
        if name(total) == "add" and isinstance(arg(total, 1), (int, float)) and option(total, 2, "alpha", 1) == 1:
            helpers.add(total)
            total, eps = arg(total, 0), float(arg(total, 1))
        helpers.add(total)
        if not self._sums(total, node) or any(self._leaks(n, helpers) for n in (node, *helpers - {quotients[0]})):
            return None
        self.indices.intact(node, self.memory.position[total])
        return replace(router, weight=quotients[0], renormalize=True, eps=eps)

    def _sums(self, total: fx.Node, node: fx.Node) -> bool:
        """Whether ``total`` is the sum of ``node`` over the choices, kept as a dimension."""
        if name(total) != "sum" or arg(total, 0) is not node or option(total, 2, "keepdim", False) is not True:
            return False
        if torch.promote_types(dtype(node), dtype(total)) != dtype(total):
            return False
        rank = len(self.indices.shape(node))
        return [d % rank for d in option(total, 1, "dim") or ()] == [rank - 1]

    def _scaled(self, router: Router) -> Router | None:
        found = readers(router.weight)
        if len(found) != 1 or name(found[0]) != "mul" or not isinstance(arg(found[0], 1), (int, float)):
            return None
        if self._leaks(router.weight, set(found)):
            return None
        return replace(router, weight=found[0], scale=router.scale * float(arg(found[0], 1)))

    def _leaks(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether something beside ``inside`` reads the value."""
        return bool(node.meta.get("dsinfra_returned")) or any(u not in inside for u in readers(node))

    def unread(self, node: fx.Node, inside: set[fx.Node]) -> None:
        """Refuses a value in the model's top-k order that something reads beside the new experts and weights."""
        if self._leaks(node, inside):
            raise IntermediateUsed(f"`{node.name}` of the router is used beside its experts and weights", node)
