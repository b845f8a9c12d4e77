"""Small readings of FX nodes that every pass needs: shapes under a size assignment, source line, module path, aliasing.

A *shadow* node carries a fake tensor in ``meta["val"]``; a Dynamo node carries one in ``meta["example_value"]``.
Sizes may be symbolic: a :class:`Sizes` replaces each free symbol by a concrete number, so that a proof can run on
ordinary integers, once for each assignment.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Iterator

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# Sizes that a proof is tried at: step * prime + base, the first of them that every guard of the trace allows.
_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23)
_BASES = (0, 256, 1024, 4096)
_STEPS = (1, 8, 64, 128)


class Sizes:
    """One assignment of numbers to the free size symbols of a graph (empty for a static graph)."""

    def __init__(self, assignment: dict[sympy.Symbol, int] | None = None):
        self.assignment = assignment or {}

    def number(self, value: object) -> int:
        """An int, SymInt or node that holds one -> the number under this assignment."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymInt):
            expr = value.node.expr.xreplace({s: sympy.Integer(n) for s, n in self.assignment.items()})
            return int(expr)
        return int(value)  # type: ignore[call-overload]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.number(s) for s in node.meta["val"].shape)


def free_symbols(graph: fx.Graph) -> list[sympy.Symbol]:
    """Size symbols of the graph's inputs, in a fixed order."""
    found: set[sympy.Symbol] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            found |= value.node.expr.free_symbols
        elif node.op == "placeholder" and isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    found |= size.node.expr.free_symbols
    return sorted(found, key=str)


def assignments(graph: fx.Graph, above: int = 0) -> list[Sizes]:
    """The size assignments a proof has to hold for: one for a static graph, otherwise two of different orders.

    A trace holds only where its guards do, so each assignment satisfies them: a branch that was taken at the traced
    size is taken at these. With ``above``, every size of both exceeds it.

    Raises:
        ValueError: no two assignments that the guards allow were found.
    """
    symbols = free_symbols(graph)
    if not symbols:
        return [Sizes()]
    env = _shape_env(graph)
    found: list[Sizes] = []
    for step, base in itertools.product(_STEPS, _BASES):
        if len(found) == 2:
            break
        base += -(-above // step) * step
        values = (step * (_PRIMES[i % len(_PRIMES)] + 60 * (i // len(_PRIMES))) + base for i in range(len(symbols)))
        sizes = Sizes(dict(zip(symbols, values, strict=True)))
        if _allowed(env, sizes):
            found.append(sizes)
    if len(found) < 2:
        raise ValueError(f"the guards on the sizes {symbols} allow none of those a proof is tried at")
    return found


def _shape_env(graph: fx.Graph) -> ShapeEnv:
    """That of the symbolic sizes of a graph's inputs."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    raise ValueError("no symbolic size")


def _allowed(env: ShapeEnv, sizes: Sizes) -> bool:
    """Whether every range and guard that the trace relied on holds; one on other symbols says nothing here."""
    numbers = {s: sympy.Integer(n) for s, n in sizes.assignment.items()}
    for symbol, number in numbers.items():
        bounds = env.var_to_range.get(symbol)
        if bounds is not None and not bounds.lower <= number <= bounds.upper:
            return False
    held = (guard.expr.xreplace(env.replacements).xreplace(numbers) for guard in env.guards)
    return all(expr != sympy.false for expr in held)


def settle(modules: Iterable[fx.GraphModule]) -> None:
    """Checks and recompiles each graph that a pass wrote: once, because both go over all of it."""
    for module in dict.fromkeys(modules):
        module.graph.lint()
        module.recompile()


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """Positional or keyword argument of an ATen call."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def source_place(node: fx.Node | None) -> tuple[str, int] | None:
    """(file, line) of the user's line that made the node."""
    trace = (node.meta.get("stack_trace") or "") if node is not None else ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return (frames[-1][0], int(frames[-1][1])) if frames else None


def short_name(file: str) -> str:
    """The last two components of a path: what a report shows of it."""
    return "/".join(file.split("/")[-2:])


def source_line(node: fx.Node | None) -> str:
    """``file.py:123`` of the user's line that made the node, or ``?``."""
    found = source_place(node)
    return f"{short_name(found[0])}:{found[1]}" if found else "?"


def graph_names(module: fx.GraphModule) -> dict[fx.Graph, str]:
    """Graphs of ``module`` and of the bodies of its higher-order operators, and their names; its own is ''."""
    return {m.graph: name for name, m in module.named_modules() if isinstance(m, fx.GraphModule)}


def place(node: fx.Node, names: dict[fx.Graph, str]) -> str:
    """A node of one of those graphs for the report: ``name``, or ``body/name``."""
    body = names.get(node.graph, "")
    return f"{body}/{node.name}" if body else node.name


def module_path(node: fx.Node | None) -> str:
    """Qualified name of the innermost nn.Module that ran the node, as in ``named_modules``; empty at the top."""
    stack = (node.meta.get("nn_module_stack") or {}) if node is not None else {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    path = re.sub(r"^L\.\w+\.?", "", path.replace("(", "").replace(")", ""))
    path = re.sub(r"^(self|model_to_compile)\.", "", path)
    return ".".join(p for p in path.split(".") if p not in ("_modules", ""))


def called(node: fx.Node) -> str:
    """What the node calls, without the overload's name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0] if node.op in ("call_function", "call_method") else ""


def torch_call(node: fx.Node) -> str:
    """:func:`called` for what torch defines; '' for functions of other libraries, whatever their name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        own = str(target).startswith("aten.")
    else:
        own = (getattr(target, "__module__", None) or "torch").partition(".")[0] in ("torch", "_operator", "builtins")
    return called(node) if own else ""


def aliased_argument(node: fx.Node) -> fx.Node | None:
    """The argument whose storage this node's result shares (views and in-place results), by the operator's schema."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        # An item of a split shares the storage of all of them; each result of a sort has its own.
        return None if _makes_fresh(node.args[0]) else node.args[0]
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns:
        return None
    first = schema.arguments[0].alias_info if schema.arguments else None
    if first is not None and "*" in first.after_set and isinstance(node.args[0], fx.Node):
        return node.args[0]  # split, chunk, unbind: a list of views
    returned = schema.returns[0].alias_info
    if returned is None:
        return None
    for value, declared in zip(node.args, schema.arguments, strict=False):
        shared = declared.alias_info is not None and declared.alias_info.before_set & returned.before_set
        if shared and isinstance(value, fx.Node):
            return value
    return None


def _makes_fresh(node: fx.Node) -> bool:
    """True if every result of the operator has a storage of its own, by its schema (lists of views may not say so)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or any(str(r.type) != "Tensor" for r in schema.returns):
        return False
    return not any(x.alias_info for x in (*schema.arguments, *schema.returns))


def written_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that the operator writes, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return
    named = dict(node.kwargs)
    for value, declared in zip(node.args, schema.arguments, strict=False):
        named[declared.name] = value
    for declared in schema.arguments:
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = named.get(declared.name)
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, fx.Node):
                    yield item
