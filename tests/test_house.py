"""House rules that a machine can check: sizes, direction of imports, no paths of one machine, skips name their tier."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiers import tier_of

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "lowering", "passes", "runtime")  # linked from dscompile/
CODE = ("bench", "dscompile", *FOLDERS)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".txt", ".cfg", ".yml", ".yaml", ""}

# A folder may import itself and these. Not a linter of packages: `kernels` has no __init__.py, so they don't see it.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "runtime": {"kernels"},
    "lowering": {"kernels", "runtime"},
    "passes": {"lowering"},
    "dscompile": {"kernels", "runtime", "lowering", "passes"},
    "bench": {"kernels", "runtime", "lowering", "passes", "dscompile", "tests"},
}
# What every folder may use of the package itself: the guard against bare names, from the light `__init__.py`.
OPEN_TO_ALL = {"refuse_bare_names"}


def python_files(*folders: str) -> list[Path]:
    """Every source file under the root's `folders`, not through the links in dscompile/."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).parts
            linked = folder == "dscompile" and inside[0] in FOLDERS
            if "__pycache__" not in inside and not linked:
                found.append(path)
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of each import; `name` is empty for a plain `import`. Relative ones are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = f"{above}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def wrong_imports(source: str, folder: str, package: str) -> list[str]:
    """Imports in `source`, a file of `folder`, that point the wrong way or use a folder's bare name."""
    found = []
    for line, module, name in imports(ast.parse(source), package):
        top, *inner = [*module.split("."), *([name] if name else [])]
        if top in FOLDERS:
            found.append(f"line {line}: {module} is a bare name, write dscompile.{module}")
        if top == "dscompile" and inner and inner[0] in OPEN_TO_ALL:
            continue
        target = inner[0] if top == "dscompile" and inner and inner[0] in FOLDERS else top
        if target in {*MAY_IMPORT, "tests"} - {folder} - MAY_IMPORT[folder]:
            found.append(f"line {line}: {folder} may not import {'.'.join([top, *inner])}")
    return found


@pytest.mark.parametrize("path", python_files(*CODE), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    inside = path.relative_to(ROOT)
    prefix = "" if inside.parts[0] in ("bench", "dscompile") else "dscompile."
    package = prefix + ".".join(inside.parent.parts)
    assert not wrong_imports(path.read_text(), inside.parts[0], package)


@pytest.mark.parametrize(
    ("folder", "line", "complaint"),
    [
        ("kernels", "from dscompile.lowering import ops", "kernels may not import dscompile.lowering"),
        ("kernels", "import dscompile.runtime.groups", "kernels may not import dscompile.runtime"),
        ("lowering", "from dscompile import passes", "lowering may not import dscompile.passes"),
        ("lowering", "from ..passes import absorb", "lowering may not import dscompile.passes"),
        ("passes", "from dscompile.kernels import launch", "passes may not import dscompile.kernels"),
        ("passes", "from dscompile.config import Config", "passes may not import dscompile.config"),
        ("runtime", "def f():\n    import dscompile.lowering.ops", "runtime may not import dscompile.lowering"),
        ("dscompile", "from bench import results", "dscompile may not import bench"),
        ("dscompile", "import passes.absorb", "bare name"),
    ],
)
def test_the_import_rule_sees_a_wrong_import(folder: str, line: str, complaint: str) -> None:
    assert complaint in "; ".join(wrong_imports(line, folder, f"dscompile.{folder}"))


def test_the_import_rule_lets_right_imports_pass() -> None:
    lines = ["import torch", "from dscompile import refuse_bare_names", "from dscompile.lowering import ops"]
    assert wrong_imports("\n".join([*lines, "from . import facts"]), "passes", "dscompile.passes") == []


@pytest.mark.parametrize("path", python_files(*CODE, "tests"), ids=name_of)
def test_sizes(path: Path) -> None:
    source = path.read_text()
    limit = 600 if path.is_relative_to(ROOT / "tests") else 500
    assert source.count("\n") <= limit, f"more than {limit} lines: this is two files"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 150, f"{node.name} has {lines} lines: this is several functions"


def test_docstrings() -> None:
    sources = {path: path.read_text() for path in python_files(*CODE, "tests")}
    missing = [name_of(p) for p, source in sources.items() if source and not ast.get_docstring(ast.parse(source))]
    assert not missing, f"modules without a docstring: {missing}"


def tracked_texts() -> list[Path]:
    """Text files of the checkout; without git, every text file outside of the hidden folders that tools leave."""
    git = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True)
    if git.returncode == 0:
        paths = [ROOT / line for line in git.stdout.splitlines()]
    else:
        paths = [p for p in ROOT.rglob("*") if not _is_hidden(p.relative_to(ROOT).parts[:-1])]
    return [p for p in paths if p.is_file() and not p.is_symlink() and p.suffix in TEXT_SUFFIXES]


def _is_hidden(folders: tuple[str, ...]) -> bool:
    return any(name.startswith(".") and name != ".ci" for name in folders)


def test_no_paths_of_one_machine() -> None:
    # A home folder, or one under the root that no Linux has; spelled so that this file doesn't match itself.
    path = re.compile(r"""(?<![\w.\-/~$}])/(?:home|root|Users|wor[k]|farm|mnt|scratch)/\w""")
    found = []
    for text in tracked_texts():
        for number, line in enumerate(text.read_text(errors="replace").splitlines(), 1):
            if path.search(line):
                found.append(f"{name_of(text)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("reason", "tier"),
    [("gpu: no CUDA device", "gpu"), ("Skipped: versions: no folder", "versions"), ("no GPU", None), ("gpus: x", None)],
)
def test_tier_of(reason: str, tier: str | None) -> None:
    assert tier_of(reason) == tier


def test_a_skip_without_a_tier_fails_and_tiers_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "def test_vague(): pytest.skip('not here')\n"
        "def test_named(): pytest.skip('packaging: no pip')\n"
        "@pytest.mark.multi_gpu(999)\n"
        "def test_marked(): raise AssertionError('must not run')\n"
        "@pytest.mark.xfail(reason='known')\n"
        "def test_expected(): raise AssertionError\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command += ["-p", "tests.conftest", "-p", "no:cacheprovider", tmp_path / "test_skips.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "the skip 'Skipped: not here' must begin with its tier" in run.stdout
    assert re.search(r"1  multi_gpu \(several CUDA devices", run.stdout), run.stdout
    assert re.search(r"1  packaging \(", run.stdout)
    assert "1 failed, 2 skipped, 1 xfailed" in run.stdout
