"""Benchmark results: what may be written, where it says it comes from, and the tables made of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, results, table

ROOT = Path(__file__).parent.parent
MEASURED = {"case": "T=4096 bf16", "us": 10.0, "anchor": "Inductor, same run", "anchor_us": 25.0}


def row(**changes: Any) -> dict[str, Any]:
    about = {"card": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789ab"}
    return {"bench": "toy", **MEASURED, **about, "date": "2026-11-22", **changes}


def test_kept_results_fit_the_schema_and_have_a_benchmark() -> None:
    kept = {path.stem for path in results.RESULTS.glob("*.json")}
    assert kept <= set(harness.known())
    for name in kept:
        results.read(name)


def test_readme_shows_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert table.updated(text) == text, "run `python -m bench.table`"


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    rows = [row(), row(case="T=128 bf16", anchor=None, anchor_us=None)]
    assert json.loads(results.write("toy", rows, tmp_path).read_text()) == rows
    assert results.read("toy", tmp_path) == rows


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"us": 0.0}, "us is 0.0"),
        ({"us": math.nan}, "us is nan"),
        ({"us": "10"}, "us is '10'"),
        ({"us": True}, "us is True"),
        ({"anchor_us": -1.0}, "anchor_us is -1.0"),
        ({"anchor": None}, "give both or neither"),
        ({"anchor_us": None}, "give both or neither"),
        ({"card": " "}, "card is empty"),
        ({"bench": "other"}, "the file belongs to 'toy'"),
        ({"date": "22 Nov"}, "YYYY-MM-DD"),
        ({"commit": "unknown"}, "must be a git commit"),
        ({"speedup": 2.5}, "fields are"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(results.BadRow, match=complaint):
        results.write("toy", [row(**changes)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_field_no_rows_and_repeated_case_are_refused() -> None:
    short = row()
    del short["card"]
    for rows, complaint in (([short], "fields are"), ([], "non-empty"), ([row(), row()], "one row a case")):
        with pytest.raises(results.BadRow, match=complaint):
            results.validate(rows, "toy")


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DSINFRA_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "README.md", "bench/results/toy.json"):
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_commit_is_gits(checkout: Path) -> None:
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert results.commit(checkout) == head[:12]


@pytest.mark.parametrize(
    ("name", "dirty"),
    [("code.py", True), ("README.md", False), ("bench/results/toy.json", False), ("untracked.py", False)],
)
def test_only_changed_sources_make_it_dirty(checkout: Path, name: str, dirty: bool) -> None:
    (checkout / name).write_text("2\n")
    assert results.commit(checkout).endswith("-dirty") is dirty


def test_without_git_the_variable_says_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSINFRA_COMMIT", raising=False)
    with pytest.raises(RuntimeError, match="set DSINFRA_COMMIT"):
        results.commit(tmp_path)
    monkeypatch.setenv("DSINFRA_COMMIT", "0123456789ab-dirty")
    assert results.commit(tmp_path) == "0123456789ab-dirty"


def test_check_close_accepts_what_is_close() -> None:
    results.check_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), atol=0, rtol=1e-3, what="o")
    results.check_close(torch.empty(0), torch.empty(0), atol=0, rtol=0, what="nothing")


@pytest.mark.parametrize(
    ("actual", "complaint"),
    [
        ([1.0, 2.1], r"o: 1 of 2 elements off .* flat index 1, is 2.0999"),
        ([math.nan, 2.0], "o: 1 of 2 elements off .* is nan"),
        ([1.0], r"shape \(1,\) instead of \(2,\)"),
    ],
)
def test_check_close_refuses_the_rest(actual: list[float], complaint: str) -> None:
    with pytest.raises(results.CheckFailed, match=complaint):
        results.check_close(torch.tensor(actual), torch.tensor([1.0, 2.0]), atol=0.01, rtol=0.01, what="o")


def test_a_run_without_a_check_is_refused() -> None:
    with pytest.raises(results.CheckFailed, match="made no check"), results.checked("toy"):
        pass
    with results.checked("toy"):
        results.check(True, "something")


CHECKING = "from bench.results import check\nGPUS = 0\ndef run(quick=False):\n    check({ok}, 'x')\n    return [ROW]\n"
BENCHES = {
    "good": CHECKING.format(ok=True),
    "wrong": CHECKING.format(ok=False),
    "blind": "GPUS = 0\ndef run(quick=False):\n    return [ROW]\n",
    "many_gpus": "GPUS = 999\ndef run(quick=False):\n    raise AssertionError('must not run')\n",
    "many_more": "def run(quick=False):\n    return []\n",
    "helper": "def walk():\n    pass\n",
}


@pytest.fixture
def source_checkout(tmp_path: Path) -> Path:
    """A checkout with a package, the harness and toy benchmarks, apart from this one's results."""
    (tmp_path / "dscompile").mkdir()
    for name in ("__init__", "_entry", "cli", "config", "errors"):
        (tmp_path / "dscompile" / f"{name}.py").write_text((ROOT / "dscompile" / f"{name}.py").read_text())
    (tmp_path / "dscompile" / "lowering").mkdir()
    for name in ("__init__", "errors"):
        (tmp_path / "dscompile" / "lowering" / f"{name}.py").write_text((ROOT / "lowering" / f"{name}.py").read_text())
    (tmp_path / "bench").mkdir()
    for name in ("__init__", "harness", "results", "schema", "table", "zoo_table"):
        (tmp_path / "bench" / f"{name}.py").write_text((ROOT / "bench" / f"{name}.py").read_text())
    for name, source in BENCHES.items():
        text = f'"""Toy {name}."""\nROW = {MEASURED!r}\n{source}'
        (tmp_path / "bench" / f"{name}.py").write_text(text)
    return tmp_path


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(folder), "DSINFRA_COMMIT": "0123456789ab", "PATH": ""}
    words = (sys.executable, "-m", "dscompile.cli", "bench", *words)
    return subprocess.run(words, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=120)


