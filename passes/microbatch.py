"""microbatch: a graph with expert parallelism on two halves of its requests, so that one computes while one exchanges.

Before:  attention ; dispatch .. wait ; experts ; combine .. wait ; attention ; ...            of all requests
After:   attention A ; dispatch A ; attention B | wait A ; experts A ; dispatch B | combine A ; wait B ; experts B ; ...

Legal because requests don't depend on each other, which is shown operator by operator (``separable.py``) on a
functional ATen twin of the whole graph; a graph in which an operator mixes them stays as it was, and the refusal names
the operator and its line. Tokens take the place of requests where there is one request and no attention. *Changes
rounding* as another batch size does: products of fewer rows may be summed in another order.

It decides: both orders are run through the model of ``overlap.py`` with costs of the node table, and without a
predicted gain the graph is left alone. Every rank must come to the same decision. What may differ between ranks (the
number of requests, which must be even, and symbolic sizes) raises ExchangeError instead of a refusal, since ranks that
split would wait for one that did not; if predictions disagree, ranks with different numbers of tokens are told at the
first exchange (RanksDisagree, by the capacity). Exchanges keep one order on all ranks whatever the costs are.

Refused: training (its pairs of forward and backward chunks are the pipeline's), graphs that write their inputs, weights
that were quantised beside the graph, placed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from dscompile.lowering.exchange import ExchangeError, group_named
from dscompile.passes import commits, overlap
from dscompile.passes.graph import called, source_line
from dscompile.passes.microbatch_split import EXCHANGE, Split, region
from dscompile.passes.overlap_costs import NodeCosts, Table
from dscompile.passes.recognize_fp8 import operator_name
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, Unsupported
from dscompile.passes.separable import Analysis, Axis, Mixes, analyse
from dscompile.passes.shadow import _fake_inputs

NAME, KIND = "microbatch", "microbatches"
# Settings under which Inductor generates code in the graph's order: else a start is moved down to its wait.
INDUCTOR = {"reorder_for_locality": False, "reorder_for_peak_memory": False}
SCHEDULE = "dsinfra_schedule"  # in the module's meta: the planned timeline as plain data, whole and split


class InTraining(Refusal):
    """The graph is differentiated."""

    hint = "micro-batches of a training step are made by the pipeline's schedule"


class WritesInputs(Refusal):
    """The graph changes one of its inputs in place, such as a cache, which both micro-batches would."""

    hint = "compile prefill without a cache; decoding over a cache that is written in place stays whole"


class HeldBeside(Refusal):
    """The graph reads values that are kept beside it."""

    hint = "leave out fp8 or placement to have micro-batches"


@dataclass(frozen=True)
class Asked:
    """What is wanted: two micro-batches, by these costs.

    Attributes:
        comm_sms: multiprocessors that an exchange takes from kernels.
        margin: a gain that is predicted smaller than this isn't worth the split; -inf splits always.
        overlap: False leaves one micro-batch behind the other, to compare: the results are the same bits.
    """

    table: Table
    comm_sms: int = 0
    margin: float = 0.02
    overlap: bool = True


def run(
    module: fx.GraphModule, inputs: Sequence[object], asked: Asked, *, training: bool, beside: str = ""
) -> PassRecord | None:
    """Splits Dynamo's graph in place, if that is legal and pays; None if it exchanges nothing.

    Args:
        module, inputs: what Dynamo handed over; every other pass has run.
        asked: see there.
        training: whether gradients are taken.
        beside: what the graph reads from beside it, in words.

    Raises:
        ExchangeError: this rank can't split its requests evenly, and others may.
    """
    exchanges = [node for node in module.graph.nodes if operator_name(node) in EXCHANGE]
    if not exchanges:
        return None
    site = Site(KIND, "", source_line(exchanges[0]), True, node=exchanges[0].name)
    try:
        if training:
            raise InTraining("the graph is differentiated", exchanges[0])
        if beside:
            raise HeldBeside(f"the graph reads {beside}", exchanges[0])
        commits.current().permit()
        _decide(module, inputs, asked, site, group_named(exchanges[0].args[-4]).size)
    except ExchangeError:
        raise
    except Refusal as refusal:
        _keep(site, refusal)
    except Exception as error:  # a fault of ours leaves the graph whole, on every rank alike
        _keep(site, Unsupported(f"the analysis raised {type(error).__name__}: {error}", exchanges[0]))
    return PassRecord(NAME, [site])


def _keep(site: Site, refusal: Refusal) -> None:
    site.matched, site.decision = False, "all requests at once"
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint
    line = source_line(refusal.node)
    site.source = line if line != "?" else site.source
    site.node = refusal.node.name if refusal.node is not None else site.node


def _decide(module: fx.GraphModule, inputs: Sequence[object], asked: Asked, site: Site, ranks: int) -> None:
    traced = functional(module, inputs)
    analysis, what = axes(traced, module, inputs)
    inside = region(traced.graph, analysis)
    split = Split(traced, module, analysis, inside)
    costs = NodeCosts(asked.table, ranks)
    before = overlap.simulate(traced.graph.nodes, costs, asked.comm_sms)
    nodes = list(split.graph.nodes)
    if asked.overlap:
        nodes = overlap.order(split.graph, costs, comm_order=split.starts(), comm_sms=asked.comm_sms)
    after = overlap.simulate(nodes, costs, asked.comm_sms)
    site.form = f"{what}, {len(inside)} of {len(analysis.states)} operators by halves"
    site.predicted = {"whole": before.total / 1e6, "two micro-batches": after.total / 1e6}
    module.meta[SCHEDULE] = {"whole": spans(before), "two micro-batches": spans(after)}
    said = f"{after.total:.0f} us predicted in two micro-batches, {before.total:.0f} us whole"
    if after.total > before.total * (1 - asked.margin):
        site.decision = f"all requests at once: {said}"
        return
    old = next(node for node in module.graph.nodes if operator_name(node) == EXCHANGE[0])
    commits.current().add([site], [(old, split.starts()[0])], [n for n in nodes if operator_name(n)])
    overlap.apply(split.graph, nodes)
    module.graph = split.graph
    module.recompile()
    site.decision = f"{said}; {after.hidden:.0%} of communication hidden, {before.hidden:.0%} without"


def spans(timeline: overlap.Timeline) -> list[dict[str, object]]:
    """A timeline as the rows that ``dscompile report schedule`` draws."""
    return [
        {
            "row": span.row,
            "kind": operator_name(span.node) or called(span.node),
            "name": span.node.name,
            "start_us": round(span.start, 3),
            "end_us": round(span.end, 3),
        }
        for span in timeline.spans
    ]


# ------------------------------------------------------------------ analysis


def functional(module: fx.GraphModule, inputs: Sequence[object]) -> fx.GraphModule:
    """A twin of Dynamo's graph in ATen and ``dsinfra`` operators without mutation; must run where a backend runs.

    Raises:
        WritesInputs: an input is changed in place.
    """
    fakes = _fake_inputs(inputs)

    def run(*args: object) -> object:
        return fx.Interpreter(module).run(*args)

    without_mutation = torch.func.functionalize(run, remove="mutations")
    with detect_fake_mode(fakes), torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        traced = make_fx(without_mutation, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    for node in traced.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise WritesInputs(f"`{node.name}` ({called(node)}) changes an input of the graph", node)
    traced.graph.eliminate_dead_code()
    return traced


def axes(traced: fx.GraphModule, module: fx.GraphModule, inputs: Sequence[object]) -> tuple[Analysis, str]:
    """The analysis of a dimension along which exchanges can be split, and that dimension in words.

    Raises:
        Mixes: along each dimension an operator mixes; that of the first that was tried.
        ExchangeError: no dimension can be halved; on another rank, one perhaps can.
    """
    first: Mixes | None = None
    uneven: list[str] = []
    sent = [n for n in traced.graph.nodes if operator_name(n) == "dispatch_start"]
    for dim, size, seeds in _candidates(traced, module, inputs):
        where = f"{size} along dimension {dim} of {', '.join(repr(n.name) for n in seeds)}"
        if size < 2:  # a proof needs two
            uneven += [where] if dim == 0 else []
            continue
        found = analyse(traced.graph, seeds, size)
        states = [found.states[n] for n in sent]
        if not all(isinstance(state, tuple) for state in states):
            first = first or next((state for state in states if isinstance(state, Mixes)), None)
        elif size % 2:
            uneven.append(where)
        else:
            return found, f"{size} {'requests' if dim == 0 else 'tokens'} along dimension {dim} of the inputs"
    if uneven:
        raise ExchangeError(
            f"the inputs have {'; '.join(uneven)}, and microbatches is 2",
            "Every rank splits its requests into two equal halves, or all wait for one that doesn't",
            "Give each rank an even number of requests, or leave out options['microbatches'] on every rank",
        )
    raise first or Unsupported("no input of the graph has requests that are exchanged")


def _candidates(
    traced: fx.GraphModule, module: fx.GraphModule, inputs: Sequence[object]
) -> Iterator[tuple[int, int, dict[fx.Node, Axis]]]:
    """(dimension, its size, inputs that have it), requests before tokens; weights and buffers are no such inputs."""
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    held = list(zip((n for n in traced.graph.nodes if n.op == "placeholder"), names, inputs, strict=True))
    data = [
        node
        for node, name, given in held
        if isinstance(given, torch.Tensor)
        and not isinstance(given, torch.nn.Parameter)
        and not ("_parameters_" in name or "_buffers_" in name)
    ]
    if any(isinstance(given, torch.SymInt) for given in inputs):
        raise ExchangeError(
            "the graph has symbolic sizes, and microbatches is 2",
            "Halves are cut at compile time; another rank with fixed sizes would cut its own",
            "Compile with dynamic=False on every rank, or leave out options['microbatches']",
        )
    for dim in (0, 1):
        sizes = dict.fromkeys(n.meta["val"].shape[dim] for n in data if n.meta["val"].dim() > dim)
        for size in sizes:
            seeds = {n: Axis(dim) for n in data if n.meta["val"].dim() > dim and n.meta["val"].shape[dim] == size}
            yield dim, size, seeds
