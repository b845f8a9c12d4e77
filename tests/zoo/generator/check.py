"""Runs a generated module uncompiled, compiled and in float64, and compares everything that a call may leave behind.

In float64 a right rewrite agrees with eager to ten digits. In narrower dtypes the bar is a few times eager's own error
against float64, because a rewrite may round elsewhere. Either way each site must be lowered, or refused with a reason
and a line of the module; an analysis that raised is a failure even where the answer is right.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dscompile.backend import dsinfra
from dscompile.report import CompileReport
from tests.zoo.generator.program import Program

TIMES = 4.0  # the bar: so many times eager's error against float64 ...
ROUNDINGS = 8.0  # ... plus so many roundings of the largest element
EXACT = 1e-9  # of the largest element, where everything is computed in float64


class Discarded(Exception):
    """The module itself fails, or its answer depends on what torch leaves open: nothing can be compared."""


class WrongAnswer(AssertionError):
    """Compiled and eager disagree by more than the bar."""


class Crash(AssertionError):
    """The compiled module, or the analysis, raised."""


class Broken(AssertionError):
    """A match that must be there is missing, one that must not is there, or a refusal says too little."""


@dataclass
class Verdict:
    """What happened to one module: operators written, refusals by class."""

    matched: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


@dataclass
class Run:
    """What the calls of one module left behind: (name, tensor) in a fixed order."""

    seen: list[tuple[str, torch.Tensor]] = field(default_factory=list)


def compare(program: Program) -> Verdict:
    """Compares one module with eager; raises WrongAnswer, Crash, Broken, or Discarded."""
    try:
        module = program.load()
    except SyntaxError as error:  # of a random edit
        raise Discarded(f"{type(error).__name__}: {error}") from error
    model, inputs = module.Model(), module.calls()
    try:
        expected = _run(model, model, program, inputs)
        exact = _exact(program, module) if program.rounds else None
    except Exception as error:  # a random edit may have made it no module at all
        raise Discarded(f"{type(error).__name__}: {error}") from error
    if not all(bool(x.isfinite().all()) for name, x in expected.seen if not name.startswith("input")):
        raise Discarded("not finite")
    reports: list[CompileReport] = []
    ours = module.Model()
    compiled = _compiled(ours, program, reports)
    try:
        found = _run(compiled, ours, program, module.calls())
    except Exception as error:
        if _fails_without_us(module, program):
            raise Discarded("torch.compile fails without us, too") from error
        raise Crash(f"compiled: {type(error).__name__}: {error}") from error
    try:
        _same(expected, found, exact, program)
    except WrongAnswer:
        _must_be_defined(module, program, expected, exact)
        raise
    return _verdict(program, reports)


class _OtherChoices(TorchFunctionMode):
    """`topk` as torch documents it, with the other answers that are right, too.

    Of equal elements any may be chosen and in any order, and without `sorted` the order of all is open.
    """

    def __init__(self, last: bool):
        super().__init__()
        self.last = last

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.topk, torch.Tensor.topk):
            return self._topk(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _topk(self, input: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        turned = input.flip(dim) if self.last else input
        ids = turned.sort(dim=dim, descending=largest, stable=True)[1].narrow(dim, 0, k)
        ids = input.shape[dim] - 1 - ids if self.last else ids
        ids = ids if sorted else ids.flip(dim)
        return torch.return_types.topk((input.gather(dim, ids), ids))


def _must_be_defined(module: ModuleType, program: Program, expected: Run, exact: Run | None) -> None:
    """Raises Discarded if eager itself answers otherwise with another right choice of `topk`."""
    for last in (False, True):
        model = module.Model()
        with _OtherChoices(last):
            other = _run(model, model, program, module.calls())
        try:
            _same(expected, other, exact, program)
        except WrongAnswer as error:
            raise Discarded("the answer depends on an order that torch leaves open") from error


def _fails_without_us(module: ModuleType, program: Program) -> bool:
    """Whether Dynamo alone can't compile the module: what eager allows is not all that fake tensors allow."""
    model = module.Model()
    torch._dynamo.reset()
    try:
        _run(torch.compile(model, backend="aot_eager" if program.train else "eager"), model, program, module.calls())
    except Exception:
        return True
    return False


_COUNT = itertools.count()


def _compiled(model: nn.Module, program: Program, reports: list[CompileReport]) -> Callable:
    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        return dsinfra(gm, inputs, options={"inner": program.inner}, sink=reports.append)

    if next(_COUNT) % 64 == 0:  # each module is code of its own: only memory has to be given back
        torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def _exact(program: Program, module: ModuleType) -> Run:
    """The same module in float64, with the weights and inputs that the narrow one has."""
    wide = program.exact().load()
    model = wide.Model()
    model.load_state_dict(module.Model().state_dict())
    inputs = [tuple(_widened(x) for x in call) for call in module.calls()]
    return _run(model, model, program, inputs, autocast=False)


