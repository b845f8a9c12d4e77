"""What ranks run for `test_pipeline_gloo.py`: a pipeline's step beside the same step of one process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dscompile
from dscompile.runtime.pipeline import Pipeline
from dscompile.runtime.pipeline_stage import ModuleStage
from dscompile.runtime.pipeline_torch import TorchDualPipeV
from dscompile.runtime.schedules import SCHEDULES, one_f_one_b
from tests.zoo import hf

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
VOCABULARY = 128
MICRO = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": VOCABULARY}


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@functools.cache
def groups() -> dict[int, dist.ProcessGroup]:
    """The first one, two and four ranks; all ranks make all of them."""
    return {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}


def deepseek(layers: int, dtype: torch.dtype, stages: int) -> tuple[nn.Module, list[nn.Module]]:
    """A model and its stages; the grouped products of the default experts don't take float64."""
    model = hf.build_model("deepseek_v3", experts="batched_mm", num_hidden_layers=layers, **MICRO).to(dtype)
    return model, dscompile.pipeline_stages(model, stages)


class Block(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def toy(layers: int, dtype: torch.dtype, stages: int) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    parts: list[nn.Module] = [Block() for _ in range(stages)]
    parts[0] = nn.Sequential(nn.Embedding(VOCABULARY, 16), parts[0])
    parts[-1] = nn.Sequential(parts[-1], nn.Linear(16, VOCABULARY))
    whole = nn.Sequential(*parts).to(dtype)
    return whole, list(whole)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


Expected = tuple[list[Tensor], Tensor, dict[str, Tensor]]  # logits and losses of the micro-batches, gradients


def one_process(whole: nn.Module, micros: Sequence[Tensor]) -> Expected:
    """A step on one process."""
    logits = [logits_of(whole, ids) for ids in micros]
    losses = torch.stack([loss(y, ids) for y, ids in zip(logits, micros)])
    losses.mean().backward()
    grads = {name: p.grad for name, p in whole.named_parameters()}
    whole.zero_grad()
    return [y.detach() for y in logits], losses.detach(), grads


def check_step(
    rank: int, make: Any, name: str, size: int, micro_batches: int, layers: int, dtype: torch.dtype, kind: type
) -> int:
    """Two steps whose gradients add up, and inference between them; -> how many gradients were compared."""
    groups()
    if rank >= size:
        return 0
    schedule = SCHEDULES[name.removeprefix("torch ")](size, micro_batches)
    whole, stages = make(layers, dtype, schedule.stages)
    ids = hf.tokens(micro_batches, 5, seed=3, vocabulary=VOCABULARY)
    micros = ids.chunk(micro_batches)
    told: list[Any] = [one_process(whole, micros) if rank == 0 else None]
    dist.broadcast_object_list(told, 0, groups()[size])
    logits, losses, grads = told[0]

    mine = {i: kind(stages[i]) for i in schedule.held(rank)}
    if name.startswith("torch "):
        pipeline: Pipeline = TorchDualPipeV(mine, micro_batches, loss, groups()[size])
    else:
        pipeline = Pipeline(schedule, mine, loss, groups()[size])
    close = functools.partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for times in (1, 2):
        close(pipeline.step(ids, list(micros)).to(dtype), losses)
        compared = 0
        for i in mine:
            for key, p in stages[i].named_parameters():
                want = grads[key if make is deepseek else f"{i}.{key}"]
                close(p.grad / times, want, msg=lambda said, key=key: f"{key}: {said}")
                compared += 1
        if times == 1:
            found = pipeline.forward(ids)
            assert set(found) == {m for (s, m), r in schedule.place.items() if r == rank and s == schedule.stages - 1}
            for m, y in found.items():
                close(y, logits[m])
    assert not any(stage.gradients for stage in mine.values())
    return compared


def check_copies_are_equal(rank: int) -> bool:
    """Both copies of a stage get the same bits, so that they stay copies; also after a step of other lengths."""
    schedule = SCHEDULES["dualpipe"](4, 8)
    _, stages = toy(4, torch.float32, 4)
    pipeline = Pipeline(schedule, {i: ModuleStage(stages[i]) for i in schedule.held(rank)}, loss, groups()[4])
    for length in (5, 7):
        ids = hf.tokens(8, length, vocabulary=VOCABULARY)
        pipeline.step(ids, ids)
    own = torch.cat([p.grad.flatten() for i in sorted(pipeline.stages) for p in stages[i].parameters()])
    others: list[Any] = [None] * 4
    dist.all_gather_object(others, own)
    return torch.equal(others[rank], others[3 - rank])


def check_refusals(rank: int) -> list[str]:
    """What each rank of two is told."""
    groups()
    if rank >= 2:
        return []
    schedule = SCHEDULES["dualpipev"](2, 4)
    _, stages = toy(4, torch.float32, 4)
    held = {i: ModuleStage(stages[i]) for i in schedule.held(rank)}
    pipeline = Pipeline(schedule, held, loss, groups()[2])
    ids = hf.tokens(4, 5, vocabulary=VOCABULARY)
    said = []
    for call in (
        lambda: pipeline.step(ids[:3], ids),
        lambda: pipeline.step(list(ids[:3]), ids),
        lambda: pipeline.step([ids[:1], ids[1:2], ids[2:3, :4], ids[3:]], ids),
        lambda: Pipeline(schedule, held, group=groups()[2]).step(ids, ids),
        lambda: Pipeline(SCHEDULES["dualpipev"](4, 8), held, loss, groups()[2]),
        lambda: Pipeline(schedule, {}, loss, groups()[2]),
        lambda: pipeline.step(ids + VOCABULARY, ids),
    ):
        try:
            call()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def check_shapes(rank: int) -> str:
    """A stage in the middle that changes the width."""
    groups()
    if rank:
        return ""
    schedule = one_f_one_b(1, 2, 3)
    stages = toy(3, torch.float32, 3)[1]
    stages[1] = nn.Linear(16, 8)
    pipeline = Pipeline(schedule, {i: ModuleStage(stage) for i, stage in enumerate(stages)}, loss, groups()[1])
    ids = hf.tokens(2, 5, vocabulary=VOCABULARY)
    try:
        pipeline.step(ids, ids)
    except ValueError as error:
        return str(error)
    return ""
