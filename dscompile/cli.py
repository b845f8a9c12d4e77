"""The `dscompile` command: `demo`, `explain`, `report`, `bisect` and `bench`, each a thin shell over other modules.

Exit codes: 0 done, 1 refused or failed with the reason on standard error, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dscompile
from dscompile._entry import BACKEND_NAME, ensure_registered
from dscompile.config import INNER


class UserError(Exception):
    """A command that can't be carried out as given; the message says what to change."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` default to the process's own."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except UserError as error:
        print(f"dscompile: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dscompile", description="torch.compile backend 'dsinfra': see what it does.")
    parser.add_argument("--version", action="version", version=f"dscompile {dscompile.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="generate with a small DeepSeek-V3 and compare with eager token by token")
    demo.add_argument("--backend", default=BACKEND_NAME, help="another torch.compile backend, for comparison")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", help="say what would be recognised in a model, and why the rest would not")
    explain.add_argument(
        "target",
        help="a transformers model type (deepseek_v3), built small with random weights; or module:function or "
        "file.py:function, a function without arguments that returns (model, args, kwargs)",
    )
    explain.add_argument("--train", action="store_true", help="as a step of training, not as inference")
    explain.add_argument("--decode", action="store_true", help="one token against a static cache, not a whole prompt")
    explain.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the configuration")
    explain.set_defaults(run=_explain)

    bisect = commands.add_parser("bisect", help="name the first rewrite that makes a result wrong, or a script fail")
    bisect.add_argument("target", help="as for explain: what each run builds anew; with --check: a Python script")
    bisect.add_argument("arguments", nargs="*", help="the script's own arguments, behind --")
    bisect.add_argument("--check", action="store_true", help="run the script instead: exit status 0 means good")
    bisect.add_argument("--bar", type=float, help="largest relative error (default: twice eager's own, plus a floor)")
    bisect.add_argument("--inner", default="inductor", choices=INNER, help="what compiles the rewritten graph")
    bisect.add_argument("--train", action="store_true", help="as a step of training: compare gradients too")
    bisect.add_argument("--decode", action="store_true", help="one token against a static cache, not a whole prompt")
    bisect.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the configuration")
    bisect.set_defaults(run=_bisect)

    page = commands.add_parser("report", help="make one HTML page of a dump: sites, graphs around each pass, refusals")
    page.add_argument(
        "directory", type=Path, help='what options={"dump": ...} or DSINFRA_DUMP named; "placement" or "schedule"'
    )
    page.add_argument(
        "record",
        type=Path,
        nargs="?",
        help='after "placement": the JSON of Rebalancer.record(); after "schedule": that of a timeline',
    )
    page.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: inside or beside it)")
    page.set_defaults(run=_report)

    bench = commands.add_parser("bench", help="run one benchmark and keep its rows in bench/results/")
    bench.add_argument("name", nargs="?", help="its name or an unambiguous beginning; without it the names are listed")
    bench.add_argument("--quick", action="store_true", help="fewer cases and repetitions; nothing is kept")
    bench.set_defaults(run=_bench)
    return parser


def _demo(parsed: argparse.Namespace) -> int:
    _need("transformers", "the demo compiles one of its models")
    from dscompile import demo

    ensure_registered()
    return demo.main(backend=parsed.backend)


def _bisect(parsed: argparse.Namespace) -> int:
    from dscompile import bisect
    from dscompile.errors import BisectError

    script = Path(parsed.target)
    if parsed.check and not script.is_file():
        raise UserError(f"{parsed.target!r} is no file: --check runs a Python script, give its path.")
    if not parsed.check and (script.suffix == ".py" or parsed.arguments):
        raise UserError(
            f"{parsed.target!r} names no function to compare: add --check to run a script and read its exit status, or "
            "give file.py:function, a function without arguments that returns (model, args, kwargs)."
        )
    try:
        if parsed.check:
            bisect.script(script, parsed.arguments)
        else:
            make = _maker(parsed)
            bisect.model(make, inner=parsed.inner, bar=parsed.bar, train=parsed.train)
    except BisectError as error:
        raise UserError(str(error)) from error
    return 0


def _maker(parsed: argparse.Namespace) -> Callable[[], tuple[Any, Sequence[Any], dict[str, Any]]]:
    """What builds (model, args, kwargs) of a target: a function of the user's, or an example by its model type."""
    if ":" in parsed.target:
        return _load(parsed.target)
    _need("transformers", "a model type names one of its models")
    from dscompile import demo

    return lambda: demo.example(parsed.target, _settings(parsed.set), decode=parsed.decode)


def _explain(parsed: argparse.Namespace) -> int:
    model, args, kwargs = _maker(parsed)()
    import torch

    with torch.set_grad_enabled(parsed.train):
        print(dscompile.explain(model, *args, **kwargs))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from dscompile import placement_page, report_page, schedule_page
    from dscompile.errors import ReportError

    broken: Sequence[str] = ()
    try:
        if parsed.record is None:
            file, found = report_page.write(parsed.directory, parsed.output)
            broken = found.broken
        elif str(parsed.directory) == "placement":
            file = placement_page.write(parsed.record, parsed.output)
        elif str(parsed.directory) == "schedule":
            file = schedule_page.write(parsed.record, parsed.output)
        else:
            raise UserError(
                "report takes one directory, or `placement FILE`, or `schedule FILE`; "
                f"got {parsed.directory} {parsed.record}."
            )
    except ReportError as error:
        raise UserError(f"{error}.") from error
    for why in broken:
        print(f"left out: {why}", file=sys.stderr)
    print(file)
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    root = Path(dscompile.__file__).parent.parent
    if not (root / "bench" / "harness.py").is_file():
        raise UserError(
            f"benchmarks are not part of the installed package (no bench/ in {root}): run this from a source checkout "
            "installed with `pip install -e .`"
        )
    sys.path.insert(0, str(root))
    harness, results = importlib.import_module("bench.harness"), importlib.import_module("bench.results")
    try:
        return harness.main(parsed.name, quick=parsed.quick)
    except (harness.UnknownBenchmark, harness.MissingDevice, results.CheckFailed, results.BadRow) as error:
        raise UserError(f"{error} Nothing was written.") from error


def _need(module: str, why: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{module} is not installed, and {why}: `pip install 'dscompile[demo]'`")


def _load(target: str) -> Callable[[], tuple[Any, Sequence[Any], dict[str, Any]]]:
    """The function that `module:function` or `path/to/file.py:function` names."""
    where, _, function = target.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None:
                raise UserError(f"{where} can't be loaded as Python source.")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(where)
        return getattr(module, function)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UserError(
            f"{target!r} can't be loaded ({error}): give module:function or file.py:function, a function without "
            "arguments that returns (model, args, kwargs)."
        ) from error


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b=None", "c=text"]` as a dict of Python values; what is no Python literal stays text."""
    settings = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not (field and equals):
            raise UserError(f"--set {pair!r} must read FIELD=VALUE, for example --set num_hidden_layers=5")
        try:
            settings[field] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[field] = value
    return settings


if __name__ == "__main__":
    sys.exit(main())
