"""README's tables, generated from `bench/results/*.json`: `python -m bench.table` rewrites them, `--check` compares.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`. Every case of a card is shown, losses included, in
the order in which it was measured; times of a CPU stay in their files. A benchmark without any yields a sentence that
says so: no number is typed in by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench import schema, zoo_table
from bench.results import RESULTS, ROOT, Row, read

_BLOCK = re.compile(r"(<!-- bench:(?P<name>[a-z0-9_]+) -->\n).*?(<!-- /bench -->)", flags=re.S)


def speed_up(row: Row) -> float | None:
    """How many times faster than the anchor (below 1: slower); None without an anchor."""
    return row["anchor_us"] / row["us"] if row["anchor_us"] is not None else None


def render(name: str, rows: list[Row]) -> str:
    """A Markdown table of one benchmark, with the cards, versions, commits and command under it."""
    if schema.of(name) is schema.ZOO:
        return zoo_table.render(rows)
    origins = dict.fromkeys(
        f"{r['card']}, torch {r['torch']}, triton {r['triton']}, commit {r['commit']}, {r['date']}" for r in rows
    )
    several = len({row["commit"] for row in rows}) > 1
    lines = ["| case | ours, us | anchor | anchor, us | speed-up |" + (" commit |" if several else "")]
    lines += ["|---|---:|---|---:|---:|" + ("---|" if several else "")]
    for row in rows:
        ratio = speed_up(row)
        anchor, anchor_us = (row["anchor"], f"{row['anchor_us']:,.1f}") if ratio is not None else ("none", "")
        times = f"{ratio:.2f}" if ratio is not None else ""
        line = f"| {row['case']} | {row['us']:,.1f} | {anchor} | {anchor_us} | {times} |"
        lines.append(line + (f" {row['commit']} |" if several else ""))
    lines += ["", f"{'; '.join(origins)}. `dscompile bench {name}`"]
    return "\n".join(lines) + "\n"


def plain(rows: list[Row]) -> str:
    """The same rows for a terminal, columns aligned."""
    if rows and schema.of(rows[0]["bench"]) is schema.ZOO:
        return zoo_table.plain(rows)
    cells = [("case", "ours us", "anchor us", "speed-up", "anchor")]
    for row in rows:
        ratio = speed_up(row)
        beside = ("-", "-", "-") if ratio is None else (f"{row['anchor_us']:,.1f}", f"{ratio:.2f}", str(row["anchor"]))
        cells.append((row["case"], f"{row['us']:,.1f}", *beside))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for case, *numbers, anchor in cells:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:])]
        lines.append("  ".join([case.ljust(widths[0]), *aligned, anchor]))
    return "\n".join(lines)


def updated(text: str, folder: Path = RESULTS) -> str:
    """`text` with every marked block replaced by what the files in `folder` say.

    Raises:
        ValueError: a marker is left open or has a malformed name.
        BadRow: a file does not fit the schema.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        try:
            rows = read(name, folder)
        except FileNotFoundError:
            rows = []
        if rows and schema.of(name) is not schema.ZOO:  # which says of its times that there are none
            rows = [row for row in rows if not row["card"].startswith("CPU")]
        missing = f"Not measured yet: `dscompile bench {name}` on a machine with the card writes it.\n"
        table = render(name, rows) if rows else missing
        return f"{match[1]}{table}{match[3]}"

    opened, found = text.count("<!-- bench:"), len(_BLOCK.findall(text))
    inner = [m.group(0) for m in _BLOCK.finditer(text) if m.group(0).count("<!-- bench:") > 1]
    if opened != found or inner:
        raise ValueError(
            f"{opened} '<!-- bench:NAME -->' markers but {found - len(inner)} complete blocks: each needs a name of "
            "[a-z0-9_] on a line of its own and a closing '<!-- /bench -->'."
        )
    return _BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite README.md, or with `--check` return 1 when it is out of date."""
    words = sys.argv[1:] if arguments is None else arguments
    if words not in ([], ["--check"]):
        print("usage: python -m bench.table [--check]", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = updated(text)
    if words and new != text:
        print("README.md does not show what bench/results says: run `python -m bench.table`", file=sys.stderr)
        return 1
    if new != text:
        readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
