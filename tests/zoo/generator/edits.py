"""Random changes of single statements: constants off by one, values confused, writes in place, copies, other orders.

What a changed module computes, nobody knows; it is compared with eager all the same. Most of what goes wrong in a
matcher is that it looks at too little, and a change at a random place finds what it doesn't look at.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tests.zoo.generator.program import Program

_SIZES = ("b", "s", "t", "_", "shape", "T", "e")  # locals that are no tensors
_IN_PLACE = (
    "{}.mul_(1.5)",
    "{}.add_(0.25)",
    "{}.zero_()",
    "{}[..., :1] = 0.5",
    "{}[:, :1] = 0.5",
    "{}[:1].neg_()",
    "{}[..., -1:].mul_(2)",
    "{0}.copy_({0}.flip(-1))",
)
_VALUES = (
    "{}.roll(1, -1)",
    "{}.roll(1, 1)",
    "{}.flip(0)",
    "{}.flip(-2)",
    "{} * 1.5",
    "{} + 0.25",
    "{}.detach()",
    "{}.neg()",
    "{0} * torch.arange(1, {0}.shape[-1] + 1).to({0}.dtype)",
    "{0} * torch.arange(1, {0}.shape[0] + 1).to({0}.dtype).view(-1, *[1] * ({0}.dim() - 1))",
    "{0} * torch.arange(1, {0}.shape[1] + 1).to({0}.dtype).view(-1, *[1] * ({0}.dim() - 2))",
    "{0}.to(torch.float16).to({0}.dtype)",
    "{0}.to(torch.bfloat16).to({0}.dtype)",
    "{}.tanh()",
    "{}.abs()",
    "{}.clamp(max=0.5)",
    "{0}.transpose(0, 1).reshape({0}.shape)",
    "{0}.transpose(-1, -2).reshape({0}.shape)",
    "{0}.reshape(-1).roll(1).view({0}.shape)",
    "torch.cat([{0}[-1:], {0}[:-1]])",
    "torch.cat([{0}[:, 1:], {0}[:, :1]], 1)",
    "{0}.index_select(0, torch.arange({0}.shape[0]).flip(0))",
    "{0}.masked_fill(torch.arange({0}.shape[-1]) == 1, 0.0)",
    "{0}.contiguous()",
    "{0}.clone()",
    "{0}.expand_as({0})",
    "{0}.mT.contiguous().mT",
    "F.dropout({}, 0.0)",
    "{0} + 0 * {0}.sum()",
    "torch.where({0} > 0, {0}, 0.5 * {0})",
)


class Editor:
    """Draws changes of the statements of one module."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any], program: Program):
        self.draw = draw
        self.program = program
        self.lines = list(program.forward)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def names(self, before: int) -> list[str]:
        """Local names bound before a statement, the input first."""
        found = ["x"]
        for line in self.lines[:before]:
            found += [name for name in _bound(line) if name not in _SIZES]
        return list(dict.fromkeys(found))

    def place(self) -> int:
        return self.draw(st.integers(1, len(self.lines)))

    def write(self) -> None:
        """A write in place, anywhere."""
        at = self.place()
        self.lines.insert(at, self.pick(_IN_PLACE).format(self.pick(self.names(at))))

    def value(self) -> None:
        """A value replaced by a function of itself."""
        at = self.place()
        name = self.pick(self.names(at))
        self.lines.insert(at, f"{name} = {self.pick(_VALUES).format(name)}")

    def constant(self) -> None:
        """A number in a statement changed by one, or its sign."""
        tree, found = self._statements(ast.Constant)
        found = [(i, n) for i, n in found if isinstance(n.value, (int, float)) and not isinstance(n.value, bool)]
        if not found:
            return
        i, node = self.pick(found)
        node.value = self.pick((node.value + 1, node.value - 1, -node.value, node.value * 2))
        self.lines[i] = ast.unparse(tree[i])

    def name(self) -> None:
        """A value where another stood."""
        tree, found = self._statements(ast.Name)
        found = [(i, n) for i, n in found if isinstance(n.ctx, ast.Load) and n.id in self.names(i)]
        if not found:
            return
        i, node = self.pick(found)
        node.id = self.pick(self.names(i))
        self.lines[i] = ast.unparse(tree[i])

    def size(self) -> None:
        """A size where another stood."""
        sizes = ("B", "D", "H", "N", "R", "V", "C", "E", "K", "W", "b", "s", "t")
        tree, found = self._statements(ast.Name)
        found = [(i, n) for i, n in found if isinstance(n.ctx, ast.Load) and n.id in sizes]
        if not found:
            return
        i, node = self.pick(found)
        node.id = self.pick(sorted({n.id for _, n in found}))
        self.lines[i] = ast.unparse(tree[i])

    def flag(self) -> None:
        """True for False, and the other way round."""
        tree, found = self._statements(ast.Constant)
        found = [(i, n) for i, n in found if isinstance(n.value, bool)]
        if found:
            i, node = self.pick(found)
            node.value = not node.value
            self.lines[i] = ast.unparse(tree[i])

    def order(self) -> None:
        """Two neighbouring statements exchanged."""
        at = self.draw(st.integers(1, max(len(self.lines) - 1, 1)))
        self.lines[at - 1 : at + 1] = self.lines[at - 1 : at + 1][::-1]

    def twice(self) -> None:
        """A statement done again later."""
        line = self.pick(self.lines[1:] or self.lines)
        self.lines.insert(self.place(), line)

    def returned(self) -> None:
        """One more value returned."""
        name = self.pick(self.names(len(self.lines)))
        self.program = replace(self.program, result=f"{self.program.result}, {name}")

    def late(self) -> None:
        """A value kept under another name, and read where the first stood."""
        at = self.place()
        name = self.pick(self.names(at))
        self.lines.insert(at, f"kept = {name} * 1")
        self.program = replace(self.program, result=f"{self.program.result}, kept")

    def no_grad(self) -> None:
        """A statement without gradients."""
        found = [i for i, line in enumerate(self.lines) if i and not line.startswith("with ")]
        if found:
            i = self.pick(found)
            self.lines[i] = f"with torch.no_grad(): {self.lines[i]}"

    def _statements(self, kind: type) -> tuple[list[ast.Module], list[tuple[int, Any]]]:
        trees = [ast.parse(line) for line in self.lines]
        found = [(i, n) for i, tree in enumerate(trees) if i for n in ast.walk(tree) if isinstance(n, kind)]
        return trees, found


