"""One HTML page from a dump directory: ``dscompile report DIR``.

``collect.py`` reads what ``dump.py`` wrote, this file puts it and the assets into one file that needs no network: style
and scripts inline, the data as JSON beside them. All that comes from a model (names, source lines, messages) is data:
it is escaped where it is embedded, and the scripts put it on the page as text, never as markup. A content security
policy that allows the page's own script and style by their hash, and nothing else, stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from dscompile.errors import ReportError
from dscompile.report_page.collect import Collected, collect

ASSETS = Path(__file__).parent / "assets"
# In this order they are one script; what it is made of, from the bottom up.
SCRIPTS = ("dom", "state", "data", "head", "sites", "detail", "drawing", "graphs", "source", "schedule", "main")


def write(directory: Path, file: Path | None = None) -> tuple[Path, Collected]:
    """Writes the page of a dump directory to ``file`` (by default ``report.html`` inside it); -> where, and from what.

    Raises:
        ReportError: there is no dump, none of it can be read, or the page can't be written.
    """
    found = collect(directory)
    file = file or directory / "report.html"
    try:
        file.write_text(page(found))
    except OSError as error:
        raise ReportError(
            f"the page {str(file)!r} can't be written ({error.strerror or error}): name another file with -o"
        ) from error
    return file, found


def page(found: Collected) -> str:
    """The whole page."""
    style = (ASSETS / "page.css").read_text()
    script = "\n".join(["(() => {", '"use strict";', *((ASSETS / f"{n}.js").read_text() for n in SCRIPTS), "})();"])
    data = [_data("report", found.report)]
    data += [_data(f"graph-{i}", graphs) for i, graphs in enumerate(found.graphs)]
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    parts = {"policy": policy, "style": style, "data": "\n".join(data), "script": script}
    text = (ASSETS / "page.html").read_text()
    for name, value in parts.items():  # no value holds a marker: in data, `<` is escaped
        text = text.replace(f"<!--{name}-->", value)
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(name: str, value: Any) -> str:
    """A script element that holds JSON; nothing in it can end the element or begin another."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII: U+2028 and U+2029 are escaped, too
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'
