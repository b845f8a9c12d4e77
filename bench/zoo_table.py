"""The zoo's results as a table: one line for each model and card, all its modes folded into it."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]


def render(rows: list[Row]) -> str:
    """Markdown, one table a card, with the card, versions, commits and the command under each."""
    blocks = []
    for card in dict.fromkeys(row["card"] for row in rows):
        own = [row for row in rows if row["card"] == card]
        origins = dict.fromkeys(
            f"{card}, torch {r['torch']}, triton {r['triton']}, commit {r['commit']}, {r['date']}" for r in own
        )
        lines = [
            "| model | version | modes | sites lowered | refused | error, eager's | compile s, Inductor's | warm s |"
        ]
        lines.append("|---|---|---|---:|---|---|---|---:|")
        models = dict.fromkeys((row["model"], row["version"]) for row in own)
        lines += [line([row for row in own if (row["model"], row["version"]) == model]) for model in models]
        blocks.append("\n".join([*lines, "", f"{'; '.join(origins)}. `dscompile bench zoo`"]))
    return "\n\n".join(blocks) + "\n"


def line(rows: list[Row]) -> str:
    """All modes of one model: errors and refusals are the largest, seconds the sums over the modes that were timed."""
    good = [row for row in rows if row["failure"] is None]
    modes = f"{', '.join(row['mode'].replace('_', ' ') for row in good)}: {len(good)}/{len(rows)}"
    failed = "".join(f"; **{row['mode']} fails**" for row in rows if row["failure"] is not None)
    refused: Counter[str] = Counter()
    for row in good:
        refused |= Counter(row["refused"])
    why = ", ".join(f"{number} x {reason}" for reason, number in refused.items()) or "none"
    cells = (
        rows[0]["model"],
        rows[0]["version"],
        modes + failed,
        str(max((row["lowered"] for row in good), default=0)),
        why,
        f"{_largest(good, 'error')}, {_largest(good, 'eager_error')}",
        _seconds(good),
        _warm(good),
    )
    return "| " + " | ".join(cells) + " |"


def _largest(rows: list[Row], field: str) -> str:
    found = [row[field] for row in rows if row[field] is not None]
    return f"{max(found):.1e}" if any(found) else "0"


def _seconds(rows: list[Row]) -> str:
    timed = [row for row in rows if row["compile_s"] is not None and row["inductor_s"] is not None]
    if not timed:
        return "not timed"
    ours, theirs = (sum(row[field] for row in timed) for field in ("compile_s", "inductor_s"))
    return f"{ours:.1f}, {theirs:.1f}"


def _warm(rows: list[Row]) -> str:
    timed = [row["warm_s"] for row in rows if row["warm_s"] is not None]
    return f"{sum(timed):.1f}" if timed else ""


def plain(rows: list[Row]) -> str:
    """Every row for a terminal."""
    lines = []
    for row in rows:
        times = " ".join(
            f"{name} {row[field]:.1f} s"
            for name, field in (("ours", "compile_s"), ("inductor", "inductor_s"), ("warm", "warm_s"))
            if row[field] is not None
        )
        verdict = row["failure"] or f"{row['lowered']} lowered, {sum(row['refused'].values())} refused"
        lines.append(f"{row['model']:24} {row['version']:8} {row['mode']:15} {verdict}  {times}")
    return "\n".join(lines)
