"""The page of a placement: numbers that can be checked by hand, names that can't break out, records that are none."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dscompile import cli, placement_page
from dscompile.errors import ReportError
from dscompile.runtime.movement import ExpertSlots
from dscompile.runtime.placement import Rebalancer

LAYER = {"name": "layers.0", "load": [6, 2, 2, 2], "before": [0, 1, 2, 3], "now": [0, 1, 2, 3], "moves": 3}
RECORD = {"ranks": 2, "steps": 9, "layers": [LAYER, {**LAYER, "name": "layers.1", "load": [1, 1, 1, 1]}]}


class Seen(HTMLParser):
    """Texts and tags of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_numbers() -> None:
    seen = Seen(placement_page.page(RECORD))
    assert seen.tags.count("rect") == 2 * 2 * 2  # layers, before and now, GPUs
    assert "layers.0, GPU 0: 1.33 of the mean" in seen.texts and "layers.0, GPU 1: 0.67 of the mean" in seen.texts
    row = seen.texts[seen.texts.index("moved") :]
    assert row[1:8] == ["layers.0", "12", "0.750", "0.750", "1.33 x mean", "1.33 x mean", "3"]
    assert any("2 layers on 2 GPUs after 9 steps" in t and "0.800 now" in t and "6 experts" in t for t in seen.texts)


def test_names_stay_text() -> None:
    name = '<script>alert("x")</script>&amp;'
    page = placement_page.page({**RECORD, "layers": [{**LAYER, "name": name}]})
    seen = Seen(page)
    assert "script" not in seen.tags and name in "".join(seen.texts)
    assert not re.search(r"(?<!-)\bsrc=|href=|@import|url\(", page), "nothing is loaded"


def test_what_a_rebalancer_records(tmp_path: Path) -> None:
    maps = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    layer = ExpertSlots((torch.ones(2, 1),), *maps, torch.tensor([3, 1]))
    rebalancer = Rebalancer([layer], torch.tensor([[1, 0]]), every=1)
    rebalancer.step()
    rebalancer.close()
    (tmp_path / "record.json").write_text(json.dumps(rebalancer.record(["model.layers.0.mlp"])))
    page = placement_page.write(tmp_path / "record.json")
    assert page == tmp_path / "record.html" and "model.layers.0.mlp" in page.read_text()


WRONG = {
    "no record": [],
    "no layers": {**RECORD, "layers": []},
    "no ranks": {**RECORD, "ranks": 0},
    "negative load": {**RECORD, "layers": [{**LAYER, "load": [-1, 2, 2, 2]}]},
    "an expert that isn't": {**RECORD, "layers": [{**LAYER, "now": [0, 1, 2, 9]}]},
    "markup for a number": {**RECORD, "steps": "<b>"},
    "uneven": {**RECORD, "ranks": 3},
}


@pytest.mark.parametrize("record", WRONG.values(), ids=WRONG.keys())
def test_records_that_are_none(record: Any, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ReportError, match="rebalancer.record"):
        placement_page.write(tmp_path / "record.json")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="can't be read"):
        placement_page.write(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ReportError, match="is no JSON"):
        placement_page.write(tmp_path / "broken.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(RECORD))
    assert cli.main(["report", "placement", str(record)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'record.html'}\n" and (tmp_path / "record.html").is_file()
    assert cli.main(["report", "placement", str(tmp_path / "absent.json")]) == 1
    assert cli.main(["report", str(tmp_path), str(record)]) == 1
    assert "report takes one directory, or `placement FILE`" in capsys.readouterr().err