def test_bench_command_writes_and_prints(source_checkout: Path) -> None:
    run = command(source_checkout, "goo")
    assert run.returncode == 0, run.stderr
    assert "T=4096 bf16" in run.stdout and "2.50" in run.stdout
    kept = results.read("good", source_checkout / "bench" / "results")
    assert [(r["us"], r["commit"]) for r in kept] == [(10.0, "0123456789ab")]


def test_quick_run_is_not_kept(source_checkout: Path) -> None:
    assert command(source_checkout, "good", "--quick").returncode == 0
    assert not (source_checkout / "bench" / "results").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("wrong", "check failed: x Nothing was written."),
        ("blind", "'blind' made no check"),
        ("many_gpus", "needs 999 CUDA device(s)"),
        ("many", "'many' could be many_gpus, many_more"),
        ("god", "no benchmark is called 'god'; did you mean 'good'? Known: blind, good, many_gpus, many_more, wrong"),
        ("helper", "no benchmark is called 'helper'"),
    ],
)
def test_bench_command_refuses(source_checkout: Path, name: str, complaint: str) -> None:
    run = command(source_checkout, name)
    assert run.returncode == 1
    assert complaint in run.stderr
    assert not (source_checkout / "bench" / "results").exists()


def test_bench_command_needs_a_source_checkout(source_checkout: Path) -> None:
    (source_checkout / "bench" / "harness.py").unlink()
    run = command(source_checkout, "good")
    assert run.returncode == 1 and "run this from a source checkout" in run.stderr


def test_known_reads_gpus_and_summary_without_importing(source_checkout: Path) -> None:
    benchmarks = harness.known(source_checkout / "bench")
    assert benchmarks["many_gpus"] == harness.Benchmark("many_gpus", 999, "Toy many_gpus.")
    assert benchmarks["many_more"].gpus == 1


def test_table_shows_losses_and_origin() -> None:
    lines = table.render("toy", [row(), row(case="slow", us=50.0), row(case="alone", anchor=None, anchor_us=None)])
    assert "| T=4096 bf16 | 10.0 | Inductor, same run | 25.0 | 2.50 |" in lines
    assert "| slow | 50.0 | Inductor, same run | 25.0 | 0.50 |" in lines
    assert "| alone | 10.0 | none |  |  |" in lines
    assert (
        "NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, commit 0123456789ab, 2026-11-22. `dscompile bench toy`"
        in lines
    )


