"""Mixtures of experts around their grouped GEMMs: plan of a stable sort by expert, gather, weighted combine.

A row is a pair (token t, choice k), numbered i = t K + k. `plan` sorts rows by expert, `gather_rows` writes each
token's vector to the sorted places of its rows, and after the GEMMs `combine` adds each token's rows up. At decode
`plan_and_gather` and `plan_and_gather_quantize` do the first two in one launch. Everything stays on the device, with
the shapes known on the host: no synchronisation, no padding, safe in a CUDA graph; results are bitwise repeatable.
kernels/moe_triton.py says how. An id outside [0, E), such as a sentinel of expert parallelism, has a sorted place
behind all experts, belongs to none of them and contributes nothing.
"""

from __future__ import annotations

import torch

from dscompile.kernels import quantize
from dscompile.kernels.moe_launch import launch_combine, launch_gather, plan_in_one, plan_in_three
from dscompile.kernels.quantize import check_plan
from dscompile.kernels.refusals import BadArguments, device_refusal, refuse_if

# Rows up to which one launch, whose every program reads all ids, is faster than three. On an H100 (torch 2.11, Triton
# 3.6), the plan of 2048 takes 4.4 us instead of 8.6, that of 4096 10.7 instead of 8.9; with 7168 columns 27.5, not 33.
FEW_ROWS = 2048
FEW_ROWS_TO_MOVE = 4096
_MOST_EXPERTS = 4096


