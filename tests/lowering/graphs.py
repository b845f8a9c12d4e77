"""Compile a function with dynamic sizes and count how many graphs it took."""

from collections.abc import Callable
from typing import Any

import torch


def compile_counting(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """-> the compiled function, by AOTAutograd without code generation, and the list that its graphs are added to."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    return torch.compile(function, backend=backend, dynamic=True, fullgraph=True), graphs
