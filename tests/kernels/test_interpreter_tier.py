"""Runs this folder's interpreter tier in a process of its own: a kernel is interpreted from its definition on."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy
import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
FILES = sorted(FOLDER.glob("test_*_interpreter.py"))


def _release(module: ModuleType) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.fixture(scope="module")
def run() -> "subprocess.CompletedProcess[str]":
    """Every file in one process, which reports each test."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreter: this process runs the tier itself")
    triton = pytest.importorskip("triton", reason="interpreter: Triton is not installed")
    if _release(triton) <= (3, 8) and _release(numpy) >= (2, 4):
        pytest.skip(
            f"interpreter: Triton {triton.__version__} cannot interpret with NumPy {numpy.__version__}, only < 2.4"
        )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", ROOT, *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_interpreter_tier(run: "subprocess.CompletedProcess[str]", file: Path) -> None:
    lines = re.findall(rf"/{file.name}::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", run.stdout)
    assert lines and Counter(lines) == {"PASSED": len(lines)}, run.stdout[-6000:] + run.stderr[-2000:]


def test_the_tier_ends_well(run: "subprocess.CompletedProcess[str]") -> None:
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
