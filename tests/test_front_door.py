"""What a newcomer meets first: README's order and example, the `dscompile` command, the demo."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dscompile import cli, demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOY = """
import torch

def call():
    return torch.nn.Linear(4, 4), (torch.ones(2, 4),), {}
"""


CHANGES = ["--set", "num_hidden_layers=2", "--set", "q_lora_rank=None"]
COMMANDS = {
    "demo": ["demo"],
    "inference": ["explain", "deepseek_v3", *CHANGES],
    "train": ["explain", "deepseek_v3", *CHANGES, "--train"],
}
_PROCESS = """
import contextlib, io, json, sys, traceback
from dscompile._entry import ensure_registered
ensure_registered()
example, commands = json.loads(sys.argv[1])
found = {}
def note(name, call):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = call()
        except BaseException:
            code = traceback.format_exc()
    found[name] = code or 0, said.getvalue()
    import torch
    torch.compiler.reset()
note("example", lambda: exec(example, {"__name__": "__main__"}))
from dscompile import cli
for name, words in commands.items():
    note(name, lambda: cli.main(words))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What README's example and the commands print, each from a fresh compiler in one new process, which must succeed.

    From the root, on the CPU; graphs are run operator by operator, so that no C++ is compiled.
    """
    example = re.search(r"```python\n(.*?)```", README, flags=re.S)
    assert example and example[1].count("\n") <= 12
    env = os.environ | {"DSINFRA_INNER": "aot_eager", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _PROCESS, json.dumps([example[1], COMMANDS])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(code == 0 for code, _ in found.values()), found
    return {name: text for name, (_, text) in found.items()}


def test_readme_keeps_its_order() -> None:
    headings = re.findall(r"^#+ (.+)$", README, flags=re.M)
    assert headings == ["dscompile", "Example", "Measured", "Who should not use this", "Map"]
    assert README.index("make demo") < README.index("make test") < README.index("## Example")


def test_readme_names_every_folder() -> None:
    named = set(re.findall(r"^\| `(\w+)/` \|", README, flags=re.M))
    assert named == {
        p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and any(p.glob("*.*"))
    } - {
        "build",
        "dscompile.egg-info",
    }


def test_readme_example_runs(said: dict[str, str]) -> None:
    assert re.search(r"2 x mla lowered: model\.layers\.0\.self_attn", said["example"]), said["example"]


@pytest.mark.slow
def test_demo_yields_eagers_tokens(said: dict[str, str]) -> None:
    assert "tokens: all 64 equal eager's" in said["demo"]
    prefill, decoding = said["demo"].split("graph 0")[1].split("graph 1")
    assert "2 x mla lowered" in prefill, prefill
    assert "2 x mla lowered" in decoding and "absorbed" in decoding


def generated(tokens: list[int], *logits: list[float]) -> SimpleNamespace:
    """A result of `generate` for one request with a prompt of two tokens."""
    return SimpleNamespace(
        sequences=torch.tensor([[9, 9, *tokens]]), logits=[torch.tensor([values]) for values in logits]
    )


def test_demo_compares_tokens() -> None:
    eager = generated([0, 1], [3.0, 1.0], [1.0, 2.0])
    assert demo.equal_tokens(generated([0, 1]), eager)
    assert not demo.equal_tokens(generated([0, 0]), eager)


def test_demo_compares_logits_until_the_texts_part() -> None:
    eager = generated([0, 1, 1], [3.0, 4.0], [0.0, 5.0], [0.0, 5.0])
    assert demo.logit_error(eager, eager) == 0
    two_off = generated([0, 1, 1], [3.0, 4.0], [3.0, 5.0], [2.0, 5.0])
    assert demo.logit_error(two_off, eager) == pytest.approx(2 / 5)
    parts_at_first = generated([1, 0, 0], [3.0, 6.0], [1e6, 5.0], [1e6, 1e6])
    assert demo.logit_error(parts_at_first, eager) == pytest.approx(2 / 5)


def test_explain_takes_a_function_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    assert cli.main(["explain", f"{tmp_path}/toy.py:call"]) == 0
    assert "no attention, expert layer or FP8 layer found" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_explain_takes_a_model_type_and_changes(mode: str, said: dict[str, str]) -> None:
    assert "2 x mla lowered: model.layers.0.self_attn" in said[mode]
    assert "experts lowered: model.layers.1.mlp.experts" in said[mode]
    assert "route lowered: model.layers.1.mlp.gate" in said[mode]
    assert ("training needs the backward" in said[mode]) == (mode == "train")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["explain", "no_such_module:call"], "No module named 'no_such_module'"),
        (["explain", "os:no_such_function"], "no attribute 'no_such_function'"),
        (["explain", "no_such_file.py:call"], "No such file"),
        (["explain", "deepseek_v3", "--set", "layers"], "must read FIELD=VALUE"),
        (["bench", "no_such_benchmark"], "no benchmark is called 'no_such_benchmark'"),
    ],
)
def test_wrong_arguments_say_what_to_change(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 1
    assert complaint in capsys.readouterr().err


def test_command_without_a_verb_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `python -m dscompile.cli`, as the Makefile calls it."""
    monkeypatch.setattr(sys, "argv", ["dscompile"])
    monkeypatch.delitem(sys.modules, "dscompile.cli")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("dscompile.cli", run_name="__main__")
    assert "COMMAND" in capsys.readouterr().err
