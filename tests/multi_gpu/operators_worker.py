"""What one process of a group does with the exchange operators on its GPU: layers, models, replays, syncs, a death.

Started once a GPU by torchrun or by tests/multi_gpu/test_exchange.py, with names of parts:

    torchrun --nproc-per-node 2 -m tests.multi_gpu.operators_worker layers fp8 replays profile models

Each case is a line that begins with "ok" or "WRONG"; rank 0 writes them to the file DSINFRA_EP_RESULTS as JSON, too.
The exit status is 0 where all is right on every rank.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile import report
from dscompile._entry import ensure_registered
from dscompile.lowering import select
from dscompile.passes.quantize_weights import quantize_weight
from dscompile.runtime import groups
from dscompile.runtime.groups import Group, RankLost
from tests.models import expert_parallel_checks as checks
from tests.zoo import expert_parallel as toy
from tests.zoo.hf import build_model, tokens

OPS = torch.ops.dsinfra
D, F, K, E = 256, 128, 4, 16
WAITS = r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$|Memcpy (DtoH|HtoD).*Pageable"
KERNELS = r"(dispatch|combine)_(start|wait)(_planning)?"
MODELS = {"deepseek_v3": {"first_k_dense_replace": 0}, "qwen3_moe": {}, "mixtral": {}}
RESULTS: list[dict[str, Any]] = []


def begin() -> Group:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    ensure_registered()
    return groups.join("world")


def tell(group: Group, part: str, case: str, fine: bool, said: str) -> None:
    """One line, and the verdict of all ranks."""
    print(f"[rank {group.rank}] {'ok' if fine else 'WRONG'} {part:8} {case:40} {said}", flush=True)
    RESULTS.append({"part": part, "case": case, "ok": fine, "said": said})


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


# ------------------------------------------------------------------ layers: both implementations, bit for bit


def layers(group: Group) -> None:
    """Results and gradients of an expert layer over shared memory are those over NCCL to the last bit."""
    W, rank = group.size, group.rank
    counts = {
        "even": [64] * W,
        "many": [600 - 7 * r for r in range(W)],
        "one empty": [48 * (r % 2) for r in range(W)],
        "all empty": [0] * W,
        "few and many": [300 if r else 1 for r in range(W)],
    }
    for number, (name, each) in enumerate(counts.items()):
        for dtype in (torch.bfloat16, torch.float16):
            found = []
            for way in ("symmetric", "all_to_all"):
                with select.force("exchange", way):
                    found.append(_layer_step(group, each[rank], number, dtype))
            torch.cuda.synchronize()
            same = [torch.equal(one, other) for one, other in zip(*found)]
            fine = all(same) and all(bool(t.isfinite().all()) for t in found[0])
            tell(group, "layers", f"{name}, {dtype}", fine, f"y, dx, dweight, dW equal: {same}")


def _layer_step(group: Group, count: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """y and its gradients by x, routing weights and this rank's weights, through the operators."""
    g = torch.Generator().manual_seed(100 * seed + group.rank)
    x = torch.randn(count, D, generator=g).to(dtype).cuda().requires_grad_()
    idx = torch.rand(count, E, generator=g).topk(K).indices
    idx = torch.where(torch.rand(count, K, generator=g) < 0.1, -1, idx).cuda()
    weight = torch.rand(count, K, generator=g).cuda().requires_grad_()
    L = E // group.size
    g.manual_seed(7 + group.rank)
    gate_up = (torch.randn(L, 2 * F, D, generator=g) / 16).to(dtype).cuda().requires_grad_()
    down = (torch.randn(L, D, F, generator=g) / 11).to(dtype).cuda().requires_grad_()
    where = group.name, E, 600, 0
    plan, inbox = OPS.dispatch_start.default(x, idx, weight, None, *where)
    rows, ids, weights, arrived, _ = OPS.dispatch_wait.default(plan, inbox, x, idx, weight, None, *where)
    z = OPS.experts.default(rows, ids, weights, gate_up, down, None, None, "silu", False, 1.0, 0.0)
    inbox = OPS.combine_start.default(z, None, plan, arrived, *where)
    y, _ = OPS.combine_wait.default(inbox, z, None, plan, arrived, *where)
    y.backward(torch.sin(y.detach().float() * 9).to(dtype))
    return [y.detach(), x.grad, weight.grad, gate_up.grad, down.grad]


# ------------------------------------------------------------------ fp8: quantised before the dispatch or behind it


@torch.no_grad()
def fp8(group: Group) -> None:
    """FP8 experts give the same bits over rows that were quantised before they were sent, on both ways."""
    W, rank = group.size, group.rank
    for number, each in enumerate(([64] * W, [600 - 7 * r for r in range(W)], [48 * (r % 2) for r in range(W)])):
        found = {}
        for way in ("symmetric", "all_to_all"):
            for early in (True, False):
                with select.force("exchange", way):
                    found[way, early] = _fp8_layer(group, each[rank], number, early)
        torch.cuda.synchronize()
        first = found["symmetric", True]
        same = {str(key): torch.equal(first, y) for key, y in found.items()}
        fine = all(same.values()) and bool(first.isfinite().all()) and (not each[rank] or bool(first.any()))
        tell(group, "fp8", f"{each[:2]} tokens", fine, f"y equal: {same}")


