"""The ordered list of passes, and the one function that runs them on Dynamo's graph.

    shadow  ->  recognize_mla  ->  absorb  ->  lower

A graph without a softmax or an attention is not traced at all. Nothing here may break a compilation: what raises is
turned into a note of the record (``strict`` raises instead), and the graph stays as the finished passes left it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

import dscompile.lowering.ops  # noqa: F401  (registers the operators the passes write)
from dscompile.passes import absorb, lower, recognize_mla
from dscompile.passes.bind import Bindings
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.shadow import trace

Observer = Callable[[str, str, fx.GraphModule], None]  # (pass, "before" | "after", graph)

PASSES = ("shadow", recognize_mla.NAME, absorb.NAME, lower.NAME)

# In training, a graph that holds one of these is left alone: a rewrite could lose what they do to a gradient.
_GRADIENT_HOOKS = ("register_hook", "autograd_function_apply", "call_hook", "_register_hook_trampoline")
_ANCHORS = ("scaled_dot_product_attention", "softmax", "_softmax")


@dataclass
class Outcome:
    """Records of the passes that ran, in order; ``error`` is what stopped them, if something did."""

    records: list[PassRecord] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def sites(self) -> list[Site]:
        return next((r.sites for r in self.records if r.name == recognize_mla.NAME), [])


def run(
    module: fx.GraphModule, inputs: Sequence[object], *, strict: bool = False, observe: Observer | None = None
) -> Outcome:
    """Runs every pass on Dynamo's graph ``module``, in place; raises only if ``strict``."""
    outcome = Outcome()
    if not any(_is_anchor(node) for node in _nodes(module)):
        return outcome
    try:
        _run(module, inputs, outcome, observe or (lambda *_: None))
    except Exception as error:
        if strict:
            raise
        outcome.error = error
    return outcome


def _run(module: fx.GraphModule, inputs: Sequence[object], outcome: Outcome, observe: Observer) -> None:
    training = recognize_mla.is_training(list(inputs))
    if training and any(_name(node) in _GRADIENT_HOOKS for node in _nodes(module)):
        outcome.records.append(PassRecord("shadow", note="gradients are changed by hooks or own autograd functions"))
        return
    start = time.perf_counter()
    shadow = trace(module, inputs)
    outcome.records.append(PassRecord("shadow", seconds=time.perf_counter() - start))
    observe("shadow", "after", shadow.module)

    bound: list[Bindings] = []

    def recognise() -> PassRecord:
        record, found = recognize_mla.run(shadow, training)
        bound.extend(found)
        return record

    passes = {
        recognize_mla.NAME: recognise,
        absorb.NAME: lambda: absorb.run(bound),
        lower.NAME: lambda: lower.run(bound),
    }
    for name, step in passes.items():
        observe(name, "before", module)
        start = time.perf_counter()
        record = step()
        record.seconds = time.perf_counter() - start
        outcome.records.append(record)
        observe(name, "after", module)


def _nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes of a graph and of the bodies of its higher-order operators."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from child.graph.nodes


def _is_anchor(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and _name(node) in _ANCHORS


def _name(node: fx.Node) -> str:
    """What the node calls, without the overload's name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0]


def op_counts(module: fx.GraphModule) -> dict[str, int]:
    """Number of live calls of each ``dsinfra`` operator, and of attention and softmax that were left."""
    counts: dict[str, int] = {}
    for child in module.modules():
        if not isinstance(child, fx.GraphModule):
            continue
        live = _live(child.graph)
        for node in child.graph.nodes:
            if node not in live:
                continue
            name = None
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dsinfra":
                name = node.target._schema.name.split("::")[1]
            elif _is_anchor(node):
                name = _name(node).lstrip("_")
            if name is not None:
                counts[name] = counts.get(name, 0) + 1
    return counts


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on (in-place updates of inputs hold no attention)."""
    live: set[fx.Node] = set()
    todo = [graph.output_node()]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(node.all_input_nodes)
    return live
