"""An exchange on a slot of an arena, with its tensors: what the operators of expert parallelism call on GPUs.

    dispatch_start -> dispatch_wait -> (experts) -> combine_start -> combine_wait

or `dispatch` and `combine`, which put each pair on the current stream so that the second kernel begins beside the
first. All enqueue and return; results are tensors of fixed sizes, so calls can be captured in CUDA graphs. Backward of
dispatch is combine by the same plan, backward of combine is dispatch of rows alone (`topk_idx` None).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dscompile.kernels import exchange_launch as kernels
from dscompile.kernels.exchange import LaunchShape, launch_shape
from dscompile.kernels.exchange_launch import Arrived, Plan
from dscompile.runtime.symmetric import Arena

__all__ = ["Arrived", "Exchange", "Plan", "plan_of"]


def plan_of(packed: torch.Tensor) -> Plan:
    """A plan whose parts lie in int32 [T + 1, W]: a row a token, then the counts."""
    return Plan(packed[:-1], packed[-1])


@dataclass(frozen=True)
class Exchange:
    """The exchange on slot `number` of an arena. sms: CTAs that send, None for the choice of `launch_shape`."""

    arena: Arena
    number: int
    sms: int | None = None

    def __post_init__(self) -> None:
        self.arena.check()

    @property
    def slot(self) -> kernels.Slot:
        return self.arena.slots[self.number]

    def shape(self, tokens: int) -> LaunchShape:
        return launch_shape(self.slot.spec, tokens, sms=self.sms)

    # Dispatch

    def dispatch_start(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weight: torch.Tensor | None,
        plan: Plan | None = None,
        *,
        scale: torch.Tensor | None = None,
    ) -> Plan:
        """Send x [T, D] to the ranks of its experts, T <= capacity. Returns the plan, `plan` where one is given.

        scale: of rows that are given quantised, float32 [D / 128, T_pad] as quantize_1x128 makes it.
        topk_idx [T, K] ids of all ranks' experts, -1 for none, topk_weight float32 [T, K]; both None, with a plan, to
        send rows alone. No kernel that starts early stands behind this.
        """
        finished = plan is not None
        plan = plan or self.empty_plan(len(x))
        self.send(x, topk_idx, topk_weight, plan, finished, scale)
        return plan

    def dispatch_wait(self, tokens: int, *, copies: bool, given: Arrived | None = None) -> Arrived:
        """Wait for all ranks' rows. tokens: T of this rank, by which the CTAs are chosen.

        copies: rows are a copy, and the stage is free; otherwise a view, valid until `combine_start` or `release`.
        given: what arrived when the same plan was used with ids, where rows came alone.
        """
        arrived = self.empty_arrived(copies=copies, given=given)
        self.receive(arrived, tokens, copies=copies, unpacks=given is None, overlapped=False)
        return arrived

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weight: torch.Tensor | None,
        *,
        copies: bool,
        plan: Plan | None = None,
        given: Arrived | None = None,
        scale: torch.Tensor | None = None,
    ) -> tuple[Plan, Arrived]:
        """Both, on the current stream, overlapped."""
        finished = plan is not None
        # Before the kernels: none of these may take memory that the sending kernel still reads.
        plan, arrived = plan or self.empty_plan(len(x)), self.empty_arrived(copies=copies, given=given)
        self.send(x, topk_idx, topk_weight, plan, finished, scale)
        self.receive(arrived, len(x), copies=copies, unpacks=given is None, overlapped=True)
        return plan, arrived

    def release(self) -> None:
        """Free the stage of a dispatch that was viewed and that no combine follows."""
        kernels.release(self.slot)

    # Combine

    def combine_start(
        self,
        y: torch.Tensor,
        arrived: Arrived,
        tokens: int,
        *,
        extra: torch.Tensor | None = None,
        frees_stage: bool = True,
    ) -> None:
        """Send rows of y [M, D] back to their tokens, and extra float32 [M, K] beside them.

        frees_stage: no kernel from here on reads what the slot's last dispatch brought; False where it is another
        exchange's and still viewed.
        """
        self.send_back(y, arrived.source_token, arrived.counts, tokens, extra=extra, frees_stage=frees_stage)

    def combine_wait(self, plan: Plan, *, extra: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y [T, D], for each token the sum of what the ranks sent back; extra_sum float32 [T, K] where asked for."""
        results = self.empty_results(plan, extra)
        self.sum(plan, *results, overlapped=False)
        return results

    def combine(
        self, y: torch.Tensor, arrived: Arrived, plan: Plan, *, extra: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both, on the current stream, overlapped."""
        results = self.empty_results(plan, extra is not None)
        self.combine_start(y, arrived, len(plan.place), extra=extra)
        self.sum(plan, *results, overlapped=True)
        return results

    # Tensors

    def empty_plan(self, tokens: int) -> Plan:
        return plan_of(torch.empty((tokens + 1, self.arena.world), dtype=torch.int32, device=self.slot.device))

    def empty_arrived(self, *, copies: bool, given: Arrived | None = None) -> Arrived:
        """Uninitialised, but for what is `given`."""
        spec, device = self.slot.spec, self.slot.device
        view = self.arena.stage_rows(self.number)
        rows = torch.empty_like(view) if copies else view
        scale = torch.empty((spec.blocks, spec.scale_rows), device=device) if spec.quantized else None
        counts = torch.empty(spec.world, dtype=torch.int32, device=device)
        if given is not None:
            return Arrived(rows, scale, given.ids, given.weights, given.source_token, counts)
        ids = torch.empty((spec.rows, spec.top_k), dtype=torch.int32, device=device)
        source_token = torch.empty(spec.rows, dtype=torch.int32, device=device)
        return Arrived(rows, scale, ids, torch.empty(ids.shape, device=device), source_token, counts)

    def empty_results(self, plan: Plan, extra: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        spec, tokens, device = self.slot.spec, len(plan.place), self.slot.device
        y = torch.empty((tokens, spec.width), dtype=getattr(torch, spec.dtype), device=device)
        return y, torch.empty((tokens, spec.top_k), device=device) if extra else None

    # Launches into what was allocated

    def send(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weight: torch.Tensor | None,
        plan: Plan,
        finished: bool,
        scale: torch.Tensor | None = None,
    ) -> None:
        """`dispatch_start` into a plan that was allocated. finished: it is made; otherwise it is filled."""
        shape = self.shape(len(x))
        planning = shape.fused and not finished
        before = not shape.fused and not finished
        if before:
            kernels.make_plan(self.slot, topk_idx, plan)
        kernels.dispatch_start(
            self.slot,
            x,
            plan,
            topk_idx,
            topk_weight,
            ctas=shape.send,
            scale=scale,
            planning=planning,
            overlapped=before,
        )

    def send_back(
        self,
        y: torch.Tensor,
        source_token: torch.Tensor,
        counts: torch.Tensor,
        tokens: int,
        *,
        extra: torch.Tensor | None,
        frees_stage: bool,
    ) -> None:
        """`combine_start` by what it reads of `Arrived`."""
        ways = self.shape(tokens)
        kernels.combine_start(
            self.slot,
            y,
            source_token,
            counts,
            ctas=ways.send,
            chunks=ways.chunks,
            extra=extra,
            frees_stage=frees_stage,
        )

    def receive(self, arrived: Arrived, tokens: int, *, copies: bool, unpacks: bool, overlapped: bool) -> None:
        """`dispatch_wait` into tensors that were allocated. unpacks: ids, weights and source_token are filled too."""
        ctas = self.shape(tokens).receive
        kernels.dispatch_wait(self.slot, arrived, ctas=ctas, copies=copies, unpacks=unpacks, overlapped=overlapped)

    def sum(self, plan: Plan, y: torch.Tensor, extra_sum: torch.Tensor | None, *, overlapped: bool) -> None:
        """`combine_wait` into tensors that were allocated."""
        shape = self.shape(len(plan.place))
        kernels.combine_wait(
            self.slot, plan, y, ctas=shape.receive, parts=shape.parts, extra_sum=extra_sum, overlapped=overlapped
        )
