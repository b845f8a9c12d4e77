"""What benchmarks of whole compiled models share: variants, timing, the proof of a CUDA graph, the command line.

Both variants run in one process, one after the other, each from empty caches. Times are medians over single steps
between CUDA events with a synchronisation behind each: what a caller waits for, launches and guards included.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import results, table
from bench.results import check


@dataclass(frozen=True)
class Variant:
    """One compiler with its settings; `dry` swaps code generation for AOTAutograd run operator by operator."""

    name: str
    ours: bool
    mode: str | None = None
    dry: bool = False

    def compile(self, model: nn.Module) -> Any:
        """`torch.compile` with this variant's backend."""
        if not self.ours:
            backend = "aot_eager" if self.dry else "inductor"
            return torch.compile(model, backend=backend, mode=None if self.dry else self.mode)
        from dscompile._entry import ensure_registered

        ensure_registered()
        options = {"mode": self.mode} if self.mode else {}
        if self.dry:
            options["inner"] = "aot_eager"
        return torch.compile(model, backend="dsinfra", options=options)


def variants(mode: str | None, dry: bool) -> tuple[Variant, Variant]:
    """The anchor and ours."""
    return Variant("inductor", False, mode, dry), Variant("dsinfra", True, mode, dry)


@dataclass
class Measured:
    """One variant on one case: median microseconds a step, seconds of the first call, peak GiB while stepping."""

    us: float
    first_call_s: float
    peak_gib: float


@contextlib.contextmanager
def from_scratch() -> Iterator[None]:
    """Empty compiler caches, in memory and on disk, inside; whatever was compiled is dropped behind."""
    from torch._inductor.utils import fresh_inductor_cache

    from dscompile import report

    forget()
    torch._dynamo.utils.counters.clear()
    report.clear()
    with fresh_inductor_cache():
        yield
    forget()


def forget() -> None:
    """Drop compiled code, captured graphs and cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(step: Callable[[], Any], rewind: Callable[[], None], *, warmup: int, repeats: int) -> Measured:
    """First call, `warmup` calls, then `repeats` timed ones; `rewind` runs before the first of each, never timed."""
    rewind()
    start = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - start
    for _ in range(warmup):
        step()
    synchronize()
    rewind()
    times = [_one(step) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return Measured(statistics.median(times), first, peak)


def _one(step: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def check_cuda_graph(step: Callable[[], Any], what: str) -> None:
    """A step under `reduce-overhead` must be launches of recorded graphs: it may be skipped without a word."""
    from torch.profiler import ProfilerActivity, profile

    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    check(skips == 0, f"{what}: CUDA graphs were skipped {skips} times")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    names = [event.key for event in profiled.key_averages()]
    launches = [name for name in names if "GraphLaunch" in name]
    runtime_seen = any(name.startswith(("cuda", "cu")) for name in names)
    check(bool(launches) or not runtime_seen, f"{what}: no graph launch among the runtime's calls {names[:20]}")


def check_all_lowered(config: Any, what: str) -> None:
    """Every attention and every layer of experts was lowered in the newest graph; prints the first decision of each."""
    from dscompile import report

    newest = report.last()
    check(newest is not None, f"{what}: dsinfra compiled nothing")
    assert newest is not None
    layers = config.num_hidden_layers
    for kind, wanted in (("mla", layers), ("experts", layers - config.first_k_dense_replace)):
        lowered = [site for site in newest.sites if site.matched and site.kind == kind]
        check(len(lowered) == wanted, f"{what}: {len(lowered)} of {wanted} {kind} lowered\n{newest}")
        if lowered:
            print(f"  {what}: {wanted} x {kind} -> {lowered[0].decision}; kernel {lowered[0].kernel}", flush=True)


def median_token_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Median over tokens of a token's relative error.

    The median, because a token near a tie between two experts may go either way in half precision.
    """
    wanted = reference.double()
    errors = (logits.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(errors.flatten().median())


def check_logits(
    run: Callable[[Any], torch.Tensor], model: nn.Module, both: tuple[Variant, Variant], what: str
) -> None:
    """Compare both variants with the same weights in float32: our error may be twice Inductor's, no more.

    `run(callable)` gives logits of equal inputs and state at each call, in the callable's dtype.
    """
    import copy

    errors = {}
    wide = copy.deepcopy(model).float()
    reference = run(wide)
    del wide
    for variant in both:
        with from_scratch():
            errors[variant.name] = median_token_error(run(variant.compile(model)), reference)
    text = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    print(f"  {what}: relative error of the median token beside float32: {text}", flush=True)
    anchor, ours = (errors[variant.name] for variant in both)
    check(ours <= 2 * max(anchor, 1e-6), f"{what}: error {ours:.2e} is over twice Inductor's {anchor:.2e}")


def report_pair(case: str, anchor: Measured, ours: Measured, anchor_name: str) -> dict[str, Any]:
    """Print one comparison and return its row."""
    print(case)
    for name, found in (("inductor", anchor), ("dsinfra", ours)):
        print(f"  {name:8} {found.us:12,.1f} us  first call {found.first_call_s:6.1f} s  {found.peak_gib:5.1f} GiB")
    print(f"  speed-up {anchor.us / ours.us:.2f}", flush=True)
    return {"case": case, "us": ours.us, "anchor": anchor_name, "anchor_us": anchor.us}


def command(name: str, run: Callable[..., list[dict[str, Any]]], dry_run: Callable[[], list[dict[str, Any]]]) -> None:
    """`python -m bench.NAME [--quick] [--json PATH] | --dry`."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--dry", action="store_true", help="micro models on the CPU, no code generation, nothing kept")
    given = parser.parse_args()
    if given.dry and (given.json or given.quick):
        parser.error("--dry times nothing worth keeping: leave --json and --quick out")
    with results.checked(name):
        rows = results.stamp(name, dry_run() if given.dry else run(quick=given.quick))
    print(table.plain(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
