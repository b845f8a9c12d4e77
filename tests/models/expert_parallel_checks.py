"""What the ranks of `test_expert_parallel_gloo.py` run: models, compiled with their experts spread over a group."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from dscompile import report
from dscompile._entry import ensure_registered
from dscompile.adapters import hf_fp8
from dscompile.passes import fp8_dispatch
from dscompile.passes.record import PassRecord
from dscompile.runtime import groups
from dscompile.runtime.expert_store import ExpertStore
from tests.zoo import expert_parallel as toy
from tests.zoo import fp8
from tests.zoo.hf import build_model, tokens

CAPACITY = 40


@functools.cache
def group_of(size: int) -> groups.Group | None:
    """The group of the first `size` ranks; None in the others."""
    made = dist.new_group(list(range(size)))
    return groups.join(made) if dist.get_rank() < size else None


def compiled(model: nn.Module, group: groups.Group, dynamic: bool | None = None, **options: Any) -> Any:
    ensure_registered()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"inner": "aot_eager", "ep_group": group.process_group, "ep_capacity": CAPACITY, **options}
    return torch.compile(model, backend="dsinfra", options=settings, dynamic=dynamic, fullgraph=True)


def summed(gradient: torch.Tensor, group: groups.Group) -> torch.Tensor:
    dist.all_reduce(gradient, group=group.process_group)
    return gradient


def spread_layers() -> list[Any]:
    """Sites of the last graph that was compiled."""
    return [site for site in report.reports()[-1].sites if site.kind == "expert_parallel"]


def off(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors beyond the bar; a gradient that is zero in theory is measured against the largest."""
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    errors = {n: float((actual[n] - want).norm()) / max(float(want.norm()), floor) for n, want in expected.items()}
    return {name: error for name, error in errors.items() if not error <= 1e-5}


def check_model(
    rank: int, size: int, model_type: str, shapes: tuple[tuple[int, int], ...], overrides: dict[str, Any]
) -> list[str]:
    """Outputs and gradients of a replicated model are those without expert parallelism; -> its decisions."""
    group = group_of(size)
    if group is None:
        return []
    model = build_model(model_type, **overrides)
    call, ids = compiled(model, group), tokens(*shapes[rank], seed=rank + 50)
    expected, grads = step(model, model, ids), step(model, call, ids)
    sites = spread_layers()
    assert [site.matched for site in sites] == [True] * overrides["num_hidden_layers"], [s.reason for s in sites]
    for name in expected:
        if is_expert(name):
            expected[name], grads[name] = summed(expected[name], group), summed(grads[name], group)
    wrong = off(grads, expected)
    assert not wrong, f"relative errors beyond the bar: {wrong}"
    return [site.decision for site in sites]


