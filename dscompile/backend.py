"""The backend: ``torch.compile(model, backend="dsinfra")``.

Dynamo hands over one graph; the passes analyse its shadow and write ``dsinfra`` operators into it where they proved
what a region computes; AOTAutograd and Inductor compile the result under settings of this call alone. What can't be
proved stays as it was, with the reason in the report. Reading on: ``passes/pipeline.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dscompile import report as reports
from dscompile import verify
from dscompile.adapters import hf_fp8
from dscompile.config import Config
from dscompile.dump import Dump
from dscompile.errors import AnalysisFailed, StrictRefusal
from dscompile.lowering import inductor
from dscompile.lowering.exchange import ExchangeError
from dscompile.passes import commits, fp8_free, graph_copy, pipeline, placement
from dscompile.passes.commits import Commits
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.fp8_refusals import KeptPrecise
from dscompile.passes.refusals import OutOfFuel
from dscompile.report import CompileReport

log = logging.getLogger("dscompile")
_BY_REQUEST = (KeptPrecise.__name__, OutOfFuel.__name__)  # refusals that are no fault under strict


def dsinfra(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    sink: Callable[[CompileReport], None] = reports.add,
) -> Callable[..., Any]:
    """Compiles one of Dynamo's graphs.

    Args:
        gm: Dynamo's graph; rewritten in place.
        example_inputs: its inputs (tensors, parameters, symbolic sizes).
        mode: Inductor's mode, as ``torch.compile(mode=...)`` passes it.
        options: :class:`dscompile.config.Config` fields, and settings of Inductor.
        sink: receives the report of this graph.

    Raises:
        OptionError: an option is unknown or has a wrong value.
        DumpDirectoryError: the dump directory can't be written; nothing was compiled.
        WeightFreed: the graph reads a weight whose memory was given back under ``fp8_free``.
        StrictRefusal, AnalysisFailed: under ``strict``, where a site would be left to Inductor.
        VerifyError: under ``strict`` and ``verify``, where a rewritten region computes something else.
    """
    config = Config.of(mode, options)
    dump = Dump(config.dump)
    report = CompileReport(device=_device(example_inputs))
    original = graph_copy.copied(gm)[0] if config.enable and config.verify else None
    prepared, rewritten = _analyse(gm, example_inputs, config, dump, report) if config.enable else (None, Commits())
    if original is not None and rewritten.links:
        record, right = verify.run(gm, example_inputs, rewritten, config.strict)
        report.records.append(record)
        if not right:
            gm, prepared = original, None
    report.op_counts = pipeline.op_counts(gm)
    dump.finish(report, config)
    sink(report)
    log.info("%s", report)
    fp8_free.check(gm, example_inputs)
    if prepared is None or not prepared.slots:
        return _compile_placed(gm, example_inputs, config)
    compiled = prepared.bind(_compile_placed(*prepared.lift(), config))
    if config.fp8_free and config.inner != "eager":  # which would run what is dead, too
        report.records.append(fp8_free.run(prepared))
        log.info("dsinfra: %s", report.records[-1].note)
    return compiled


def _reset() -> None:
    """What ``torch._dynamo.reset()`` calls: fuel is counted from 0 again, and Inductor resets what is its own."""
    commits.restart()
    inductor.reset()


dsinfra.reset = _reset  # type: ignore[attr-defined]
hf_fp8.watch()  # for callers of this function that never go through the entry point


def _analyse(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, dump: Dump, report: CompileReport
) -> tuple[Prepared | None, Commits]:
    """Runs the passes and fills the report; -> what the rewritten graph takes as further inputs, and the rewrites."""
    try:
        outcome = pipeline.run(
            gm,
            inputs,
            strict=config.strict,
            observe=dump.observe,
            fp8=config.fp8,
            fp8_head=config.fp8_head,
            fuel=config.fuel,
            ep=None if config.ep_group is None else (config.ep_group, config.ep_capacity),
            book=config.placement,
            batch_invariant=config.batch_invariant,
            microbatches=config.split(),
        )
    except ExchangeError:  # of this rank alone, perhaps: others would wait for it
        raise
    except Exception as error:
        raise AnalysisFailed(f"the analysis raised {type(error).__name__}: {error}") from error
    report.records, report.sites, report.rewrites = outcome.records, outcome.sites, outcome.commits.rewrites
    if outcome.error is not None:
        report.error = f"{type(outcome.error).__name__}: {outcome.error}"
        log.warning("dsinfra: %s; this graph is left to Inductor", report.error)
    refused = [site for site in report.refused if site.refusal not in _BY_REQUEST]
    if config.strict and refused:
        first = refused[0]
        raise StrictRefusal(
            f"{len(refused)} of {len(report.sites)} sites can't be lowered. First: {first.module_path or '(top)'} "
            f"at {first.source}: {first.refusal}: {first.reason}. {first.hint}".rstrip(". ")
            + "."
        )
    return outcome.prepared, outcome.commits


def _compile_placed(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """With slots and maps of placed experts as further inputs, where there are any."""
    gm, inputs, bind = placement.lift(gm, inputs)
    return bind(_compile(gm, inputs, config))


def _compile(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    if config.inner == "eager":
        return gm.forward
    if config.inner == "aot_eager":
        return inductor.compile_eager(gm, inputs)
    return inductor.compile_graph(gm, inputs, config.mode, dict(config.inductor), config.key())


def _device(inputs: Sequence[Any]) -> str:
    """The card's name, or what runs instead of it."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    cuda = next((d for d in devices if d.type == "cuda"), None)
    if cuda is None:
        return "CPU (reference implementations)"
    major, minor = torch.cuda.get_device_capability(cuda)
    note = "" if (major, minor) == (9, 0) else ": no Hopper, Triton or reference implementations"
    return f"{torch.cuda.get_device_name(cuda)}{note}"
