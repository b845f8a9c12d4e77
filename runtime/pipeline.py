"""Runs a pipeline schedule: one process a rank, each computing its own list of actions and handing on what others need.

    Pipeline(dualpipe(R, M), {stage index: Stage}, loss).step(batch, targets)

A step is what one process with the whole model would do: the mean of the micro-batches' losses, and its gradient added
to ``.grad`` of each weight. Where a schedule keeps a stage on two ranks (DualPipe), both get the sum of their halves.
What lies between two stages is one tensor of one shape and dtype; it is asked of stage 0 when a batch of a new shape
comes. Transfers are point to point, in an order that can't deadlock (``schedules.with_transfers``).

Refused: batches that don't divide into the schedule's micro-batches, micro-batches of different shapes, stages whose
outputs differ in shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile.runtime.pipeline_stage import Stage
from dscompile.runtime.schedules import Op, Pair, Schedule, Transfer, check, with_transfers

Loss = Callable[[Tensor, Tensor], Tensor]  # (output of the last stage, target), of one micro-batch -> 0-d
Key = tuple[bool, int, int]  # (forward?, stage, micro-batch): one tensor that passes between stages


class PipelineError(ValueError):
    """A pipeline was given what it can't run."""


class Pipeline:
    """A schedule with the stages of this rank.

    Args:
        schedule: one action list a rank of ``group``.
        stages: by index, those that ``schedule.held(rank)`` names.
        loss: needed for ``step``.
        group: None: the default group.

    Raises:
        PipelineError: the group has another size, or other stages were given.
        ScheduleError: the schedule isn't valid.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        loss: Loss | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.group = group or dist.group.WORLD
        self.rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if size != len(schedule.ranks):
            raise PipelineError(
                f"{schedule.name} for {len(schedule.ranks)} ranks in a group of {size}. Each rank has a list of its "
                f"own. Make the schedule for {size} ranks."
            )
        if sorted(stages) != schedule.held(self.rank):
            raise PipelineError(
                f"rank {self.rank} was given stages {sorted(stages)}. {schedule.name} computes "
                f"{schedule.held(self.rank)} of {schedule.stages} on it. Give it these."
            )
        check(schedule)
        self.schedule, self.stages, self.loss = schedule, dict(stages), loss
        self._lists = {
            training: with_transfers(schedule if training else schedule.forward_only())[self.rank]
            for training in (True, False)
        }
        self._between: dict[tuple, tuple[torch.Size, torch.dtype]] = {}

    def step(self, batch: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> Tensor:
        """One step of training; -> the micro-batches' losses [M] float64, on every rank.

        Every rank gives the same batch: a tensor that is split along its first dimension, or the M micro-batches.

        Raises:
            PipelineError: no loss was given; micro-batches differ in shape or number.
        """
        if self.loss is None:
            raise PipelineError("step() needs a loss, and none was given. Give Pipeline(loss=...), or call forward().")
        micros, wanted = self._split(batch, "batch"), self._split(targets, "targets")
        for stage in self.stages.values():
            stage.clear()
        run = Run(self, micros, wanted)
        self.run(run)
        self._sum_copies()
        for stage in self.stages.values():
            for p, grad in stage.gradients.items():
                p.grad = grad if p.grad is None else p.grad + grad
            stage.clear()
        losses = torch.zeros(len(micros), dtype=torch.float64, device=micros[0].device)
        for m, value in run.losses.items():
            losses[m] = value
        dist.all_reduce(losses, group=self.group)
        return losses

    def forward(self, batch: Tensor | Sequence[Tensor]) -> dict[int, Tensor]:
        """Outputs by micro-batch, of those whose last stage is on this rank. Raises as ``step``."""
        run = Run(self, self._split(batch, "batch"), None)
        self.run(run)
        return run.outputs

    def run(self, run: Run) -> None:
        """This rank's part of a pass."""
        run.all(self._lists[run.targets is not None])

    def _split(self, batch: Tensor | Sequence[Tensor], what: str) -> list[Tensor]:
        count = self.schedule.micro_batches
        if isinstance(batch, Tensor):
            if not batch.dim() or batch.shape[0] % count or not batch.shape[0]:
                raise PipelineError(
                    f"{what} {list(batch.shape)} for {count} micro-batches. They are equal parts of its first "
                    f"dimension. Give a multiple of {count} rows."
                )
            return list(batch.chunk(count))
        if len(batch) != count:
            raise PipelineError(
                f"{len(batch)} micro-batches as {what}. {self.schedule.name} was made for {count}. Give {count}."
            )
        for m, one in enumerate(batch):
            if one.shape != batch[0].shape or one.dtype != batch[0].dtype:
                raise PipelineError(
                    f"{what}: micro-batch {m} is {list(one.shape)} {one.dtype}, the first {list(batch[0].shape)} "
                    f"{batch[0].dtype}. Ranks receive into tensors whose shape they know before. Pad them to one shape."
                )
        return list(batch)

    def between(self, x: Tensor) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of what stage 0 makes of a micro-batch like ``x``: its rank tries it once, all are told."""
        key = (x.shape, x.dtype)
        if key not in self._between and self.schedule.stages > 1:
            owner = self.schedule.place[0, 0]
            said: list = [None]
            if self.rank == owner:
                try:
                    y = self.stages[0].infer(x)
                    said = [(y.shape, y.dtype)]
                except Exception as error:
                    said = [f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(said, dist.get_global_rank(self.group, owner), self.group)
            if isinstance(said[0], str):
                raise PipelineError(
                    f"stage 0 can't run a micro-batch of {list(x.shape)} {x.dtype} on rank {owner}: {said[0]}. All "
                    "ranks stop here, or they would wait for it. Give a batch that the model takes."
                )
            self._between[key] = said[0]
        return self._between.get(key, (x.shape, x.dtype))

    def _sum_copies(self) -> None:
        """Gradients of a stage that two ranks hold: each sends its own to the other and adds, first rank's first."""
        wanted: list[tuple[Stage, torch.nn.Parameter, int, Tensor]] = []
        sends: list[dist.P2POp] = []
        for s, stage in sorted(self.stages.items()):
            for peer in {r for (t, _), r in self.schedule.place.items() if t == s} - {self.rank}:
                for p in stage.weights:
                    own = stage.gradients.setdefault(p, torch.zeros_like(p)).contiguous()
                    wanted.append((stage, p, peer, torch.empty_like(own)))
                    sends.append(dist.P2POp(dist.isend, own, group=self.group, group_peer=peer))
        recvs = [dist.P2POp(dist.irecv, into, group=self.group, group_peer=peer) for _, _, peer, into in wanted]
        works = dist.batch_isend_irecv([*sends, *recvs]) if sends else []
        for work in works:
            work.wait()
        for stage, p, peer, other in wanted:
            own = stage.gradients[p]
            stage.gradients[p] = own + other if self.rank < peer else other + own