def plan(topk_idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """topk_idx int64 or int32 [T, K] -> order int32 [T * K], position int32 [T, K], ends int32 [E].

    order[p] is the row at sorted place p, position its inverse, and ends[e] the number of rows of experts 0 to e: those
    of expert e lie at ends[e - 1] .. ends[e]. Rows of one expert keep their order.

    Raises:
        BadArguments: topk_idx is no matrix of integers, or experts below 1.
        KernelLimit: no Triton or no CUDA device.
    """
    _check_ids(topk_idx, experts)
    refuse_if(device_refusal("topk_idx", topk_idx, integers=True))
    if topk_idx.numel() <= FEW_ROWS:
        return plan_in_one(topk_idx, experts)[:3]
    return plan_in_three(topk_idx, experts)


def plan_and_gather(
    x: torch.Tensor, topk_idx: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`plan` and `gather_rows`, in one launch where rows are few -> rows [T * K, D], order, position, ends.

    Raises:
        BadArguments, KernelLimit: as these two.
    """
    _check_ids(topk_idx, experts)
    _check_rows(x, topk_idx)
    refuse_if(device_refusal("x", x))
    if topk_idx.numel() <= FEW_ROWS_TO_MOVE:
        order, position, ends, rows, _ = plan_in_one(topk_idx, experts, x)
    else:
        order, position, ends = plan_in_three(topk_idx, experts)
        rows = gather_rows(x, order, topk_idx.shape[1], position)
    return rows, order, position, ends


def plan_and_gather_quantize(
    x: torch.Tensor, topk_idx: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`plan` and `quantize.gather_quantize_1x128`, in one launch where rows are few -> q, scale, order, position, ends.

    Raises:
        BadArguments, KernelLimit: as these two.
    """
    _check_ids(topk_idx, experts)
    _check_rows(x, topk_idx)
    refuse_if(quantize.refusal(x))
    if topk_idx.numel() <= FEW_ROWS_TO_MOVE:
        order, position, ends, q, scale = plan_in_one(topk_idx, experts, x, quantized=True)
    else:
        order, position, ends = plan_in_three(topk_idx, experts)
        q, scale = quantize.gather_quantize_1x128(x, order, topk_idx.shape[1], position)
    return q, scale, order, position, ends


def gather_rows(x: torch.Tensor, order: torch.Tensor, top_k: int, position: torch.Tensor | None = None) -> torch.Tensor:
    """x[order // top_k] of x [T, D] -> [T * top_k, D], contiguous.

    Args:
        x: bfloat16, float16 or float32; columns contiguous, or it is copied.
        order, position: of `plan`. With position each token is read once, without once for each of its places.
        top_k: places of a token.

    Raises:
        BadArguments: x is no matrix, or order or position don't fit it.
        KernelLimit: no Triton, no CUDA device, or another dtype.
    """
    if x.dim() != 2:
        raise BadArguments(f"x is {tuple(x.shape)}. Its rows are gathered. Pass [T, D].")
    check_plan(x, order, top_k, position)
    refuse_if(device_refusal("x", x))
    return launch_gather(x, order, position, top_k)[0]


def combine(
    z: torch.Tensor,
    position: torch.Tensor,
    topk_weight: torch.Tensor | None,
    topk_idx: torch.Tensor,
    experts: int,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t] = sum over k of topk_weight[t, k] * z[position[t, k]] -> [T, D] in out_dtype, by default z's.

    Args:
        z: [T * K, D] bfloat16, float16 or float32, columns contiguous, in sorted places. Rows whose id is outside
            [0, E) are not read: they may be NaN.
        position: int32 [T, K], of `plan`.
        topk_weight: [T, K] bfloat16, float16 or float32; None for weights of 1.
        topk_idx: the ids that were planned.
        experts: E.
        out_dtype: bfloat16, float16 or float32.
        bias: [E, D] in one of these; its expert's row is added to each row of z first, rounded to z's dtype.

    Summed in float32 in the order of k and rounded once.

    Raises:
        BadArguments: shapes or dtypes that don't fit together.
        KernelLimit: no Triton, no CUDA device, or another dtype.
    """
    _check_ids(topk_idx, experts)
    _check_combine(z, position, topk_weight, topk_idx, bias, experts)
    y = torch.empty((topk_idx.shape[0], z.shape[1]), dtype=out_dtype or z.dtype, device=z.device)
    for name, x in (("z", z), ("topk_weight", topk_weight), ("bias", bias), ("y", y)):
        refuse_if(None if x is None else device_refusal(name, x))
    launch_combine(z, position, topk_weight, topk_idx, experts, bias, y)
    return y


def _check_ids(topk_idx: torch.Tensor, experts: int) -> None:
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int64, torch.int32):
        raise BadArguments(
            f"topk_idx is {topk_idx.dtype} {tuple(topk_idx.shape)}. It holds the experts of each token. Pass int64 or "
            "int32 [T, K]."
        )
    if not 1 <= experts <= _MOST_EXPERTS:
        raise BadArguments(f"experts is {experts}. Blocks of rows hold a count for each. Use 1 to {_MOST_EXPERTS}.")


def _check_rows(x: torch.Tensor, topk_idx: torch.Tensor) -> None:
    if x.dim() != 2 or x.shape[0] != topk_idx.shape[0] or x.device != topk_idx.device:
        raise BadArguments(
            f"x is {tuple(x.shape)} on {x.device}, topk_idx {tuple(topk_idx.shape)} on {topk_idx.device}. Row t of "
            "both is token t. Pass [T, D] and [T, K] on one device."
        )


def _check_combine(
    z: torch.Tensor,
    position: torch.Tensor,
    topk_weight: torch.Tensor | None,
    topk_idx: torch.Tensor,
    bias: torch.Tensor | None,
    experts: int,
) -> None:
    tensors = {"z": z, "position": position, "topk_idx": topk_idx}
    if topk_weight is not None:
        tensors["topk_weight"] = topk_weight
    shapes = [x.shape for name, x in tensors.items() if name != "z"]
    if z.dim() != 2 or z.shape[0] != topk_idx.numel() or any(shape != topk_idx.shape for shape in shapes):
        raise BadArguments(
            f"{', '.join(f'{name} is {tuple(x.shape)}' for name, x in tensors.items())}. There is one row of z for "
            "each choice of a token. Pass z [T * K, D] and the others [T, K]."
        )
    if position.dtype != torch.int32 or not position.is_contiguous():
        raise BadArguments(
            f"position is {position.dtype} with strides {position.stride()}. It is read as `plan` gives it. Pass "
            "contiguous int32."
        )
    if bias is not None:
        tensors["bias"] = bias
        if bias.shape != (experts, z.shape[1]):
            raise BadArguments(
                f"bias is {tuple(bias.shape)} for z {tuple(z.shape)} of {experts} experts. It has a row an "
                f"expert. Pass [{experts}, {z.shape[1]}]."
            )
    if any(x.device != z.device for x in tensors.values()):
        raise BadArguments(
            f"Tensors are on {sorted({str(x.device) for x in tensors.values()})}. One kernel reads them all. Move "
            "them to one device."
        )