def zoo_row(**changes: Any) -> dict[str, Any]:
    found = {
        "model": "deepseek_v3",
        "version": "5.23.0",
        "mode": "prefill",
        "failure": None,
        "lowered": 4,
        "refused": {},
    }
    found |= {"error": 6e-7, "eager_error": 0.0, "graphs": 1, "breaks": 0}
    about = {field: row()[field] for field in ("card", "torch", "triton", "commit", "date")}
    return {"bench": "zoo", **found, "compile_s": 9.0, "inductor_s": 10.0, "warm_s": 1.5, **about, **changes}


def test_zoo_rows_of_other_cards_are_kept(tmp_path: Path) -> None:
    cpu, old, new = zoo_row(card="CPU"), zoo_row(lowered=3), zoo_row()
    for rows in ([cpu, old], [new]):
        results.write("zoo", rows, tmp_path)
    assert results.read("zoo", tmp_path) == [cpu, new]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([zoo_row(), zoo_row()], "one row a card and model and version and mode"),
        ([zoo_row(compile_s=0.0)], "compile_s is 0.0, a time must be positive"),
        ([zoo_row(error=math.nan)], "error is nan"),
        ([zoo_row(refused=2)], "refused is 2"),
        ([row(bench="zoo")], "fields are"),
    ],
)
def test_bad_zoo_rows_are_refused(rows: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(results.BadRow, match=complaint):
        results.validate(rows, "zoo")


def test_zoo_table_folds_modes_and_shows_failures() -> None:
    refused = {"mla: NoUpProjection": 2}
    decode = zoo_row(mode="static_decode", refused=refused, error=2e-6, compile_s=None, inductor_s=None, warm_s=None)
    text = table.render("zoo", [zoo_row(), decode, zoo_row(mode="train", failure="refused {}", error=0.5)])
    assert (
        "| deepseek_v3 | 5.23.0 | prefill, static decode: 2/3; **train fails** | 4 | 2 x mla: NoUpProjection "
        "| 2.0e-06, 0 | 9.0, 10.0 | 1.5 |" in text
    )
    cards = table.render("zoo", [zoo_row(card="CPU"), zoo_row()])
    assert cards.count("| model |") == 2 and "CPU, torch 2.11.0" in cards


def test_updated_replaces_marked_blocks_alone(tmp_path: Path) -> None:
    results.write("toy", [row()], tmp_path)
    text = "a\n<!-- bench:toy -->\nold\n<!-- /bench -->\nb\n<!-- bench:other -->\n<!-- /bench -->\nc\n"
    new = table.updated(text, tmp_path)
    assert new.startswith("a\n<!-- bench:toy -->\n| case |") and new.endswith("<!-- /bench -->\nc\n")
    assert "old" not in new and "Not measured yet: `dscompile bench other`" in new
    assert table.updated(new, tmp_path) == new


def test_times_of_a_cpu_stay_in_their_files(tmp_path: Path) -> None:
    text = "<!-- bench:toy -->\n<!-- /bench -->\n"
    results.write("toy", [row(card="CPU of a kind, 2 cores")], tmp_path)
    assert "Not measured yet" in table.updated(text, tmp_path)
    results.write("toy", [row(card="CPU of a kind, 2 cores"), row(case="on a card")], tmp_path)
    shown = table.updated(text, tmp_path)
    assert "| on a card |" in shown and "CPU" not in shown and shown.count("\n| ") == 2


@pytest.mark.parametrize(
    "text",
    [
        "<!-- bench:toy -->\nopen\n",
        "<!-- bench:Toy Name -->\n<!-- /bench -->\n",
        "<!-- bench:a -->\n<!-- bench:b -->\n<!-- /bench -->\n",
    ],
)
def test_broken_markers_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complete blocks"):
        table.updated(text, tmp_path)