class Run:
    """One pass through a rank's list.

    ``ready`` holds tensors made here or received that an action has yet to take, ``coming`` those still on their way.
    """

    def __init__(self, pipeline: Pipeline, micros: list[Tensor], targets: list[Tensor] | None):
        self.pipeline, self.micros, self.targets = pipeline, micros, targets
        self.last = pipeline.schedule.stages - 1
        self.shape, self.dtype = pipeline.between(micros[0])
        self.ready: dict[Key, Tensor] = {}
        self.coming: dict[Key, tuple[Tensor, list[dist.Work]]] = {}
        self.sent: list[tuple[Tensor, list[dist.Work]]] = []  # kept until they have left
        self.losses: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def all(self, actions: Sequence[Op | Pair | Transfer]) -> None:
        for action in actions:
            if isinstance(action, Transfer):
                self._transfer(action)
            else:
                self.do(action)
        for _, works in self.sent:
            for work in works:
                work.wait()

    def do(self, action: Op | Pair) -> None:
        if isinstance(action, Pair):
            self._pair(action)
        else:
            self._compute(action)

    def _compute(self, op: Op) -> None:
        stage = self.pipeline.stages[op.stage]
        if op.kind == "F":
            x = self._input(op)
            self._forwarded(op, stage.infer(x) if self.targets is None else stage.forward(op.micro, x))
        elif op.kind == "W":
            stage.backward_weight(op.micro)
        else:
            step = stage.backward if op.kind == "B" else stage.backward_input
            self._backwarded(op, step(op.micro, self._gradient(op)))

    def _pair(self, pair: Pair) -> None:
        f, b = pair
        x, dy = self._input(f), self._gradient(b)
        stages = self.pipeline.stages
        y, dx = stages[f.stage].overlapped(f.micro, x, stages[b.stage], b.micro, dy)
        self._backwarded(b, dx)
        self._forwarded(f, y)

    def _input(self, op: Op) -> Tensor:
        return self.take((True, op.stage - 1, op.micro)) if op.stage else self.micros[op.micro]

    def _gradient(self, op: Op) -> Tensor:
        return self.take((False, op.stage + 1, op.micro))

    def _forwarded(self, op: Op, y: Tensor) -> None:
        if op.stage < self.last:
            self.keep((True, op.stage, op.micro), y)
        elif self.targets is None:
            self.outputs[op.micro] = y
        else:  # the loss stands where a next stage would, and gives its gradient at once
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                loss = self.pipeline.loss(y, self.targets[op.micro])  # type: ignore[misc]
            (dy,) = torch.autograd.grad(loss / len(self.micros), y)
            self.losses[op.micro] = loss.detach()
            self.ready[False, op.stage + 1, op.micro] = dy

    def _backwarded(self, op: Op, dx: Tensor | None) -> None:
        if op.stage:
            assert dx is not None, f"{op}: hidden states are differentiable"
            self.keep((False, op.stage, op.micro), dx)

    def check(self, key: Key, tensor: Tensor) -> None:
        if (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            raise PipelineError(
                f"stage {key[1]} gave {list(tensor.shape)} {tensor.dtype}, stage 0 {list(self.shape)} {self.dtype}. "
                "Ranks receive into tensors of one shape. Cut where the hidden states have one shape and dtype."
            )

    def keep(self, key: Key, tensor: Tensor) -> None:
        """For whoever takes it: another stage of this rank, or a transfer."""
        self.check(key, tensor)
        self.ready[key] = tensor

    def take(self, key: Key) -> Tensor:
        """What another stage kept, here or on another rank."""
        if key in self.coming:
            tensor, works = self.coming.pop(key)
            for work in works:
                work.wait()
            return tensor
        return self.ready.pop(key)

    def _transfer(self, transfer: Transfer) -> None:
        op, group = transfer.op, self.pipeline.group
        key = (op.kind == "F", op.stage, op.micro)
        if transfer.kind == "recv":
            tensor = torch.empty(self.shape, dtype=self.dtype, device=self.micros[0].device)
            self.coming[key] = tensor, _start(dist.irecv, tensor, group, transfer.peer)
        else:
            self.sent = [(t, works) for t, works in self.sent if not all(work.is_completed() for work in works)]
            tensor = self.ready.pop(key).contiguous()
            self.sent.append((tensor, _start(dist.isend, tensor, group, transfer.peer)))


def _start(kind: Callable, tensor: Tensor, group: dist.ProcessGroup, peer: int) -> list[dist.Work]:
    return dist.batch_isend_irecv([dist.P2POp(kind, tensor, group=group, group_peer=peer)])