@torch.no_grad()
def check_fp8(rank: int, kind: str) -> list[list[str]]:
    """A layer of deepseek_v3 in FP8 gives the same bits whether it quantises in front of the dispatch or behind it.

    kind: "checkpoint", "stored" (in an ExpertStore), or "asked for". -> what the sites of both say."""
    group = group_of(2)
    if group is None:
        return []
    hf_fp8.install()
    micro = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    whole, twin = fp8.hf_pair(**micro)
    layer = (twin.bfloat16() if kind == "asked for" else whole).model.layers[0].mlp
    options = {"fp8": "block"} if kind == "asked for" else {}
    x = torch.randn(1, 5 - 2 * rank, 256, generator=torch.Generator().manual_seed(rank)).bfloat16()
    results = [layer(x)]
    if kind == "stored":
        ExpertStore(layer, group.process_group)
    told: list[list[str]] = []
    for run in (fp8_dispatch.run, lambda *_: PassRecord(fp8_dispatch.NAME)):
        with mock.patch.object(fp8_dispatch, "run", run):
            results.append(compiled(layer, group, **options)(x))
        last = report.reports()[-1]
        assert not last.error and "gather_experts" not in last.op_counts, last
        told.append([f"{s.kind}: {s.decision}" for s in last.sites if s.kind in ("expert_parallel", fp8_dispatch.NAME)])
    assert torch.equal(results[1], results[2]), "quantised behind the dispatch, it has other bits"
    bar = 0.08 if kind == "asked for" else 0.02  # uncompiled, that one computes in 16 bits
    assert relative(results[1], results[0]) < bar, "other numbers than on one rank"
    return told


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def step(model: nn.Module, call: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter for a loss that is a sum over tokens."""
    model.zero_grad()
    logits = call(ids, use_cache=False).logits
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def is_expert(name: str) -> bool:
    return ".experts." in name


# ------------------------------------------------------------------ toys, in float64


def check_lengths(rank: int, size: int) -> int:
    """One dynamic graph for every number of tokens, another on each rank, and one for a rank without any."""
    group = group_of(size)
    if group is None:
        return 0
    model = toy.build(2)
    call = compiled(model, group, dynamic=True, ep_capacity=24)
    with torch.no_grad():
        for turn, empty in enumerate((False, False, False, rank == 1, False)):
            x = toy.rows(10 * turn + rank, 2, 0 if empty else 3 + 2 * turn + rank)
            torch.testing.assert_close(call(x), model(x), rtol=1e-11, atol=1e-11)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_empty_training(rank: int, size: int) -> None:
    """A rank without tokens takes part in a step: its own experts get the gradient of everybody's tokens."""
    group = group_of(size)
    if group is None:
        return
    model = toy.build(1)
    x = toy.rows(rank, 0 if rank == 0 else 2, 3)
    expected, grads = toy_step(model, model, x), toy_step(model, compiled(model, group, ep_capacity=6), x)
    for name in ("layers.0.w_gate_up", "layers.0.w_down"):
        if rank == 0:
            assert grads[name][: 8 // size].any() and not grads[name][8 // size :].any()
        expected[name], grads[name] = summed(expected[name], group), summed(grads[name], group)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-11, atol=1e-11)


def toy_step(model: nn.Module, call: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    call(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check_store(rank: int, folder: str) -> dict[str, Any]:
    """A model on the meta device: own rows from a file, a step of training, the whole state dict again."""
    from safetensors.torch import save_file

    group = group_of(4)
    assert group is not None
    whole = toy.build(2)
    path = f"{folder}/rank{rank}.safetensors"
    save_file(whole.state_dict(), path)
    with torch.device("meta"):
        model = toy.Stack(2).double()
    held = model.layers[0].w_down
    store = ExpertStore(model, group.process_group)
    store.load(path, device="cpu")
    found = {"shapes": [list(p.shape) for p in store.parameters()], "weights": dict(store.weights)}
    found["local"] = sum(p.untyped_storage().nbytes() for p in store.parameters())
    for name, value in store.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    x = toy.rows(rank, 1, 2 + rank)
    call = compiled(model, group, ep_capacity=8)
    y, expected = call(x), whole(x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)  # uncompiled: gathers the weights
    y.square().sum().backward()
    expected.square().sum().backward()
    for own, name in zip(store.parameters(), store.weights, strict=True):
        total = summed(whole.get_parameter(name).grad, group)
        torch.testing.assert_close(own.grad, total[2 * rank : 2 * rank + 2], rtol=1e-10, atol=1e-10)
    found["decisions"] = [site.decision for site in spread_layers()]
    found["ops"] = report.reports()[-1].op_counts
    return found | {"meta": held.is_meta}


def check_store_of_a_whole_model(rank: int) -> tuple[int, int]:
    """Weights that every rank has whole: memory of the others' experts is given back, optimizers go on."""
    group = group_of(2)
    if group is None:
        return 0, 0
    model, whole = toy.build(1), toy.build(1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    before = sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if "w_" in n)
    store = ExpertStore(model, group.process_group)
    after = sum(p.untyped_storage().nbytes() for p in store.parameters())
    call = compiled(model, group, ep_capacity=8)
    xs = [toy.rows(r, 1, 4) for r in range(2)]
    call(xs[rank]).square().sum().backward()
    sum(whole(x).square().sum() for x in xs).backward()
    own = {id(p) for p in store.parameters()}
    for p in model.parameters():
        if id(p) not in own:
            summed(p.grad, group)
    for optimizer in optimizers:
        optimizer.step()
    for name, value in store.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-10, atol=1e-10)
    return before, after
