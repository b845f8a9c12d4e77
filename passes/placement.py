"""placement: expert layers count what is chosen and find replicas, so that experts can be moved while the model runs.

Before:  y = experts(x, ids, weights, W1 [E,..], W2 [E,..])
After:   y = experts(x, place_counted(ids, counter, log2phy, logcnt), weights, W1 [P,..], W2 [P,..])

W1 and W2 then hold physical slots: slot p the expert phy2log[p], some experts several times. *Exact*: every slot of an
expert holds the same weights, and the sum over a token's choices stays in their order. Counter, maps and slots are
tensors that the compiled graph takes as further inputs (:func:`lift`), at addresses that stay: a new plan is written
into them, and nothing is compiled or captured again. Over several ranks W1 and W2 are ``gather_experts`` of a rank's
own slots, which ``expert_parallel`` leaves out.

A ``Book`` says which layer has which tensors; layers are told by their module's path, and a layer that the book doesn't
know is refused and left alone. So is one in training (replicas of an expert would need the sum of their gradients), one
with biases (they would have to move, too), and one whose number of experts isn't the book's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import dscompile.lowering.ops.placement  # noqa: F401  (registers the operators)
from dscompile.lowering import inductor
from dscompile.passes import commits
from dscompile.passes.emit import Emitter
from dscompile.passes.experts_apart import in_pieces, refuse_pieces
from dscompile.passes.experts_bind import Written
from dscompile.passes.graph import module_path, settle, source_line
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, Unsupported

NAME, KIND = "placement", "placement"
_PREFIX = "dsinfra_slots_"


class NotPlaced(Refusal):
    """The book has no placement for this layer, or one of another size."""

    hint = "give the layer's module path, as the report names it, a placement of its number of experts"


class PlacedTraining(Refusal):
    """A layer in training: the gradients of replicas would have to be added up."""

    hint = "place experts in inference"


class PlacedBias(Refusal):
    """Experts with biases, which a placement doesn't move."""

    hint = "biases of experts aren't moved"


class PlacedTwice(Refusal):
    """One body serves several layers, which would share counters and maps."""

    hint = "compile the layers without sharing one body (torch.compiler.nested_compile_region)"


class PlacedInside(Refusal):
    """A layer inside a checkpoint or another body, whose inputs are its own."""

    hint = "don't run the layer under checkpointing"


class Slots(Protocol):
    """One layer: ``runtime.movement.Slots``, with two weights."""

    weights: Sequence[Tensor]  # [n,2F,D] and [n,D,F]
    log2phy: Tensor
    logcnt: Tensor
    counter: Tensor


@dataclass(frozen=True)
class Book:
    """What is placed: layers by module path; ``ranks`` that share the slots, and how a replica is chosen."""

    layers: Mapping[str, Slots]
    ranks: int = 1
    group: str = ""  # the joined group's name, where there are several
    policy: str = "round_robin"

    @classmethod
    def of(cls, placed: Any, policy: str = "round_robin") -> Book:
        """The book of a ``runtime.expert_slots.PlacedExperts``."""
        return cls(placed.layers, placed.ranks, placed.group, policy)


def run(layers: Sequence[Written], book: Book, root: fx.GraphModule, training: bool) -> PassRecord:
    """Rewrites every expert layer of the graph ``root`` that the book knows; runs in front of ``expert_parallel``."""
    record = PassRecord(NAME)
    found = [layer for layer in layers if operator_name(layer.node) == "experts" or in_pieces(layer.node)]
    for layer in found:
        site = Site(KIND, module_path(layer.node), source_line(layer.node), True, node=layer.node.name)
        site.form = layer.site.form
        try:
            refuse_pieces(layer.node)
            if training:
                raise PlacedTraining("the layer's gradients are asked for", layer.node)
            _place(layer, site, book, root)
        except Refusal as refusal:
            _keep(site, refusal)
        except Exception as error:  # a fault of ours costs this site, not the others
            _keep(site, Unsupported(f"the analysis raised {type(error).__name__}: {error}", layer.node))
        record.sites.append(site)
    settle(layer.module for layer in found)
    return record


def _keep(site: Site, refusal: Refusal) -> None:
    site.matched, site.decision = False, "experts stay where they are"
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint


def _place(layer: Written, site: Site, book: Book, root: fx.GraphModule) -> None:
    """Writes one layer; raises a Refusal, and then the graph is as it was."""
    node = layer.node
    slots = _known(layer, site, book)
    if layer.module is not root:
        raise PlacedInside("the layer is in the body of a higher-order operator", node)
    commits.current().permit()
    e = Emitter(node)
    attributes: list[str] = []
    try:
        held = [_constant(e, layer.module, value, attributes) for value in _tensors(slots)]
        counter, log2phy, logcnt, *weights = held
        x, ids, weight = node.args[:3]
        total = slots.weights[0].shape[0] * book.ranks
        rule = total, book.ranks, book.policy
        placed = e.call(torch.ops.dsinfra.place_counted.default, ids, counter, log2phy, logcnt, *rule)
        if book.ranks > 1:
            weights = [e.call(torch.ops.dsinfra.gather_experts.default, w, book.group, total) for w in weights]
        y = e.call(torch.ops.dsinfra.experts.default, x, placed, weight, *weights, *node.args[5:])
    except Exception:
        e.undo()
        for name in attributes:
            delattr(layer.module, name)
        raise
    node.replace_all_uses_with(y)
    commits.current().add([site], [(node, y)], e.made)
    commits.current().erase(node)  # pure, and without readers now
    layer.node = y
    experts = slots.counter.shape[0]
    spare = f", {total - experts} of them spare" if total > experts else ""
    site.decision = f"{experts} experts in {total} slots of {book.ranks} rank{'s' * (book.ranks > 1)}{spare}"
    site.kernel = book.policy


def _known(layer: Written, site: Site, book: Book) -> Slots:
    """The layer's slots; raises a Refusal where they don't fit it."""
    node = layer.node
    slots = book.layers.get(site.module_path)
    if slots is None:
        known = ", ".join(sorted(book.layers)[:4]) or "none"
        raise NotPlaced(f"no placement for the layer {site.module_path or '(top)'}; there are {known}", node)
    if layer.twins:
        raise PlacedTwice(f"{1 + len(layer.twins)} layers run one body", node)
    if any(bias is not None for bias in node.args[5:7]):
        raise PlacedBias("the experts have biases", node)
    wanted = [w.meta["example_value"] for w in node.args[3:5]]
    experts = wanted[0].shape[0]
    if slots.counter.shape[0] != experts:
        raise NotPlaced(f"the layer has {experts} experts and its placement {slots.counter.shape[0]}", node)
    for own, value in zip(slots.weights, wanted, strict=True):
        if own.shape[1:] != value.shape[1:] or own.dtype != value.dtype or own.device != value.device:
            raise NotPlaced(
                f"slots {list(own.shape)} of {own.dtype} on {own.device} for weights {list(value.shape)} of "
                f"{value.dtype} on {value.device}",
                node,
            )
    return slots


def _tensors(slots: Slots) -> list[Tensor]:
    return [slots.counter, slots.log2phy, slots.logcnt, *slots.weights]


def _constant(e: Emitter, module: fx.GraphModule, value: Tensor, attributes: list[str]) -> fx.Node:
    """The tensor itself as a buffer of the graph's module: read, and the counter written, where it lies."""
    name = f"{_PREFIX}{sum(key.startswith(_PREFIX) for key in module._buffers)}"
    module.register_buffer(name, value, persistent=False)
    attributes.append(name)
    with e.graph.inserting_before(e.anchor):
        node = e.graph.get_attr(name)
    fake = isinstance(e.mode, FakeTensorMode)
    node.meta["example_value"] = e.mode.from_tensor(value, static_shapes=True) if fake else value
    e.made.append(node)
    return node


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def lift(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any], Wrap]:
    """Counters, maps and slots as inputs behind the graph's own, once all passes ran: AOTAutograd takes no constants.

    Returns:
        (a copy of the graph module, its example inputs, what makes a callable of the old inputs from the compiled one).
    """
    nodes = [n for n in module.graph.nodes if n.op == "get_attr" and str(n.target).startswith(_PREFIX)]
    held = [getattr(module, n.target) for n in nodes]
    if not held:
        return module, list(inputs), lambda compiled: compiled
    graph, env = fx.Graph(), {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = inductor.copied_input(graph, node)
    for node, value in zip(nodes, held, strict=True):
        env[node] = inductor.static_input(graph, node.target, node.meta, value)
    for node in module.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    lifted = fx.GraphModule(module, graph)
    lifted.meta = module.meta
    known = {*lifted.__dict__, "_graph", "_code"}
    lifted.__dict__.update({k: v for k, v in module.__dict__.items() if k not in known})

    def bind(compiled: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: compiled(*args, *held)

    return lifted, [*inputs, *held], bind
