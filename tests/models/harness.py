"""Runs one zoo case three ways: compiled, uncompiled, and uncompiled in wider arithmetic; and says what was compiled.

Most tests use Inductor's stand-in `aot_eager`, which runs the rewritten graph through AOTAutograd operator by operator:
seconds instead of a minute a case. `DSINFRA_TEST_BACKEND` names another torch backend to run the numerical half of the
suite with, to tell a fault of the tests from one of the backend.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.zoo import Example, Precision, ZooCase

BACKEND = os.environ.get("DSINFRA_TEST_BACKEND", "dsinfra")
FAST = {"inner": "aot_eager"}

# Largest relative error of a float32 run: a few hundred roundings of 2**-24 in a chain of two layers.
FLOAT32_BAR = 2e-5


@dataclass
class Outcome:
    """Results by name (`call 0`, `loss`, `grad some.weight`) and what the compiler reported.

    output: the compiled module's; eager: the same module's without compiling; reference: equal weights, wider
    arithmetic. counts: operators of each graph, as reported; graphs: how many Dynamo made. sites: attentions;
    layers: expert layers and routers.
    """

    output: dict[str, torch.Tensor]
    eager: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]
    graphs: int
    counts: list[dict[str, int]] = field(default_factory=list)
    sites: list[list[Any]] = field(default_factory=list)
    layers: list[list[Any]] = field(default_factory=list)

    @property
    def refusals(self) -> list[Any]:
        return [site for sites in self.sites for site in sites if not site.matched]


def compile_module(module: nn.Module, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """`torch.compile` with the backend under test; `options` go to dsinfra, and to it alone."""
    if BACKEND != "dsinfra":
        return torch.compile(module, backend=BACKEND, **settings)
    from dscompile._entry import ensure_registered

    ensure_registered()
    return torch.compile(module, backend="dsinfra", options=FAST if options is None else options, **settings)


def run_case(case: ZooCase, options: dict[str, Any] | None = None, precision: Precision | None = None) -> Outcome:
    """Compile and run `case`; each of the three runs has a module, inputs and cache of its own, of equal values."""
    precision = precision or Precision()
    wide = Precision(precision.weights, torch.float32) if case.autocast else case.reference(precision)
    example = case.example(wide)
    eager = reference = _run(case, example, example.module, None)
    if case.autocast or wide.working is not precision.working:
        example = case.example(precision)
        eager = _run(case, example, example.module, case.autocast)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = len(_reports())
    example = case.example(precision)
    compiled = compile_module(example.module, options, fullgraph=case.fullgraph)
    output = _run(case, example, compiled, case.autocast)
    reports = _reports()[before:]
    return Outcome(
        output=output,
        eager=eager,
        reference=reference,
        graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
        counts=[dict(report.op_counts) for report in reports],
        sites=[[site for site in report.sites if site.kind == "mla"] for report in reports],
        layers=[[site for site in report.sites if site.kind in ("experts", "route")] for report in reports],
    )


def _reports() -> list[Any]:
    if BACKEND != "dsinfra":
        return []
    from dscompile.report import reports

    return list(reports())


def _run(case: ZooCase, example: Example, call: Any, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    results: dict[str, torch.Tensor] = {}
    region = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    training = case.mode == "train"
    with torch.set_grad_enabled(training), region:
        for index, args in enumerate(example.calls):
            output = call(*args, **example.kwargs)
            if not training:
                found = _tensors(f"call {index}", output)
                results.update(found if example.keep is None else {n: t[example.keep] for n, t in found.items()})
    if training:
        loss = getattr(output, "loss", None)
        loss = output.float().square().mean() if loss is None else loss
        loss.backward()
        results["loss"] = loss.detach()
        for name, parameter in example.module.named_parameters():
            if parameter.grad is not None:
                results[f"grad {name}"] = parameter.grad.detach().clone()
    return results


def _tensors(name: str, output: Any) -> dict[str, torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return {name: output.detach().clone()}
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return {f"{name}[{i}]": value.detach().clone() for i, value in enumerate(output)}
    attentions = getattr(output, "attentions", None) or ()
    results = {f"{name} attention {i}": value.detach().clone() for i, value in enumerate(attentions)}
    return {name: output.logits.detach().clone(), **results}


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of the expected value, for each result.

    A gradient that is zero in theory is measured against the largest gradient instead.

    Raises:
        AssertionError: the two hold different results, or shapes, or a value is not finite.
    """
    assert actual.keys() == expected.keys(), f"results differ: {sorted(actual.keys() ^ expected.keys())}"
    floor = 1e-6 * max(float(value.double().norm()) for value in expected.values())
    errors = {}
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        assert bool(got.isfinite().all()), f"{name} is not finite"
        errors[name] = float((got.double() - want.double()).norm() / max(float(want.double().norm()), floor))
    return errors


def median_token_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Median over all tokens of the relative error of a token's logits.

    The median, because a token that sits near a tie between two experts may go either way in half precision, and is
    then far off in a correct run.
    """
    errors = []
    for name, want in expected.items():
        difference = (actual[name].double() - want.double()).norm(dim=-1)
        errors.append((difference / want.double().norm(dim=-1).clamp_min(1e-12)).flatten())
    return float(torch.cat(errors).median())


def attention_ops(counts: dict[str, int]) -> int:
    """How many latent-attention operators a graph holds, prefill and decode forms together."""
    return sum(n for op, n in counts.items() if op.replace("::", ".").split(".")[-1] in ("mla", "mla_decode"))


def refusal_text(site: Any) -> str:
    """What a refused site says about itself: the refusal's class and its reason."""
    return f"{site.refusal}: {site.reason}"
