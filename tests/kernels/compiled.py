"""Runs a `compile_*.py` beside this file: kernels compiled for devices that are not here, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def compiled_by(script: str, triton: str | None = None) -> dict[str, Any]:
    """The facts that the script prints in its last line; `triton` is a folder with another Triton than the installed.

    Skips where none is installed.
    """
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    path = [triton, str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


def compiled_by_either(script: str, which: str) -> dict[str, Any]:
    """By the "installed" Triton, or by the "newest" one that DSINFRA_TRITON_NEWEST names; skips where it names none."""
    if which == "installed":
        return compiled_by(script)
    folder = os.environ.get("DSINFRA_TRITON_NEWEST")
    if not folder:
        pytest.skip("versions: DSINFRA_TRITON_NEWEST names no folder with another Triton")
    return compiled_by(script, folder)
