"""The ordered list of passes, and the one function that runs them on Dynamo's graph.

    recognize_fp8  ->  shadow  ->  recognize_mla  ->  absorb  ->  recognize_experts  ->  recognize_router  ->
    placement and expert_parallel where they are asked for  ->  lower
    (->  fp8_share, quantize_weights where FP8 is read or asked for, fp8_dispatch where expert_parallel ran, too)  ->
    real_rotation  ->  mixed_product
    (->  microbatch, which is asked for, on the graph that all of them made)

A graph without a softmax, an attention or a product by expert is not traced at all. Nothing here may break a
compilation: what raises is turned into a note of the record (``strict`` raises instead), and the graph stays as the
finished passes left it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import dscompile.lowering.ops  # noqa: F401  (registers the operators the passes write)
from dscompile.lowering.exchange import ExchangeError
from dscompile.passes import (
    absorb,
    commits,
    expert_parallel,
    fp8_dispatch,
    fp8_share,
    lower,
    microbatch,
    mixed_product,
    placement,
    provenance,
    quantize_weights,
    real_rotation,
    recognize_experts,
    recognize_fp8,
    recognize_mla,
    recognize_router,
)
from dscompile.passes.bind import Bindings
from dscompile.passes.commits import Commits
from dscompile.passes.experts_bind import Written
from dscompile.passes.experts_values import sizes_of
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.fp8_roles import up_projections
from dscompile.passes.graph import called
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.shadow import trace

Observer = Callable[[str, str, fx.GraphModule], None]  # (pass, "before" | "after", graph)

PASSES = (
    "shadow",
    recognize_mla.NAME,
    absorb.NAME,
    recognize_experts.NAME,
    recognize_router.NAME,
    lower.NAME,
)
LAST = (
    fp8_share.NAME,
    quantize_weights.NAME,
    fp8_dispatch.NAME,
    real_rotation.NAME,
    mixed_product.NAME,
    microbatch.NAME,
)
# For the names of files: also of the passes that run only where FP8 is read or asked for.
NUMBERS = {name: i for i, name in enumerate(PASSES)} | {recognize_fp8.NAME: 0}
NUMBERS |= {name: len(PASSES) + i for i, name in enumerate(LAST)}
NUMBERS[expert_parallel.NAME] = NUMBERS[recognize_router.NAME]  # only where a group was given
NUMBERS[placement.NAME] = NUMBERS[recognize_router.NAME]  # only where a book was given

# In training, a graph that holds one of these is left alone: a rewrite could lose what they do to a gradient.
_GRADIENT_HOOKS = ("register_hook", "autograd_function_apply", "call_hook", "_register_hook_trampoline")
# One that asks for gradients, or begins a transform of torch.func, in itself is left alone always.
_DIFFERENTIATES = ("requires_grad_", "grad", "backward", "_make_dual")
_TRANSFORMS = "_increment_nesting"
_ANCHORS = ("scaled_dot_product_attention", "softmax", "_softmax")
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")  # products by expert


@dataclass
class Outcome:
    """Records of the passes that ran, in order; ``error`` is what stopped them, if something did."""

    records: list[PassRecord] = field(default_factory=list)
    error: BaseException | None = None
    prepared: Prepared | None = None  # values made once from weights, which the compiled graph takes as inputs
    commits: Commits = field(default_factory=Commits)  # what was rewritten

    @property
    def sites(self) -> list[Site]:
        names = (
            recognize_mla.NAME,
            recognize_experts.NAME,
            recognize_router.NAME,
            placement.NAME,
            expert_parallel.NAME,
            recognize_fp8.NAME,
            quantize_weights.NAME,
            fp8_dispatch.NAME,
            real_rotation.NAME,
            mixed_product.NAME,
            microbatch.NAME,
        )
        return [site for name in names for r in self.records if r.name == name for site in r.sites]


def run(
    module: fx.GraphModule,
    inputs: Sequence[object],
    *,
    strict: bool = False,
    observe: Observer | None = None,
    fp8: str | None = None,
    fp8_head: bool = False,
    fuel: int | None = None,
    ep: tuple[str, int | None] | None = None,
    book: placement.Book | None = None,
    batch_invariant: bool = False,
    microbatches: microbatch.Asked | None = None,
) -> Outcome:
    """Runs every pass on Dynamo's graph ``module``, in place; raises only if ``strict``.

    With ``fp8``, weights are quantised, the head's too with ``fp8_head``. ``fuel``: see ``commits.py``. ``ep``: a
    group's name and the capacity, see ``expert_parallel.py``; its ExchangeError is raised always, since other ranks
    would wait. ``book``: the slots of placed experts, see ``placement.py``. ``batch_invariant``: see ``absorb.py``.
    ``microbatches``: see ``microbatch.py``."""
    outcome = Outcome(commits=Commits(fuel))
    observe = observe or (lambda *_: None)
    found: recognize_fp8.Found = []
    try:
        with commits.committing(outcome.commits):
            wrapped = next((node for node in _nodes(module) if _is_wrapped(node)), None)
            if wrapped is not None:
                kind = type(wrapped.meta["example_value"]).__name__
                note = f"`{wrapped.name}` is a {kind}, a tensor with rules of its own: our operators have none"
                outcome.records.append(PassRecord("shadow", note=note))
                return outcome
            if any(recognize_fp8.is_anchor(node) for node in _nodes(module)):
                found = _fp8(module, outcome, observe)
            if fp8 or (ep and found) or any(_is_anchor(node) or _is_product(node) for node in _nodes(module)):
                _run(module, inputs, outcome, observe, found, fp8, fp8_head, ep, book, batch_invariant)
        provenance.fill(module, outcome.commits)
        if microbatches is not None:
            _split(module, inputs, outcome, observe, microbatches, book)
    except Exception as error:
        if strict or isinstance(error, ExchangeError):
            raise
        outcome.error = error
    return outcome


def _fp8(module: fx.GraphModule, outcome: Outcome, observe: Observer) -> recognize_fp8.Found:
    observe(recognize_fp8.NAME, "before", module)
    outcome.commits.name = recognize_fp8.NAME
    start = time.perf_counter()
    record, found = recognize_fp8.run(module)
    record.seconds = time.perf_counter() - start
    outcome.records.append(record)
    observe(recognize_fp8.NAME, "after", module)
    return found


def _run(
    module: fx.GraphModule,
    inputs: Sequence[object],
    outcome: Outcome,
    observe: Observer,
    found: recognize_fp8.Found,
    fp8: str | None,
    fp8_head: bool,
    ep: tuple[str, int | None] | None,
    book: placement.Book | None,
    batch_invariant: bool,
) -> None:
    if any(_differentiates(node) for node in _nodes(module)):
        outcome.records.append(PassRecord("shadow", note="the graph takes gradients, or transforms, in itself"))
        outcome.records += [quantize_weights.differentiated()] if fp8 else []
        return
    training = recognize_mla.is_training(list(inputs))
    if training and any(called(node) in _GRADIENT_HOOKS for node in _nodes(module)):
        outcome.records.append(PassRecord("shadow", note="gradients are changed by hooks or own autograd functions"))
        return
    start = time.perf_counter()
    shadow = trace(module, inputs)
    outcome.records.append(PassRecord("shadow", seconds=time.perf_counter() - start))
    observe("shadow", "after", shadow.module)

    sizes = sizes_of(shadow.graph)
    prepared = outcome.prepared = Prepared(module, inputs)
    bound: list[Bindings] = []
    layers: list[Written] = []  # expert layers and routers
    ids: list[fx.Node] = []  # of the expert layers, for their routers

    def experts() -> PassRecord:
        record, written, found = recognize_experts.run(shadow, sizes, training, prepared)
        layers.extend(written)
        ids.extend(found)
        return record

    def routers() -> PassRecord:
        record, written = recognize_router.run(shadow, sizes, training, ids)
        layers.extend(written)
        return record

    def recognise() -> PassRecord:
        record, sites = recognize_mla.run(shadow, training, prepared)
        bound.extend(sites)
        recognize_fp8.settle(found, up_projections(bound))
        return record

    passes = {
        recognize_mla.NAME: recognise,
        absorb.NAME: lambda: absorb.run(bound, batch_invariant),
        recognize_experts.NAME: experts,
        recognize_router.NAME: routers,
    }
    if book:
        passes[placement.NAME] = lambda: placement.run(layers, book, module, training)
    if ep:
        passes[expert_parallel.NAME] = lambda: expert_parallel.run([*layers, *in_place(found)], module, *ep)
    passes[lower.NAME] = lambda: lower.run([*bound, *layers])
    if found:
        passes[fp8_share.NAME] = lambda: fp8_share.run(module, shadow)
    if fp8:
        passes[quantize_weights.NAME] = lambda: quantize_weights.run(
            module, shadow, prepared, bound, training=training, head=fp8_head
        )
    if ep and (fp8 or found):
        passes[fp8_dispatch.NAME] = lambda: fp8_dispatch.run(module, training)
    passes[real_rotation.NAME] = lambda: real_rotation.run(module)
    passes[mixed_product.NAME] = lambda: mixed_product.run(module)
    for name, step in passes.items():
        observe(name, "before", module)
        outcome.commits.name = name
        start = time.perf_counter()
        record = step()
        record.seconds = time.perf_counter() - start
        outcome.records.append(record)
        observe(name, "after", module)


def _split(
    module: fx.GraphModule,
    inputs: Sequence[object],
    outcome: Outcome,
    observe: Observer,
    asked: microbatch.Asked,
    book: placement.Book | None,
) -> None:
    quantised = outcome.prepared is not None and outcome.prepared.slots
    beside = "quantised weights" if quantised else "slots of placed experts" if book else ""
    observe(microbatch.NAME, "before", module)
    outcome.commits.name = microbatch.NAME
    start = time.perf_counter()
    with commits.committing(outcome.commits):
        training = recognize_mla.is_training(list(inputs))
        record = microbatch.run(module, inputs, asked, training=training, beside=beside)
    if record is not None:
        record.seconds = time.perf_counter() - start
        outcome.records.append(record)
    observe(microbatch.NAME, "after", module)


def _nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes of a graph and of the bodies of its higher-order operators."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from child.graph.nodes


def _is_wrapped(node: fx.Node) -> bool:
    """True for a tensor made of others, as DTensor and quantised weights are: it gives operators its own meaning."""
    return is_traceable_wrapper_subclass(node.meta.get("example_value"))


def _differentiates(node: fx.Node) -> bool:
    name = called(node)
    return name in _DIFFERENTIATES or name.endswith(_TRANSFORMS)


def _is_anchor(node: fx.Node) -> bool:
    return called(node) in _ANCHORS


def _is_product(node: fx.Node) -> bool:
    """A product by expert, grouped or batched, weights chosen by row, an expert's rows added, or who chose it."""
    names = (*_GROUPED, "bmm", "index_add", "index_add_", "one_hot")
    # `idx == e` of a loop over experts; Dynamo writes a function or a method, by its version.
    compared = called(node).strip("_") == "eq" and any(isinstance(arg, int) for arg in node.args)
    by_row = called(node) in ("getitem", "index_select") and any(isinstance(a, fx.Node) for a in node.args[1:])
    chosen = by_row and getattr(node.meta.get("example_value"), "ndim", 0) == 3
    return called(node) in names or compared or chosen


