"""The package as users get it: wheel, editable install, the backend's entry point, and the hazards of flat folders."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dscompile

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "lowering", "passes", "runtime")


def run_python(*words: str, path: Path | str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in `cwd` with `path` as the whole PYTHONPATH, so that nothing of this process leaks in.

    Without PYTHONSAFEPATH: that Python finds packages in the folder it starts in is what several tests are about.
    """
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def python(*words: str, path: Path | str = "", cwd: Path = ROOT) -> str:
    """What a run that must succeed wrote to its standard output."""
    run = run_python(*words, path=path, cwd=cwd)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build needs of the checkout, links kept as links, away from its build products."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("packaging: pip or setuptools is not installed")
    version = metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"packaging: setuptools {version} is older than 77")
    target = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for folder in ("dscompile", *FOLDERS):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy), cwd=folder)
    return next(folder.glob("dscompile-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, to be put on a PYTHONPATH: importlib finds its entry points there as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_folders_are_links_to_the_roots_folders() -> None:
    for folder in FOLDERS:
        link = ROOT / "dscompile" / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"


def test_wheel_holds_every_source_as_a_real_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info for info in archive.infolist()}
        entry_points = archive.read(next(n for n in packed if n.endswith("entry_points.txt"))).decode()
    sources = set()
    for folder in ("dscompile", *FOLDERS):
        prefix = Path() if folder == "dscompile" else Path("dscompile")
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT)
            through_link = folder == "dscompile" and inside.parts[1] in FOLDERS
            if path.suffix in (".py", ".json", ".js", ".css", ".html") and not through_link:
                sources.add(str(prefix / inside))
    assert sources <= set(packed), f"missing in pyproject's packages or package-data: {sorted(sources - set(packed))}"
    modes = {name: info.external_attr >> 28 for name, info in packed.items()}
    assert 0o12 not in modes.values(), "a symbolic link in the wheel"
    assert {n.split("/")[0] for n in packed if ".dist-info/" not in n} == {"dscompile"}
    assert re.search(r"\[torch_dynamo_backends\]\s+dsinfra = dscompile\._entry:dsinfra", entry_points)


def test_installed_wheel_is_found_by_torch(installed: Path, tmp_path: Path) -> None:
    code = "import torch, dscompile; print(torch._dynamo.list_backends()); print(dscompile.__file__)"
    backends, file = python("-c", code, path=installed, cwd=tmp_path).splitlines()
    assert "'dsinfra'" in backends
    assert Path(file).is_relative_to(installed)


def test_editable_install_finds_the_checkout(copy: Path, tmp_path: Path) -> None:
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    python(*words, "--prefix", str(tmp_path), "-e", str(copy), cwd=tmp_path)
    site = next(path for path in tmp_path.rglob("*-packages") if list(path.glob("dscompile-*.dist-info")))
    code = (
        f"import site; site.addsitedir({str(site)!r})\n"
        "import dscompile.runtime, dscompile.lowering.ops, dscompile.passes, dscompile.kernels\n"
        "import importlib.metadata as md, importlib.util as iu; print(dscompile.__file__)\n"
        f"print([e.value for d in md.distributions(path=[{str(site)!r}]) for e in d.entry_points])\n"
        "print([iu.find_spec(name) for name in ('passes', 'kernels', 'runtime', 'lowering')])"
    )
    # -S: the checkout that these tests run from may itself be installed in this environment, and would be found first.
    folders = [str(site), *(p for p in sys.path if p.endswith("-packages"))]
    file, entries, bare = python("-S", "-c", code, path=os.pathsep.join(folders), cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(copy)
    assert "dscompile._entry:dsinfra" in entries
    assert bare == "[None, None, None, None]", "an editable install must not make the bare names importable"


def test_loading_the_entry_point_loads_no_torch() -> None:
    code = (
        "from importlib.metadata import EntryPoint; import sys\n"
        "ep = EntryPoint('dsinfra', 'dscompile._entry:dsinfra', 'torch_dynamo_backends')\n"
        "print(ep.load().__name__, sorted({'torch', 'triton', 'transformers', 'sympy'} & set(sys.modules)))"
    )
    assert python("-c", code) == "dsinfra []\n"


def test_backend_is_listed_once_however_often_it_is_asked_for() -> None:
    from dscompile._entry import ensure_registered

    ensure_registered()
    ensure_registered()
    import torch

    assert torch._dynamo.list_backends(exclude_tags=()).count("dsinfra") == 1


def test_unknown_attribute_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="no attribute 'explian'; it has .*explain"):
        dscompile.explian  # noqa: B018


@pytest.mark.parametrize("folder", ["lowering", "passes", "runtime"])
@pytest.mark.parametrize("first", ["", "import dscompile; "], ids=["before", "after"])
def test_bare_name_is_refused(folder: str, first: str) -> None:
    run = run_python("-c", f"{first}import {folder}")
    assert run.returncode == 1
    assert f"Import it as 'dscompile.{folder}'" in run.stderr


def test_bare_kernel_module_is_refused() -> None:
    run = run_python("-c", "import kernels.launch, dscompile")
    assert run.returncode == 1
    assert "Import it as 'dscompile.kernels.launch'" in run.stderr


def test_other_packages_of_those_names_are_left_alone(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / f"{folder}.py").write_text("mine = True\n")
    code = "import kernels, lowering, passes, runtime, dscompile, dscompile.runtime; print(passes.mine)"
    assert python("-c", code, path=f"{tmp_path}{os.pathsep}{ROOT}", cwd=tmp_path) == "True\n"


def test_root_does_not_shadow_the_kernels_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.18.2'\n")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, ''); import kernels; print(kernels.__file__)"
    assert python("-c", code, path=tmp_path).strip() == str(tmp_path / "kernels" / "__init__.py")


def test_transformers_imports_its_models_from_the_root() -> None:
    code = (
        "from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m; import dscompile\n"
        "from transformers.utils import is_kernels_available\n"
        "import importlib.metadata as md\n"
        "try: md.version('kernels'); there = True\n"
        "except md.PackageNotFoundError: there = False\n"
        "print(m.DeepseekV3Attention.__name__, is_kernels_available() and not there)"
    )
    assert python("-c", code).splitlines()[-1] == "DeepseekV3Attention False"
