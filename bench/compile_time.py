"""First-call seconds of a prompt: dsinfra and Inductor, from empty caches and in a second process that finds them full.

Each time is taken in a process of its own, which builds the model, then times the first call. The second process of a
variant must have been served by the compiler's caches, and dsinfra must do its analysis in both: it runs before the
caches are asked. `analysis` is the share of our passes in the first process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import compiled, models
from bench.compiled import Variant
from bench.results import ROOT, check

GPUS = 1


@dataclass(frozen=True)
class Plan:
    """What to run."""

    names: tuple[str, ...] = ("v2lite", "micro61")
    tokens: int = 128
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dry: bool = False


DRY = Plan(("micro",), 32, "cpu", torch.float32, True)


def run(quick: bool = False, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Three rows a model: first process, second process, and our passes alone; quick leaves v2lite out."""
    plan = plan or (Plan(names=("micro61",)) if quick else Plan())
    rows = []
    for name in plan.names:
        layers = models.CONFIGS[name]["num_hidden_layers"]
        cold, warm = {}, {}
        for variant in compiled.variants(None, plan.dry):
            with tempfile.TemporaryDirectory() as folder:
                cold[variant.name] = _process(variant, name, folder, plan)
                warm[variant.name] = _process(variant, name, folder, plan)
        _check(name, layers, cold, warm, plan)
        for title, found in (("first process", cold), ("second process", warm)):
            ours, anchor = found["dsinfra"]["first_call_s"], found["inductor"]["first_call_s"]
            case = f"{name}, {layers} layers, {title}"
            rows.append({"case": case, "us": ours * 1e6, "anchor": "inductor, same run", "anchor_us": anchor * 1e6})
            print(f"{case}: dsinfra {ours:.1f} s, inductor {anchor:.1f} s, ratio {ours / anchor:.2f}", flush=True)
        seconds = cold["dsinfra"]["passes"]
        print("  passes: " + ", ".join(f"{key} {value:.2f} s" for key, value in seconds.items()), flush=True)
        case = f"{name}, {layers} layers, analysis"
        rows.append({"case": case, "us": sum(seconds.values()) * 1e6, "anchor": None, "anchor_us": None})
    return rows


def _check(name: str, layers: int, cold: dict[str, Any], warm: dict[str, Any], plan: Plan) -> None:
    for variant in cold:
        a, b = cold[variant]["logits"], warm[variant]["logits"]
        same = max(abs(x - y) for x, y in zip(a, b)) <= 1e-2 * max(map(abs, a))
        check(same, f"{name}, {variant}: the second process gives other logits: {a} and {b}")
        hits = warm[variant]["cache_hits"]
        check(plan.dry or hits > 0, f"{name}, {variant}: the second process compiled again (no cache hit)")
        check(cold[variant]["cache_hits"] == 0, f"{name}, {variant}: the first process found full caches")
    for found in (cold, warm):
        matched = found["dsinfra"]["matched"]
        check(matched == layers, f"{name}: {matched} of {layers} attentions lowered")


def _process(variant: Variant, name: str, folder: str, plan: Plan) -> dict[str, Any]:
    """Times one first call in a new process whose compiler caches are in `folder`."""
    words = [variant.name, name, plan.device, str(plan.dtype)[6:], str(plan.tokens), str(int(plan.dry))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": path}
    command = [sys.executable, "-m", "bench.compile_time", "--worker", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process of {' '.join(words)} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _worker(variant_name: str, name: str, device: str, dtype: str, tokens: str, dry: str) -> None:
    from dscompile import report

    variant = next(v for v in compiled.variants(None, bool(int(dry))) if v.name == variant_name)
    with torch.no_grad():
        model = models.build(name, device, getattr(torch, dtype))
        ids = models.token_ids(model, 1, int(tokens))
        call = variant.compile(model)
        compiled.synchronize()
        start = time.perf_counter()
        logits = call(ids, use_cache=False).logits
        compiled.synchronize()
        seconds = time.perf_counter() - start
    counters = torch._dynamo.utils.counters
    newest = report.last() if variant.ours else None
    found = {
        "first_call_s": seconds,
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "passes": newest.seconds if newest else {},
        "matched": sum(site.kind == "mla" for site in newest.matched) if newest else 0,
        "logits": logits[0, -1, :8].float().tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--worker", nargs=6)
    worker, _ = parser.parse_known_args()
    if worker.worker:
        _worker(*worker.worker)
    else:
        compiled.command("compile_time", run, partial(run, plan=DRY))
