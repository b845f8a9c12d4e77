"""The shadow: a pre-dispatch ATen twin of Dynamo's graph, made only to be analysed.

Dynamo's graph is a mix of Python calls, methods and slices; after AOTAutograd an attention with unequal head widths is
taken apart. In between stands the pre-dispatch ATen graph: one spelling for each operator, attention whole, autograd
not yet applied. :func:`trace` runs Dynamo's graph under its own fake tensors and returns every intermediate value as an
output, so that output k *is* the k-th value: a map between both graphs that needs no naming convention. Bodies of
checkpoint and wrap operators are run inline and map to the node inside their body.

The shadow is read, Dynamo's graph is edited. Refuses (raises) what fake tensors can't run: data-dependent branches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx.traceback
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from dscompile.passes.graph import graph_names, place

# Higher-order operators whose body runs exactly once, with the arguments that follow it.
INLINED = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph"}


@dataclass(frozen=True)
class Owner:
    """A node of Dynamo's graph, or of a higher-order operator's body inside it."""

    module: fx.GraphModule
    node: fx.Node


@dataclass
class Shadow:
    """``graph`` is the ATen twin; ``owners[node]``: the Dynamo nodes that hold the same value, in program order."""

    module: fx.GraphModule
    owners: dict[fx.Node, list[Owner]]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def owner_in(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | None:
        """Dynamo node of ``module`` that holds this value, or None."""
        return next((o.node for o in self.owners.get(node, ()) if o.module is module), None)


class _Recorder(fx.Interpreter):
    """Runs a Dynamo graph and notes every tensor it makes, bodies of ``INLINED`` operators included."""

    def __init__(self, module: fx.GraphModule, sink: list[tuple[Owner, torch.Tensor]], without_grad: set[fx.Node]):
        super().__init__(module, garbage_collect_values=False)
        self.sink = sink
        self.without_grad = without_grad

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "output":
            self.sink.append((Owner(self.module, n), result))
            if not torch.is_grad_enabled():
                self.without_grad.add(n)
        return result

    def call_function(self, target, args, kwargs):
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in INLINED:
            body = next(a for a in args if isinstance(a, fx.GraphModule))
            operands = [a for a in args[args.index(body) + 1 :] if not isinstance(a, str)]
            return _Recorder(body, self.sink, self.without_grad).run(*operands)
        return super().call_function(target, args, kwargs)


def _fake_inputs(inputs: Sequence[object]) -> list[object]:
    """Inputs as fake tensors with the symbols that Dynamo gave them."""
    mode = detect_fake_mode(inputs)
    context = TracingContext.try_get()
    fakes: list[object] = []
    for value in inputs:
        if isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor):
            known = context.tensor_to_context.get(value) if context is not None else None
            if known is not None:
                value = mode.from_tensor(value, symbolic_context=known, source=known.tensor_source)
            else:
                value = mode.from_tensor(value, static_shapes=True)
        fakes.append(value)
    return fakes


def _autocast(node: fx.Node, owner: Owner) -> None:
    """Gives a value the dtype that it has in Dynamo's graph: tracing keeps autocast's regions without their casts."""
    value, known = node.meta["val"], owner.node.meta.get("example_value")
    if isinstance(known, torch.Tensor) and known.dtype != value.dtype:
        node.meta["val"] = value.to(known.dtype)


def trace(module: fx.GraphModule, inputs: Sequence[object]) -> Shadow:
    """Shadow of ``module``; must run where a backend runs (inside Dynamo's tracing context)."""
    mode = detect_fake_mode(inputs)
    recorded: list[Owner] = []
    without_grad: set[fx.Node] = set()

    def run(*args):
        sink: list[tuple[Owner, torch.Tensor]] = []
        _Recorder(module, sink, without_grad).run(*args)
        recorded[:] = [owner for owner, _ in sink]
        return [value for _, value in sink]

    fakes = _fake_inputs(inputs)
    with mode, torch.fx.traceback.preserve_node_meta():
        twin = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    for node, name in zip((n for n in twin.graph.nodes if n.op == "placeholder"), names, strict=True):
        node.meta["dynamo_name"] = name
    owners: dict[fx.Node, list[Owner]] = defaultdict(list)
    bodies = graph_names(module)
    for node, owner in zip(twin.graph.output_node().args[0], recorded, strict=True):
        owners[node].append(owner)
        node.meta.setdefault("dsinfra_place", place(owner.node, bodies))
        _autocast(node, owner)
        if owner.node in without_grad and owner.node.op not in ("placeholder", "get_attr"):
            node.meta["dsinfra_no_grad"] = True
        # Every value is an output of the twin; this marks those that Dynamo's graph (or a body) really returns.
        if any(user.op == "output" for user in owner.node.users):
            node.meta["dsinfra_returned"] = True
    return Shadow(twin, dict(owners))
