"""Runs this folder's interpreter tier in its own process: a kernel is interpreted or not from its definition on."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def _release(module: ModuleType) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*_interpreter.py")), ids=lambda path: path.stem)
def test_interpreter_tier(file: Path) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreter: this process runs the tier itself")
    triton = pytest.importorskip("triton", reason="interpreter: Triton is not installed")
    if _release(triton) <= (3, 8) and _release(numpy) >= (2, 4):
        pytest.skip(
            f"interpreter: Triton {triton.__version__} cannot interpret with NumPy {numpy.__version__}, only < 2.4"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"^\d+ passed", run.stdout, flags=re.M) and "skipped" not in run.stdout, run.stdout[-2000:]
