"""A pipeline stage that runs as graphs: recognised and rewritten as by the backend, its backward in two halves.

    Dynamo  ->  passes  ->  AOTAutograd's joint graph  ->  F, I, W  and, for F&B, one woven graph of two stages

Dynamo still guards every call and finds the weights, so a batch of another shape makes other graphs. What is kept of a
micro-batch between F, I and W is a tuple of tensors; autograd takes no part. F&B gives the same bits as F and B.

Refused: stages that Dynamo doesn't take whole, that write to their inputs, or whose weights are prepared (FP8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dscompile.passes import pipeline
from dscompile.passes.dualpipe import Cost, Order, Split, split, weave
from dscompile.passes.dualpipe_joint import NoJointGraph, joint_graph
from dscompile.runtime.pipeline_stage import Stage, add_gradients, leaf, trained

Compile = Callable[[fx.GraphModule], Callable[..., Any]]


class GraphStage:
    """A module of one tensor, as ``runtime.pipeline_stage.Stage`` asks for it.

    Args:
        compile: what makes a callable of each graph; None: it runs operator by operator.
        order, cost: of woven graphs, see ``passes.dualpipe.weave``.
        recognise: run the backend's passes first.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        compile: Compile | None = None,
        order: Order | None = None,
        cost: Cost | None = None,
        recognise: bool = True,
    ):
        self.module = module
        self.weights = trained(module)
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.compile, self.order, self.cost, self.recognise = compile or _as_it_is, order, cost, recognise
        self.outcomes: list[pipeline.Outcome] = []  # of the passes, a shape of the input each
        self._call = torch.compile(module, backend=self._capture, fullgraph=True, dynamic=False)
        self._kept: dict[int, tuple[_Graphs, Sequence[Any]]] = {}
        self._woven: dict[tuple[_Graphs, _Graphs], Callable[..., Any]] = {}
        self._x: Tensor | None = None
        self._run: Callable[[_Graphs, Sequence[Tensor]], Tensor] | None = None

    def infer(self, x: Tensor) -> Tensor:
        return self._through_dynamo(x, lambda graphs, args: graphs.infer(*args)[0])

    def forward(self, micro: int, x: Tensor) -> Tensor:
        return self._through_dynamo(x, lambda graphs, args: self._keep(micro, graphs, graphs.forward(*args)))

    def backward(self, micro: int, dy: Tensor) -> Tensor | None:
        graphs, saved = self._kept.pop(micro)
        with torch.no_grad():
            return self._add(graphs, graphs.backward(*saved, dy))

    def backward_input(self, micro: int, dy: Tensor) -> Tensor | None:
        graphs, saved = self._kept[micro]
        with torch.no_grad():
            dx, *handed = graphs.input(*saved, dy)
        given = (*saved, dy)
        self._kept[micro] = graphs, [given[i] if was_given else handed[i] for was_given, i in graphs.split.held]
        return dx

    def backward_weight(self, micro: int) -> None:
        graphs, held = self._kept.pop(micro)
        with torch.no_grad():
            self._add(graphs, (None, *graphs.weight(*held)))

    def overlapped(
        self, micro: int, x: Tensor, other: Stage, other_micro: int, dy: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(other, GraphStage):
            return self.forward(micro, x), other.backward(other_micro, dy)
        theirs, saved = other._kept.pop(other_micro)
        found: list[Tensor | None] = []

        def run(ours: _Graphs, args: Sequence[Tensor]) -> Tensor:
            if (ours, theirs) not in self._woven:
                graph = weave(ours.split.forward, theirs.split.backward, self.order, self.cost)
                self._woven[ours, theirs] = self.compile(graph)
            outs = self._woven[ours, theirs](*args, *saved, dy)
            count = len(ours.split.forward.graph.output_node().args[0])
            found.append(other._add(theirs, outs[count:]))
            return self._keep(micro, ours, outs[:count])

        return self._through_dynamo(x, run), found[0]

    def clear(self) -> None:
        self._kept.clear()
        self.gradients.clear()

    def _keep(self, micro: int, graphs: _Graphs, outs: Sequence[Any]) -> Tensor:
        y, *saved = outs
        self._kept[micro] = graphs, saved
        return y

    def _add(self, graphs: _Graphs, outs: Sequence[Any]) -> Tensor | None:
        dx, *grads = outs
        add_gradients(self.gradients, zip(graphs.weights, grads, strict=True))
        return dx

    def _through_dynamo(self, x: Tensor, run: Callable[[_Graphs, Sequence[Tensor]], Tensor]) -> Tensor:
        """y = run(graphs for an input like x, their inputs), which Dynamo gathers."""
        self._x, self._run = leaf(x), run
        try:
            with torch.enable_grad():  # what Dynamo traces and guards on; the graphs themselves run without
                return self._call(self._x)
        finally:
            self._x = self._run = None

    def _capture(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[Tensor]]:
        """Dynamo's backend."""
        if self.recognise:
            self.outcomes.append(pipeline.run(module, inputs))
            prepared = self.outcomes[-1].prepared
            if prepared is not None and prepared.slots:
                raise NoJointGraph(
                    f"{len(prepared.slots)} weights of the stage are read in a form that is prepared before, as FP8 "
                    "is. No gradient comes back to them. Train in 16 or 32 bits, or pass recognise=False."
                )
        joint = joint_graph(module, inputs)
        graphs: list[_Graphs] = []

        def call(*args: Tensor) -> tuple[Tensor]:
            assert self._run is not None and self._x is not None
            if not graphs:
                graphs.append(_Graphs(joint, args, self._x, self.compile))
            with torch.no_grad():
                return (self._run(graphs[0], args),)

        return call


class _Graphs:
    """The graphs for one shape of the input.

    Attributes:
        weights: parameters, in the order in which B and W give their gradients.
    """

    def __init__(self, joint: fx.GraphModule, args: Sequence[Tensor], x: Tensor, compile: Compile):
        self.split: Split = split(joint, next(i for i, arg in enumerate(args) if arg is x))
        self.weights = [args[i] for i in self.split.weights]
        made = (compile(getattr(self.split, name)) for name in ("infer", "forward", "backward", "input", "weight"))
        self.infer, self.forward, self.backward, self.input, self.weight = made


def _as_it_is(graph: fx.GraphModule) -> Callable[..., Any]:
    return graph
