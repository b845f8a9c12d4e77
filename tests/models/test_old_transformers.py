"""Older versions of transformers run the core zoo cases, each in a process of its own.

`DSINFRA_TF_5_17` and `DSINFRA_TF_5_12` name directories that hold such a version (`pip install --target`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo import select

ROOT = Path(__file__).parents[2]

_RUN = """
import sys, pytest, transformers
found, wanted = transformers.__version__, sys.argv[1]
assert found.startswith(wanted + "."), f"transformers is {found}, not {wanted}"
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.17", "5.12"])
def test_core_cases(version: str) -> None:
    variable = f"DSINFRA_TF_{version.replace('.', '_')}"
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"versions: {variable} names no folder with transformers {version}")
    cases = [f"{ROOT}/tests/models/test_zoo.py::test_case[{case.name}]" for case in select("core")]
    command = [
        sys.executable,
        "-c",
        _RUN,
        version,
        "-q",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        *cases,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(rf"\b{len(cases)} passed", done.stdout), done.stdout[-2000:]
