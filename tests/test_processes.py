"""What one process leaves for the next: entries in torch's caches, keyed by our sources, and no file anywhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dscompile.config import Config
from dscompile.dump import Dump
from dscompile.errors import DumpDirectoryError

ROOT = Path(__file__).parent.parent
FOLDERS = ("dscompile", "passes", "lowering", "kernels", "runtime")

# For each folder in argv a process that compiles with the package in it, one after another. They are forked where torch
# is imported and nothing else has happened, which spares all but one of its imports.
# Notes every file that Python opens for writing, makes, renames or links. Compilers that torch starts are processes of
# their own: what they leave is found by looking through the folders afterwards.
_PROCESSES = """
import json, os, sys
written = []
def hook(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "shutil.move", "shutil.copyfile"):
        made = args[1] if event in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile") else args[0]
        if not isinstance(made, int):
            written.append(os.path.abspath(os.fsdecode(made)))
sys.addaudithook(hook)
import torch, torch._dynamo
tests, *roots = sys.argv[1:]
for root in roots:
    process = os.fork()
    if not process:
        break
    if os.waitpid(process, 0)[1]:
        sys.exit(1)
else:
    sys.exit(0)
sys.path[:0] = [root, tests]
from torch._dynamo.utils import counters
from dscompile._entry import ensure_registered
from tests.passes.toy import D, S, Toy, randn
ensure_registered()
module, x = Toy(), randn(2, S, D)
with torch.no_grad():
    y = torch.compile(module, backend="dsinfra")(x)
    assert torch.allclose(y, module(x))
import dscompile
found = {"written": written, "file": dscompile.__file__}
print(json.dumps(found | {name: dict(counters[name]) for name in ("aot_autograd", "inductor")}))
"""


def processes(folder: Path, *roots: Path) -> list[dict[str, Any]]:
    """Compiles a toy with the package in each of `roots`, in a process each, one after another.

    Their home, caches and dumps are below `folder`.
    """
    places = {name: folder / name for name in ("home", "cwd", "cache", "tmp")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DSINFRA_", "TORCH", "TRITON", "XDG_"))}
    env |= {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(places["cache"]), "DSINFRA_DUMP": str(folder / "dump")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", _PROCESSES, ROOT, *roots]
    run = subprocess.run(command, cwd=places["cwd"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def copy_of_package(folder: Path, version: str) -> Path:
    """The package's sources elsewhere, as another version; with their bytecode, for which the times of files vouch."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns(*(FOLDERS[1:] if name == "dscompile" else ()))
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        if name != "dscompile":
            (folder / "dscompile" / name).symlink_to(folder / name)
    init = folder / "dscompile" / "__init__.py"
    text = init.read_text()
    (line,) = [one for one in text.splitlines() if one.startswith("__version__")]
    init.write_text(text.replace(line, f'__version__ = "{version}"'))
    return folder


@pytest.mark.slow
def test_caches_and_files(tmp_path: Path) -> None:
    """The second process compiles from the caches; one of another version never does; nothing is written elsewhere."""
    ours, others = (copy_of_package(tmp_path / version, version) for version in ("9.9.8", "9.9.9"))
    first, second, other = processes(tmp_path, ours, ours, others)
    assert all(run["file"].startswith(str(tmp_path)) for run in (first, second, other))
    assert first["aot_autograd"]["autograd_cache_miss"] == 1 and first["inductor"]["fxgraph_cache_miss"] == 1
    assert second["aot_autograd"]["autograd_cache_hit"] == 1 and "fxgraph_cache_miss" not in second["inductor"]
    assert other["aot_autograd"].get("autograd_cache_hit", 0) == 0 and other["inductor"]["fxgraph_cache_miss"] == 1
    for run in (first, second, other):
        assert not run["aot_autograd"].get("autograd_cache_bypass") and not run["inductor"].get("fxgraph_cache_bypass")
        allowed = tuple(f"{tmp_path / name}{os.sep}" for name in ("cache", "dump", "tmp"))
        existing = str(tmp_path / "cwd")
        elsewhere = [p for p in run["written"] if p != existing and not f"{p}{os.sep}".startswith(allowed)]
        assert run["written"] and all(path.startswith(("/dev/", "/proc/")) for path in elsewhere), elsewhere
    assert not list((tmp_path / "home").iterdir()) and not list((tmp_path / "cwd").iterdir())
    assert {path.name for path in (tmp_path / "dump").iterdir()} == {"graph_000", "graph_001", "graph_002"}


@pytest.mark.parametrize("told", [True, False], ids=["told where", "default"])
def test_binaries_of_cuda_kernels_lie_in_torchs_cache(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.runtime_utils import cache_dir

    from dscompile.kernels import nvrtc

    monkeypatch.delenv("DSINFRA_CACHE_DIR", raising=False)
    if told:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    else:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    ours = nvrtc.cache_folder()  # before torch is asked, which sets the variable
    assert Path(ours).parent == Path(cache_dir())


@pytest.mark.parametrize("how", ["a file", "below a file", "no such device"])
def test_a_dump_directory_that_cant_be_written_is_refused_first(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dscompile.passes import pipeline
    from tests.passes.toy import D, S, Toy, randn

    (tmp_path / "file").write_text("")
    given = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "dump", "no such device": "/proc/dump"}
    monkeypatch.setattr(pipeline, "run", lambda *args, **kwargs: pytest.fail("the analysis began"))
    with pytest.raises(DumpDirectoryError, match="can't be written.*give a directory you own, or unset DSINFRA_DUMP"):
        Dump(Config.of(None, {"dump": str(given[how])}).dump)
    torch._dynamo.reset()
    call = torch.compile(Toy(), backend="dsinfra", options={"inner": "eager", "dump": str(given[how])})
    with pytest.raises(Exception, match="can't be written"):
        call(randn(2, S, D))
    torch._dynamo.reset()
