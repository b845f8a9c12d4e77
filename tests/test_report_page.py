"""`dscompile report`: what it reads, what it refuses, and the page it writes, looked at in headless Chromium."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dscompile import cli, report_page
from dscompile.backend import dsinfra
from dscompile.errors import ReportError
from tests.browser import chromium, opened
from tests.passes.toy import D, S, Toy, randn, stack

HOSTILE = '</script><img src=x onerror="window.hacked = 1"> & <!--data--> \u2028\''
REPLICAS = 21  # of a model with three layers: 63


def dump(module: Any, directory: Path, *inputs: torch.Tensor, **kwargs: Any) -> None:
    torch._dynamo.reset()
    options = {"inner": "eager", "dump": str(directory)}
    call = torch.compile(module, backend=lambda gm, i: dsinfra(gm, i, options=options))
    with torch.no_grad():
        call(*inputs, **kwargs)


def biased() -> Toy:
    layer = Toy(3)
    layer.b = torch.nn.Linear(layer.b.in_features, layer.b.out_features, dtype=torch.float64)
    return layer


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two graphs: three layers of which the last is refused, and one without attention."""
    root = tmp_path_factory.mktemp("toys")
    dump(stack(Toy, lambda: Toy(1), biased)(), root, randn(2, S, D))
    dump(lambda x: x + 1, root, randn(3))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V3 of transformers with three layers."""
    from dscompile import demo

    root = tmp_path_factory.mktemp("model")
    module, args, kwargs = demo.example("deepseek_v3", {"num_hidden_layers": 3, "hidden_size": 64})
    dump(module, root, *args, **kwargs)
    return root


@pytest.fixture
def copy(toys: Path, tmp_path: Path) -> Path:
    """The toys' dump, to be changed."""
    return Path(shutil.copytree(toys, tmp_path / "dump"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(toys: Path) -> Path:
    return report_page.write(toys)[0]


def change(file: Path, **values: Any) -> dict[str, Any]:
    record = json.loads(file.read_text()) | values
    file.write_text(json.dumps(record))
    return record


# ------------------------------------------------------------------ the command, and what it refuses


def test_the_command_writes_one_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    text = (copy / "report.html").read_text()
    assert cli.main(["report", str(copy), "-o", str(copy / "other.html")]) == 0
    assert (copy / "other.html").read_text() == text
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(""", text)
    assert outside == [], "nothing is loaded"


def test_the_folder_of_one_graph_is_enough(copy: Path) -> None:
    _, found = report_page.write(copy / "graph_000", copy / "one.html")
    assert [graph["name"] for graph in found.report["graphs"]] == ["graph_000"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", r"nowhere' does not exist: give the directory of options"),
        (lambda root: root / "graph_000" / "record.json", r"record.json' is a file: give the directory"),
        (lambda root: (root / "a").mkdir() or root / "a", "is empty, but no graph_NNN of a compilation"),
    ],
)
def test_no_dump_is_an_error(make: Any, message: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(make(copy))]) == 1
    assert re.search(rf"^dscompile: .*{message}", capsys.readouterr().err)


def test_a_directory_of_other_things_is_named_with_what_it_holds(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(ReportError, match=r"holds a, b, c, d, e \.\., but no graph_NNN"):
        report_page.write(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "graph_000 has no record.json: its compilation raised, or is not done yet"),
        ('{"passes": [', r"graph_000/record.json is no JSON \(.*\): it was cut off or changed"),
        ("[]", "graph_000/record.json holds no list of passes"),
        ('{"passes": [{"name": "absorb"}]}', "graph_000/record.json holds no list of passes with their sites"),
        ('{"passes": [{"name": "absorb", "sites": [{"kind": "mla"}]}]}', "holds no list of passes with their sites"),
    ],
)
def test_a_broken_record(text: str | None, message: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone it is an error, beside others it is left out and named."""
    record = copy / "graph_000" / "record.json"
    record.write_text(text) if text is not None else record.unlink()
    assert cli.main(["report", str(copy)]) == 0
    assert re.search(rf"left out: .*{message}", capsys.readouterr().err)
    shutil.rmtree(copy / "graph_001")
    assert cli.main(["report", str(copy)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "compile again with a new directory" in error


def test_broken_graphs(copy: Path) -> None:
    (copy / "graph_000" / "graphs.json").write_text('{"rows": []}')
    _, found = report_page.write(copy)
    assert re.search("graph_000/graphs.json lacks some of bodies, files", found.broken[0])


def test_a_page_that_cannot_be_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(copy), "-o", str(copy)]) == 1
    assert re.search(r"can't be written \(Is a directory\): name another file with -o", capsys.readouterr().err)


# ------------------------------------------------------------------ what is embedded


def test_each_site_is_listed_once_with_its_passes(toys: Path) -> None:
    sites = report_page.collect(toys).report["graphs"][0]["sites"]
    lowered = ["recognize_mla", "absorb", "lower"]
    assert [site["passes"] for site in sites] == [lowered, lowered, ["recognize_mla"]]
    assert [site["matched"] for site in sites] == [True, True, False]


def test_equal_sites_of_one_pass_stay_several(copy: Path) -> None:
    file = copy / "graph_000" / "record.json"
    record = json.loads(file.read_text())
    record["passes"][1]["sites"] *= 2
    change(file, passes=record["passes"])
    assert len(report_page.collect(copy).report["graphs"][0]["sites"]) == 6


def test_nothing_of_a_model_is_markup(copy: Path) -> None:
    file = copy / "graph_000" / "record.json"
    change(file, device=HOSTILE, versions={HOSTILE: HOSTILE}, error=HOSTILE)
    text = report_page.write(copy)[0].read_text()
    assert "<img" not in text and "\u2028" not in text
    assert text.count("<script") == text.count("</script>") == 4
    kept = re.search(r'<script type="application/json" id="report">(.*?)</script>', text)
    assert kept and json.loads(kept[1])["graphs"][0]["device"] == HOSTILE


# ------------------------------------------------------------------ the page


def rows(page: Any) -> list[str]:
    return page.locator("#sites .where").all_inner_texts()


def test_the_head_and_the_tables(browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        assert at.locator("h1").inner_text() == "2 of 3 sites lowered"
        head = at.locator("header").inner_text()
        assert f"torch {torch.__version__.partition('+')[0]}" in head and "inner=eager" in head and "CPU" in head
        assert at.locator(".tab", has_text="graph 00").all_inner_texts() == ["graph 000 3 sites", "graph 001 0 sites"]
        assert rows(at) == ["layers.0,1 × 2", "layers.2"], "layers that differ only in their number share a line"
        assert "recognize_mla" in at.locator("#passes").inner_text()
        assert "2 × mla" in at.locator("#passes .ops").inner_text()
        at.locator(".tab", has_text="graph 001").click()
        assert "No attention, expert layer or FP8 layer was found" in at.locator("#sites").inner_text()
        assert "#g=1" in at.url


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("state", "refused", ["layers.2"]),
        ("state", "lowered", ["layers.0,1 × 2"]),
        ("pass", "absorb", ["layers.0,1 × 2"]),
    ],
)
def test_filters(name: str, value: str, expected: list[str], browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        at.locator(f"#sites select[name={name}]").select_option(value)
        assert rows(at) == expected and f"{name}={value}" in at.url
        at.reload()
        assert rows(at) == expected, "a link shows the same"
        assert at.locator(f"#sites select[name={name}]").input_value() == value


def test_filters_by_kind_and_refusal(browser: Any, copy: Path) -> None:
    file = copy / "graph_000" / "record.json"
    passes = json.loads(file.read_text())["passes"]
    other = {**passes[1]["sites"][2], "kind": "route", "refusal": "RouterForm", "module_path": "gate"}
    passes[1]["sites"].append(other)
    change(file, passes=passes)
    with opened(browser, report_page.write(copy)[0]) as at:
        at.locator("select[name=kind]").select_option("route")
        assert rows(at) == ["gate"]
        at.locator("select[name=kind]").select_option("")
        at.locator("select[name=refusal]").select_option("UpProjectionBias")
        assert rows(at) == ["layers.2"]


def test_free_text_keeps_the_cursor(browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        at.keyboard.press("/")
        at.keyboard.type("bias absorbed", delay=1)
        assert rows(at) == ["layers.2"] and at.evaluate("document.activeElement.name") == "q"
        at.keyboard.type(" nowhere")
        assert rows(at) == [] and "No site passes the filters" in at.locator("#sites").inner_text()


def test_a_refusal_says_what_would_make_it_match(browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        at.locator(".where", has_text="layers.2").click()
        panel = at.locator(".panel")
        text = panel.inner_text()
        assert "UpProjectionBias" in text and "the up-projection adds a bias" in text
        assert "What would make it match\na bias in the key/value up-projection can't be absorbed" in text
        assert "return self.b(latent)" in panel.locator(".line.here").inner_text(), "the source line that failed"
        assert re.search(r"passes/toy\.py:\d+", panel.locator(".source figcaption").inner_text())


def test_a_near_miss_shows_what_held(browser: Any, copy: Path) -> None:
    file = copy / "graph_000" / "record.json"
    passes = json.loads(file.read_text())["passes"]
    passes[1]["sites"][2] |= {
        "closest": "expanded MLA",
        "proved": ["scores are bilinear", "keys are one up-projection"],
    }
    change(file, passes=passes)
    with opened(browser, report_page.write(copy)[0], "#site=2") as at:
        assert "Closest form: expanded MLA" in at.locator(".refusal").inner_text()
        held = passes[1]["sites"][2]["proved"]
        assert at.locator(".facts .held").all_inner_texts() == held
        assert at.locator(".facts .failed").all_inner_texts() == ["the up-projection adds a bias"]


def test_what_only_looks_like_a_site_is_none(browser: Any, copy: Path) -> None:
    """A near miss has a line, what is common (a classifier's softmax) only on request; neither counts as refused."""
    file = copy / "graph_000" / "record.json"
    passes = json.loads(file.read_text())["passes"]
    like = passes[1]["sites"][2]
    passes[1] |= {
        "near_misses": [{**like, "kind": "route", "module_path": "near"}],
        "passed_over": [{**like, "kind": "route", "module_path": "far"}],
    }
    change(file, passes=passes)
    with opened(browser, report_page.write(copy)[0]) as at:
        assert at.locator("h1").inner_text() == "2 of 3 sites lowered"
        assert rows(at) == ["layers.0,1 × 2", "layers.2", "near"]
        at.locator("select[name=state]").select_option("passed over")
        assert rows(at) == ["far"]
        at.locator("select[name=state]").select_option("near miss")
        assert rows(at) == ["near"]


def test_a_match_by_the_keyboard_alone(browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        at.locator(".where").first.focus()
        at.keyboard.press("Enter")
        assert at.locator(".where").first.get_attribute("aria-expanded") == "true"
        assert at.evaluate("document.activeElement.className") == "where", "focus stays on the row"
        panel = at.locator(".panel")
        for text in ("absorbed", "expanded", "rope", "causal", "reference", "recognize_mla, absorb, lower"):
            assert text in panel.inner_text()
        at.keyboard.press("Tab")
        at.keyboard.press("Tab")
        at.keyboard.press("Enter")
        assert panel.locator(".members [aria-current]").inner_text() == "1" and "site=1" in at.url
        assert panel.locator(".members code").inner_text() == "layers.1"


def test_drawings_show_what_is_bound_and_what_is_replaced(browser: Any, page: Path) -> None:
    with opened(browser, page, "#site=0") as at:
        bound, replaced = at.locator(".drawing").all()
        texts = bound.locator("text").all_text_contents()
        assert {"q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv", "causal = True"} <= set(texts)
        weight = next(text for text in bound.locator("title").all_text_contents() if "b_parameters_weight" in text)
        assert weight.endswith(": float64[44, 12]")
        names = replaced.locator("title").all_text_contents()
        assert any("scaled_dot_product_attention" in name for name in names)
        assert any("linear" in name for name in names), "the up-projection is gone, too"


def test_a_pass_shows_what_it_changed(browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        assert at.locator("#graphs .tab[aria-current]").inner_text().startswith("recognize_mla")
        assert any("dsinfra.mla.default(" in text for text in at.locator(".row.added").all_inner_texts())
        assert at.locator(".row.removed").count() >= 2
        few = at.locator(".row").count()
        at.locator("input[name=whole]").check()
        assert at.locator(".row").count() > few and "whole=1" in at.url
        at.locator("#graphs input[type=search]").fill("dsinfra.mla")
        assert at.locator(".row").count() == 2 == at.locator(".row.added").count()
        at.locator(".row .node .ref").first.click()
        assert "dsinfra.mla.default(" in at.locator(".whole").inner_text()
        at.locator("#graphs .tab", has_text="lower").click()
        assert at.locator(".row.added").count() == 0 < at.locator(".row").count(), "on the CPU the operator stays"


def test_nodes_link_to_their_source_line(browser: Any, page: Path) -> None:
    with opened(browser, page) as at:
        at.locator(".row.added .place").first.click()
        here = at.locator("#source .line.here")
        assert "sdpa(q, k, v, is_causal=True)" in here.inner_text() and here.is_visible()
        at.reload()
        at.wait_for_selector("#source .line.here")
        assert here.is_visible(), "a link shows the same"


def test_hostile_names_stay_text(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Module names, source lines, file names, node names and messages that would like to be markup."""
    folder = tmp_path / "a<b>&"
    folder.mkdir()
    source = folder / "<img src=x>.py"
    spelled = HOSTILE.replace("\u2028", "")
    source.write_text(
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
        f"def attend(self, q, k, v):\n    return sdpa(q, k, v, is_causal=True)  # {spelled}\n"
    )
    spec = importlib.util.spec_from_file_location("hostile", source)
    assert spec and spec.loader
    hostile = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hostile", hostile)
    spec.loader.exec_module(hostile)
    layers = torch.nn.Sequential()
    layers.add_module(re.sub(r"['.]", "", spelled), type("Changed", (Toy,), {"attend": hostile.attend})())
    dump(layers, tmp_path / "dump", randn(2, S, D))
    record = json.loads((tmp_path / "dump" / "graph_000" / "record.json").read_text())
    for one in record["passes"]:
        one["note"] = HOSTILE
        for site in one["sites"]:
            texts = [key for key, value in site.items() if isinstance(value, str) and key not in ("source", "node")]
            site |= dict.fromkeys(texts, HOSTILE)
            site |= {"matched": False, "proved": [HOSTILE], "bound": {HOSTILE: f"x: {HOSTILE}"}}
    values: dict[str, Any] = {"device": HOSTILE, "error": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    values |= {"op_counts": {HOSTILE: 1}, "placement": {HOSTILE: [[1]]}}
    values["schedule"] = [{"name": HOSTILE, "start_us": 0, "end_us": 1, "stream": HOSTILE}]
    change(tmp_path / "dump" / "graph_000" / "record.json", passes=record["passes"], **values)
    with opened(browser, report_page.write(tmp_path / "dump")[0], "#site=0") as at:
        assert at.evaluate("window.hacked") is None and at.locator("img").count() == 0
        assert at.locator("script").count() == 3
        for place in ("header", ".site", ".refusal", ".drawing", "#passes", "#placement", "#schedule"):
            assert "<img src=x" in (at.locator(place).first.text_content() or ""), place
        assert spelled[:40] in at.locator(".panel .line.here").inner_text()
        assert "<img src=x>.py" in (at.locator("#source").text_content() or "")


def test_schedule_and_placement(browser: Any, copy: Path) -> None:
    steps = [
        {"name": "attention", "resource": "compute", "start_us": 0, "end_us": 40, "microbatch": 0},
        {"name": "dispatch", "stream": "communication", "start_us": 40, "end_us": 90, "microbatch": 0},
        {"name": "attention", "resource": "compute", "start_us": 40, "end_us": 80, "microbatch": 1},
    ]
    change(copy / "graph_000" / "record.json", schedule=steps, placement={"layers.3": [[3, 0], [0, 1], [1, 1]]})
    with opened(browser, report_page.write(copy)[0]) as at:
        slots = at.locator("#schedule rect").all()
        assert [slot.get_attribute("class") for slot in slots] == ["slot batch-0", "slot batch-0", "slot batch-1"]
        widths = [float(slot.get_attribute("width")) for slot in slots]
        assert widths[1] / widths[0] == pytest.approx(50 / 40)
        assert "2 micro-batches on 2 resources, 90.0 µs" in at.locator("#schedule").inner_text()
        assert at.locator("#placement .heat").count() == 4
        assert "3 experts on 2 ranks; the fullest rank has 1.33 of the mean" in at.locator("#placement").inner_text()
        at.locator(".tab", has_text="graph 001").click()
        assert not at.locator("#schedule").is_visible() and not at.locator("#placement").is_visible()


def test_a_dump_without_graphs_still_has_its_sites(browser: Any, copy: Path) -> None:
    (copy / "graph_000" / "graphs.json").unlink()
    with opened(browser, report_page.write(copy)[0], "#site=2") as at:
        assert "UpProjectionBias" in at.locator(".panel").inner_text()
        assert "holds no graphs" in at.locator("#graphs").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "dark"), (420, "light")])
def test_narrow_and_dark(width: int, scheme: str, browser: Any, page: Path) -> None:
    with opened(browser, page, "#site=0", color_scheme=scheme) as at:
        at.set_viewport_size({"width": width, "height": 900})
        assert at.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        luminance = sum(map(int, re.findall(r"\d+", at.evaluate("getComputedStyle(document.body).backgroundColor"))))
        assert (luminance < 200) == (scheme == "dark")


# ------------------------------------------------------------------ a whole model


def replicated(model: Path, root: Path) -> Path:
    """A dump of 63 layers: every node, place and site of one with three, `REPLICAS` times."""
    folder = Path(shutil.copytree(model / "graph_000", root / "graph_000"))
    graphs = json.loads((folder / "graphs.json").read_text())
    names, lines, count = graphs["names"], graphs["rows"], len(graphs["rows"])
    graphs["names"] = [f"{name}_of_{k}" for k in range(REPLICAS) for name in names]
    graphs["rows"] = []
    for first in range(0, REPLICAS * len(names), len(names)):
        for body, name, kind, call, args, place in lines:
            args = [part + first if isinstance(part, int) else part for part in args]
            graphs["rows"].append([body, name + first, kind, call, args, place])
    graphs["graphs"] = [[[first + k * count, n] for k in range(REPLICAS) for first, n in g] for g in graphs["graphs"]]
    (folder / "graphs.json").write_text(json.dumps(graphs))
    record = json.loads((folder / "record.json").read_text())
    for one in record["passes"]:
        one["sites"] = [again(site, k) for k in range(REPLICAS) for site in one["sites"]]
    (folder / "record.json").write_text(json.dumps(record))
    return root


def again(site: dict[str, Any], k: int) -> dict[str, Any]:
    bound = {name: re.sub(r"(\w+): ", rf"\1_of_{k}: ", text) for name, text in site["bound"].items()}
    path = re.sub(r"\d+", lambda number: str(int(number[0]) + 3 * k), site["module_path"], count=1)
    region = [f"{name}_of_{k}" for name in site["region"]]
    return site | {"module_path": path, "node": f"{site['node']}_of_{k}", "region": region, "bound": bound}


def test_a_model_of_63_layers_opens_in_two_seconds(browser: Any, model: Path, tmp_path: Path) -> None:
    file, found = report_page.write(replicated(model, tmp_path))
    graphs = found.graphs[0]
    assert graphs is not None and len(graphs["rows"]) > 15_000
    with opened(browser, file) as at:
        loaded = at.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        table = at.evaluate("performance.getEntriesByName('first-table')[0].startTime")
        assert max(loaded, table) < 2000, (loaded, table)
        assert rows(at)[0] == "model.layers.0–62.self_attn × 63"
        assert at.locator("#graphs .row").count() < 100, "only what is in sight is drawn"
        at.locator(".where").first.click()
        assert at.locator(".members a").count() == 63 and at.locator(".drawing").count() == 2
        assert file.stat().st_size < 12 * 2**20


def test_a_model_names_what_it_bound(model: Path) -> None:
    sites = report_page.collect(model).report["graphs"][0]["sites"]
    assert {site["kind"] for site in sites if site["state"] == "lowered"} == {"mla", "experts", "route"}
    assert "refused" not in {site["state"] for site in sites}
    mla = next(site for site in sites if site["kind"] == "mla")
    assert mla["bound"]["w_uk"].endswith("kv_b_proj_parameters_weight_: float32[256, 64]")
    assert set(mla["predicted"]) == {"absorbed", "expanded"} and all(0 < s < 1 for s in mla["predicted"].values())
    experts = next(site for site in sites if site["kind"] == "experts")
    assert {"x", "topk_idx", "w_gate_up", "w_down"} <= set(experts["bound"])
    assert experts["bound"]["topk_idx"].startswith("topk_indices"), "the model's own, not the lowered router's"
    assert set(experts["predicted"]) == {"fused", "pieces"}
    assert any("grouped" in name or "out" in name for name in experts["region"])


def test_every_script_is_part_of_the_page() -> None:
    assert {f"{name}.js" for name in report_page.SCRIPTS} == {p.name for p in report_page.ASSETS.glob("*.js")}