def in_place(found: recognize_fp8.Found) -> list[Written]:
    """Operators that an adapter brought into the graph, as if a pass had written them."""
    return [Written(site, node.graph.owning_module, node) for site, node in found if site.matched]


def op_counts(module: fx.GraphModule) -> dict[str, int]:
    """Number of live calls of each ``dsinfra`` operator, and of attention, softmax and grouped products left over."""
    counts: dict[str, int] = {}
    for child in module.modules():
        if not isinstance(child, fx.GraphModule):
            continue
        live = _live(child.graph)
        for node in child.graph.nodes:
            if node not in live:
                continue
            name = recognize_fp8.operator_name(node) or None
            if name is None and _is_anchor(node):
                name = called(node).lstrip("_")
            elif name is None and called(node) in _GROUPED:
                name = "grouped_mm"
            if name is not None:
                counts[name] = counts.get(name, 0) + 1
    return counts


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on, what is written in place into them included."""
    live: set[fx.Node] = set()
    todo = [graph.output_node()]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(node.all_input_nodes)
            if node.op != "placeholder":
                todo.extend(user for user in node.users if user.args[:1] == (node,) and called(user) in _WRITES)
    return live


_WRITES = ("setitem", "copy_", "index_add_", "scatter_", "scatter_add_", "index_copy_", "index_put_", "masked_fill_")
