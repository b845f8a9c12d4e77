"""One HTML page of when everything runs, and the same as a trace for Perfetto: ``dscompile report schedule FILE``.

The file is JSON: a list of spans, or an object of such lists by name, which are drawn below each other on one scale
(``{"planned": [..], "measured": [..]}``; what a compilation plans is the ``schedule.json`` of its dump). A span is

    {"row": "rank 0/compute", "kind": "experts", "name": "layer 3, A", "start_us": 120.5, "end_us": 356.0}

A row is a rank, or with a slash a stream of a rank; rows ``compute`` and ``comm`` without one are streams of a single
rank. A span is communication if its row's last part is ``comm`` or its kind is send, recv or ends in ``_start``. Shown
are bars in a colour for each kind, of each row the part of the whole time in which it is idle (its bubble), and of each
timeline how much communication lies under computation of the same rank. The page loads nothing and has no script; names
are the only text that is not ours, and are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dscompile.errors import ReportError

_WIDTH, _ROW, _LABEL, _AXIS = 1080, 24, 130, 26  # pixels
_TICKS = 8
_NARROWEST, _LETTER = 0.4, 8.0  # pixels of a bar, and of a letter in it
_COLOURS = (
    *("#7aa6dc", "#f2b66d", "#8fc98b", "#e39aa6", "#b7a3dc", "#8fd0cf", "#d9c36b", "#c99f7f"),
    *("#a9bf6f", "#d7a3cf", "#9fb3c8", "#f0a58a"),
)
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1c1e21; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; } text { font-size: 11px; }
line { stroke: #d8dade; } rect { stroke: #fff; stroke-width: .3; }
"""


class Span(NamedTuple):
    """One bar, in microseconds."""

    row: str
    kind: str
    name: str
    start_us: float
    end_us: float

    @property
    def rank(self) -> str:
        """Spans of one rank overlap each other's communication."""
        above, slash, _ = self.row.rpartition("/")
        return above if slash or self.row in ("compute", "comm") else self.row

    @property
    def is_comm(self) -> bool:
        return self.row.rpartition("/")[2] == "comm" or self.kind in ("send", "recv") or self.kind.endswith("_start")


Timelines = dict[str, list[Span]]


def write(source: Path, file: Path | None = None) -> Path:
    """Reads a schedule, writes its page to ``file`` (by default beside it, as .html) and a trace beside that; -> page.

    Raises:
        ReportError: the schedule can't be read or is none, or a file can't be written.
    """
    try:
        timelines = checked(json.loads(source.read_text()))
    except OSError as error:
        raise ReportError(f"{str(source)!r} can't be read ({error.strerror or error})") from error
    except ValueError as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{str(source)!r} is no JSON ({error}): write a list of spans") from error
    file = file or source.with_suffix(".html")
    try:
        file.write_text(page(timelines))
        file.with_suffix(".trace.json").write_text(json.dumps(trace(timelines)))
    except OSError as error:
        raise ReportError(f"the page {str(file)!r} can't be written ({error.strerror or error})") from error
    return file


def checked(found: Any) -> Timelines:
    """The timelines of a file; raises ReportError where a span lacks a field, or ends before it begins."""
    wanted = "A schedule is a list of {row, kind, name, start_us, end_us}, or an object of such lists by name"
    lists = {"schedule": found} if isinstance(found, list) else found
    if not isinstance(lists, dict) or not any(lists.values()):
        raise ReportError(f"the file holds a {type(found).__name__} without spans: there is nothing to draw. {wanted}")
    timelines: Timelines = {}
    for name, spans in lists.items():
        if not isinstance(spans, list):
            raise ReportError(f"{name!r} is a {type(spans).__name__} and no list of spans. {wanted}")
        timelines[name] = [_span(one, f"span {i} of {name!r}", wanted) for i, one in enumerate(spans)]
    return timelines


def _span(one: Any, where: str, wanted: str) -> Span:
    if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("row", "kind", "name")):
        raise ReportError(f"{where} is {one!r}: row, kind and name must be text. {wanted}")
    start: Any = one.get("start_us")
    end: Any = one.get("end_us")
    for time in (start, end):
        if type(time) not in (int, float) or not math.isfinite(time):
            raise ReportError(f"{where} has a time {time!r}: it must be a number of microseconds. {wanted}")
    if end < start:
        raise ReportError(f"{where} is from {start} to {end} us: it must not end before it begins. {wanted}")
    return Span(one["row"], one["kind"], one["name"], float(start), float(end))


# ------------------------------------------------------------------ numbers


def _merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The time that spans cover, as intervals in order that don't touch."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start_us):
        if found and span.start_us <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], span.end_us)
        else:
            found.append((span.start_us, span.end_us))
    return found


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def extent(spans: Iterable[Span]) -> float:
    """Microseconds from the first start to the last end."""
    every = list(spans)
    return max(s.end_us for s in every) - min(s.start_us for s in every) if every else 0.0


