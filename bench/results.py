"""Benchmark results as data: the schema of a row, the checks behind a claim, and the files in `bench/results/`.

Numbers are only worth keeping when they can be traced and were taken on right answers. So a row carries the card, the
versions and the commit; a file is written only after the benchmark compared its outputs with a reference; and what does
not fit the schema is refused when written and again when read. Times are medians in microseconds of the whole operator
or step; the speed-up is `anchor_us / us`, never stored.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import schema

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent

# Not code: writing a result must not make the next one look as if it came from changed sources.
_NOT_SOURCES = ("bench/results", "README.md")


# One measured case; its fields are those of `schema.of(name)`. `bench` is the benchmark's name and also the file's,
# `card` the device as its driver names it, `commit` that of the sources measured (-dirty when they were changed).
Row = dict[str, Any]


class BadRow(ValueError):
    """A row that does not fit the schema."""


class CheckFailed(AssertionError):
    """A benchmark's outputs were wrong, or it never looked at them: its times mean nothing."""


_checks_made = 0


def check(ok: bool, what: str) -> None:
    """Record one comparison with a reference; raise `CheckFailed` naming `what` when it did not hold."""
    global _checks_made
    _checks_made += 1
    if not ok:
        raise CheckFailed(f"check failed: {what}")


def check_close(actual: Any, expected: Any, *, atol: float, rtol: float, what: str) -> None:
    """Compare two tensors of equal shape (in float64, so that neither side's dtype rounds); NaN anywhere is a failure.

    Raises:
        CheckFailed: shapes differ, or some |actual - expected| > atol + rtol * |expected|; says how far off and where.
    """
    check(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    want = expected.double()
    excess = (actual.double() - want).abs() - (atol + rtol * want.abs())
    bad = ~(excess <= 0)
    worst = int(excess.nan_to_num(nan=math.inf).argmax()) if excess.numel() else 0
    check(
        not bool(bad.any()),
        f"{what}: {int(bad.sum())} of {bad.numel()} elements off by more than atol {atol} + rtol {rtol}; the worst, "
        f"flat index {worst}, is {actual.flatten()[worst].item() if bad.numel() else None} "
        f"instead of {expected.flatten()[worst].item() if bad.numel() else None}",
    )


@contextmanager
def checked(name: str) -> Iterator[None]:
    """Around one benchmark's run: raises `CheckFailed` at the end when it compared nothing with a reference."""
    before = _checks_made
    yield
    if _checks_made == before:
        raise CheckFailed(
            f"benchmark {name!r} made no check: compare its outputs with a reference before timing them "
            "(bench.results.check or check_close)."
        )


def stamp(name: str, measured: Iterable[dict[str, Any]]) -> list[Row]:
    """Complete a benchmark's rows (the measured fields of its schema) with card, versions, commit and date.

    Raises:
        BadRow: a row has other fields than those, or a wrong value.
    """
    about, wanted = _environment(), schema.of(name).measured
    rows = []
    for row in measured:
        if set(row) != set(wanted):
            raise BadRow(f"benchmark {name!r} gave a row with {sorted(row)}; it must have exactly {list(wanted)}.")
        rows.append({"bench": name, **row, **about})
    return validate(rows, name)


def validate(rows: Any, name: str) -> list[Row]:
    """Return `rows` as `list[Row]` when every one fits the schema and belongs to benchmark `name`.

    Raises:
        BadRow: names the row, what was found and what is allowed.
    """
    if not isinstance(rows, list) or not rows:
        raise BadRow(f"results of {name!r} must be a non-empty list of rows, found {type(rows).__name__} of no rows.")
    for index, row in enumerate(rows):
        problem = _problem(row, name)
        if problem:
            raise BadRow(f"row {index} of {name!r}: {problem}")
    key = schema.of(name).key
    cases = [tuple(row[field] for field in key) for row in rows]
    twice = {case for case in cases if cases.count(case) > 1}
    if twice:
        raise BadRow(f"results of {name!r} repeat {sorted(map(str, twice))}: give one row a {' and '.join(key)}.")
    return rows


def _problem(row: Any, name: str) -> str | None:
    form = schema.of(name)
    if not isinstance(row, dict) or set(row) != set(form.fields):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        return f"fields are {found}, they must be exactly {sorted(form.fields)}"
    for field, types in form.fields.items():
        value = row[field]
        if isinstance(value, bool) or not isinstance(value, types):
            return f"{field} is {value!r}, it must be {' or '.join(t.__name__ for t in types)}"
        if isinstance(value, str) and not value.strip():
            return f"{field} is empty"
        if field in form.times and value is not None and not (math.isfinite(value) and value > 0):
            return f"{field} is {value!r}, a time must be positive and finite"
        if isinstance(value, float | int) and not (math.isfinite(value) and value >= 0):
            return f"{field} is {value!r}, it must be finite and not negative"
    if row["bench"] != name:
        return f"bench is {row['bench']!r}, the file belongs to {name!r}"
    if form is schema.TIMES and (row["anchor"] is None) != (row["anchor_us"] is None):
        return f"anchor is {row['anchor']!r} but anchor_us is {row['anchor_us']!r}: give both or neither"
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", row["date"]):
        return f"date is {row['date']!r}, it must read YYYY-MM-DD"
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", row["commit"]):
        return f"commit is {row['commit']!r}, it must be a git commit, with -dirty appended if sources were changed"
    return None


def write(name: str, rows: list[Row], folder: Path = RESULTS) -> Path:
    """Write `folder/NAME.json`; one row a line, so that a diff shows which case changed.

    What was there is replaced; where the schema `merges`, only rows of the same key.
    """
    validate(rows, name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    form = schema.of(name)
    if form.merges and path.is_file():
        new = {tuple(row[field] for field in form.key): row for row in rows}
        old = {tuple(row[field] for field in form.key): row for row in read(name, folder)}
        rows = [new.pop(key, row) for key, row in old.items()]
        rows += new.values()
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return path


def read(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of one benchmark, validated.

    Raises:
        FileNotFoundError: it was never measured.
        BadRow: the file does not fit the schema.
    """
    return validate(json.loads((folder / f"{name}.json").read_text()), name)


def _environment() -> dict[str, str]:
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        names = []
    return f"CPU {names[0] if names else 'of unknown model'}, {os.cpu_count()} cores"


def commit(root: Path = ROOT) -> str:
    """The commit of the sources in `root`, `-dirty` appended when a tracked source differs from it.

    A copy of the tree without its `.git` must say where it came from in the variable DSINFRA_COMMIT.

    Raises:
        RuntimeError: neither git nor DSINFRA_COMMIT knows.
    """
    told = os.environ.get("DSINFRA_COMMIT")
    if told:
        return told
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        sources = [".", *(f":!{path}" for path in _NOT_SOURCES)]
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{root} is not a git checkout ({error}): set DSINFRA_COMMIT to the commit that is measured."
        ) from error
    return head + ("-dirty" if changed else "")


def _git(root: Path, *words: str) -> str:
    # safe.directory: a checkout mounted into a container often belongs to another user.
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
