"""expert_parallel: the experts of a layer, spread over the ranks of a group, by ``options={"ep_group": group}``.

Before:  y = experts(x, ids, weights, W1 [E,..], W2 [E,..])
After:   plan, inbox = dispatch_start(x, ids, weights)
         .. what needs no y: shared experts ..
         rows, ids', weights' = dispatch_wait(plan, inbox)
         z = experts(rows, ids', weights', W1 [L,..], W2 [L,..])        of this rank alone: L = E / W
         y = combine_wait(combine_start(z, plan))

and so `fp8_experts`, weights and scales (whose rows `fp8_dispatch` then sends in FP8), because the sum over a token's
choices may be taken rank by rank. *Changes rounding*: each rank's part is rounded to the dtype of x before the sum over
ranks, which is in float32 and in the order of ranks; so it runs only when asked for.

Each rank keeps its own tokens (data parallelism), any number up to the capacity, and computes with experts rank*L to
(rank+1)*L. Weights are read in the form that the model has them in: ``gather_experts`` of a rank's own (a model in an
``ExpertStore``) is left out and its argument read; a weight that every rank has whole is sliced, which copies nothing.
Gradients: those of an own weight are the sum over all ranks' tokens; those of a whole weight are that in the own rows
and zero elsewhere, so that the sum over ranks is what it is without expert parallelism, and so is a mean.

Raises ExchangeError where a rank's call can't be spread for a reason that other ranks may not have (too many tokens, an
unknown number of them): a rank that left its layer whole would be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from dscompile.lowering.exchange import ExchangeError, Group, Payload, chosen, group_named, spec_of
from dscompile.passes import commits
from dscompile.passes.emit import Emitter
from dscompile.passes.ep_place import sink
from dscompile.passes.ep_refusals import SpreadAlready, UnevenExperts, UnorderedExchanges
from dscompile.passes.ep_slots import Exchange, assign
from dscompile.passes.experts_apart import in_pieces, refuse_pieces
from dscompile.passes.experts_bind import Written
from dscompile.passes.graph import called, module_path, settle, source_line
from dscompile.passes.recognize_comm import exchanged_products, own_exchange
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, Unsupported

aten = torch.ops.aten
NAME, KIND = "expert_parallel", "expert_parallel"
LAYERS = ("experts", "fp8_experts")
_WEIGHT_DTYPES = (torch.float32, torch.float64)


def run(layers: Sequence[Written], module: fx.GraphModule, group: str, capacity: int | None) -> PassRecord:
    """Spreads every expert layer that was recognised; ``Written.node`` is the local layer then.

    Args:
        layers: what was written by the passes before; others than expert layers are left alone.
        module: Dynamo's graph, whose own exchanges are reported.
        group: name of a joined group.
        capacity: the most tokens of a rank in one call; None: the number that this graph has.

    Raises:
        ExchangeError: see above.
    """
    record = PassRecord(NAME)
    spread = Spread(group_named(group), capacity)
    found = _in_order([layer for layer in layers if operator_name(layer.node) in LAYERS or in_pieces(layer.node)])
    for layer in found:
        site = Site(KIND, module_path(layer.node), source_line(layer.node), True, node=layer.node.name)
        site.form = layer.site.form
        try:
            spread.layer(layer, site)
        except ExchangeError:
            raise
        except Refusal as refusal:
            _keep(site, refusal)
        except Exception as error:  # a fault of ours costs this site, not the others; on every rank alike
            _keep(site, Unsupported(f"the analysis raised {type(error).__name__}: {error}", layer.node))
        record.sites.append(site)
    if not found:
        record.sites += [site for m in module.modules() if isinstance(m, fx.GraphModule) for site in _exchanged(m)]
    slots = max([assign(exchanges) for exchanges in spread.exchanges.values()], default=0)
    settle(layer.module for layer in found)
    if spread.exchanges:
        record.note = f"rank {spread.group.rank} of {spread.group.size}, {slots} slot" + "s" * (slots != 1)
    return record


def _exchanged(module: fx.GraphModule) -> Iterator[Site]:
    """Grouped products of a graph without a recognised layer, whose rows the model exchanges itself."""
    for collective, product in exchanged_products(module.graph).items():
        site = Site(KIND, module_path(product), source_line(product), False, node=product.name)
        _keep(
            site,
            SpreadAlready(
                f"the model sends the rows of `{product.name}` by `{called(collective)}`: its experts are one rank's",
                product,
            ),
        )
        site.decision = "left to the model, which exchanges the rows itself"
        yield site


def _in_order(layers: list[Written]) -> list[Written]:
    """Those of one graph in the order of that graph."""
    graphs = {layer.node.graph: i for i, layer in reversed(list(enumerate(layers)))}
    return sorted(layers, key=lambda layer: (graphs[layer.node.graph], layer.node))


def _keep(site: Site, refusal: Refusal) -> None:
    site.matched, site.decision = False, "every rank computes its tokens with all experts"
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint


@dataclass
class Spread:
    """Rewrites the expert layers of one of Dynamo's graphs."""

    group: Group
    capacity: int | None
    exchanges: dict[fx.Graph, list[Exchange]] = field(default_factory=dict)

    def layer(self, layer: Written, site: Site) -> None:
        """Writes one layer; raises a Refusal, and then the graph is as it was."""
        node = layer.node
        refuse_pieces(node)
        x, ids, weight, *_ = node.args
        experts, tokens = node.args[3].meta["example_value"].shape[0], x.meta["example_value"].shape[0]
        capacity = self._capacity(tokens, site)
        W = self.group.size
        if experts % W:
            raise UnevenExperts(f"{experts} experts can't be spread evenly over {W} ranks", node)
        collective = own_exchange(node)
        if collective is not None:
            raise SpreadAlready(
                f"the model has `{called(collective)}` around the layer: its experts are one rank's", node
            )
        self._check_order(node)
        commits.current().permit()
        e = Emitter(node)
        try:
            local, ways = self._local_arguments(e, node)
            where = (self.group.name, experts, capacity, 0)
            dtype = weight.meta["example_value"].dtype
            routed = x, ids, weight if dtype in _WEIGHT_DTYPES else e.cast(weight, torch.float32), None
            begun = e.call(torch.ops.dsinfra.dispatch_start.default, *routed, *where)
            plan, inbox = e.item(begun, 0), e.item(begun, 1)
            first = len(e.made)
            wait = e.call(torch.ops.dsinfra.dispatch_wait.default, plan, inbox, *routed, *where)
            *rows, arrived = (e.item(wait, i) for i in range(4))  # no scales: rows are in 16 bits
            own = e.call(getattr(torch.ops.dsinfra, operator_name(node)).default, *rows, *local)
            back = e.call(torch.ops.dsinfra.combine_start.default, own, None, plan, arrived, *where)
            sums = e.call(torch.ops.dsinfra.combine_wait.default, back, own, None, plan, arrived, *where)
            y = e.item(sums, 0)
        except Exception:
            e.undo()
            raise
        node.replace_all_uses_with(y)
        commits.current().add([site, *_twins(layer, site)], [(node, y)], e.made)
        commits.current().erase(node)  # pure, and without readers now
        between = sink(e.made[first:], y)
        layer.node = own
        held = self.exchanges.setdefault(own.graph, [])
        held.append((begun, wait, back, sums))
        sent = [x.meta["example_value"], ids.meta["example_value"], routed[2].meta["example_value"]]
        site.kernel, why_not = chosen(spec_of(*where), Payload.of(*sent))
        site.decision = f"{experts // W} of {experts} experts on each of {W} ranks, capacity {capacity}, {ways}" + (
            f", {between} other operator{'s' * (between > 1)} during the dispatch" if between else ""
        )
        if why_not and sent[0].device.type == "cuda":
            site.decision += f" ({why_not})"

    def _capacity(self, tokens: int | torch.SymInt, site: Site) -> int:
        where = f"the expert layer {site.module_path or '(top)'} at {site.source}"
        if self.capacity is None:
            if not isinstance(tokens, int) or tokens == 0:
                raise ExchangeError(
                    f"{where} has {tokens} tokens and no capacity was given",
                    "Every rank sets room aside for the same number of tokens, whatever it has itself",
                    "Give options['ep_capacity'], the most tokens that a rank ever has in one call",
                )
            return tokens
        if isinstance(tokens, int) and tokens > self.capacity:
            raise ExchangeError(
                f"{where} has {tokens} tokens and options['ep_capacity'] is {self.capacity}",
                "Ranks set room aside for the capacity, which no rank may exceed",
                "Give a larger one on every rank",
            )
        return self.capacity

    def _check_order(self, node: fx.Node) -> None:
        """Refuses a layer that doesn't depend on the one that was spread before it in the same graph."""
        earlier = self.exchanges.get(node.graph)
        if not earlier:
            return
        last = earlier[-1][-1]
        seen, todo = set(), list(node.all_input_nodes)
        while todo:
            found = todo.pop()
            if found is last:
                return
            if found not in seen and found > last:
                seen.add(found)
                todo += found.all_input_nodes
        raise UnorderedExchanges("the layer doesn't depend on the expert layer before it", node)

    # -------------------------------------------------------------- weights

    def _local_arguments(self, e: Emitter, node: fx.Node) -> tuple[list[object], str]:
        """(the layer's arguments from the first weight on, with this rank's weights; how they are read)."""
        ways: set[str] = set()
        local = [self._local(e, arg, ways) if isinstance(arg, fx.Node) else arg for arg in node.args[3:]]
        return local, " and ".join(sorted(ways))

    def _local(self, e: Emitter, weight: fx.Node, ways: set[str]) -> fx.Node:
        """The rows rank*L to (rank+1)*L of a weight's first dimension."""
        name = operator_name(weight)
        if name == "gather_experts" and weight.args[1] == self.group.name:
            ways.add("its own weights")
            return weight.args[0]
        if weight.target is aten.transpose.int and 0 not in weight.args[1:]:
            return e.call(weight.target, self._local(e, weight.args[0], ways), *weight.args[1:])
        if weight.target is aten.cat.default and weight.args[1] == 1:
            return e.call(weight.target, [self._local(e, part, ways) for part in weight.args[0]], 1)
        L = weight.meta["example_value"].shape[0] // self.group.size
        ways.add("slices of whole weights")
        return e.call(aten.slice.Tensor, weight, 0, self.group.rank * L, (self.group.rank + 1) * L)


def _twins(layer: Written, site: Site) -> list[Site]:
    """Sites of the other runs of a shared body: the same layer again."""
    return [Site(KIND, twin.module_path, twin.source, True, form=site.form) for twin in layer.twins]
