"""Routers of mixtures of experts: the entry to the kernel, its limits, its launch.

From the logits of each token to the experts it goes to and their weights, in one launch for the forms that published
models use: softmax or sigmoid scores or logits, a bias that only counts for the choice, groups of experts of which
the best stay, renormalised and scaled weights. kernels/route_triton.py has the formula and how ties and NaN are
ordered. No host synchronisation and no state: safe in a CUDA graph. Results are bitwise repeatable.
"""

from __future__ import annotations

import torch

from dscompile.kernels.overlap import start_overlapped
from dscompile.kernels.refusals import BadArguments, device_refusal, refuse_if

SCORES = ("softmax", "sigmoid", "softmax_topk")
GROUP_SCORES = ("max", "top2", "max_zero", "top2_zero")
MAX_EXPERTS = 512
MAX_TOP_K = 32


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    score: str,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> topk_idx int64 [T, K], topk_weight float32 [T, K], both contiguous.

    Args:
        logits: bfloat16, float16 or float32; computed in float32.
        bias: [E] in one of these dtypes, added to the scores for the choice only, or None.
        top_k: K, experts of a token.
        score: "softmax" or "sigmoid" of the logits, or "softmax_topk": the best logits, softmax over the chosen.
        n_group: groups of E / n_group consecutive experts, of which the topk_group best stay in the running.
        topk_group: see n_group. It counts for nothing where n_group is 1.
        group_score: "max", the best choice of a group, or "top2", the sum of the two best. Experts of the other groups
            have a choice of -inf, or of 0 with "max_zero" and "top2_zero".
        renormalize: divide a token's weights by their sum + eps.
        eps: see renormalize.
        scale: multiplies the weights at the end.

    Weights are scores without the bias, in descending order of the choice; of equal choices the lowest expert is first,
    NaN before all. A row with a NaN gives NaN weights under "softmax"; under the others only where it was chosen.

    Raises:
        BadArguments: shapes, names or numbers that don't fit together.
        KernelLimit: `refusal(logits, top_k)`.
    """
    _check(logits, bias, top_k, score, n_group, topk_group, group_score)
    refuse_if(refusal(logits, top_k) or (device_refusal("bias", bias) if bias is not None else None))
    from dscompile.kernels.route_triton import route_kernel

    tokens, experts = logits.shape
    topk_idx = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    topk_weight = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if topk_idx.numel() == 0:
        return topk_idx, topk_weight
    start_overlapped(
        route_kernel,
        tokens,
        logits.device,
        logits if logits.stride(1) == 1 else logits.contiguous(),
        bias if bias is None or bias.stride(0) == 1 else bias.contiguous(),
        topk_idx,
        topk_weight,
        logits.stride(0) if logits.stride(1) == 1 else experts,
        float(eps),
        float(scale),
        EXPERTS=experts,
        K=top_k,
        SCORE=score,
        GROUPS=n_group,
        TOPK_GROUP=topk_group,
        GROUP_SCORE=group_score.removesuffix("_zero"),
        OTHERS_ZERO=group_score.endswith("_zero"),
        RENORMALIZE=renormalize,
        G=_power_of_two(n_group),
        S=_power_of_two(experts // n_group),
        K_PAD=_power_of_two(top_k),
        num_warps=1,
    )
    return topk_idx, topk_weight


def refusal(logits: torch.Tensor, top_k: int) -> str | None:
    """Why the kernel can't take these logits, or None. Reads metadata only."""
    found = device_refusal("logits", logits)
    if found:
        return found
    if logits.shape[-1] > MAX_EXPERTS or top_k > MAX_TOP_K:
        return (
            f"{top_k} experts of {logits.shape[-1]} are asked for. A token's experts are held by one warp, at most "
            f"{MAX_TOP_K} of {MAX_EXPERTS}. Use the operator's reference."
        )
    return None


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _check(logits, bias, top_k, score, n_group, topk_group, group_score) -> None:
    if logits.dim() != 2:
        raise BadArguments(f"logits are {tuple(logits.shape)}. A row is a token, a column an expert. Pass [T, E].")
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise BadArguments(f"top_k is {top_k} of {experts} experts. They must be different. Use 1 to {experts}.")
    if bias is not None and (bias.shape != (experts,) or bias.device != logits.device):
        raise BadArguments(
            f"bias is {tuple(bias.shape)} on {bias.device} for logits {tuple(logits.shape)} on {logits.device}. It has "
            f"one value an expert. Pass [{experts}] on {logits.device}."
        )
    if score not in SCORES or group_score not in GROUP_SCORES:
        raise BadArguments(
            f"score is {score!r} and group_score {group_score!r}. No router of that name is known. Use one of "
            f"{', '.join(map(repr, SCORES))}, and one of {', '.join(map(repr, GROUP_SCORES))}."
        )
    if n_group < 1 or experts % n_group or (n_group > 1 and not 1 <= topk_group <= n_group):
        raise BadArguments(
            f"{topk_group} of {n_group} groups of {experts} experts. Groups have equally many experts, and some "
            "of them stay. Use an n_group that divides the experts and a topk_group of 1 to n_group."
        )
    if n_group > 1 and group_score.startswith("top2") and experts // n_group < 2:
        raise BadArguments(
            f"group_score is {group_score!r} for groups of one expert. There is no second to add. Use 'max'."
        )
