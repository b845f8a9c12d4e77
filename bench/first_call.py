"""One first call of a compiled model in a process of its own, timed: what compile_time and warm_start share.

Timed is the call alone: Dynamo, our passes, AOTAutograd, Inductor and the step itself; imports and building the model
are not. On a card the clock is the wall's. On a CPU it is the processor time of the process and of the compilers that
it started, because machines without a card are usually shared: seconds a neighbour takes do not count.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench import compiled, models
from bench.compiled import Variant
from bench.results import ROOT, check

MICRO = ("deepseek_v3", "deepseek_v2", "minicpm3", "qwen3_moe", "gpt_oss")  # of tests/zoo/hf.py: 2 layers each
TOKENS, PROMPT, CAPACITY = 32, 10, 64


@dataclass(frozen=True)
class Case:
    """A model (of the zoo, or of `bench.models`) and what is called: `prefill`, `decode` (static cache) or `train`."""

    model: str
    call: str = "prefill"

    @property
    def title(self) -> str:
        known = models.CONFIGS.get(self.model)
        layers = known["num_hidden_layers"] if known else 2
        return f"{self.model}, {layers} layers, {self.call}"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> str:
    """What the times are, for the rows."""
    return "seconds of the wall" if torch.cuda.is_available() else "processor time"


def seconds() -> float:
    """Now, on the clock that :func:`clock` names."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(variant: Variant, case: Case, folder: str) -> dict[str, Any]:
    """One first call in a new process whose compiler caches are in `folder`.

    Returns:
        `seconds`, `cache_hits` of torch's caches, `analysis` (seconds in all our passes, by the same clock) and
        `passes` (of each, by the wall's), `matched` sites, `graphs`, and `values`: the first results, to compare.
    """
    words = [variant.name, case.model, case.call, str(int(variant.dry))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_call", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the process of {' '.join(words)} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_same(what: str, *runs: dict[str, Any]) -> None:
    """The results of all runs agree to a hundredth, and each lowered as many sites as the last with its compiler."""
    first = runs[0]["values"]
    for other in (run["values"] for run in runs[1:]):
        worst = max(abs(a - b) for a, b in zip(first, other, strict=True))
        check(worst <= 3e-2 * max(map(abs, first)), f"{what}: two runs give {first} and {other}")


def _build(case: Case) -> nn.Module:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if case.model in models.CONFIGS:
        return models.build(case.model, device(), dtype)
    from tests.zoo import hf

    return hf.build_model(case.model).to(device(), dtype)


def _step(model: nn.Module, case: Case, call: Callable[..., Any]) -> Callable[[], torch.Tensor]:
    """The call that is timed; -> what it returns to compare."""
    tokens = models.token_ids(model, 1, 1 if case.call == "decode" else TOKENS)
    if case.call == "train":
        model.train()

        def train() -> torch.Tensor:
            loss = call(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            return loss.detach()[None]

        return train
    if case.call == "decode":
        cache = models.filled_static_cache(model, 1, CAPACITY, PROMPT)
        return lambda: call(tokens, past_key_values=cache, use_cache=True).logits[0, -1, :8]
    return lambda: call(tokens, use_cache=False).logits[0, -1, :8]


def _timed_passes() -> list[float]:
    """Seconds of every later run of our passes."""
    from dscompile.passes import pipeline

    spent: list[float] = []
    run = pipeline.run

    def timed(*args: Any, **settings: Any) -> Any:
        start = seconds()
        try:
            return run(*args, **settings)
        finally:
            spent.append(seconds() - start)

    pipeline.run = timed
    return spent


def _worker(variant_name: str, model_name: str, call_name: str, dry: str) -> None:
    from dscompile import report

    case, analysis = Case(model_name, call_name), _timed_passes()
    importlib.import_module("torch._inductor.compile_fx")  # as all imports, in no compiler's time
    variant = next(v for v in compiled.variants(None, bool(int(dry))) if v.name == variant_name)
    with torch.set_grad_enabled(call_name == "train"):
        model = _build(case)
        step = _step(model, case, variant.compile(model))
        start = seconds()
        values = step()
        took = seconds() - start
    counters = torch._dynamo.utils.counters
    reports = report.reports()
    passes: dict[str, float] = {}
    for one in reports:
        for name, spent in one.seconds.items():
            passes[name] = passes.get(name, 0.0) + spent
    found = {
        "seconds": took,
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "analysis": sum(analysis),
        "passes": passes,
        "matched": sum(len(one.matched) for one in reports),
        "graphs": len(reports),
        "values": values.float().tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
