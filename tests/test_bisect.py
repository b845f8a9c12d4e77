"""Fuel applies the first n rewrites and leaves the rest untouched; bisect names the one that makes a result wrong."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscompile import bisect, cli
from dscompile.backend import dsinfra
from dscompile.config import Config
from dscompile.errors import BisectError, OptionError
from dscompile.lowering import select
from dscompile.passes import commits
from dscompile.report import CompileReport
from tests.passes.test_quantize_weights import MLP, build, rows
from tests.passes.toy import D, S, Toy, randn, stack
from tests.zoo.experts import Layer, ToyExperts

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def from_zero() -> Iterator[None]:
    torch._dynamo.reset()
    commits.restart()
    with torch.no_grad():
        yield


def names(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.format_node()) for n in gm.graph.nodes]


class Compiled:
    """A module compiled with some fuel; graphs as Dynamo made them and as the backend left them."""

    def __init__(self, module: Any, **options: Any):
        self.reports: list[CompileReport] = []
        self.graphs: list[tuple[list[str], list[str]]] = []
        options = {"inner": "eager", **options}

        def backend(gm: torch.fx.GraphModule, inputs: list) -> Any:
            before = names(gm)
            compiled = dsinfra(gm, inputs, options=options, sink=self.reports.append)
            self.graphs.append((before, names(gm)))
            return compiled

        self.call = torch.compile(module, backend=backend)

    @property
    def rewrites(self) -> list[tuple[int, str]]:
        return [(r.number, r.name) for report in self.reports for r in report.rewrites]

    @property
    def refusals(self) -> list[str]:
        return [site.refusal for report in self.reports for site in report.sites]


def layers() -> nn.Module:
    return stack(Toy, lambda: Toy(1), lambda: Toy(2))()


def moe() -> nn.Module:
    torch.manual_seed(0)
    return ToyExperts(Layer()).double()


# ------------------------------------------------------------------ the option


@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_a_wrong_fuel_is_named(value: Any) -> None:
    with pytest.raises(OptionError, match=r"options\['fuel'\] is .*a number of rewrites, 0 or more, or None for all"):
        Config.of(None, {"fuel": value})


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSINFRA_FUEL", "7")
    assert Config.of().fuel == 7 and Config.of(None, {"fuel": None}).fuel is None
    for text in ("-1", "many", "1.0"):
        monkeypatch.setenv("DSINFRA_FUEL", text)
        with pytest.raises(OptionError, match=f"DSINFRA_FUEL is '{text}'"):
            Config.of()


def test_fuel_is_part_of_the_caches_keys() -> None:
    assert len({Config(fuel=n).key() for n in (None, 0, 1, 2)}) == 4


# ------------------------------------------------------------------ fuel

CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]] = {
    "mla": (layers, randn(2, S, D), {}),
    "experts and router": (moe, randn(2, S, 24), {}),
    "quantised weights": (lambda: build(MLP()), rows(32, 128), {"fp8": "block", "inner": "aot_eager"}),
}


@pytest.mark.parametrize("case", CASES)
def test_without_fuel_every_graph_is_left_as_it_was(case: str) -> None:
    make, x, options = CASES[case]
    module = make()
    compiled = Compiled(module, fuel=0, strict=True, **options)  # no fault: by request
    torch.testing.assert_close(compiled.call(x), module(x), rtol=0, atol=0)
    for before, after in compiled.graphs:
        assert after == before
    assert compiled.rewrites == [] and "OutOfFuel" in compiled.refusals
    assert set(compiled.refusals) <= {"OutOfFuel", "KeptPrecise"}


@pytest.mark.parametrize("case", CASES)
def test_each_unit_is_one_rewrite_more(case: str) -> None:
    make, x, options = CASES[case]
    every = Compiled(make(), **options)
    every.call(x)
    assert [number for number, _ in every.rewrites] == [*range(1, len(every.rewrites) + 1)] != []
    for fuel in range(len(every.rewrites)):
        torch._dynamo.reset()
        commits.restart()
        some, module = Compiled(make(), fuel=fuel, **options), make()
        found = some.call(x)
        assert some.rewrites == every.rewrites[:fuel]
        if not options:
            torch.testing.assert_close(found, module(x), rtol=1e-9, atol=1e-11)


def test_rewrites_are_counted_over_all_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Toy(), Toy(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    compiled = Compiled(Broken(), fuel=1)
    compiled.call(randn(2, S, D))
    assert compiled.refusals == ["", "OutOfFuel"] and commits.count() == 1
    torch._dynamo.reset()
    compiled.call(randn(2, S, D))
    assert commits.count() == 1, "a function of ours around the backend hides its reset from torch"


def test_dynamos_reset_counts_from_zero() -> None:
    from dscompile._entry import ensure_registered

    ensure_registered()
    torch.compile(Toy(), backend="dsinfra", options={"inner": "eager"})(randn(2, S, D))
    assert commits.count() == 1
    torch._dynamo.reset()
    assert commits.count() == 0


def test_absorption_is_a_rewrite_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from dscompile.passes import absorb

    monkeypatch.setattr(absorb.heuristics, "prefer_absorbed", lambda **sizes: (True, "as the test wants it"))
    for fuel, operators, decision in (
        (0, {"scaled_dot_product_attention": 1}, "left to Inductor"),
        (1, {"mla": 1}, "mla: expanded, the 1 rewrites that the fuel allows were applied"),
        (2, {"mla_decode": 1}, "mla_decode: as the test wants it"),
    ):
        torch._dynamo.reset()
        commits.restart()
        compiled = Compiled(Toy(), fuel=fuel)
        compiled.call(randn(2, S, D))
        assert compiled.reports[0].op_counts == operators
        assert compiled.reports[0].sites[0].decision == decision


# ------------------------------------------------------------------ the search


def trials(good: Callable[[int], bool]) -> tuple[Callable[[int], bisect.Trial], list[int]]:
    asked: list[int] = []

    def run(fuel: int) -> bisect.Trial:
        asked.append(fuel)
        return bisect.Trial(fuel, good(fuel), "error 1.0e+00")

    return run, asked


@pytest.mark.parametrize("bad", [1, 2, 13, 99, 100])
def test_the_first_bad_rewrite_is_found_in_few_runs(bad: int) -> None:
    run, asked = trials(lambda fuel: fuel < bad)
    before, after = bisect.search(run, 100, lambda text: None)
    assert (before.fuel, after.fuel) == (bad - 1, bad) and len(asked) <= 10


def test_a_fault_that_is_no_rewrites_is_said_so() -> None:
    with pytest.raises(BisectError, match="Without any rewrite .*no rewrite's fault: look at the model"):
        bisect.search(trials(lambda fuel: False)[0], 8, lambda text: None)


def test_results_that_change_are_said_so() -> None:
    seen: set[int] = set()

    def first_time_only(fuel: int) -> bool:
        again = fuel in seen
        seen.add(fuel)
        return fuel == 0 or again  # bad when it is first tried

    with pytest.raises(
        BisectError, match="not the same each time: fuel 0 was good and fuel 1 bad.*fix the random seed"
    ):
        bisect.search(trials(first_time_only)[0], 8, lambda text: None)


# ------------------------------------------------------------------ a model


def third_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third site's scale is lost: its weights differ from the others' by their address."""
    run, seen = select.Table.run, []

    def wrong(self: select.Table, *args: Any) -> Any:
        found = run(self, *args)
        if self.op != "mla":
            return found
        mark = float(args[4].flatten()[0])
        seen.append(mark) if mark not in seen else None
        return (found[0] * 1.01, found[1]) if mark == marks[2] else found

    marks = [float(layer.b.weight.flatten()[0]) for layer in layers().layers]
    monkeypatch.setattr(select.Table, "run", wrong)