def _fp8_layer(group: Group, count: int, seed: int, early: bool) -> Tensor:
    g = torch.Generator().manual_seed(100 * seed + group.rank)
    x = torch.randn(count, D, generator=g).bfloat16().cuda()
    idx = torch.rand(count, E, generator=g).topk(K).indices.cuda()
    weight, where = torch.rand(count, K, generator=g).cuda(), (group.name, E, 600, 0)
    g.manual_seed(7 + group.rank)
    shapes = (E // group.size, 2 * F, D), (E // group.size, D, F)
    weights = [part.cuda() for shape in shapes for part in quantize_weight(torch.randn(shape, generator=g) / 16)]
    sent, scale = OPS.quantize_1x128.default(x) if early else (x, None)
    plan, inbox = OPS.dispatch_start.default(sent, idx, weight, scale, *where)
    *rows, arrived, row_scale = OPS.dispatch_wait.default(plan, inbox, sent, idx, weight, scale, *where)
    quantised = (row_scale, x.dtype) if early else ()
    z = OPS.fp8_experts.default(*rows, *weights, "silu", *quantised)
    inbox = OPS.combine_start.default(z, None, plan, arrived, *where)
    return OPS.combine_wait.default(inbox, z, None, plan, arrived, *where)[0]


# ------------------------------------------------------------------ replays: CUDA graphs of compiled layers


def stack() -> nn.Module:
    """Two expert layers with a shared expert each."""
    return toy.build(2, dtype=torch.bfloat16, kind=toy.WideToy).cuda()


def rows(seed: int) -> Tensor:
    return toy.rows(seed, 4, 16, torch.bfloat16, toy.WideToy).cuda()


def compiled(model: nn.Module, group: Group, **options: Any) -> Any:
    settings = {"ep_group": group.process_group, "ep_capacity": 96, **options}
    return torch.compile(model, backend="dsinfra", options=settings, fullgraph=True)


def replays(group: Group) -> None:
    """A captured layer gives what it gives uncaptured, with other tokens, routing and delays each time."""
    model = stack()
    plain = compiled(model, group)
    captured = compiled(copy.deepcopy(model), group, mode="reduce-overhead")
    skips = torch._dynamo.utils.counters["inductor"]
    before, wrong, worst = skips["cudagraph_skips"], 0, 0.0
    with torch.no_grad():
        for turn in range(204):
            x = rows(1000 * group.rank + turn)
            _delay(group, turn)
            torch.compiler.cudagraph_mark_step_begin()
            got, expected = captured(x).clone(), plain(x)
            wrong += not torch.equal(got, expected)
            worst = max(worst, off(got, expected))
    torch.cuda.synchronize()
    skipped = skips["cudagraph_skips"] - before
    kernels = {site.kernel for r in report.reports()[-2:] for site in r.sites if site.kind == "expert_parallel"}
    fine = not wrong and not skipped and kernels == {"symmetric"}
    said = f"{wrong} of 204 differ, by {worst:.1e} at most; graphs skipped {skipped}; {sorted(kernels)}"
    tell(group, "replays", "inference, 204 replays", fine, said)
    _training_replays(group)


def _training_replays(group: Group) -> None:
    plain_model = stack()
    captured_model = copy.deepcopy(plain_model)
    plain, captured = compiled(plain_model, group), compiled(captured_model, group, mode="reduce-overhead")
    worst = 0.0
    for turn in range(40):
        x = rows(1000 * group.rank + turn)
        _delay(group, turn)
        grads = []
        for model, call in ((plain_model, plain), (captured_model, captured)):
            model.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            call(x).float().square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        worst = max(worst, *(off(*pair) for pair in zip(*grads)))
    torch.cuda.synchronize()
    tell(group, "replays", "training, 40 steps", worst < 1e-2, f"gradients differ by {worst:.1e} at most")


def _delay(group: Group, turn: int) -> None:
    """One rank's device lags by up to 5 ms, another one each time."""
    if turn % 3 == 1 and turn // 3 % group.size == group.rank:
        torch.cuda._sleep(int(1e6 * (1 + turn % 8)))


# ------------------------------------------------------------------ profile: nothing is read on the host


@contextmanager
def no_reads() -> Iterator[None]:
    """A block in which torch raises where it would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def profile(group: Group) -> None:
    """No call of a compiled layer, forward and backward, waits for the device; starts are on a stream of their own."""
    for mode in (None, "reduce-overhead"):
        model = stack()
        call = compiled(model, group, **({} if mode is None else {"mode": mode}))
        x = rows(group.rank)
        for _ in range(4):
            _step(model, call, x)
        torch.cuda.synchronize()
        with torch.profiler.profile(record_shapes=False) as seen:
            with no_reads():
                for _ in range(3):
                    _step(model, call, x)
        found = [event.name for event in seen.events()]
        # The profiler itself waits once, when it stops.
        waits = [name for name in found if re.search(WAITS, name)]
        exchanged = sum(re.fullmatch(KERNELS, name) is not None for name in found)
        fine = len(waits) <= 1 and exchanged >= 3 * 2 * 8
        said = f"{len(waits)} waits {sorted(set(waits))}, {exchanged} kernels of exchanges in 3 steps"
        tell(group, "profile", f"mode {mode}", fine, said)


def _step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    model.zero_grad(set_to_none=True)
    call(x).float().square().sum().backward()


# ------------------------------------------------------------------ models


def models(group: Group) -> None:
    """Outputs and gradients of models are those of the same graph with all experts on every rank."""
    for name, overrides in MODELS.items():
        for dtype, bar in ((torch.bfloat16, 3e-2), (torch.float32, 1e-4)):
            kernel, why, wrong, worst = _model(group, name, overrides, dtype, bar)
            wanted = "symmetric" if dtype is torch.bfloat16 else "all_to_all"
            told = kernel == wanted and ("rows are torch.float32" in why) == (dtype is torch.float32)
            said = f"{kernel}, off by {worst:.1e} at most {wrong or ''} {'' if told else why}"
            tell(group, "models", f"{name}, {dtype}", not wrong and told, said)


def _model(group: Group, name: str, overrides: dict, dtype: torch.dtype, bar: float) -> tuple[str, str, dict, float]:
    """(implementation, decision, errors beyond the bar, the largest error) of a step of training."""
    model = build_model(name, num_hidden_layers=1, **overrides).to("cuda", dtype)
    ids = tokens(2, 5 + 3 * group.rank, seed=group.rank + 50).cuda()
    torch._dynamo.reset()
    alone = model  # in 16 bits compiled, too: another rounding of the router would send tokens elsewhere
    if dtype is torch.bfloat16:
        alone = torch.compile(model, backend="dsinfra", options={"inner": "aot_eager"}, fullgraph=True)
    expected = checks.step(model, alone, ids)
    found = checks.step(model, checks.compiled(model, group), ids)
    (site,) = checks.spread_layers()
    for key in expected:
        if checks.is_expert(key):
            expected[key], found[key] = checks.summed(expected[key], group), checks.summed(found[key], group)
    norms = {key: float(value.float().norm()) for key, value in expected.items()}
    floor = 1e-3 * max(norms.values())
    errors = {key: float((found[key] - expected[key]).float().norm()) / max(norms[key], floor) for key in expected}
    wrong = {key: f"{error:.1e}" for key, error in errors.items() if not error <= bar}
    return site.kernel or "", site.decision, wrong, max(errors.values())


# ------------------------------------------------------------------ death


def death(group: Group) -> None:
    """The last rank leaves: the others' devices give up in time, and what they say names it and the operator."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dscompile").addHandler(handler)
    model = stack()
    call = compiled(model, group, inner="aot_eager")
    x = rows(group.rank)
    with torch.no_grad():
        for _ in range(3):
            call(x)
        torch.cuda.synchronize()
        dist.barrier()
        last = group.size - 1
        if group.rank == last:
            print(f"[rank {last}] dies", flush=True)
            os._exit(0)
        K = model.layers[0].layer.top_k
        routed = torch.zeros(64, K, dtype=torch.int64, device="cuda"), torch.ones(64, K, device="cuda")
        start, raised = time.monotonic(), ""
        try:
            call(x)
            torch.cuda.synchronize()
        except RuntimeError as error:
            raised = str(error).splitlines()[0]
        seconds = time.monotonic() - start
        time.sleep(1.5)  # the watch looks twice a second
        try:
            OPS.dispatch_start.default(x.flatten(0, 1), *routed, None, group.name, toy.SharedToy.E, 96, 0)
            error_said, named = "nothing", False
        except RankLost as error:
            error_said, named = str(error), error.rank == last and error.operator != ""
    logged = any(f"for rank {last}:" in line for line in said)
    fine = bool(raised) and named and logged and seconds < group.timeout + 10
    told = f"after {seconds:.1f} s; CUDA: {raised[:60]!r}; logged {logged}; next call: {error_said[:150]}"
    tell(group, "death", f"rank {last} of {group.size}", fine, told)
    sys.stdout.flush()
    write(group)
    os._exit(0 if fine else 1)


def write(group: Group) -> None:
    if group.rank == 0 and (path := os.environ.get("DSINFRA_EP_RESULTS")):
        with open(path, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "world": group.size, "rows": RESULTS}, file, indent=1)


PARTS = {"layers": layers, "fp8": fp8, "replays": replays, "profile": profile, "models": models, "death": death}


def main(names: list[str]) -> None:
    group = begin()
    for name in names:
        start = time.monotonic()
        PARTS[name](group)
        if group.rank == 0:
            print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        write(group)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    if not all(row["ok"] for row in RESULTS):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
