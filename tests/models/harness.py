"""Runs one zoo case three ways: compiled, uncompiled, and uncompiled in wider arithmetic; and says what was compiled.

Most tests use Inductor's stand-in `aot_eager`, which runs the rewritten graph through AOTAutograd operator by operator:
seconds instead of a minute a case. `DSINFRA_TEST_BACKEND` names another torch backend to run the numerical half of the
suite with, to tell a fault of the tests from one of the backend.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

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
    arithmetic. graphs: how many Dynamo made; breaks: how often it had to end one. reports: one for each graph.
    """

    output: dict[str, torch.Tensor]
    eager: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]
    graphs: int
    breaks: int
    reports: list[Any] = field(default_factory=list)

    @property
    def counts(self) -> list[dict[str, int]]:
        """Operators of each graph."""
        return [dict(report.op_counts) for report in self.reports]

    @property
    def sites(self) -> list[list[Any]]:
        """Attentions of each graph."""
        return [[site for site in report.sites if site.kind == "mla"] for report in self.reports]

    @property
    def layers(self) -> list[list[Any]]:
        """Expert layers and routers of each graph."""
        return [[site for site in report.sites if site.kind in ("experts", "route")] for report in self.reports]

    @property
    def lowered(self) -> dict[str, int]:
        """Lowered sites of all graphs, by kind."""
        return Counter(site.kind for report in self.reports for site in report.sites if site.matched)

    @property
    def refused(self) -> dict[str, int]:
        """Refused sites of all graphs, by kind and class of the refusal."""
        sites = [site for report in self.reports for site in report.sites if not site.matched]
        return Counter(f"{site.kind}: {site.refusal}" for site in sites)

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
    precision = precision or case.precision
    wide = Precision(precision.weights, torch.float32) if case.autocast else case.reference(precision)
    example = case.example(wide)
    eager = reference = run_calls(case, example, uncompiled(case, example), None)
    if case.autocast or wide.working is not precision.working:
        example = case.example(precision)
        eager = run_calls(case, example, uncompiled(case, example), case.autocast)
    example = case.example(precision)
    forget()
    before = len(_reports())
    with compiling(case, example, BACKEND, FAST if options is None else options) as call:
        output = run_calls(case, example, call, case.autocast)
    return Outcome(output, eager, reference, *captured(), reports=_reports()[before:])


def forget() -> None:
    """What was compiled before, and the counts of it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def captured() -> tuple[int, int]:
    """(graphs that Dynamo made, breaks between them) since `forget`."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def captured_without_us(case: ZooCase) -> tuple[int, int]:
    """(graphs, breaks) of the same calls under Dynamo alone."""
    example = case.example()
    forget()
    with compiling(case, example, "eager", {}) as call:
        run_calls(case, example, call, case.autocast)
    return captured()


def uncompiled(case: ZooCase, example: Example) -> Any:
    """What is called for a result without compiling."""
    return partial(example.module.generate, disable_compile=True) if case.mode == "generate" else example.module


@contextlib.contextmanager
def compiling(case: ZooCase, example: Example, backend: str, options: dict[str, Any]) -> Iterator[Any]:
    """What is called for a compiled result; `options` go to dsinfra, and to it alone.

    `generate` compiles for itself: it is told the backend, and passes no options on, so they come by variable.
    """
    from dscompile._entry import ensure_registered

    ensure_registered()
    if case.mode != "generate":
        settings = {"options": options} if backend == "dsinfra" else {}
        yield torch.compile(example.module, backend=backend, fullgraph=case.fullgraph, **settings)
        return
    from transformers import CompileConfig

    variables = {f"DSINFRA_{name.upper()}": str(value) for name, value in options.items()}
    config = CompileConfig(backend=backend, fullgraph=case.fullgraph)
    config.mode = None if backend == "eager" else config.mode
    config._compile_all_devices = True
    with mock.patch.dict(os.environ, variables if backend == "dsinfra" else {}):
        yield partial(example.module.generate, compile_config=config)


def _reports() -> list[Any]:
    if BACKEND != "dsinfra":
        return []
    from dscompile.report import reports

    return list(reports())


def run_calls(
    case: ZooCase, example: Example, call: Any, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Results by name of all calls, of a step of training, or of `generate`."""
    torch.manual_seed(0)
    results: dict[str, torch.Tensor] = {}
    region = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    training = case.mode == "train"
    if case.mode == "generate":
        found = call(*example.args, **example.kwargs, return_dict_in_generate=True, output_logits=True)
        return {"tokens": found.sequences, **{f"call {i}": logits for i, logits in enumerate(found.logits)}}
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
    results.update(_cached(example))
    return results


def _cached(example: Example) -> dict[str, torch.Tensor]:
    """Everything that a cache among the arguments holds after the last call, its length included."""
    cache = example.kwargs.get("past_key_values")
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(getattr(cache, "layers", ())):
        for name, value in sorted(vars(layer).items()):
            held = {name: value} if isinstance(value, torch.Tensor) else value if isinstance(value, dict) else {}
            tensors = {key: tensor for key, tensor in held.items() if isinstance(tensor, torch.Tensor)}
            found.update({f"cache {index} {name} {key}": tensor.clone() for key, tensor in tensors.items()})
    if cache is not None:
        found["cache length"] = torch.tensor(int(cache.get_seq_length()))
    return found


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
        if name.startswith(("cache", "tokens")):
            continue
        difference = (actual[name].double() - want.double()).norm(dim=-1)
        errors.append((difference / want.double().norm(dim=-1).clamp_min(1e-12)).flatten())
    return float(torch.cat(errors).median())


def continued_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """`median_token_error` of two results of `generate`, as long as a request's tokens agree: behind, texts differ."""
    steps = sum(name.startswith("call") for name in expected)
    same_BT = (actual["tokens"] == expected["tokens"])[:, -steps:]
    counted_BT = torch.cat([torch.ones_like(same_BT[:, :1]), same_BT[:, :-1]], 1).cumprod(1).bool()
    both = [{f"call {i}": run[f"call {i}"][counted_BT[:, i]] for i in range(steps)} for run in (actual, expected)]
    return median_token_error(*both)


def attention_ops(counts: dict[str, int]) -> int:
    """How many latent-attention operators a graph holds, prefill and decode forms together."""
    return sum(n for op, n in counts.items() if op.replace("::", ".").split(".")[-1] in ("mla", "mla_decode"))


def refusal_text(site: Any) -> str:
    """What a refused site says about itself: the refusal's class and its reason."""
    return f"{site.refusal}: {site.reason}"