def _widened(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _run(call: Callable, model: nn.Module, program: Program, calls: list[tuple], autocast: bool = True) -> Run:
    run = Run()
    for number, inputs in enumerate(calls):
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in leaves:
            x.requires_grad_(program.train)
            if program.lengths and x.dim() > 1:
                torch._dynamo.mark_dynamic(x, 1)
        given = tuple(x * 1 if program.train and isinstance(x, torch.Tensor) else x for x in inputs)
        if program.lengths and program.train:
            for x in given:
                if isinstance(x, torch.Tensor) and x.dim() > 1:
                    torch._dynamo.mark_dynamic(x, 1)
        narrow = torch.autocast("cpu", torch.bfloat16) if program.autocast and autocast else contextlib.nullcontext()
        captured = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # rows of one expert of a loop
        with torch.set_grad_enabled(program.train), narrow, captured, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call(*given)
        results = list(result) if isinstance(result, tuple) else [result]
        floating = [x for x in results if isinstance(x, torch.Tensor) and x.requires_grad]
        run.seen += [(f"result {i} of call {number}", x.detach().clone()) for i, x in enumerate(results)]
        run.seen += [
            (f"input {i} after call {number}", x.detach().clone())
            for i, x in enumerate(given)
            if isinstance(x, torch.Tensor)
        ]
        if program.train and floating:
            sum((x.double() * _probe(x)).sum() for x in floating).backward()  # type: ignore[union-attr]
            run.seen += [(f"gradient of input {i}, call {number}", _gradient(x)) for i, x in enumerate(leaves)]
    run.seen += [(f"buffer {name}", x.detach().clone()) for name, x in model.named_buffers()]
    if program.train:
        run.seen += [(f"gradient of {name}", _gradient(p)) for name, p in model.named_parameters()]
    return run


def _probe(x: torch.Tensor) -> torch.Tensor:
    """A gradient that differs from element to element."""
    return torch.linspace(-1, 1, max(x.numel(), 1), dtype=torch.float64).cos().reshape(x.shape)


def _gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad.clone()


def _same(expected: Run, found: Run, exact: Run | None, program: Program) -> None:
    for k, ((name, a), (_, b)) in enumerate(zip(expected.seen, found.seen, strict=True)):
        name = name.replace("_orig_mod.", "")
        if a.dtype != b.dtype or a.shape != b.shape:
            raise WrongAnswer(f"{name} is {b.dtype} {list(b.shape)}, eager's {a.dtype} {list(a.shape)}")
        if not a.is_floating_point():
            if not torch.equal(a, b):
                raise WrongAnswer(f"{name} differs, and holds no floating numbers")
            continue
        if torch.equal(a, b):
            continue
        difference = (a.double() - b.double()).abs().nan_to_num(torch.inf).max().item()
        reference = a if exact is None else exact.seen[k][1]
        size = reference.double().abs().max().item()
        bar = EXACT * max(size, 1e-3)
        if exact is not None:
            own = (a.double() - reference.double()).abs().max().item()
            rounding = torch.finfo(torch.bfloat16 if program.autocast else getattr(torch, program.work)).eps
            bar = max(bar, TIMES * own + ROUNDINGS * rounding * max(size, 1e-3))
            difference = (b.double() - reference.double()).abs().nan_to_num(torch.inf).max().item()
        if not difference <= bar:
            raise WrongAnswer(
                f"{name} is off by {difference:.3g}; its largest element is {size:.3g}, the bar {bar:.3g}"
            )


def _verdict(program: Program, reports: list[CompileReport]) -> Verdict:
    verdict = Verdict()
    for report in reports:
        if report.error:
            raise Crash(f"the analysis stopped: {report.error}")
        for site in report.sites:
            if site.matched:
                verdict.matched[site.kind] += 1
                continue
            verdict.refused[site.refusal] += 1
            if "the analysis raised" in site.reason:
                raise Crash(f"{site.kind}: {site.reason}")
            if not site.reason or site.source == "?":
                raise Broken(f"{site.kind} refused without a reason or line: {site.reason!r} at {site.source!r}")
    for kind, must in program.expect.items():
        if must and not verdict.matched[kind]:
            reasons = [f"{s.refusal} at {s.source}: {s.reason}" for r in reports for s in r.refused]
            raise Broken(f"{kind} was not found: {'; '.join(reasons) or 'no site'}")
        if must and any(s.kind == kind and not s.matched for r in reports for s in r.sites):
            reasons = [f"{s.refusal} at {s.source}: {s.reason}" for r in reports for s in r.refused]
            raise Broken(f"{kind} was lowered in one graph and refused in another: {'; '.join(reasons)}")
        if not must and verdict.matched[kind]:
            raise Broken(f"{kind} was lowered, and can't be that")
    return verdict
