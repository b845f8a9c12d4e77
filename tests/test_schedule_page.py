"""The page of a schedule: numbers that can be checked by hand, a trace that a viewer opens, files that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dscompile import cli, schedule_page
from dscompile.errors import ReportError
from tests.runtime.test_placement_page import Seen


def span(row: str, kind: str, start: float, end: float, name: str = "") -> dict[str, Any]:
    return {"row": row, "kind": kind, "name": name or kind, "start_us": start, "end_us": end}


# Of 100 us of communication, 30 lie under the first product and 50 under the second.
STREAMS = [
    span("compute", "gemm", 0, 40),
    span("comm", "dispatch_start", 10, 60),
    span("compute", "gemm", 70, 120),
    span("comm", "combine_start", 70, 120),
]
RANKS = [
    span("rank 0", "F", 0, 10),
    span("rank 0", "B", 30, 50),
    span("rank 1", "F", 10, 20),
    span("rank 1", "B", 20, 30),
]


def test_numbers_of_two_streams() -> None:
    (spans,) = schedule_page.checked(STREAMS).values()
    assert schedule_page.hidden(spans) == pytest.approx(80 / 100)
    assert schedule_page.bubbles(spans) == {"compute": pytest.approx(30 / 120), "comm": pytest.approx(20 / 120)}


def test_numbers_of_ranks() -> None:
    (spans,) = schedule_page.checked(RANKS).values()
    assert schedule_page.hidden(spans) is None
    assert schedule_page.bubbles(spans) == {"rank 0": pytest.approx(0.4), "rank 1": pytest.approx(0.6)}


def test_another_ranks_work_hides_nothing() -> None:
    spans = [span("rank 0/comm", "send", 0, 10), span("rank 1/compute", "F", 0, 10), span("rank 0/compute", "F", 8, 12)]
    (found,) = schedule_page.checked(spans).values()
    assert schedule_page.hidden(found) == pytest.approx(0.2)


def test_planned_and_measured_stand_on_one_scale() -> None:
    slower = [{**s, "start_us": 2 * s["start_us"], "end_us": 2 * s["end_us"]} for s in STREAMS]
    page = schedule_page.page(schedule_page.checked({"planned": STREAMS, "measured": slower}))
    seen = Seen(page)
    assert seen.tags.count("rect") == 3 + 2 * 4 and seen.texts.count("gemm") >= 3  # kinds, and bars
    assert "120.0 us, 80.0% of communication hidden" in seen.texts
    assert "240.0 us, 80.0% of communication hidden" in seen.texts and "25.0%" in seen.texts
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)" height="19"', page)]
    assert widths[4:] == pytest.approx([2 * w for w in widths[:4]], rel=1e-3)


def test_names_stay_text() -> None:
    name = '<script>alert("x")</script>&amp;'
    page = schedule_page.page(schedule_page.checked({name: [span(name, name, 0, 1, name)]}))
    seen = Seen(page)
    assert "script" not in seen.tags and name in "".join(seen.texts)
    assert not re.search(r"(?<!-)\bsrc=|href=|@import|url\(", page), "nothing is loaded"


def test_the_command_writes_page_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"planned": STREAMS}))
    assert cli.main(["report", "schedule", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "step.html")
    events = json.loads((tmp_path / "step.trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["planned", "compute", "comm"]
    bars = [e for e in events if e["ph"] == "X"]
    assert [(e["tid"], e["ts"], e["dur"]) for e in bars] == [(0, 0, 40), (1, 10, 50), (0, 70, 50), (1, 70, 50)]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "without spans"),
        ({"planned": {}, "x": 1}, "'planned' is a dict and no list"),
        ([{"row": "a"}], "row, kind and name must be text"),
        ([span("a", "b", 2, 1)], "is from 2 to 1 us"),
        ([span("a", "b", 0, float("nan"))], "has a time nan"),
    ],
)
def test_what_is_no_schedule(found: Any, said: str) -> None:
    with pytest.raises(ReportError, match=said):
        schedule_page.checked(found)


@pytest.mark.parametrize(("text", "said"), [("{", "is no JSON"), (None, "can't be read")])
def test_what_is_no_file(tmp_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["report", "schedule", str(file)]) == 1
    assert said in capsys.readouterr().err