def bubbles(spans: list[Span]) -> dict[str, float]:
    """Of each row, the part of the timeline in which nothing runs there."""
    total = extent(spans)
    rows = dict.fromkeys(s.row for s in spans)
    return {row: 1 - _length(_merged(s for s in spans if s.row == row)) / total if total else 0.0 for row in rows}


def hidden(spans: list[Span]) -> float | None:
    """The part of all communication that lies under computation of its own rank; None without communication."""
    whole = seen = 0.0
    for rank in dict.fromkeys(s.rank for s in spans):
        comm = _merged(s for s in spans if s.rank == rank and s.is_comm)
        work = _merged(s for s in spans if s.rank == rank and not s.is_comm)
        whole += _length(comm)
        seen += _length(comm) + _length(work) - _length(_union(comm, work))  # what both cover
    return seen / whole if whole else None


def _union(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return _merged(Span("", "", "", *interval) for interval in (*left, *right))


# ------------------------------------------------------------------ trace


def trace(timelines: Timelines) -> dict[str, Any]:
    """Chrome's trace format, which ui.perfetto.dev opens: a process for each timeline, a thread for each row."""
    events: list[dict[str, Any]] = []
    for pid, (name, spans) in enumerate(timelines.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        rows = {row: tid for tid, row in enumerate(dict.fromkeys(s.row for s in spans))}
        for row, tid in rows.items():
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": row}})
        events += [
            dict(ph="X", pid=pid, tid=rows[s.row], name=s.name, cat=s.kind, ts=s.start_us, dur=s.end_us - s.start_us)
            for s in spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


# ------------------------------------------------------------------ page


def page(timelines: Timelines) -> str:
    """The whole page."""
    kinds = list(dict.fromkeys(s.kind for spans in timelines.values() for s in spans))
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)}
    scale = max(map(extent, timelines.values())) or 1.0
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Schedule</title>',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{style}'\">",
            f"<style>{_STYLE}</style></head><body><h1>Schedule</h1>",
            _legend(colours),
            *(_timeline(name, spans, scale, colours) for name, spans in timelines.items()),
            "</body></html>",
        ]
    )


def _legend(colours: dict[str, str]) -> str:
    parts, x, y = [], 0.0, 0
    for kind, colour in colours.items():
        if x + 24 + _LETTER * len(kind) > _WIDTH:
            x, y = 0.0, y + 18
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 10}">{html.escape(kind)}</text>')
        x += 32 + _LETTER * len(kind)
    return f'<svg viewBox="0 0 {_WIDTH} {y + 16}" width="{_WIDTH}" role="img" aria-label="kinds">{"".join(parts)}</svg>'


def _timeline(name: str, spans: list[Span], scale: float, colours: dict[str, str]) -> str:
    under = hidden(spans)
    said = f"{extent(spans):,.1f} us" + ("" if under is None else f", {under:.1%} of communication hidden")
    idle = bubbles(spans)
    table = "".join(f"<tr><td>{html.escape(row)}</td><td>{part:.1%}</td></tr>" for row, part in idle.items())
    return (
        f"<h2>{html.escape(name)}</h2><p>{said}</p>{_chart(name, spans, scale, colours)}"
        f"<table><thead><tr><th>row</th><th>bubble</th></tr></thead><tbody>{table}</tbody></table>"
    )


def _chart(name: str, spans: list[Span], scale: float, colours: dict[str, str]) -> str:
    """Rows of bars over an axis of microseconds; `scale` of them fill the width."""
    first = min((s.start_us for s in spans), default=0.0)
    rows = {row: i for i, row in enumerate(dict.fromkeys(s.row for s in spans))}
    height, pixel = len(rows) * _ROW + _AXIS, (_WIDTH - _LABEL) / scale
    parts = []
    for i in range(_TICKS + 1):
        x = _LABEL + i * (_WIDTH - _LABEL) / _TICKS
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - _AXIS}"/>')
        anchor, us = ("end", f"{i * scale / _TICKS:,.0f} us") if i else ("start", "0")
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{us}</text>')
    parts += [f'<text x="0" y="{i * _ROW + 15}">{html.escape(row)}</text>' for row, i in rows.items()]
    for s in spans:
        x, width = _LABEL + (s.start_us - first) * pixel, max((s.end_us - s.start_us) * pixel, _NARROWEST)
        y = rows[s.row] * _ROW
        title = html.escape(f"{s.name} ({s.kind}): {s.start_us:,.1f} to {s.end_us:,.1f} us")
        parts.append(
            f'<rect x="{x:.2f}" y="{y + 2}" width="{width:.2f}" height="{_ROW - 5}" fill="{colours[s.kind]}">'
            f"<title>{title}</title></rect>"
        )
        if width > _LETTER * len(s.name) + 4:
            parts.append(f'<text x="{x + 3:.2f}" y="{y + 15}">{html.escape(s.name)}</text>')
    label = html.escape(f"{name}: what runs when", quote=True)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
