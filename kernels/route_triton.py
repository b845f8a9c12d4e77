"""Routers of mixtures of experts in plain Triton: scores, groups, the best experts and their weights, in one kernel.

    score  = softmax(logits) | sigmoid(logits) | logits     choice = score + bias, unless the expert's group is out
    chosen = the K experts of the highest choice            weight = the score of a chosen expert, without the bias

Inputs: logits [T, E] of any float dtype, columns contiguous; bias [E] or None. Outputs: the experts int64 [T, K] in
descending order of choice, among equals the lowest index first, and their weights float32 [T, K]. One program is one
warp and takes one token: its experts lie in the warp's registers as [groups, experts of a group], and each of the K
steps is two warp-wide reductions, of the choice and then of the lowest index that has it. Choices are compared as
integers that order as floats do, with NaN above all others as in torch.topk and -0 equal to 0.

All arithmetic is in float32; exponentials are those of the hardware, to 2 units in the last place of 2**x.
"""

import triton
import triton.language as tl

from dscompile.kernels.overlap_triton import begin


@triton.jit
def order_key(x):
    """float32 -> int32 that compares as x does: NaN is the largest, both zeros are equal, none is -2**31."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def value_of(key):
    """The float32 of a key by `order_key`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def score_of(logits, top, total, SCORE: tl.constexpr):
    """Scores of logits in float32; top and total are the maximum and the sum of the token's softmax."""
    if SCORE == "softmax":
        return tl.div_rn(tl.exp(logits - top), tl.broadcast_to(total, logits.shape))
    if SCORE == "sigmoid":
        one = tl.full(logits.shape, 1.0, tl.float32)
        return tl.div_rn(one, 1.0 + tl.exp(-logits))
    return logits


@triton.jit
def kept_groups(key, s, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_SCORE: tl.constexpr):
    """key [G, S] of the choices -> [G, 1], whether fewer than TOPK_GROUP groups come before the group."""
    best = tl.max(key, 1, keep_dims=True)
    group = best
    if GROUP_SCORE == "top2":
        first = tl.min(tl.where(key == best, s, 0x7FFFFFFF), 1, keep_dims=True)
        second = tl.max(tl.where(s == first, -0x80000000, key), 1, keep_dims=True)
        group = order_key(value_of(best) + value_of(second))
    g = tl.arange(0, key.shape[0])
    group = tl.where((g < GROUPS)[:, None], group, -0x80000000)
    other = tl.trans(group)  # [1, G]
    before = (other > group) | ((other == group) & (g[None, :] < g[:, None]))
    return tl.sum(before.to(tl.int32), 1, keep_dims=True) < TOPK_GROUP


# One token a program: with two, reductions over the half of a warp's lanes came out wrong on a GPU (Triton 3.6).
@triton.jit(do_not_specialize=["stride"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    idx_ptr,
    weight_ptr,
    stride,
    eps,
    scale,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    OTHERS_ZERO: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    K_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Formula and layout: at the head of this file. G, S and K_PAD are powers of two at or above the sizes they hold.

    Experts of groups that are out have a choice of 0 if OTHERS_ZERO, else -inf.
    """
    begin(OVERLAP)
    tl.static_assert(EXPERTS % GROUPS == 0, "groups have equally many experts")
    size: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G)[:, None]
    s = tl.arange(0, S)[None, :]
    e = g * size + s
    real = (g < GROUPS) & (s < size)
    row_ptr = logits_ptr + token * stride
    logits = tl.load(row_ptr + e, mask=real, other=-float("inf")).to(tl.float32)

    top = 0.0
    total = 1.0
    if SCORE == "softmax":
        top = tl.max(tl.max(logits, 1), 0)
        total = tl.sum(tl.sum(tl.exp(logits - top), 1), 0)
    choice = score_of(logits, top, total, SCORE)
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + e, mask=real, other=0.0).to(tl.float32)
    key = tl.where(real, order_key(choice), -0x80000000)
    if GROUPS > 1:
        out = 0 if OTHERS_ZERO else -0x7F800001  # the keys of 0 and of -inf
        key = tl.where(real, tl.where(kept_groups(key, s, GROUPS, TOPK_GROUP, GROUP_SCORE), key, out), -0x80000000)

    key = tl.reshape(key, (G * S,))
    e = tl.reshape(e, (G * S,))
    k = tl.arange(0, K_PAD)
    chosen = tl.zeros((K_PAD,), tl.int32)
    for step in range(K):
        best = tl.max(key, 0)
        expert = tl.min(tl.where(key == best, e, 0x7FFFFFFF), 0)
        chosen = tl.where(k == step, expert, chosen)
        key = tl.where(e == expert, -0x80000000, key)

    # The scores of the chosen, computed anew: their logits lie in the cache, a reduction a step would not be shorter.
    logits = tl.load(row_ptr + chosen, mask=k < K, other=-float("inf")).to(tl.float32)
    if SCORE == "softmax_topk":
        power = tl.exp(logits - tl.max(logits, 0))
        weight = tl.div_rn(power, tl.broadcast_to(tl.sum(power, 0), power.shape))
    else:
        weight = score_of(logits, top, total, SCORE)
    if RENORMALIZE:
        weight = tl.where(k < K, weight, 0.0)
        weight = tl.div_rn(weight, tl.broadcast_to(tl.sum(weight, 0) + eps, weight.shape))
    tl.store(idx_ptr + token * K + k, chosen.to(tl.int64), mask=k < K)
    tl.store(weight_ptr + token * K + k, weight * scale, mask=k < K)