def make() -> tuple[nn.Module, tuple, dict]:
    return layers(), (randn(2, S, D),), {}


def test_a_wrong_rewrite_of_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    third_is_wrong(monkeypatch)
    said: list[str] = []
    bisect.model(make, inner="eager", say=said.append)
    assert said[0].startswith("Compared with eager; no wider copy") and "the bar is 1.0e-09" in said[0]  # float64
    lines = {line.split()[0]: line.split(None, 1)[1] for line in said[-1].splitlines()}
    assert said[-1].startswith("Rewrite 3 of 3 is the first that makes it bad.")
    assert lines["site"] == "mla layers.2" and lines["source"].startswith("passes/toy.py:")
    assert lines["pass"] == "recognize_mla" and lines["replaced"] == "scaled_dot_product_attention by mla"
    assert float(lines["before"].split()[-1]) < 1e-9 < 1e-4 < float(lines["after"].split()[-1])


def test_a_right_model_has_nothing_to_find() -> None:
    said: list[str] = []

    def wide() -> tuple[nn.Module, tuple, dict]:
        return layers().float(), (randn(2, S, D, dtype=torch.float32),), {}

    bisect.model(wide, inner="eager", train=True, say=said.append)
    assert said[0].startswith("Compared with a wider copy, from which eager is ")
    assert said[-1].startswith("All 3 rewrites together stay within the bar")


