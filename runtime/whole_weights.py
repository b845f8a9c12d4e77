"""`dsinfra::gather_experts` and `reduce_experts`: weights of all ranks' experts, from each rank's own, and back.

    gather_experts:  own [L,...] of each rank  ->  [E,...] on every rank, E = W*L, rank w's from w*L on
    reduce_experts:  [E,...] of each rank  ->  [L,...], the sum over ranks of the own rows, in float32, in their order

Each is the other's gradient. They stand where a model reads weights that an ``ExpertStore`` has spread; a compiled
layer that was spread reads its own and has no use for them. Gathering moves every weight in each call: right, and slow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile.runtime import groups
from dscompile.runtime.groups import GroupError


@torch.library.custom_op("dsinfra::gather_experts", mutates_args=())
def gather_experts(own: Tensor, group: str, num_experts: int) -> Tensor:
    """-> [E,...]; raises GroupError where L of each rank are not E, RankLost where a rank doesn't come."""
    _check(own, group, num_experts)
    found = groups.get(group)
    spec = {"experts": num_experts, "weight": str([*own.shape]), "dtype": str(own.dtype)}
    found.enter("gather_experts", spec)
    own = own.contiguous()
    if found.size == 1:
        return own.clone()
    whole = own.new_empty(num_experts, *own.shape[1:])
    try:
        dist.all_gather(list(whole.chunk(found.size)), own, group=found.process_group)
    except RuntimeError as error:
        raise found.lost("gather_experts", error) from None
    return whole


@gather_experts.register_fake
def _(own: Tensor, group: str, num_experts: int) -> Tensor:
    _check(own, group, num_experts)
    return own.new_empty(num_experts, *own.shape[1:])


@torch.library.custom_op("dsinfra::reduce_experts", mutates_args=())
def reduce_experts(whole: Tensor, group: str) -> Tensor:
    """-> [L,...]; raises RankLost where a rank doesn't come."""
    found = groups.get(group)
    found.enter("reduce_experts", {"gradient": str([*whole.shape]), "dtype": str(whole.dtype)})
    parts = whole.contiguous()
    if found.size > 1:
        received = torch.empty_like(parts)
        try:
            dist.all_to_all_single(received, parts, group=found.process_group)
        except RuntimeError as error:
            raise found.lost("reduce_experts", error) from None
        parts = received
    wide = torch.float64 if whole.dtype is torch.float64 else torch.float32
    total = parts.new_zeros(whole.shape[0] // found.size, *whole.shape[1:], dtype=wide)
    for part in parts.chunk(found.size):
        total = total + part.to(wide)
    return total.to(whole.dtype)


@reduce_experts.register_fake
def _(whole: Tensor, group: str) -> Tensor:
    return whole.new_empty(whole.shape[0] // groups.get(group).size, *whole.shape[1:])


def _check(own: Tensor, group: str, num_experts: int) -> None:
    W = groups.get(group).size
    if own.dim() < 1 or own.shape[0] * W != num_experts:
        raise GroupError(
            f"gather_experts: own {list(own.shape)} on each of {W} ranks, of {num_experts} experts. Each rank holds "
            f"equally many. Give [{num_experts // W}, ...], if the group is right."
        )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, grad_whole: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.dsinfra.reduce_experts.default(grad_whole, ctx.group), None, None


gather_experts.register_autograd(_backward, setup_context=_setup)
