"""Reads a dump directory into what the page shows; refuses with a reason what is no dump.

A graph whose files are missing or broken does not hide the others: it is named, with the reason, on the page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dscompile.errors import ReportError

# Lists of sites in a pass's record, and what those in them are; sites proper are lowered or refused.
_STATES = {"sites": "", "near_misses": "near miss", "passed_over": "passed over"}
_SITE = ("kind", "module_path", "source", "matched")


@dataclass
class Collected:
    """``report``: what the page shows at once; ``graphs``: ``graphs.json`` of each compiled graph, or None."""

    report: dict[str, Any]
    graphs: list[dict[str, Any] | None]
    broken: list[str] = field(default_factory=list)  # why a graph is left out, one sentence each


def collect(directory: Path) -> Collected:
    """Every graph below a dump directory, or the one that a ``graph_NNN`` holds.

    Raises:
        ReportError: the directory holds no graph, or none that can be read.
    """
    shown, drawn, broken = [], [], []
    folders = _folders(directory)
    for folder in folders:
        try:
            record, graphs = _record(folder), _graphs(folder)
        except ReportError as error:
            broken.append(str(error))
            continue
        shown.append(_graph(folder.name, record, graphs))
        drawn.append(graphs)
    if not shown:
        raise ReportError(f"{broken[0]} Nothing of {str(directory)!r} can be shown; compile again with a new directory")
    return Collected({"directory": directory.name, "graphs": shown, "broken": broken}, drawn, broken)


def _folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise ReportError(f"{str(directory)!r} {found}: {_WANTED}")
    if directory.name.startswith("graph_"):
        return [directory]
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and path.name.startswith("graph_"))
    if not folders:
        names = sorted(path.name for path in directory.iterdir())
        there = f"holds {', '.join(names[:5])}{' ..' if len(names) > 5 else ''}" if names else "is empty"
        raise ReportError(f"{str(directory)!r} {there}, but no graph_NNN of a compilation: {_WANTED}")
    return folders


_WANTED = 'give the directory of options={"dump": ...} or DSINFRA_DUMP, after a compilation'


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise ReportError(f"{file.parent.name}/{file.name} can't be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise ReportError(f"{file.parent.name}/{file.name} is no JSON ({error}): it was cut off or changed.") from error


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / "record.json").exists():
        raise ReportError(f"{folder.name} has no record.json: its compilation raised, or is not done yet.")
    record = _read(folder / "record.json")
    passes = record.get("passes") if isinstance(record, dict) else None
    if not isinstance(passes, list) or not all(isinstance(p, dict) and _sites(p) is not None for p in passes):
        raise ReportError(f"{folder.name}/record.json holds no list of passes with their sites: no dump wrote it.")
    return record


def _sites(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    sites = record.get("sites")
    if not isinstance(record.get("name"), str) or not isinstance(sites, list):
        return None
    return sites if all(isinstance(s, dict) and all(name in s for name in _SITE) for s in sites) else None


def _graphs(folder: Path) -> dict[str, Any] | None:
    """What ``snapshots.py`` wrote; None in a dump without it."""
    if not (folder / "graphs.json").exists():
        return None
    graphs = _read(folder / "graphs.json")
    wanted = {"names", "bodies", "rows", "graphs", "passes", "places", "files"}
    if not isinstance(graphs, dict) or not wanted <= graphs.keys():
        raise ReportError(f"{folder.name}/graphs.json lacks some of {', '.join(sorted(wanted))}: no dump wrote it.")
    return graphs


def _graph(name: str, record: dict[str, Any], graphs: dict[str, Any] | None) -> dict[str, Any]:
    """The record, each site once with its state and the passes that list it, and how many lines each pass changed."""
    sites = [site for key in _STATES for site in _once(record["passes"], key)]
    passes = []
    for one in record["passes"]:
        rest = {key: value for key, value in one.items() if key not in _STATES}
        passes.append(rest | _changes(one["name"], graphs))
    rest = {key: value for key, value in record.items() if key not in ("passes", "rewrites")}
    return {**rest, "name": name, "passes": passes, "sites": sites}


def _once(passes: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Equal sites of one pass are several places; those of two passes are one."""
    sites: dict[str, dict[str, Any]] = {}
    for one in passes:
        seen: dict[str, int] = {}
        for site in one.get(key, []):
            text = json.dumps(site, sort_keys=True)
            seen[text] = seen.get(text, 0) + 1
            state = _STATES[key] or ("lowered" if site["matched"] else "refused")
            known = sites.setdefault(f"{seen[text]} {text}", {**site, "state": state, "passes": []})
            known["passes"].append(one["name"])
    return list(sites.values())


def _changes(name: str, graphs: dict[str, Any] | None) -> dict[str, Any]:
    stages = (graphs or {}).get("passes", {}).get(name, {})
    if graphs is None or "after" not in stages or "before" not in stages:
        return {"drawn": bool(stages)}
    before, after = (_rows(graphs["graphs"][stages[stage]]) for stage in ("before", "after"))
    return {"drawn": True, "added": len(after - before), "removed": len(before - after)}


def _rows(runs: list[list[int]]) -> set[int]:
    return {row for first, count in runs for row in range(first, first + count)}
