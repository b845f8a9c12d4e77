"""AOTAutograd's joint graph of a graph from Dynamo: forward and backward in one, without mutation.

The one use of private torch API by the pipeline: ``aot_export_joint_simple``, the same in torch 2.11 and 2.13. It
refuses what can't be one pure graph: inputs that are written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_joint_simple


class NoJointGraph(RuntimeError):
    """A stage has no joint graph; the cause is chained."""


def joint_graph(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """(inputs, dy) -> (y, gradient of each input, None for one that needs none).

    Args:
        module: of one output. Its inputs' ``requires_grad`` says which gradients there are.

    Raises:
        NoJointGraph: with AOTAutograd's reason.
    """
    outputs = module.graph.output_node().args[0]
    if len(outputs) != 1:
        raise NoJointGraph(
            f"a stage of {len(outputs)} outputs. What lies between two stages is one tensor. Return one, and change "
            "nothing outside of the stage."
        )

    def copied(*args: Tensor) -> tuple[Tensor]:
        return (module(*args)[0].clone(),)  # an output may be a view then

    try:
        joint = aot_export_joint_simple(copied, tuple(inputs), trace_joint=True)
    except Exception as error:
        raise NoJointGraph(
            f"AOTAutograd makes no joint graph of a stage with {len(inputs)} inputs: {type(error).__name__}: "
            f"{str(error)[:500]}. A stage runs as a pure function of its weights and its input. Leave out what it "
            "writes to (counters, caches), or run it without graphs."
        ) from error
    _take_back(joint)
    return joint


def _take_back(joint: fx.GraphModule) -> None:
    """Removes the copy: nothing writes to what these graphs return."""
    out = joint.graph.output_node()
    copy, *grads = out.args[0]  # type: ignore[misc]
    assert copy.target is torch.ops.aten.clone.default, f"{copy.format_node()} is no copy"
    out.args = ([copy.args[0], *grads],)
    if not copy.users:
        joint.graph.erase_node(copy)
    joint.recompile()