def test_what_is_no_rewrites_fault_is_not_blamed_on_one() -> None:
    def noisy() -> tuple[Callable, tuple, dict]:
        return lambda x: layers()(x) * (1 + torch.compiler.is_compiling()), (randn(2, S, D),), {}

    with pytest.raises(BisectError, match=r"Without any rewrite \(fuel 0\) it is bad as well"):
        bisect.model(noisy, inner="eager", say=lambda text: None)


def test_a_model_without_tensors() -> None:
    with pytest.raises(BisectError, match="returned no tensor.*return one"):
        bisect.model(lambda: (lambda: 3, (), {}), say=lambda text: None)


# ------------------------------------------------------------------ the command


def test_the_command_on_a_function(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.test_bisect import make\n")
    assert cli.main(["bisect", f"{file}:make", "--inner", "eager", "--bar", "1e-9"]) == 0
    assert "nothing to find" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine.py"], "names no function to compare: add --check to run a script"),
        (["nowhere.py", "--check"], "'nowhere.py' is no file: --check runs a Python script, give its path"),
        (["nowhere.py:make"], "can't be loaded"),
    ],
)
def test_wrong_targets_are_explained(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bisect", *arguments]) == 1
    assert words in capsys.readouterr().err


SCRIPT = """
    import os, sys
    fuel = os.environ["DSINFRA_FUEL"]
    if os.environ["DSINFRA_DUMP"]:
        import json, pathlib
        folder = pathlib.Path(os.environ["DSINFRA_DUMP"], "graph_000")
        folder.mkdir()
        kinds = ["mla", "experts", "route", "mla"]
        rewrites = [dict(number=i + 1, name="a_pass", kind=kind, module_path=f"layers.{i}", source="m.py:3",
                         replaced="sum", operator=kind) for i, kind in enumerate(kinds)]
        (folder / "record.json").write_text(json.dumps({"rewrites": rewrites}))
    sys.exit("far off" if fuel == "" or int(fuel) >= BAD else 0)
"""


def script(folder: Path, text: str, bad: int = 3) -> Path:
    path = folder / "check.py"
    path.write_text(textwrap.dedent(text).replace("BAD", str(bad)))
    return path


def test_the_command_on_a_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A script of the same interface as a real one, which says of each number of rewrites whether it is good."""
    assert cli.main(["bisect", str(script(tmp_path, SCRIPT)), "--check"]) == 0
    out = capsys.readouterr().out
    assert "fuel  all  BAD: exit status 1, far off" in out and "fuel    2  good: exit status 0" in out
    assert "Rewrite 3 of 4 is the first that makes it bad." in out and "route layers.2" in out


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("pass", 0, "With all 0 rewrites check.py passes: nothing to find."),
        ("raise SystemExit('broken')", 1, "fails (exit status 1, broken) and no rewrite was recorded"),
        (SCRIPT, 1, "Without any rewrite (fuel 0) it is bad as well: exit status 1, far off"),
    ],
    ids=["good", "elsewhere", "not ours"],
)
def test_scripts_without_a_wrong_rewrite(
    text: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["bisect", str(script(tmp_path, text, bad=0)), "--check"]) == code
    said = capsys.readouterr()
    assert words in (said.err if code else said.out)


@pytest.mark.slow
def test_a_real_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles one layer; the check fails as soon as that is rewritten."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    text = """
        import torch
        from dscompile import report
        from dscompile.backend import dsinfra
        from tests.passes.toy import D, S, Toy, randn
        with torch.no_grad():
            torch.compile(Toy(), backend=lambda gm, i: dsinfra(gm, i, options={"inner": "eager"}))(randn(2, S, D))
        assert "mla" not in report.last().op_counts, report.last().op_counts
    """
    said: list[str] = []
    bisect.script(script(tmp_path, text), say=said.append)
    assert said[-1].startswith("Rewrite 1 of 1 is the first") and "mla (top)" in said[-1]
