"""Rows of the matrix under other versions of their libraries, each version in a process of its own.

`DSINFRA_TF_5_17`, `DSINFRA_TF_5_12` and `DSINFRA_TITAN` name folders that hold one (`pip install --target`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo import select
from tests.zoo.matrix import MODES

ROOT = Path(__file__).parents[2]
ZOO, MATRIX = (f"{ROOT}/tests/models/{name}.py" for name in ("test_zoo", "test_matrix"))

_RUN = """
import importlib.metadata, sys, pytest
found, (package, wanted) = importlib.metadata.version(sys.argv[1]), sys.argv[1:3]
assert found.startswith(wanted + "."), f"{package} is {found}, not {wanted}"
sys.exit(pytest.main(sys.argv[3:]))
"""


def cells(*rows: str) -> list[str]:
    return [f"{MATRIX}::test_cell[{row}/{mode}]" for row in rows for mode in MODES]


CORE = [f"{ZOO}::test_case[{case.name}]" for case in select("core")]
LITE = f"{MATRIX}::test_cell[deepseek_v2_lite/prefill]"
TITAN = ["torchtitan/prefill", "torchtitan/packed", "torchtitan_sdpa/prefill", "torchtitan_sdpa/train"]
SUITES = {
    "transformers 5.17": ("DSINFRA_TF_5_17", [*CORE, LITE, *cells("deepseek_v3", "deepseek_v32")]),
    "transformers 5.12": ("DSINFRA_TF_5_12", [*CORE, LITE, *cells("deepseek_v3")]),
    "torchtitan 0.3": (
        "DSINFRA_TITAN",
        [
            *(f"{MATRIX}::test_cell[{name}]" for name in TITAN),
            *(f"{MATRIX}::test_golden_explain[{row}]" for row in ("torchtitan", "torchtitan_sdpa")),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", SUITES, ids=["transformers_5.17", "transformers_5.12", "torchtitan_golden"])
def test_rows(library: str) -> None:
    variable, tests = SUITES[library]
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"versions: {variable} names no folder with {library}")
    flags = ["-q", "--show-capture=no", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
    command = [sys.executable, "-c", _RUN, *library.split(), *flags, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(rf"\b{len(tests)} passed", done.stdout), done.stdout[-2000:]
