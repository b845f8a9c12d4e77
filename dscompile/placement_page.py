"""One HTML page of where experts live: ``dscompile report placement FILE``, from ``Rebalancer.record()`` as JSON.

Per layer the load of every GPU before and after, how balanced both are for the same loads, and how many experts moved;
a heat map of GPUs by layers, in which 1 is the mean. The page needs no network and has no script; names are the only
text that is not ours, and are escaped. A content security policy that allows the page's own style stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

import torch

from dscompile.errors import ReportError
from dscompile.runtime import eplb

_CELL, _GAP, _LABEL = 14, 24, 220  # pixels; a label's characters are cut to fit
_LONGEST = 32
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1e21; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; } text { font-size: 11px; }
"""


def write(source: Path, file: Path | None = None) -> Path:
    """Reads a record and writes its page to ``file`` (by default beside it, as .html); -> where.

    Raises:
        ReportError: the record can't be read or is none, or the page can't be written.
    """
    try:
        record = json.loads(source.read_text())
    except OSError as error:
        raise ReportError(f"{str(source)!r} can't be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ReportError(
            f"{str(source)!r} is no JSON ({error}): write it with json.dumps(rebalancer.record())"
        ) from error
    file = file or source.with_suffix(".html")
    try:
        file.write_text(page(record))
    except OSError as error:
        raise ReportError(f"the page {str(file)!r} can't be written ({error.strerror or error})") from error
    return file


def page(record: Any) -> str:
    """The whole page; raises ReportError for what `Rebalancer.record()` can't have given."""
    layers = [_layer(one, record["ranks"]) for one in _checked(record)]
    before, now = (_total(layers, key) for key in ("before", "now"))
    moves = sum(one["moves"] for one in layers)
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Expert placement</title>',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{style}'\">",
            f"<style>{_STYLE}</style></head><body><h1>Expert placement</h1>",
            f"<p>{len(layers)} layers on {record['ranks']} GPUs after {record['steps']} steps. Balancedness (mean over "
            f"maximum) of all layers {before:.3f} as placed first, {now:.3f} now; {moves} experts moved. Both "
            "are for the loads of the present window.</p>",
            _heat_map(layers),
            _table(layers),
            "</body></html>",
        ]
    )


def _checked(record: Any) -> list[dict[str, Any]]:
    """The layers; raises ReportError where a field is missing or of another form."""
    wanted = "Write it with json.dumps(rebalancer.record())"
    if not isinstance(record, dict) or not isinstance(record.get("layers"), list) or not record["layers"]:
        raise ReportError(f"the record is {type(record).__name__} without layers: there is nothing to draw. {wanted}")
    for key in ("ranks", "steps"):
        if type(record.get(key)) is not int or record[key] < (key == "ranks"):
            raise ReportError(f"the record's {key} is {record.get(key)!r}: it must be a number of them. {wanted}")
    for i, one in enumerate(record["layers"]):
        fine = isinstance(one, dict) and type(one.get("moves")) is int and isinstance(one.get("name"), str)
        fine = fine and all(isinstance(one.get(key), list) and one[key] for key in ("load", "before", "now"))
        fine = fine and all(type(e) in (int, float) and e >= 0 for e in one["load"])
        for key in ("before", "now"):
            fine = fine and len(one[key]) % record["ranks"] == 0
            fine = fine and all(type(e) is int and 0 <= e < len(one["load"]) for e in one[key])
        if not fine:
            raise ReportError(f"layer {i} of the record has no load and placements that fit each other. {wanted}")
    return record["layers"]


def _layer(one: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Name, moves, and of both placements the load of each GPU over the mean."""
    weight = torch.tensor([one["load"]], dtype=torch.float64)
    found: dict[str, Any] = {"name": one["name"], "moves": one["moves"], "load": sum(one["load"])}
    for key in ("before", "now"):
        loads = eplb.gpu_loads(weight, torch.tensor([one[key]]), ranks)[0]
        found[key] = loads.tolist()
    return found


def _balance(loads: list[float]) -> float:
    return float(eplb.balancedness(torch.tensor(loads, dtype=torch.float64)))


def _total(layers: list[dict[str, Any]], key: str) -> float:
    """Of all layers together, which run one after the other: sums of means over sums of maxima."""
    most = sum(max(one[key]) for one in layers)
    return sum(sum(one[key]) / len(one[key]) for one in layers) / most if most else 1.0


def _heat_map(layers: list[dict[str, Any]]) -> str:
    ranks = len(layers[0]["now"])
    block = ranks * _CELL
    width, height = _LABEL + 2 * block + _GAP, (len(layers) + 2) * _CELL
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="load of each GPU by layer, before and now">',
        f'<text x="{_LABEL}" y="12">as placed first</text><text x="{_LABEL + block + _GAP}" y="12">now</text>',
    ]
    for row, one in enumerate(layers):
        y = (row + 1.5) * _CELL
        name = one["name"] if len(one["name"]) <= _LONGEST else "…" + one["name"][1 - _LONGEST :]
        parts.append(f'<text x="0" y="{y + 11}">{html.escape(name)}</text>')
        for x, key in ((_LABEL, "before"), (_LABEL + block + _GAP, "now")):
            mean = sum(one[key]) / ranks
            for gpu, load in enumerate(one[key]):
                share = load / mean if mean else 1.0
                title = f"{html.escape(one['name'])}, GPU {gpu}: {share:.2f} of the mean"
                parts.append(
                    f'<rect x="{x + gpu * _CELL}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" '
                    f'fill="{_colour(share)}"><title>{title}</title></rect>'
                )
    return "".join([*parts, "</svg>", "<p>Blue: below the mean, white: the mean, red: twice the mean or more.</p>"])


def _colour(share: float) -> str:
    """From blue (0) through white (1) to red (2 and more)."""
    far = min(abs(share - 1.0), 1.0)
    pale = round(255 - 175 * far)
    return f"#{255 if share >= 1 else pale:02x}{pale:02x}{pale if share >= 1 else 255:02x}"


def _table(layers: list[dict[str, Any]]) -> str:
    head = "".join(
        f"<th>{title}</th>"
        for title in ("layer", "choices", "balancedness first", "now", "fullest GPU first", "now", "moved")
    )
    rows = []
    for one in layers:
        ratio = [f"{1 / _balance(one[key]):.2f} x mean" for key in ("before", "now")]
        cells = [html.escape(one["name"]), f"{one['load']:,.0f}", f"{_balance(one['before']):.3f}"]
        cells += [f"{_balance(one['now']):.3f}", *ratio, str(one["moves"])]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
