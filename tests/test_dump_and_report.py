"""What a compilation leaves to read: dumps on disk and in torch's trace, the report, its table, and `explain`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dscompile import explain, report
from dscompile.backend import dsinfra
from dscompile.errors import DumpDirectoryError
from dscompile.passes.pipeline import NUMBERS, PASSES
from dscompile.passes.record import PassRecord, Site
from dscompile.report import CompileReport, summary, table
from tests.passes.toy import D, S, Toy, randn, sdpa, stack, toy

ROOT = Path(__file__).parent.parent


def run(module: Any, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    call = torch.compile(module, backend=lambda gm, i: dsinfra(gm, i, options={"inner": "eager", **options}))
    with torch.no_grad():
        return call(*inputs)


def biased() -> Toy:
    layer = Toy(3)
    layer.b = torch.nn.Linear(layer.b.in_features, layer.b.out_features, dtype=torch.float64)
    return layer


# ------------------------------------------------------------------ dumps


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of two layers, one of them refused."""
    root = tmp_path_factory.mktemp("dump") / "made" / "on the way"
    run(stack(Toy, biased)(), randn(2, S, D), dump=str(root))
    return root / "graph_000"


def test_every_pass_leaves_its_files(dumped: Path) -> None:
    expected = {"record.json", "explain.txt", "graphs.json", "00_shadow.after.txt"}
    for name in (*PASSES[1:], "real_rotation", "mixed_product"):
        expected |= {f"{NUMBERS[name]:02d}_{name}.{end}" for end in ("before.txt", "after.txt", "diff")}
    assert {p.name for p in dumped.iterdir()} == expected


def test_graphs_hold_each_line_once(dumped: Path) -> None:
    """What `graphs.json` says of a graph is what its readable text says."""
    graphs = json.loads((dumped / "graphs.json").read_text())
    names, files = graphs["names"], graphs["files"]

    def text(row: list) -> str:
        body, name, kind, call, args, place = row
        at = graphs["places"][place] if place >= 0 else None
        spelled = "".join(names[part] if isinstance(part, int) else part for part in args)
        left = f"{names[name]}: {kind}" if kind else names[name]
        return f"  {left} = {call}({spelled})" + (f"  # {files[at[0]]['file']}:{at[1]}" if at else "")

    for file in dumped.glob("*.before.txt"):
        runs = graphs["graphs"][graphs["passes"][file.name.split(".")[0][3:]]["before"]]
        rows = [graphs["rows"][i] for first, count in runs for i in range(first, first + count)]
        assert [text(row) for row in rows] == file.read_text().splitlines()[1:], file.name
    stages = graphs["passes"]
    assert stages["absorb"]["before"] == stages["absorb"]["after"] == stages["recognize_mla"]["after"]
    assert len({json.dumps(row) for row in graphs["rows"]}) == len(graphs["rows"])


def test_only_lines_near_those_of_nodes_are_kept(dumped: Path) -> None:
    graphs = json.loads((dumped / "graphs.json").read_text())
    source = (ROOT / "tests" / "passes" / "toy.py").read_text().splitlines()
    number = [file["file"] for file in graphs["files"]].index("passes/toy.py")
    pointed = {line for file, line in graphs["places"] if file == number}
    kept = {int(line): text for line, text in graphs["files"][number]["lines"].items()}
    assert pointed <= set(kept) and all(source[line - 1].rstrip() == text for line, text in kept.items())
    assert all(min(abs(line - other) for other in pointed) <= 2 for line in kept)


def test_a_file_that_cannot_be_read_costs_its_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dscompile.snapshots.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError), raising=False
    )
    run(Toy(), randn(2, S, D), dump=str(tmp_path))
    graphs = json.loads((tmp_path / "graph_000" / "graphs.json").read_text())
    assert graphs["places"] and all(file["lines"] == {} for file in graphs["files"])


def test_graphs_are_readable(dumped: Path) -> None:
    before = (dumped / "01_recognize_mla.before.txt").read_text()
    after = (dumped / "01_recognize_mla.after.txt").read_text()
    assert "dsinfra.mla" not in before and after.count("= dsinfra.mla.default(") == 1
    line = next(line for line in after.splitlines() if "dsinfra.mla.default(" in line)
    assert re.search(r"# passes/toy\.py:\d+$", line), "a new node has the line of the one it serves"
    assert re.search(r"linear\w*: float64\[2, 10, 24\] = ", before)


