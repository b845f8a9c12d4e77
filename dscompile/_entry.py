"""The entry point that torch loads for `backend="dsinfra"`, apart from `backend.py` so that loading it costs nothing.

torch resolves a backend's name while it builds the compiled callable; the backend's own imports (passes, operators,
kernels) wait until the first graph arrives. What has to stand before the first trace is set up here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

BACKEND_NAME = "dsinfra"


def dsinfra(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs: see `dscompile.backend.dsinfra`, which this calls with the same arguments."""
    from dscompile.backend import dsinfra as compile_graph

    return compile_graph(gm, example_inputs, mode=mode, options=options)


def _reset() -> None:
    """What `torch._dynamo.reset()` calls: the backend's own, if a graph ever loaded it."""
    backend = sys.modules.get("dscompile.backend")
    if backend is not None:
        backend.dsinfra.reset()


dsinfra.reset = _reset  # type: ignore[attr-defined]


def _watch() -> None:
    """Offer transformers' FP8 layers our kernels at the start of each compilation: a graph would come too late."""
    if "torch._dynamo" in sys.modules:  # torch loads this module from there
        from dscompile.adapters.hf_fp8 import watch

        watch()


_watch()


def ensure_registered() -> None:
    """Make the name known to torch where the package runs from a checkout that was never installed.

    An installed package needs no call: its entry point is found by name. Registering twice is an error in torch, so
    this does nothing when the name is already listed.
    """
    from torch._dynamo import list_backends, register_backend

    if BACKEND_NAME not in list_backends(exclude_tags=()):
        register_backend(dsinfra, name=BACKEND_NAME)
    _watch()
