"""The one file that touches private torch API, with the versions that each use was checked on.

| use | torch 2.11 | torch 2.13 |
|---|---|---|
| ``compile_fx(gm, inputs, config_patches=...)`` | yes | yes (one more parameter, unused) |
| ``CustomGraphPass`` with ``uuid()`` as ``post_grad_custom_post_pass`` | yes | yes (a list is allowed too, not used) |
| ``list_mode_options`` (public) | yes | yes |
| ``_dynamo_source`` and ``meta["tensor_dict"]`` of Dynamo's inputs, ``TracingContext.tensor_to_context`` | yes | yes |
| ``torch._C._AutoDispatchBelowAutograd``, on which ``torch.library``'s own autograd kernels are built | yes | yes |
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

HOOK = "post_grad_custom_post_pass"


@functools.cache
def sources_digest() -> str:
    """Hash of every source file of the package, of torch's and Triton's versions: what the caches must depend on.

    torch keys its compiled graphs on the rewritten graph, which names our operators but not their shape functions,
    backward formulas or kernels: without this digest an edit of those would be served from an old entry.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    roots = [package] if (package / "backend.py").exists() else [package / "dscompile"]
    roots += [package / name for name in ("passes", "lowering", "kernels", "runtime")]
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cu", ".cuh")):
            digest.update(path.name.encode() + path.read_bytes())
    digest.update(torch.__version__.encode())
    return digest.hexdigest()


class Stamp(CustomGraphPass):
    """A pass that changes nothing: it carries our digest into torch's cache keys and runs the user's own pass.

    ``inner`` is the pass that was configured before; if it has no ``uuid`` torch can't cache, as without us.
    """

    def __init__(self, key: str, inner: Any = None):
        self.key, self.inner = key, inner

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.inner if isinstance(self.inner, (list, tuple)) else (self.inner,):
            if one is not None:
                one(graph)

    def uuid(self) -> Any:
        keys = [self.key]
        for one in self.inner if isinstance(self.inner, (list, tuple)) else (self.inner,):
            if one is not None:
                inner = one.uuid() if hasattr(one, "uuid") else None
                if inner is None:
                    return None
                keys.append(str(inner))
        return "dsinfra:" + ":".join(keys)


def is_option(name: str) -> bool:
    """True if Inductor has a setting of this name (dots or underscores as Inductor accepts them)."""
    return name.replace("-", "_") in torch._inductor.config.get_config_copy()


def patches(mode: str | None, options: dict[str, Any], key: str) -> dict[str, Any]:
    """Inductor settings of one compilation: the mode's, the user's own, and our stamp."""
    found = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    found |= {name.replace("-", "_"): value for name, value in options.items()}
    before = found.get(HOOK, getattr(torch._inductor.config, HOOK))
    found[HOOK] = Stamp(sources_digest() + key, before)
    return found


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any], key: str
) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a rewritten graph, under settings of this call alone."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, inputs, config_patches=patches(mode, options, key))  # type: ignore[return-value]


def below_autograd() -> Any:
    """A context in which an operator's call goes past autograd to its kernel."""
    return torch._C._AutoDispatchBelowAutograd()


def compile_eager(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """AOTAutograd without code generation: the graphs Inductor would get, run operator by operator."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(module, inputs)


def copied_input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """An input of Dynamo's graph in another graph, with the source that AOTAutograd asks for (node_copy leaves it)."""
    made = graph.node_copy(node)
    made._dynamo_source = getattr(node, "_dynamo_source", None)  # type: ignore[attr-defined]
    return made


def static_input(graph: fx.Graph, name: str, meta: dict[str, Any], value: torch.Tensor) -> fx.Node:
    """A further input of a graph from Dynamo: a tensor whose address stays, as a parameter's does, for CUDA graphs.

    Its sizes are numbers also under ``dynamic=True``: AOTAutograd is told by the tracing context, where Dynamo notes
    the tensors that it knows.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    made = graph.placeholder(name)
    made.meta = {**meta, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
    made._dynamo_source = None  # type: ignore[attr-defined]
    context = TracingContext.try_get()
    if context is not None and value not in context.tensor_to_context:
        context.tensor_to_context[value] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * value.dim(),
            constraint_sizes=[None] * value.dim(),
            tensor_source=ConstantSource(name),
        )
    return made


def reset() -> None:
    """What ``torch._dynamo.reset`` resets for Inductor: the pools of captured CUDA graphs."""
    from torch._inductor import config

    if config.triton.cudagraph_trees and torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
