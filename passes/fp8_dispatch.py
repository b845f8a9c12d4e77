"""fp8_dispatch: tokens whose experts compute in FP8 travel in FP8.

Before:  rows = dispatch_wait(*dispatch_start(x, ids, weights), ..)
         z = fp8_experts(rows, .., silu)                       which quantises its rows
After:   q, scale = quantize_1x128(x)
         rows, row_scale = dispatch_wait(*dispatch_start(q, ids, weights, scale), ..)
         z = fp8_experts(rows, .., silu, row_scale, dtype of x)

*Exact*, to the bit: a row's quantisation depends on that row alone, so it is the same before it is sent and after. Half
the bytes travel, and a token is quantised once, not at each rank and for each choice. What the ranks send back stays in
16 bits: sums of parts that were rounded to FP8 would be other numbers. Shared experts that quantise the same x read
what is sent. Refused: graphs that are differentiated (rounding has no gradient), rows that something else reads too.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dscompile.lowering.exchange import Payload, chosen, spec_of
from dscompile.passes import commits
from dscompile.passes.emit import Emitter
from dscompile.passes.ep_place import is_fence
from dscompile.passes.fp8_refusals import GradientWeights
from dscompile.passes.fp8_share import rows_of
from dscompile.passes.graph import module_path, settle, source_line
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, Unsupported

NAME = KIND = "fp8_dispatch"
SCALE = 3  # behind x, ids and weights


def run(module: fx.GraphModule, training: bool) -> PassRecord:
    """Rewrites every dispatch to FP8 experts, in Dynamo's graph and the bodies inside it."""
    record = PassRecord(NAME)
    for child in module.modules():
        if not isinstance(child, fx.GraphModule):
            continue
        layers = [n for n in child.graph.nodes if operator_name(n) == "fp8_experts" and _wait_of(n) is not None]
        for layer in layers:
            record.sites.append(_site(layer, training))
        settle([child] if layers else [])
    return record


def _site(layer: fx.Node, training: bool) -> Site:
    site = Site(KIND, module_path(layer), source_line(layer), True, form="fp8_experts over a group", node=layer.name)
    try:
        if training:
            raise GradientWeights("the graph is differentiated: rows in FP8 have no gradient", layer)
        _rewrite(layer, site)
    except Refusal as refusal:
        site.matched, site.decision = False, "rows travel in 16 bits and are quantised behind the dispatch"
        site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint
    return site


def _wait_of(layer: fx.Node) -> fx.Node | None:
    """The `dispatch_wait` of 16-bit rows that the layer reads, if it does."""
    rows = layer.args[0]
    if not isinstance(rows, fx.Node) or rows.target is not operator.getitem or rows.args[1] != 0:
        return None
    wait = rows.args[0]
    sent_as_it_is = operator_name(wait) == "dispatch_wait" and wait.args[2 + SCALE] is None
    return wait if sent_as_it_is else None


def _rewrite(layer: fx.Node, site: Site) -> None:
    """Writes one layer; raises a Refusal, and then the graph is as it was."""
    wait = _wait_of(layer)
    assert wait is not None
    rows, start = layer.args[0], wait.args[0].args[0]
    if list(rows.users) != [layer] or layer.all_input_nodes.count(rows) != 1:
        others = [user.name for user in rows.users if user is not layer]
        raise Unsupported(f"the rows that arrive are read by {', '.join(others)} too", layer)
    commits.current().permit()
    x, ids, weights, _, *where = start.args
    made: list[fx.Node] = []
    emitters = [Emitter(node) for node in (start, wait, layer)]
    for emitter in emitters:
        emitter.made = made  # taken back as one
    before, between, behind = emitters
    try:
        pair = before.call(torch.ops.dsinfra.quantize_1x128.default, x)
        q, scale = before.item(pair, 0), before.item(pair, 1)
        begun = before.call(start.target, q, ids, weights, scale, *where)
        ticket = before.item(begun, 0), before.item(begun, 1)
        came = between.call(wait.target, *ticket, q, ids, weights, scale, *where)
        arrived = [between.item(came, i) for i in range(5)]
        dtype = x.meta["example_value"].dtype
        z = behind.call(layer.target, arrived[0], *layer.args[1:8], arrived[4], dtype)
    except Exception:
        before.undo()
        raise
    old = [(start, begun), (wait, came), (layer, z)]
    for node, new in zip((start, wait), (ticket, arrived), strict=True):
        for item in list(node.users):
            item.replace_all_uses_with(new[item.args[1]])
    layer.replace_all_uses_with(z)
    shared = _share(x, pair)
    commits.current().add([site], [*old, *((node, pair) for node in shared)], made)
    for node in (layer, wait, start, *shared):
        for gone in (*node.users, node):  # its items first, which have no readers now
            commits.current().erase(gone)
    _tell(site, [n.meta["example_value"] for n in (q, ids, weights)], where, x.meta["example_value"], len(shared))


def _share(x: fx.Node, pair: fx.Node) -> list[fx.Node]:
    """Gives readers of later quantisations of x this one's, up to a node that may write x; -> those."""
    source, items = rows_of(x), {item.args[1]: item for item in pair.users}
    shared: list[fx.Node] = []
    node = pair.next
    while node.op != "output" and not is_fence(node):
        if operator_name(node) == "quantize_1x128" and rows_of(node.args[0]) is source:
            for item in list(node.users):
                item.replace_all_uses_with(items[item.args[1]])
            shared.append(node)
        node = node.next
    return shared


def _tell(site: Site, sent: list[torch.Tensor], where: list, x: torch.Tensor, shared: int) -> None:
    payload = Payload.of(*sent)
    site.kernel, why_not = chosen(spec_of(*where), payload)
    size = payload.width + 4 * payload.scales
    site.decision = f"rows travel in FP8, {size} bytes each instead of {payload.width * x.itemsize}"
    site.decision += f", quantised for {shared} other reader{'s' * (shared > 1)} too" if shared else ""
    site.reason = why_not if x.is_cuda else ""
