"""Dumps: each pass's graph before and after as readable text, a unified diff, and the record as JSON.

Layout, under the directory of ``DSINFRA_DUMP`` or ``options={"dump": ...}``::

    graph_000/00_shadow.after.txt  01_recognize_mla.before.txt  ....after.txt  ....diff  record.json  explain.txt
              graphs.json  schedule.json

``graphs.json`` (``snapshots.py``) holds all graphs once more, compactly, with the source lines that nodes point at:
what ``dscompile report`` draws (``docs/report.md``). ``schedule.json`` is written where micro-batches were planned, for
``dscompile report schedule``.

The texts also go to ``torch._logging.trace_structured``, so that ``tlparse`` shows them beside torch's own artifacts.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch._logging import trace_structured

import dscompile
from dscompile.config import Config
from dscompile.errors import DumpDirectoryError
from dscompile.passes import microbatch
from dscompile.passes.graph import source_line
from dscompile.passes.pipeline import NUMBERS
from dscompile.snapshots import Snapshots, parts

if TYPE_CHECKING:
    from dscompile.report import CompileReport


class Dump:
    """Artifacts of one compiled graph; writes files only if a directory was given."""

    def __init__(self, directory: str | None):
        self.directory = _claim(Path(directory)) if directory else None
        self._before: dict[str, str] = {}
        self._snapshots = Snapshots()

    def observe(self, name: str, stage: str, module: fx.GraphModule) -> None:
        """Called by the pipeline around each pass."""
        if self.directory is None and not _tracing():
            return
        if self.directory is not None:
            self._snapshots.add(name, stage, module)
        text = readable(module)
        prefix = f"{NUMBERS[name]:02d}_{name}"
        self._write(f"{prefix}.{stage}.txt", text)
        if stage == "before":
            self._before[name] = text
        elif name in self._before:
            before = self._before[name].splitlines(keepends=True)
            lines = difflib.unified_diff(before, text.splitlines(keepends=True), "before", "after", n=2)
            self._write(f"{prefix}.diff", "".join(lines))
            if name == microbatch.NAME and microbatch.SCHEDULE in module.meta:
                self._write("schedule.json", json.dumps(module.meta[microbatch.SCHEDULE]))

    def finish(self, report: CompileReport, config: Config) -> None:
        """The record of all passes, and under which settings and versions it was made."""
        record = report.as_dict() | {"settings": _settings(config), "versions": versions()}
        self._write("record.json", json.dumps(record, indent=1))
        self._write("explain.txt", str(report) + "\n")
        if self.directory is not None:
            graphs = json.dumps(self._snapshots.as_dict(), separators=(",", ":"))
            (self.directory / "graphs.json").write_text(graphs)

    def _write(self, name: str, text: str) -> None:
        if self.directory is not None:
            (self.directory / name).write_text(text)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"dsinfra_{name}", "encoding": "json" if name.endswith(".json") else "string"},
            payload_fn=lambda: text,
        )


def _settings(config: Config) -> dict[str, object]:
    """Those that differ from the defaults."""
    default, own = Config(), [f.name for f in fields(config) if f.name not in ("inductor", "dump", "placement")]
    changed = {name: getattr(config, name) for name in own if getattr(config, name) != getattr(default, name)}
    placed = {} if config.placement is None else {"placement": sorted(config.placement.layers)}
    return changed | placed | {name: str(value) for name, value in config.inductor.items()}


def versions() -> dict[str, str]:
    """Of the packages that decide what is compiled, those that are installed; torch's with its build (`+cu130`)."""
    found = {"dscompile": dscompile.__version__, "torch": torch.__version__}
    for name in ("triton", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
    kind, call, arguments = parts(node)
    line = source_line(node)
    left = f"{node.name}: {kind}" if kind else node.name
    return f"  {left} = {call}({arguments})".replace("\0", "") + (f"  # {line}" if line != "?" else "")
