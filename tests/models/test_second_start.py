"""A second process with the same cache directory compiles nothing anew: torch's caches serve every graph of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_RUN = """
import json, sys, torch
from tests.models import harness
from tests.zoo import matrix
cells = {cell.case.name: cell for cell in matrix.cells()}
found = {}
for name in sys.argv[1:]:
    case = cells[name].case
    example = case.example()
    harness.forget()
    with harness.compiling(case, example, "dsinfra", {}) as call:
        results = harness.run_calls(case, example, call)
    counters = torch._dynamo.utils.counters
    found[name] = {
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
        "compiled": counters["inductor"]["fxgraph_cache_miss"],
        "sum": {name: float(value.double().abs().sum()) for name, value in results.items()},
    }
print(json.dumps(found))
"""

# One of each: operators without and with a backward, over a cache, and with values prepared from FP8 weights.
CELLS = ("deepseek_v3/prefill", "deepseek_v3/static_decode", "deepseek_v3_fp8/prefill", "minicpm3/train")


def start(cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _RUN, *CELLS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    for name in CELLS:
        assert first[name]["misses"] >= 1 and first[name]["hits"] == 0, first[name]
        assert second[name]["hits"] >= 1, second[name]
        assert (second[name]["misses"], second[name]["bypasses"], second[name]["compiled"]) == (0, 0, 0), second[name]
        assert second[name]["sum"] == pytest.approx(first[name]["sum"], rel=1e-6)
