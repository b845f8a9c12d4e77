"""`dscompile bisect`: which rewrite is the first that changes a result beyond its bar, found by halving the fuel.

Rewrites are numbered in the order of their commits (`passes/commits.py`), and ``fuel=n`` applies the first n. With 0 a
result is that of the inner compiler alone; if that is wrong, the fault is not in a rewrite. Between a good and a bad
number the middle is tried until both are neighbours, and both ends are tried once more: a result that changes from run
to run has no first bad rewrite.

Two ways to judge: :func:`model` compares a compiled call with the uncompiled one, both against a wider copy where one
can be made; :func:`script` runs a program, whose exit status says good (0) or bad.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscompile.errors import BisectError

Say = Callable[[str], None]
Make = Callable[[], tuple[Any, Sequence[Any], Mapping[str, Any]]]


@dataclass(frozen=True)
class Trial:
    """What one run with a number of rewrites gave; ``text`` for people."""

    fuel: int | None
    good: bool
    text: str

    def __str__(self) -> str:
        return (
            f"  fuel {'all' if self.fuel is None else self.fuel!s:>4s}  {'good' if self.good else 'BAD'}: {self.text}"
        )


def search(run: Callable[[int], Trial], total: int, say: Say) -> tuple[Trial, Trial]:
    """(last good trial, first bad one), of which the bad one has exactly one rewrite more.

    ``total`` rewrites are known to be bad.

    Raises:
        BisectError: no rewrite is at fault, or the results are not the same each time.
    """

    def tried(fuel: int) -> Trial:
        trial = run(fuel)
        say(str(trial))
        return trial

    good = tried(0)
    if not good.good:
        raise BisectError(
            f"Without any rewrite (fuel 0) it is bad as well: {good.text}. So it is no rewrite's fault: look at the "
            "model, at the inner compiler (options={'inner': 'eager'} leaves it out) or at the bar."
        )
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        if tried(middle).good:
            low = middle
        else:
            high = middle
    again = tried(low), tried(high)
    if not again[0].good or again[1].good:
        raise BisectError(
            f"The results are not the same each time: fuel {low} was good and fuel {high} bad, and now they are "
            f"{'good' if again[0].good else 'bad'} and {'good' if again[1].good else 'bad'}. A first bad rewrite can't "
            "be named: fix the random seed (torch.manual_seed, torch.use_deterministic_algorithms), or raise the bar."
        )
    return again


def _culprit(rewrite: Mapping[str, Any] | None, before: Trial, after: Trial, total: int) -> str:
    lines = [f"Rewrite {after.fuel} of {total} is the first that makes it bad."]
    if rewrite is None:
        lines.append("  It left no record: the program sets a dump directory of its own.")
    else:
        where = rewrite["module_path"] or "(top)"
        shown = {
            "site": f"{rewrite['kind']} {where}".strip(),
            "source": rewrite["source"],
            "pass": rewrite["name"],
            "replaced": f"{rewrite['replaced']} by {rewrite['operator']}",
        }
        lines += [f"  {name:9s}{text}" for name, text in shown.items()]
    return "\n".join([*lines, f"  before   {before.text}", f"  after    {after.text}"])


# ------------------------------------------------------------------ a model


@dataclass(frozen=True)
class Yardstick:
    """What results are compared with, and how far they may be."""

    expected: list[Any]
    bar: float
    text: str

    def error(self, results: list[Any]) -> float:
        from dscompile import measure

        if len(results) != len(self.expected):
            return measure.WRONG
        return max((measure.error(a, b) for a, b in zip(results, self.expected, strict=True)), default=0.0)


def model(
    make: Make, *, inner: str = "inductor", bar: float | None = None, train: bool = False, say: Say = print
) -> None:
    """Finds the first rewrite that moves a model's results beyond the bar, and says so.

    Args:
        make: -> (model, args, kwargs), anew for each run, of equal weights and inputs under one random seed.
        inner: what compiles the rewritten graph, as in ``options={"inner": ...}``.
        bar: largest relative error; by default twice eager's own against a wider copy of the model, plus a floor.
        train: compare the gradients of all parameters too.

    Raises:
        BisectError: no rewrite can be named, with the reason.
    """
    results = _run(make, train, None)
    if not results:
        raise BisectError("The call returned no tensor, so there is nothing to compare: return one from the model.")
    yardstick = _yardstick(make, train, results, bar)
    say(yardstick.text)
    seen: list[Any] = []

    def run(fuel: int | None) -> Trial:
        seen.clear()
        try:
            error = yardstick.error(_run(make, train, _options(inner, fuel), seen))
        except Exception as raised:
            return Trial(fuel, False, f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}")
        return Trial(fuel, error <= yardstick.bar, f"error {error:.1e}")

    every = run(None)
    say(str(every))
    total = sum(len(report.rewrites) for report in seen)
    if every.good:
        say(f"All {total} rewrites together stay within the bar of {yardstick.bar:.1e}: nothing to find.")
        return
    before, after = search(run, total, say)
    found = [r.as_dict() for report in seen for r in report.rewrites if r.number == after.fuel]
    say(_culprit(found[0] if found else None, before, after, total))


def _options(inner: str, fuel: int | None) -> dict[str, Any]:
    return {"inner": inner, "fuel": fuel, "strict": False, "verify": False}


def _run(make: Make, train: bool, options: dict[str, Any] | None, seen: list[Any] | None = None) -> list[Any]:
    """Every tensor that one call returns, and in training the gradients; compiled if there are options."""
    import torch

    from dscompile.backend import dsinfra
    from dscompile.passes import commits

    torch.manual_seed(0)
    built, args, kwargs = make()
    call = built
    if options is not None:
        torch._dynamo.reset()
        commits.restart()
        sink = (seen if seen is not None else []).append
        call = torch.compile(built, backend=lambda gm, inputs: dsinfra(gm, inputs, options=options, sink=sink))
    torch.manual_seed(0)
    return _results(built, call, args, kwargs, train)


def _results(built: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], train: bool) -> list:
    import torch
    from torch.utils import _pytree as pytree

    with torch.set_grad_enabled(train):
        found = [x for x in pytree.tree_leaves(call(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        results = [x.detach().clone() for x in found]
        if train:
            torch.stack([x.double().square().mean() for x in found if x.requires_grad]).sum().backward()
            results += [p.grad.detach().clone() for p in built.parameters() if p.grad is not None]
    return results


def _yardstick(make: Make, train: bool, results: list[Any], bar: float | None) -> Yardstick:
    from dscompile import measure

    wide, eager = _wider(make, train), Yardstick(results, 0.0, "")
    own = eager.error(wide) if wide is not None else measure.WRONG
    dtypes = {x.dtype for x in results if x.is_floating_point()}
    fixed = max((measure.bar(d) for d in dtypes), default=0.0)
    if wide is None or own > 10 * fixed:  # a copy that computes something else is no reference
        text, expected, default = "eager; no wider copy of the model could be made", results, fixed
    else:
        text, expected = f"a wider copy, from which eager is {own:.1e}", wide
        default = max((measure.bar(d, own) for d in dtypes), default=0.0)
    bar = default if bar is None else bar
    return Yardstick(expected, bar, f"Compared with {text}; the bar is {bar:.1e}.")


def _wider(make: Make, train: bool) -> list[Any] | None:
    """Results of the same call in wider arithmetic, or None where the model or its inputs can't be widened."""
    import torch
    from torch.utils import _pytree as pytree

    from dscompile import measure

    torch.manual_seed(0)
    built, args, kwargs = make()
    if not isinstance(built, torch.nn.Module):
        return None
    dtypes = {x.dtype for x in (*built.parameters(), *built.buffers()) if x.is_floating_point()}
    if len({measure.WIDER.get(d) for d in dtypes}) != 1 or None in {measure.WIDER.get(d) for d in dtypes}:
        return None
    (wide,) = {measure.WIDER[d] for d in dtypes}

    def widened(x: Any) -> Any:
        return x.to(wide) if isinstance(x, torch.Tensor) and x.dtype in measure.WIDER else x

    try:
        built = copy.deepcopy(built).to(wide)
        args, kwargs = pytree.tree_map(widened, (tuple(args), dict(kwargs)))
        torch.manual_seed(0)
        return _results(built, built, args, kwargs, train)
    except Exception:  # a cache of a fixed dtype, a kernel for 16 bits only: eager's results have to do
        return None