def test_the_difference_shows_what_a_pass_wrote(dumped: Path) -> None:
    diff = (dumped / "01_recognize_mla.diff").read_text()
    assert any(line.startswith("+") and "dsinfra.mla.default(" in line for line in diff.splitlines())
    removed = [line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert all("scaled_dot_product_attention" not in line for line in removed), "nothing is taken out of the graph"
    (lowered,) = dumped.glob("*_lower.diff")
    assert lowered.read_text() == "", "on the CPU the operator stays"


def test_the_record_is_complete(dumped: Path) -> None:
    record = json.loads((dumped / "record.json").read_text())
    assert set(record) == {"device", "error", "op_counts", "passes", "rewrites", "settings", "versions"}
    assert [p["name"] for p in record["passes"]] == [*PASSES, "real_rotation", "mixed_product"]
    assert record["settings"] == {"inner": "eager"} and record["versions"]["torch"] == torch.__version__
    recognised = record["passes"][1]
    assert (recognised["considered"], recognised["matched"]) == (2, 1) and recognised["seconds"] >= 0
    assert [set(s) for s in recognised["sites"]] == [set(Site("", "", "", True).as_dict())] * 2
    refused = recognised["sites"][1]
    assert refused["refusal"] == "UpProjectionBias" and refused["module_path"] == "layers.1" and refused["hint"]
    assert record["op_counts"] == {"mla": 1, "scaled_dot_product_attention": 1}


def test_the_table_is_beside_it(dumped: Path) -> None:
    text = (dumped / "explain.txt").read_text()
    assert "mla lowered: layers.0" in text and "mla refused (UpProjectionBias): layers.1" in text


def test_each_graph_has_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        run(Toy(), randn(2, S, D), dump=str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_000", "graph_001"]


def test_the_variable_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSINFRA_DUMP", str(tmp_path / "here"))
    run(Toy(), randn(2, S, D))
    assert (tmp_path / "here" / "graph_000" / "record.json").exists()


def test_a_graph_without_attention_leaves_a_record(tmp_path: Path) -> None:
    run(lambda x: x + 1, randn(3), dump=str(tmp_path))
    assert json.loads((tmp_path / "graph_000" / "record.json").read_text())["passes"] == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_directory_that_cannot_be_written_is_an_error_before_compiling(below: str, tmp_path: Path) -> None:
    """A file stands in its place, which no rights help against."""
    (tmp_path / "taken").write_text("mine")
    report.clear()
    with pytest.raises(Exception) as caught:
        run(Toy(), randn(2, S, D), dump=str(tmp_path / "taken" / below))
    error = getattr(caught.value, "inner_exception", None) or caught.value
    assert isinstance(error, DumpDirectoryError)
    assert str(tmp_path / "taken") in str(error) and "give a directory you own" in str(error)
    assert report.reports() == [] and (tmp_path / "taken").read_text() == "mine"


def test_bodies_are_dumped_too(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    changed = toy(forward=lambda self, x: checkpoint(lambda x: Toy.forward(self, x), x, use_reentrant=False))
    run(changed(), randn(2, S, D), dump=str(tmp_path))
    text = (tmp_path / "graph_000" / "01_recognize_mla.after.txt").read_text()
    assert text.count("graph ") >= 2 and "dsinfra.mla.default(" in text.split("graph ")[2]


def test_torchs_trace_holds_the_artifacts(tmp_path: Path) -> None:
    code = (
        "import torch\nfrom dscompile.backend import dsinfra\n"
        "from tests.passes.toy import D, S, Toy, randn\n"
        "options = {'inner': 'eager'}\n"
        "with torch.no_grad():\n"
        "    torch.compile(Toy(), backend=lambda gm, i: dsinfra(gm, i, options=options))(randn(2, S, D))\n"
    )
    env = os.environ | {"TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trace = "".join(p.read_text() for p in tmp_path.glob("*.log"))
    for name in ("record.json", "explain.txt", "01_recognize_mla.diff", "01_recognize_mla.after.txt"):
        assert f'"dsinfra_{name}"' in trace, name
    assert "dsinfra.mla.default(" in trace


# ------------------------------------------------------------------ explain


def test_explain_shows_a_match() -> None:
    with torch.no_grad():
        found = explain(Toy(), randn(2, S, D))
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[0] == ["graph", "0", "on", "CPU", "(reference", "implementations)"]
    shown = {words[0]: " ".join(words[1:]) for words in lines[1:]}
    assert shown["mla"] == "lowered: (top)"
    assert re.fullmatch(r"passes/toy\.py:\d+", shown["source"])
    assert shown["form"].startswith("sdpa, H 4, N 6 + R 4, V 5, C 12, rope ")
    assert shown["mask"] == "causal" and shown["decision"].startswith("mla") and shown["kernel"] == "reference"


def test_explain_shows_a_refusal_with_reason_line_and_hint() -> None:
    with torch.no_grad():
        text = str(explain(stack(Toy, biased)(), randn(2, S, D)))
    refused = text[text.index("mla refused") :]
    assert refused.startswith("mla refused (UpProjectionBias): layers.1\n")
    assert re.search(r"source +passes/toy\.py:\d+\n", refused)
    assert re.search(r"reason +the up-projection adds a bias\n", refused)
    assert re.search(r"hint +a bias in the key/value up-projection can't be absorbed", refused)
    assert "left to Inductor" in refused


def test_equal_layers_share_a_line() -> None:
    with torch.no_grad():
        text = str(explain(stack(Toy, lambda: Toy(1), lambda: Toy(2))(), randn(2, S, D)))
    assert text.count("mla lowered") == 1 and "3 x mla lowered: layers.0 ... layers.2" in text


def test_explain_of_nothing() -> None:
    assert "no attention, expert layer or FP8 layer found" in str(explain(lambda x: x + 1, randn(3)))
    assert str(report.Explanation([])) == "nothing was compiled"


def test_explain_counts_every_graph() -> None:
    def broken(self, q, k, v):  # type: ignore[no-untyped-def]
        o = sdpa(q, k, v)
        torch._dynamo.graph_break()
        return o * 1

    with torch.no_grad():
        found = explain(stack(toy(attend=broken), Toy)(), randn(2, S, D))
    assert len(found.graphs) > 1 and len(found.sites) == 2
    assert str(found).count("graph ") == len(found.graphs)


def test_explain_changes_nothing() -> None:
    """Weights, gradients, the random state, and the list of reports are as before; the module stays uncompiled."""
    module, x = stack(Toy, torch.nn.Dropout)(), randn(2, S, D)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    before, random = report.reports(), torch.get_rng_state()
    explain(module, x)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert report.reports() == before
    assert type(module.forward).__name__ == "method" and not hasattr(module, "_orig_mod")


def test_explain_runs_the_call() -> None:
    """A cache that is passed in advances as in eager mode."""
    cache = torch.zeros(3)
    explain(lambda c: c.add_(1).softmax(0), cache)
    assert torch.equal(cache, torch.ones(3))


# ------------------------------------------------------------------ reports


def site(**changes: Any) -> Site:
    return Site(**{"kind": "mla", "module_path": "a", "source": "m.py:1", "matched": True, **changes})


def test_summary_counts_and_says_why() -> None:
    sites = [site(), site(matched=False, refusal="SoftmaxSink"), site(matched=False, refusal="SoftmaxSink")]
    assert summary([CompileReport(sites=sites)]) == "1 of 3 sites lowered; refused: 2 x SoftmaxSink"
    assert summary([]) == "0 of 0 sites lowered"


def test_the_table_separates_what_differs() -> None:
    sites = [site(), site(module_path="b"), site(module_path="c", mask="causal"), site(matched=False, refusal="X")]
    text = table([CompileReport(sites=sites, device="CPU"), CompileReport(error="E: boom")])
    assert "2 x mla lowered: a ... b" in text and "  mla lowered: c" in text and "mla refused (X): a" in text
    assert "graph 1" in text and "analysis stopped, the rest is Inductor's: E: boom" in text


def test_a_report_as_json() -> None:
    found = CompileReport(records=[PassRecord("p", [site(), site(matched=False)], 0.5)], op_counts={"mla": 1})
    assert json.loads(json.dumps(found.as_dict()))["passes"][0]["matched"] == 1
    assert found.seconds == {"p": 0.5}


def test_reports_are_listed_oldest_first() -> None:
    report.clear()
    assert report.last() is None
    run(Toy(), randn(2, S, D))
    run(stack(Toy, lambda: Toy(1))(), randn(2, S, D))
    assert [r.op_counts["mla"] for r in report.reports()] == [1, 2]
    assert report.last() is report.reports()[-1]
    report.reports().clear()
    assert len(report.reports()) == 2, "the list handed out is a copy"


def test_reports_from_many_threads() -> None:
    report.clear()
    start = threading.Barrier(8)
    seen: list[int] = []

    def work() -> None:
        start.wait()
        for _ in range(200):
            report.add(CompileReport())
            seen.append(len(report.reports()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert len(report.reports()) == 1600 and max(seen) == 1600
    report.clear()


def test_a_compilation_logs_one_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dscompile"):
        run(Toy(), randn(2, S, D))
    assert [r.getMessage().startswith("graph 0") for r in caplog.records if r.name == "dscompile"] == [True]
