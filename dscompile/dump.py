"""Dumps: each pass's graph before and after as readable text, a unified diff, and the record as JSON.

Layout, under the directory of ``DSINFRA_DUMP`` or ``options={"dump": ...}``::

    graph_000/00_shadow.after.txt  01_recognize_mla.before.txt  ....after.txt  ....diff  record.json  explain.txt

The same texts go to ``torch._logging.trace_structured``, so that ``tlparse`` shows them beside torch's own artifacts.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx
from torch._logging import trace_structured

from dscompile.errors import DumpDirectoryError
from dscompile.passes.pipeline import NUMBERS

if TYPE_CHECKING:
    from dscompile.report import CompileReport


class Dump:
    """Artifacts of one compiled graph; writes files only if a directory was given."""

    def __init__(self, directory: str | None):
        self.directory = _claim(Path(directory)) if directory else None
        self._before: dict[str, str] = {}

    def observe(self, name: str, stage: str, module: fx.GraphModule) -> None:
        """Called by the pipeline around each pass."""
        if self.directory is None and not _tracing():
            return
        text = readable(module)
        prefix = f"{NUMBERS[name]:02d}_{name}"
        self._write(f"{prefix}.{stage}.txt", text)
        if stage == "before":
            self._before[name] = text
        elif name in self._before:
            before = self._before[name].splitlines(keepends=True)
            lines = difflib.unified_diff(before, text.splitlines(keepends=True), "before", "after", n=2)
            self._write(f"{prefix}.diff", "".join(lines))

    def finish(self, report: CompileReport) -> None:
        """The record of all passes."""
        self._write("record.json", json.dumps(report.as_dict(), indent=1))
        self._write("explain.txt", str(report) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.directory is not None:
            (self.directory / name).write_text(text)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"dsinfra_{name}", "encoding": "json" if name.endswith(".json") else "string"},
            payload_fn=lambda: text,
        )


def _claim(root: Path) -> Path:
    """A fresh numbered directory below ``root``; raises DumpDirectoryError before anything is compiled."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            directory = root / f"graph_{number:03d}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory
    except OSError as error:
        raise DumpDirectoryError(
            f"the dump directory {str(root)!r} can't be written ({error.strerror or error}): "
            "give a directory you own, or unset DSINFRA_DUMP"
        ) from error
    raise AssertionError("unreachable")


def _tracing() -> bool:
    return "TORCH_TRACE" in os.environ


def readable(module: fx.GraphModule) -> str:
    """The graph and the bodies of its higher-order operators, a line a node, with shapes and source lines."""
    lines = []
    for name, child in module.named_modules():
        if isinstance(child, fx.GraphModule):
            lines.append(f"graph {name or '(top)'}:")
            lines.extend(_line(node) for node in child.graph.nodes)
    return "\n".join(lines) + "\n"


def _line(node: fx.Node) -> str:
    from dscompile.passes.graph import source_line

    value = node.meta.get("example_value", node.meta.get("val"))
    shape = ""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shape = f": {str(value.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in value.shape)}]"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_function" and hasattr(node.target, "_schema"):
        target = str(node.target)
    args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    line = source_line(node)
    return f"  {node.name}{shape} = {target}({args})" + (f"  # {line}" if line != "?" else "")
