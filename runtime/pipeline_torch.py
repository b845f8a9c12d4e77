"""DualPipeV by torch.distributed.pipelining: its schedule, order and transfers, our stages in its custom functions.

torch's ``ScheduleDualPipeV`` decides what runs when and moves the tensors; F, B, I, W and F&B are registered with
``register_custom_function``, so that an F&B is one woven graph where torch's own runtime does one after the other.
torch's stages are only the ends of its transfers here: they are given shapes and never run a module.

What is touched beyond the documented names are fields of its stages and of its schedule (``args_recv_info``,
``grad_recv_info``, ``fwd_cache``, ``bwd_cache``, ``fwd_recv_ops``, ``bwd_recv_ops``), all of them in this file, as in
torch 2.13. Refused: what ``Pipeline`` refuses, and inference, which torch's schedule doesn't have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV
from torch.distributed.pipelining import schedules as theirs

from dscompile.runtime.pipeline import Key, Loss, Pipeline, Run
from dscompile.runtime.pipeline_stage import Stage
from dscompile.runtime.schedules import Op, Pair, dualpipev

_KINDS = {
    theirs.FORWARD: "F",
    theirs.FULL_BACKWARD: "B",
    theirs.BACKWARD_INPUT: "I",
    theirs.BACKWARD_WEIGHT: "W",
}


class TorchDualPipeV(Pipeline):
    """As ``Pipeline`` with ``dualpipev``, for training, run by torch."""

    def __init__(
        self, stages: Mapping[int, Stage], micro_batches: int, loss: Loss, group: dist.ProcessGroup | None = None
    ):
        size = dist.get_world_size(group)
        super().__init__(dualpipev(size, micro_batches), stages, loss, group)
        self._made: dict[tuple, tuple[ScheduleDualPipeV, list[PipelineStage]]] = {}  # by shape of a micro-batch
        self._inside: _Inside | None = None

    def run(self, run: Run) -> None:
        if run.targets is None:
            super().run(run)
            return
        key = (run.micros[0].shape, run.micros[0].dtype)
        if key not in self._made:
            self._made[key] = self._make(run)
        schedule, ends = self._made[key]
        self._inside = _Inside(self, run.micros, run.targets, schedule, ends)
        batch = [torch.cat(run.micros)] if self.rank == self.schedule.place[0, 0] else []
        schedule.step(*batch, target=torch.cat(run.targets), return_outputs=False)
        run.losses.update(self._inside.losses)
        self._inside = None

    def _make(self, run: Run) -> tuple[ScheduleDualPipeV, list[PipelineStage]]:
        x = torch.empty_like(run.micros[0], device="meta")
        between = torch.empty(run.shape, dtype=run.dtype, device="meta", requires_grad=True)
        ends = [
            PipelineStage(
                nn.Identity(),
                i,
                self.schedule.stages,
                run.micros[0].device,
                input_args=between if i else x,
                output_args=between,
                group=self.group,
            )
            for i in sorted(self.stages)
        ]
        schedule = ScheduleDualPipeV(ends, self.schedule.micro_batches, loss_fn=self.loss, scale_grads=False)

        def compute(action: Any, context: Any) -> None:
            assert self._inside is not None
            self._inside.do(_ours(action))

        for kind in (*_KINDS, theirs.OVERLAP_F_B):
            schedule.register_custom_function(kind, compute)
        schedule.register_custom_function(theirs.REDUCE_GRAD, lambda action, context: None)  # step() adds them up
        return schedule, ends


class _Inside(Run):
    """A run whose tensors come from and go to torch's stages."""

    def __init__(
        self,
        pipeline: Pipeline,
        micros: list[Tensor],
        targets: list[Tensor],
        schedule: ScheduleDualPipeV,
        ends: Sequence[PipelineStage],
    ):
        super().__init__(pipeline, micros, targets)
        self.schedule = schedule
        self.ends = {end.stage_index: end for end in ends}

    def take(self, key: Key) -> Tensor:
        forward, s, m = key
        if key in self.ready:  # the loss's gradient
            return self.ready.pop(key)
        to = s + 1 if forward else s - 1
        if s not in self.ends:
            arriving = self.schedule.fwd_recv_ops if forward else self.schedule.bwd_recv_ops
            for work in arriving.pop((to, m)):
                work.wait()
        info = (self.ends[to].args_recv_info if forward else self.ends[to].grad_recv_info)[m]
        return info[0].buffer

    def keep(self, key: Key, tensor: Tensor) -> None:
        self.check(key, tensor)
        forward, s, m = key
        end = self.ends[s]
        tensor = tensor.contiguous()
        if forward:
            end.fwd_cache[m] = (tensor,), ()
            if s + 1 in self.ends:
                self.ends[s + 1].set_local_fwd_input((tensor,), m)
        else:
            end.bwd_cache[m] = (tensor,)
            if s - 1 in self.ends:
                self.ends[s - 1].set_local_bwd_input(end.get_local_bwd_output(m), m)


def _ours(action: Any) -> Op | Pair:
    if action.computation_type == theirs.OVERLAP_F_B:
        forward, backward = map(_ours, action.sub_actions)
        return Pair(forward, backward)  # type: ignore[arg-type]
    return Op(_KINDS[action.computation_type], action.stage_index, action.microbatch_index)
