"""Real models in every mode: right or not, what became of their sites, graphs and breaks, and what compiling costs.

A model's modes run in processes of their own: dsinfra from empty caches, the same again for the start from cache, and
Inductor from empty caches. A mode is right if its outputs, sites, graphs and breaks pass the checks of the test suite;
what fails is a row that says so. Three modes are timed, the others generate no code. On CPUs the models are micro.
`ZOO_MODELS=minicpm3,qwen3_moe` measures these alone and keeps the other models' rows; `ZOO_JOBS=8` looks at eight
models at once, and times none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bench.results import ROOT, check

GPUS = 0

# Libraries beside the installed ones: the variable that names their folder, and the models that differ there.
FOLDERS = {
    "DSINFRA_TF_5_17": ("deepseek_v3", "deepseek_v32"),
    "DSINFRA_TF_5_12": ("deepseek_v3",),
    "DSINFRA_TITAN": ("torchtitan", "torchtitan_sdpa"),
}
TIMED = ("prefill", "static_decode", "train")
WORKERS = ("cold", "warm", "inductor")


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row for each model, version and mode; quick leaves times and other versions out."""
    jobs = int(os.environ.get("ZOO_JOBS", 1))
    untimed = quick or jobs > 1
    with ThreadPoolExecutor(jobs) as pool:
        models = [pool.submit(_model, folder, model, untimed) for folder, model in _rows(quick)]
        found = [row for model in models for row in model.result()]
    check(bool(found), "no model of the zoo was found")
    return found


def _model(folder: str | None, model: str, untimed: bool) -> list[dict[str, Any]]:
    """The rows of one model."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        caches = {"cold": ours, "warm": ours, "inductor": theirs}
        names = WORKERS[:1] if untimed else WORKERS
        by_worker = {name: _process(name, model, folder, caches[name], untimed) for name in names}
    seconds = {name: {row["mode"]: row.pop("first_call_s") for row in rows} for name, rows in by_worker.items()}
    found = []
    for row in by_worker["cold"]:
        ours, warm, inductor = (seconds.get(name, {}).get(row["mode"]) for name in WORKERS)
        found.append({**row, "compile_s": ours, "inductor_s": inductor, "warm_s": warm})
        print(f"{row['model']} {row['version']} {row['mode']}: {row['failure'] or 'right'}", flush=True)
    return found


def _rows(quick: bool) -> Iterator[tuple[str | None, str]]:
    """(folder of a library or None for the installed ones, model) of each row that is to be measured."""
    from tests.zoo import matrix

    only = set(filter(None, os.environ.get("ZOO_MODELS", "").split(",")))
    found = [(None, row) for row in dict.fromkeys(cell.row for cell in matrix.cells())]
    for variable, models in {} if quick else FOLDERS.items():
        if os.environ.get(variable):
            found += [(os.environ[variable], model) for model in models]
        else:
            print(f"{variable} names no folder: {', '.join(models)} of that version are left out", flush=True)
    yield from ((folder, model) for folder, model in found if not only or model in only)


def _process(name: str, model: str, folder: str | None, cache: str, untimed: bool) -> list[dict[str, Any]]:
    path = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": path}
    command = [sys.executable, "-m", "bench.zoo", "--worker", name, model, str(int(untimed))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the {name} process of {model} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------ in a process of its own


def _worker(name: str, model: str, untimed: str) -> None:
    from tests.zoo import matrix

    size = matrix.TRUE_SIZE if torch.cuda.is_available() else matrix.MICRO_SIZE
    timed = () if int(untimed) else TIMED
    cells = [cell for cell in matrix.cells(size) if cell.row == model]
    if timed:  # what a process pays once is nobody's
        torch.compile(lambda x: x + 1)(torch.ones(8, device=size.device))
    found = []
    for cell in cells:
        try:
            seconds = _first_call(cell, name) if cell.case.mode in timed else None
        except Exception:  # the cold process says what it was
            seconds = None
        row = {"mode": cell.case.mode, "first_call_s": seconds}
        found.append({**row, **_judged(cell, model, cell.case.mode in timed)} if name == "cold" else row)
    print(json.dumps(found))


def _first_call(cell: Any, name: str) -> float:
    """Seconds of the first call of a model that was just built; in training, of its backward too."""
    from tests.models import harness

    example = cell.case.example()
    harness.forget()
    backend = "inductor" if name == "inductor" else "dsinfra"
    with harness.compiling(cell.case, example._replace(more=()), backend, {}) as call:
        start = time.perf_counter()
        harness.run_calls(cell.case, example._replace(more=()), call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _judged(cell: Any, model: str, generate_code: bool) -> dict[str, Any]:
    """The row of a cell without its times: a run beside an uncompiled one, checked as the test suite does."""
    from tests.models import harness, matrix_checks

    library = "torchtitan" if model.startswith("torchtitan") else "transformers"
    version = "own code" if model.startswith("reference") else importlib.metadata.version(library)
    about = {"model": model, "version": version}
    try:
        outcome = harness.run_case(cell.case, {} if generate_code else cell.options)
        matrix_checks.check(cell, outcome)
        own, eager = matrix_checks.errors(cell, outcome)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        nothing = {"lowered": 0, "refused": {}, "error": None, "eager_error": None, "graphs": 0, "breaks": 0}
        return {**about, "failure": failure, **nothing}
    return {
        **about,
        "failure": None,
        "lowered": sum(outcome.lowered.values()),
        "refused": dict(outcome.refused),
        "error": own,
        "eager_error": eager,
        "graphs": outcome.graphs,
        "breaks": outcome.breaks,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--worker", nargs=3, required=True)
    _worker(*parser.parse_args().worker)
