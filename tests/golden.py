"""Golden texts: what was looked at once and agreed with, in ``tests/golden/<name>.txt``, compared line by line.

``check(name, text)`` fails with the difference, or with the command that writes a missing file. ``DSINFRA_ACCEPT=1``
rewrites what differs instead (``make golden`` does it for all of them): the change is then read in version control.
Names may hold folders: ``check("graphs/mla_causal", text)``.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "golden"
ACCEPT = "DSINFRA_ACCEPT"
COMMAND = "make golden"
# Texts that name torch's own operators are written on the newest version that is supported.
NEWEST_TORCH = "2.13"


def check(name: str, text: str) -> None:
    """Compares ``text`` with the golden text ``name``.

    Raises:
        AssertionError: they differ, or there is no such file; the message says how to accept the new text.
        ValueError: ``name`` is not letters, digits, ``_ . -`` and folders.
    """
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*", name):
        raise ValueError(f"{name!r} can't name a golden file: use letters, digits, `_ . -`, and / for folders.")
    path, text = FOLDER / f"{name}.txt", normalised(text)
    wanted = path.read_text() if path.is_file() else None
    if wanted == text:
        return
    if os.environ.get(ACCEPT) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    if wanted is None:
        raise AssertionError(f"there is no tests/golden/{name}.txt; `{COMMAND}` writes it. It would be:\n{text}")
    lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), "accepted", "found", n=2, lineterm="")
    difference = "\n".join(lines)
    raise AssertionError(
        f"tests/golden/{name}.txt differs; if the new text is right, `{COMMAND}` accepts it:\n{difference}"
    )


def normalised(text: str) -> str:
    """No blanks at the ends of lines, no empty lines around the text, one newline at its end."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def newest_torch_only() -> None:
    """Skips where torch is not the version on which the texts were accepted."""
    if not torch.__version__.startswith(NEWEST_TORCH):
        pytest.skip(f"versions: golden texts are those of torch {NEWEST_TORCH}, this is {torch.__version__}")
