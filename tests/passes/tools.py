"""What the pass tests share: the shadow of a small function, and a function compiled through the passes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dscompile.backend import dsinfra
from dscompile.passes.memory import Memory
from dscompile.passes.record import PassRecord
from dscompile.passes.shadow import Shadow, trace
from dscompile.report import CompileReport


def shadow_of(fn: Callable, *args: Any, dynamic: bool | None = None) -> Shadow:
    """The shadow of one graph of ``fn``."""
    found: list[Shadow] = []

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        found.append(trace(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (shadow,) = found
    return shadow


def output_of(shadow: Shadow) -> tuple[fx.Node, Memory, int]:
    """(the shadow node that the function returns, memory, a time behind everything)."""
    memory = Memory(shadow.graph)
    returned = [n for n in shadow.graph.nodes if n.meta.get("dsinfra_returned")]
    return returned[-1], memory, len(memory.position)


def compiled(fn: Callable, *args: Any, **settings: Any) -> tuple[Any, list[CompileReport]]:
    """``fn(*args)`` through the backend without code generation, and the reports of its graphs."""
    reports: list[CompileReport] = []

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        return dsinfra(gm, inputs, options={"inner": "aot_eager", "strict": False}, sink=reports.append)

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, **settings)(*args), reports


def rewritten(step: Callable[[fx.GraphModule], PassRecord], fn: Callable, *args: Any) -> tuple[Any, PassRecord, Any]:
    """(``fn(*args)`` after one pass that rewrites Dynamo's graph by itself, its record, the graph)."""
    seen: list[tuple[PassRecord, fx.GraphModule]] = []

    def backend(module: fx.GraphModule, inputs: list) -> Callable:
        seen.append((step(module), module))
        return module.forward

    torch._dynamo.reset()
    result = torch.compile(fn, backend=backend, fullgraph=True, dynamic=False)(*args)
    ((record, module),) = seen
    return result, record, module