_CHANGES = (
    (Editor.value, 6),
    (Editor.write, 6),
    (Editor.constant, 5),
    (Editor.name, 5),
    (Editor.size, 2),
    (Editor.flag, 1),
    (Editor.order, 2),
    (Editor.twice, 1),
    (Editor.returned, 2),
    (Editor.late, 1),
    (Editor.no_grad, 1),
)


def _bound(line: str) -> list[str]:
    """Names that a statement binds."""
    return [
        n.id
        for statement in ast.walk(ast.parse(line))
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        for n in ast.walk(target)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    ]


@st.composite
def edited(draw, programs: st.SearchStrategy[Program], most: int = 2) -> Program:  # type: ignore[no-untyped-def]
    """A drawn module after one or a few random changes, of which nothing is expected but a right answer."""
    program = draw(programs)
    editor = Editor(draw, program)
    changes = [change for change, weight in _CHANGES for _ in range(weight)]
    for _ in range(draw(st.integers(1, most))):
        draw(st.sampled_from(changes))(editor)
    title = f"{program.title}; edited"
    # The order of an unsorted top-k is nobody's promise, and a change might show it.
    lines = tuple(line.replace("sorted=False", "sorted=True") for line in editor.lines)
    return replace(editor.program, title=title, forward=lines, expect={})
