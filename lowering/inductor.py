"""The one file that touches private torch API, with the versions that each use was checked on.

| use | torch 2.11 | torch 2.13 |
|---|---|---|
| ``compile_fx(gm, inputs, inner_compile, config_patches=...)`` | yes | yes (one more parameter, unused) |
| ``CustomGraphPass`` with ``uuid()`` as ``post_grad_custom_post_pass`` | one | one or a list |
| ``list_mode_options``, ``list_options`` (public), ``config.get_type`` | yes | yes |
| ``_dynamo_source`` and ``meta["tensor_dict"]`` of Dynamo's inputs, ``TracingContext.tensor_to_context`` | yes | yes |
| ``torch._C._AutoDispatchBelowAutograd``, on which ``torch.library``'s own autograd kernels are built | yes | yes |
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_origin

import torch
from torch import fx
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

HOOK = "post_grad_custom_post_pass"
TAKES_LISTS = hasattr(custom_graph_pass, "get_custom_graph_passes")  # whether a hook may hold several passes


@functools.cache
def sources_digest() -> str:
    """Hash of every source file of the package (its version is in one) and of torch's version, for the caches' keys.

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
    """A pass that changes nothing: it carries our digest into the keys of torch's caches, behind the user's passes."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, graph: fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return f"dsinfra:{self.key}"


# Settings that are wrong beside our kernels. With PDL, Inductor's kernels don't wait for a kernel ahead whose results
# they don't read, nor so for those ahead of it; ours begin before that one has ended.
APART = ("triton.enable_pdl",)


class Chain(CustomGraphPass):
    """Several passes as one, for a torch whose setting holds a single one.

    If one of them has no ``uuid`` torch can't cache, as without us.
    """

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]):
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        keys = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in keys else tuple(keys)


def stamped(passes: Any, stamp: Stamp) -> Any:
    """A value of the setting :data:`HOOK`: the passes that it held, each as it was, and the stamp behind them."""
    held = passes.passes if isinstance(passes, Chain) else passes
    held = held if isinstance(held, (list, tuple)) else () if held is None else (held,)
    every = [*(one for one in held if not isinstance(one, Stamp)), stamp]
    if TAKES_LISTS:
        return every
    return stamp if len(every) == 1 else Chain(every)


def modes() -> list[str]:
    """The modes that this torch has."""
    return list(torch._inductor.list_mode_options())


def option_names() -> list[str]:
    """Every setting of Inductor."""
    return torch._inductor.list_options()


def is_option(name: str) -> bool:
    """True if Inductor has a setting of this name (dots or underscores as Inductor accepts them)."""
    return name.replace("-", "_") in option_names()


def wanted_type(name: str, value: Any) -> str:
    """What a value must be for Inductor to take it under this name; empty if it is that, or if Inductor can't tell."""
    wanted = torch._inductor.config.get_type(name.replace("-", "_"))  # type: ignore[attr-defined]
    if get_origin(wanted) is not None or isinstance(value, wanted):
        return ""
    return getattr(wanted, "__name__", str(wanted))


def settings(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor settings of one compilation: the mode's, and over them the user's own."""
    found = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    return found | {name.replace("-", "_"): value for name, value in options.items()}


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any], key: str
) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a rewritten graph, under settings of this call alone.

    The stamp is added to whatever passes are set when a graph is compiled, and :data:`APART` switched off: a backward
    is compiled later than its forward, and under the settings of that moment, as without us.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    stamp, found = Stamp(sources_digest() + key), settings(mode, options)

    def stamp_set() -> Any:
        apart = {name: False for name in APART if is_option(name) and name not in found}
        return config.patch({HOOK: stamped(getattr(config, HOOK), stamp), **apart})

    @functools.wraps(compile_fx_inner)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with stamp_set():
            return compile_fx_inner(*args, **kwargs)

    if HOOK in found:
        found[HOOK] = stamped(found[HOOK], stamp)
    with stamp_set():
        return compile_fx(module, inputs, inner_compile=inner, config_patches=found)  # type: ignore[return-value]


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
