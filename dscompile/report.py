"""What was recognised, transformed and lowered, or refused and why: the visible half of every decision.

Each compiled graph leaves a :class:`CompileReport`; :func:`reports` lists those of this process, :func:`explain` makes
one for a model without generating code. ``str(report)`` is the table.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dscompile.passes.record import PassRecord, Site

if TYPE_CHECKING:
    from dscompile.passes.commits import Rewrite

_LOCK = threading.Lock()
_REPORTS: list[CompileReport] = []


@dataclass
class CompileReport:
    """One graph: its sites, the passes' records, and what is left in the graph after them."""

    records: list[PassRecord] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    op_counts: dict[str, int] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)
    error: str = ""
    device: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each pass."""
        return {r.name: r.seconds for r in self.records}

    @property
    def matched(self) -> list[Site]:
        return [s for s in self.sites if s.matched]

    @property
    def refused(self) -> list[Site]:
        return [s for s in self.sites if not s.matched]

    @property
    def near_misses(self) -> list[Site]:
        """What looks like a site and is none, where that is worth a line."""
        return [s for r in self.records for s in r.near_misses]

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "error": self.error,
            "op_counts": self.op_counts,
            "rewrites": [r.as_dict() for r in self.rewrites],
            "passes": [r.as_dict() for r in self.records],
        }

    def __str__(self) -> str:
        return table([self])


@dataclass
class Explanation:
    """Reports of every graph that one call of a model compiled."""

    graphs: list[CompileReport]

    @property
    def sites(self) -> list[Site]:
        return [s for g in self.graphs for s in g.sites]

    def __str__(self) -> str:
        return table(self.graphs)


def reports() -> list[CompileReport]:
    """Reports of the graphs compiled in this process, oldest first."""
    with _LOCK:
        return list(_REPORTS)


def last() -> CompileReport | None:
    """The newest report, or None."""
    with _LOCK:
        return _REPORTS[-1] if _REPORTS else None


def clear() -> None:
    """Forget all reports."""
    with _LOCK:
        _REPORTS.clear()


def add(report: CompileReport) -> None:
    with _LOCK:
        _REPORTS.append(report)


def explain(model: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``model(*args, **kwargs)`` once through the passes, without code generation, and reports every decision.

    The call is a real one: a cache that is passed in advances as it does in eager mode. The model is not changed.

    Args:
        model: an ``nn.Module`` or function, not yet compiled.
        args, kwargs: the inputs of one call; prefill and decode are different calls and may decide differently.

    Returns:
        Explanation: ``print`` it for the table, or read ``sites`` (one :class:`Site` each).
    """
    import torch

    from dscompile.backend import dsinfra

    seen: list[CompileReport] = []

    def backend(module, inputs):
        return dsinfra(module, inputs, options={"inner": "eager"}, sink=seen.append)

    with torch._dynamo.utils.preserve_rng_state():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return Explanation(seen)


# ------------------------------------------------------------------ the table


def table(graphs: list[CompileReport]) -> str:
    """Sites of some graphs as text; layers that differ only in their number share a line."""
    blocks = []
    for number, graph in enumerate(graphs):
        lines = [f"graph {number}" + (f" on {graph.device}" if graph.device else "")]
        if graph.error:
            lines.append(f"  analysis stopped, the rest is Inductor's: {graph.error}")
        lines += [f"  not looked at: {r.note}" for r in graph.records if r.name == "shadow" and r.note]
        for key, sites in _grouped(graph.sites).items():
            lines.extend(_entry(key, sites))
        if not graph.sites:
            lines.append("  no attention, expert layer or FP8 layer found")
        lines.extend(_near(graph))
        blocks.append("\n".join(lines))
    return "\n".join(blocks) if blocks else "nothing was compiled"


_SHOWN = ("source", "form", "mask", "decision", "kernel", "reason", "hint")
_ORDER = ("source", "form", "mask", "decision", "closest", "kernel", "reason", "hint")


def _grouped(sites: list[Site]) -> dict[tuple, list[Site]]:
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        proof = () if site.matched else (site.closest, *site.proved)
        key = (site.kind, site.matched, site.refusal, proof, *(getattr(site, f) for f in _SHOWN))
        groups.setdefault(key, []).append(site)
    return groups


def _entry(key: tuple, sites: list[Site]) -> list[str]:
    kind, matched, refusal, _, *shown = key
    names = [site.module_path or "(top)" for site in sites]
    count = f"{len(names)} x " if len(names) > 1 else ""
    where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
    head = f"  {count}{kind} {'lowered' if matched else f'refused ({refusal})'}: {where}"
    lines = [head]
    texts = dict(zip(_SHOWN, shown, strict=True))
    if not matched:  # of a match, the form says it
        texts["closest"] = _how_far(sites[0])
    lines += [f"      {name:9s}{texts[name]}" for name in _ORDER if texts.get(name, "?") not in ("", "?")]
    largest = {what: max(s.errors[what] for s in sites if what in s.errors) for s in sites for what in s.errors}
    if largest:
        lines.append("      errors   " + ", ".join(f"{what} {_percent(e)}" for what, e in largest.items()))
    return lines


def _how_far(site: Site) -> str:
    """What a refused site was tried as, and the last fact that held; all of them stand in the record."""
    if not site.proved:
        return site.closest
    count = f"{len(site.proved)} facts held" if len(site.proved) > 1 else "one fact held"
    return f"{site.closest}; {count}, the last: {site.proved[-1]}"


def _percent(error: float) -> str:
    return f"{100 * error:.1f} %" if error >= 1e-3 or error == 0 else f"{error:.1e}"


def _near(graph: CompileReport) -> list[str]:
    """A line for what looks like a site and is none; equal ones share it."""
    counts = Counter((s.closest, s.source, s.refusal, s.reason) for s in graph.near_misses)
    return [
        f"  near miss{f' ({n} x)' if n > 1 else ''} at {source}: {closest}; but {reason} ({refusal})"
        for (closest, source, refusal, reason), n in counts.items()
    ]


def summary(graphs: list[CompileReport]) -> str:
    """One line: how many sites were lowered and refused, and why."""
    sites = [s for g in graphs for s in g.sites]
    why = Counter(s.refusal for s in sites if not s.matched)
    text = f"{sum(s.matched for s in sites)} of {len(sites)} sites lowered"
    return text + (f"; refused: {', '.join(f'{n} x {r}' for r, n in why.items())}" if why else "")