# ------------------------------------------------------------------ a script


def script(path: Path, arguments: Sequence[str] = (), say: Say = print) -> None:
    """Finds the first rewrite with which a Python program fails (exit status other than 0), and says so.

    The program runs with ``DSINFRA_FUEL``; it must not set the option ``fuel`` itself.

    Raises:
        BisectError: no rewrite can be named, with the reason.
    """

    def run(fuel: int | None, dump: str = "") -> Trial:
        kept = {name: text for name, text in os.environ.items() if name not in ("DSINFRA_FUEL", "DSINFRA_DUMP")}
        more = {"DSINFRA_FUEL": "" if fuel is None else str(fuel), "DSINFRA_DUMP": dump}
        done = subprocess.run(
            [sys.executable, str(path), *arguments], env=kept | more, capture_output=True, text=True, errors="replace"
        )
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return Trial(fuel, done.returncode == 0, f"exit status {done.returncode}" + (f", {last[0]}" if last else ""))

    with tempfile.TemporaryDirectory(prefix="dscompile_bisect_") as folder:
        every = run(None, folder)
        say(str(every))
        rewrites = {r["number"]: r for r in _recorded(Path(folder))}
    total = max(rewrites, default=0)
    if every.good:
        say(f"With all {total} rewrites {path.name} passes: nothing to find.")
        return
    if not rewrites:
        raise BisectError(
            f"{path.name} fails ({every.text}) and no rewrite was recorded, so that none can be at fault: it doesn't "
            "compile with dsinfra before it fails, or sets a dump directory of its own. Run it uncompiled, or leave "
            "out its option dump."
        )
    before, after = search(run, total, say)
    say(_culprit(rewrites.get(after.fuel or 0), before, after, total))


def _recorded(folder: Path) -> list[dict[str, Any]]:
    """Rewrites of all graphs that were dumped there."""
    records = [json.loads(record.read_text()) for record in sorted(folder.glob("graph_*/record.json"))]
    return [rewrite for record in records for rewrite in record["rewrites"]]
