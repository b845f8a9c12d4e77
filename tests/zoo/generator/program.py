"""What a generated module is: statements, one operation each, that render to a stand-alone source file.

Text, because a failing case is read by people: hypothesis shrinks the choices behind it, and what is left is printed as
a module that can be saved and run. It is executed from a real file, so that refusals can name its lines.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

_NARROW = r"torch\.(bfloat16|float16|float32)\b"
_HEADER = '''"""Generated: {title}."""

import torch
import torch.nn.functional as F
from torch import nn

work, wide = torch.{work}, torch.{wide}
{constants}


def random(seed, *shape):
    """The same numbers in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(work)


def weight(seed, *shape):
    return nn.Parameter(random(seed, *shape) / shape[-1] ** 0.5)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
'''


@dataclass(frozen=True, repr=False)
class Program:
    """A module as text.

    title: what it is, for people; constants: sizes, `NAME = value` each; init and forward: statements;
    arguments: of `forward`; result: the expression that it returns; calls: arguments of each call, as tuples;
    work, wide: dtypes of the weights and of what is computed wider; train: gradients are compared; lengths: the second
    dimension of floating inputs is symbolic; autocast: calls run under it, to bfloat16; expect: operators that must
    (True) or must not (False) be in the graphs, where that is known.
    """

    title: str
    constants: tuple[str, ...]
    init: tuple[str, ...]
    forward: tuple[str, ...]
    arguments: str
    result: str
    calls: tuple[str, ...]
    work: str = "float64"
    wide: str = "float64"
    train: bool = False
    lengths: bool = False
    autocast: bool = False
    inner: str = "eager"
    expect: dict[str, bool] = field(default_factory=dict)

    @property
    def rounds(self) -> bool:
        """Whether anything is computed in less than float64: a rewrite may leave out a rounding."""
        return self.work != "float64" or self.autocast or any(re.search(_NARROW, line) for line in self.forward)

    def exact(self) -> Program:
        """The same module with everything in float64."""
        forward = tuple(re.sub(_NARROW, "torch.float64", line) for line in self.forward)
        return replace(self, work="float64", wide="float64", forward=forward)

    def text(self) -> str:
        """The source."""
        header = _HEADER.format(title=self.title, work=self.work, wide=self.wide, constants="\n".join(self.constants))
        body = [f"        {line}" for line in self.init]
        body += ["", f"    def forward(self, {self.arguments}):"]
        body += ["        " + line.replace("\n", "\n        ") for line in self.forward]
        body += [f"        return {self.result}", "", "", "def calls():", "    return ["]
        body += [f"        {call}," for call in self.calls]
        return header + "\n".join([*body, "    ]"]) + "\n"

    def __repr__(self) -> str:
        wanted = ", ".join(f"{name} {'must' if must else 'must not'} be there" for name, must in self.expect.items())
        how = [f"train={self.train}, lengths={self.lengths}, autocast={self.autocast}, inner={self.inner!r}"]
        return "\n# " + "; ".join([*how, *([wanted] if wanted else [])]) + "\n" + self.text()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis prints a failing case."""
        printer.text(repr(self))

    def load(self) -> ModuleType:
        """Executes the source from a file of its own."""
        text = self.text()
        name = "generated_" + hashlib.sha256(text.encode()).hexdigest()[:16]
        path = _folder() / f"{name}.py"
        if not path.is_file():
            path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


_FOLDER: list[tempfile.TemporaryDirectory] = []


def _folder() -> Path:
    """One temporary folder a process; it is removed when the process ends."""
    if not _FOLDER:
        _FOLDER.append(tempfile.TemporaryDirectory(prefix="generated_"))
    return Path(_FOLDER[0].name)


class Writer:
    """Draws choices and collects what they write. The first option of every choice is the plainest."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any]):
        self.draw = draw
        self.init: list[str] = []
        self.lines: list[str] = []
        self.seed = 10
        self.odd: list[str] = []  # choices after which a match is not promised
        self.wrong: list[str] = []  # choices after which a match would be wrong

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def some(self, one_in: int = 3) -> bool:
        return self.pick(*[False] * (one_in - 1), True)

    def promised(self, plain: tuple, odd: tuple, one_in: int = 5) -> Any:
        """One of `plain`, or once in a while one of `odd`, of which no match is promised."""
        if not odd or not self.some(one_in):
            return self.pick(*plain)
        found = self.pick(*odd)
        self.odd.append(str(found))
        return found

    def weight(self, name: str, *shape: str) -> str:
        """A new parameter; -> its name."""
        self.seed += 1
        self.init.append(f"self.{name} = weight({self.seed}, {', '.join(shape)})")
        return f"self.{name}"

    def add(self, *lines: str) -> None:
        self.lines += lines

    def noise(self, *names: str) -> None:
        """Maybe copies, casts or views after which each of the values is what it was."""
        for name in names:
            if self.some(6):
                self.add(f"{name} = {self.pick(*_NOISE).format(name)}")


_NOISE = (
    "{}.contiguous()",
    "{}.clone()",
    "{0}.to({0}.dtype)",
    "{0}.reshape({0}.shape)",
    "{}.transpose(1, 2).contiguous().transpose(1, 2)",
    "{}.transpose(-1, -2).clone().transpose(-1, -2)",
    "{}.unsqueeze(0).squeeze(0)",
    "torch.cat([{0}[:, :1], {0}[:, 1:]], 1)",
    "torch.empty_like({0}).copy_({0})",
    "{0}.flatten(0, 1).unflatten(0, {0}.shape[:2])",
    "{0}[:, :, :]",
)
