"""Finds benchmarks, runs one under the rules of `bench.results`, keeps its rows and prints its table.

Benchmarks are read, not imported, to list them: a module in `bench/` with a top-level `run` is one, and its `GPUS`
says how many CUDA devices it needs. So the list, and the refusal on a machine without a GPU, need nothing installed.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from bench import results, table

_FOLDER = Path(__file__).parent


class UnknownBenchmark(ValueError):
    """A name that is no benchmark's, nor the beginning of exactly one."""


class MissingDevice(RuntimeError):
    """The benchmark needs more CUDA devices than the machine has."""


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's source says of it, without importing it."""

    name: str
    gpus: int  # CUDA devices it needs
    summary: str  # first line of its docstring


def known(folder: Path = _FOLDER) -> dict[str, Benchmark]:
    """Every benchmark in `folder`, by name, sorted."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(), filename=str(path))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            summary = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[path.stem] = Benchmark(path.stem, _gpus(tree), summary)
    return found


def _gpus(tree: ast.Module) -> int:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "GPUS" for t in node.targets):
            return int(ast.literal_eval(node.value))
    return 1


def resolve(name: str, benchmarks: dict[str, Benchmark]) -> Benchmark:
    """The benchmark called `name`, or the only one whose name begins so.

    Raises:
        UnknownBenchmark: none or several begin so; lists them, or all with the nearest first.
    """
    if name in benchmarks:
        return benchmarks[name]
    begin = [known_name for known_name in benchmarks if known_name.startswith(name)]
    if len(begin) == 1:
        return benchmarks[begin[0]]
    if begin:
        raise UnknownBenchmark(f"{name!r} could be {', '.join(begin)}: write one of them out.")
    near = difflib.get_close_matches(name, benchmarks, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UnknownBenchmark(f"no benchmark is called {name!r}; {hint}Known: {', '.join(benchmarks) or 'none'}.")


def measure(benchmark: Benchmark, *, quick: bool = False) -> list[results.Row]:
    """Run one benchmark and return its complete rows.

    Raises:
        MissingDevice: the machine has fewer CUDA devices than it needs.
        bench.results.CheckFailed: its outputs were wrong, or it compared none.
        bench.results.BadRow: its rows do not fit the schema.
    """
    import torch

    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present < benchmark.gpus:
        raise MissingDevice(
            f"benchmark {benchmark.name!r} needs {benchmark.gpus} CUDA device(s) and this machine has {present}: a "
            "time taken without them says nothing about the kernels. Run it on a machine that has them."
        )
    module = importlib.import_module(f"bench.{benchmark.name}")
    with results.checked(benchmark.name):
        measured = module.run(quick=quick)
    return results.stamp(benchmark.name, measured)


def main(name: str | None, *, quick: bool = False) -> int:
    """`dscompile bench`: list the benchmarks; or measure one, print its table and, unless `quick`, keep it."""
    benchmarks = known()
    if name is None:
        for benchmark in benchmarks.values():
            print(f"{benchmark.name:24} {benchmark.gpus} GPU  {benchmark.summary}")
        return 0
    benchmark = resolve(name, benchmarks)
    rows = measure(benchmark, quick=quick)
    print(f"{benchmark.name}: {rows[0]['card']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}")
    print(table.plain(rows))
    if quick:
        print("a quick run is not kept")
    else:
        path = results.write(benchmark.name, rows)
        print(f"wrote {path.relative_to(results.ROOT)}; `python -m bench.table` brings README's tables up to date")
    return 0
