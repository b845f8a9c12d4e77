"""Predicted costs: of MLA's two forms, keys and values expanded from the latent or the up-projection absorbed, and of
an expert layer.

Both forms of MLA give the same result. *Expanded* pays two GEMMs over all T cached rows and then attends over N + R
wide keys and V wide values; *absorbed* attends over the latent itself, C + R wide keys and C wide values, about four
times the multiplications, but reads each cached row once for all heads. So absorbed wins where few queries meet many
rows (decode), expanded where each expanded row serves many queries (prefill). An expert layer costs the weights of the
experts that are hit, or its products where many tokens share them. Pure functions of sizes: a roofline, each step
costing the larger of its arithmetic and its traffic.

MLA: B requests, S query length, T rows of the cache, H heads, N nope, R rope, V value, C latent. Experts: T tokens,
D width, F expert width, E experts, K experts a token. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Above this many queries the absorbed form must win by a margin: its rounding differs more from the written model's
# and it holds C instead of N elements a query and head, which a small gain isn't worth.
_FEW_QUERIES, _MARGIN = 16, 0.8


@dataclass(frozen=True)
class Card:
    """What a device reaches in practice, in FLOP/s and bytes/s."""

    name: str
    gemm: float  # bf16 GEMM
    bandwidth: float  # copy: read and write together
    attention: float  # fused attention at N + R 192, V 128, without a mask operand
    masked_attention: float  # the same with a mask operand, every score computed
    latent_attention: float  # absorbed attention over the latent cache


# Measured on one H100 80GB HBM3 (SXM), torch 2.11.0+cu130, bf16: GEMM 8192^3, a device copy, causal cuDNN attention at
# 128 heads x 4096, cuDNN with an additive bias at the same (3.84 ms; every score counts), absorbed decode at 128 heads.
H100 = Card("H100", 798e12, 3.0e12, 600e12, 358e12, 600e12)
# Not measured: datasheet figures times what the H100 reaches of its own (81 % of arithmetic, 90 % of bandwidth). Off
# Hopper there is no cuDNN kernel for 192/128, so attention is torch's efficient one with a mask or without, at what it
# reaches on the H100 (140e12) scaled by arithmetic, and the latent kernel is plain Triton, assumed to reach a third of
# a GEMM.
H200 = Card("H200", 798e12, 4.3e12, 600e12, 358e12, 600e12)
A100 = Card("A100", 252e12, 1.8e12, 44e12, 44e12, 84e12)
DEFAULT = Card("unknown GPU", 100e12, 0.8e12, 18e12, 18e12, 33e12)
# Not measured: some tens of cores. Both forms run as plain PyTorch, whose attention is GEMMs with softmax between.
CPU = Card("CPU", 1e12, 5e10, 2e11, 2e11, 2e11)
_BY_NAME = (H100, H200, A100)


def card_named(device_name: str) -> Card:
    """The figures for `torch.cuda.get_device_name()`; cautious ones for a card that isn't listed."""
    return next((card for card in _BY_NAME if card.name in device_name), DEFAULT)


def card_for(device: torch.device) -> Card:
    """The figures for a torch device: a CUDA device's by its name, `CPU`, or `DEFAULT` where nothing is known."""
    if device.type == "cpu":
        return CPU
    if device.type == "cuda" and torch.cuda.is_available():
        return card_named(torch.cuda.get_device_name(device))
    return DEFAULT


def visible_share(S: int, T: int, causal: bool) -> float:
    """The share of the S x T scores that a bottom-right causal mask leaves; 1 without it."""
    if not causal or S == 0 or T == 0:
        return 1.0
    rows = min(S, T)  # rows that see anything
    return (rows * T - rows * (rows - 1) / 2) / (S * T)


def _roofline(flops: float, rate: float, bytes_moved: float, card: Card) -> float:
    return max(flops / rate, bytes_moved / card.bandwidth)


def expanded_cost(
    B: int,
    S: int,
    T: int,
    H: int,
    N: int,
    R: int,
    V: int,
    C: int,
    dtype_bytes: int = 2,
    card: Card = H100,
    *,
    causal: bool = True,
    masked: bool = False,
) -> float:
    """Seconds of the expanded form: up-projections over all T rows, then attention over N + R / V wide heads.

    `masked` means a mask operand: torch's kernel then computes every score, at a fraction of the speed.
    """
    kv = B * T * H * (N + R + V)
    q_and_o = B * S * H * (N + R + V)
    weights, rows = H * C * (N + V), B * T * (C + R)
    up = _roofline(2 * B * T * H * C * (N + V), card.gemm, dtype_bytes * (weights + rows + kv), card)
    scores = B * H * S * T * (1.0 if masked else visible_share(S, T, causal))
    rate = card.masked_attention if masked else card.attention
    return up + _roofline(2 * scores * (N + R + V), rate, dtype_bytes * (kv + q_and_o), card)


def absorbed_cost(
    B: int,
    S: int,
    T: int,
    H: int,
    N: int,
    R: int,
    V: int,
    C: int,
    dtype_bytes: int = 2,
    card: Card = H100,
    *,
    causal: bool = True,
) -> float:
    """Seconds of the absorbed form: two GEMMs on the query side, then attention over the latent, read once.

    A mask operand costs no arithmetic here, the kernel reads it beside the rows, but it also skips none: causal=False.
    """
    weights = H * C * (N + V)
    queries = B * S * H * (N + V + 2 * C)
    absorb = _roofline(2 * B * S * H * C * (N + V), card.gemm, dtype_bytes * (weights + queries), card)
    scores = B * H * S * T * visible_share(S, T, causal)
    traffic = dtype_bytes * (B * T * (C + R) + B * S * H * (2 * C + R))
    return absorb + _roofline(2 * scores * (2 * C + R), card.latent_attention, traffic, card)


def mla_costs(*, causal: bool = True, masked: bool = False, length: bool = False, **sizes: Any) -> dict[str, float]:
    """Seconds of both forms, ``absorbed`` and ``expanded``, at the sizes and under the mask of `prefer_absorbed`."""
    return {
        "absorbed": absorbed_cost(**sizes, causal=causal and not masked),
        "expanded": expanded_cost(**sizes, causal=causal, masked=masked or length),
    }


def prefer_absorbed(
    B: int,
    S: int,
    T: int,
    H: int,
    N: int,
    R: int,
    V: int,
    C: int,
    dtype_bytes: int = 2,
    card: Card = H100,
    *,
    causal: bool = True,
    masked: bool = False,
    length: bool = False,
) -> tuple[bool, str]:
    """Whether to absorb the up-projection, and why, with both predicted times.

    `masked` means that the visible keys are known only from a mask operand, so neither form can skip any; `length` that
    the mask is proved to be a length, which the absorbed form reads instead of it while the expanded form still needs
    the operand. For inference only: the absorbed form has no gradient, so a caller that trains doesn't ask.
    """
    sizes = dict(B=B, S=S, T=T, H=H, N=N, R=R, V=V, C=C, dtype_bytes=dtype_bytes, card=card)
    costs = mla_costs(**sizes, causal=causal, masked=masked, length=length)  # type: ignore[arg-type]
    absorbed, expanded = costs["absorbed"], costs["expanded"]
    many = S > _FEW_QUERIES
    better = absorbed < expanded * (_MARGIN if many else 1.0)
    mask = ", with a mask operand" if masked else ", with a mask operand unless absorbed" if length else ""
    margin = f"; above {_FEW_QUERIES} queries absorbed must take less than {_MARGIN} of expanded" if many else ""
    return better, (
        f"{'absorbed' if better else 'expanded'}: {absorbed * 1e6:.1f} us absorbed against {expanded * 1e6:.1f} us "
        f"expanded predicted on {card.name} (B {B}, S {S}, T {T}, H {H}{mask}{margin})"
    )


@dataclass(frozen=True)
class ExpertsCost:
    """What an expert layer is predicted to take: `seconds` for `flops` and `bytes_moved`, by a roofline a step."""

    seconds: float
    flops: float
    bytes_moved: float
    experts_hit: float
    card: str

    def __str__(self) -> str:
        return (
            f"{self.seconds * 1e6:.1f} us predicted on {self.card} ({self.flops / 1e9:.1f} GFLOP, "
            f"{self.bytes_moved / 1e6:.1f} MB, {self.experts_hit:.0f} experts hit)"
        )


# Tensor cores multiply FP8 twice as fast as 16 bits; where there are none of FP8, values are converted first.
_FP8_SPEEDUP = 2.0
# What a grouped product reaches of one GEMM of the same size: 505 to 561 TFLOP/s of 798, at 24576 rows of 64 experts
# (N 2816, K 2048, bf16; the same card and versions).
_GROUPED = 0.66


def experts_hit(T: int, E: int, K: int) -> float:
    """How many experts T tokens are expected to go to, each to K different ones of equal chance."""
    return E * (1 - (1 - K / E) ** T)


def experts_cost(
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    weight_bytes: int = 2,
    dtype_bytes: int = 2,
    card: Card = H100,
    *,
    swiglu_fused: bool = True,
) -> ExpertsCost:
    """An expert layer without its router: gather, two grouped products, activation, weighted sum.

    Args:
        weight_bytes: of a weight; 1 means FP8 products, on cards that have them.
        dtype_bytes: of an activation.
        swiglu_fused: the first product writes F columns a row, not 2F that are read again. FP8 rows are quantised
            between the products, so they never are.
    """
    M, hit, fp8 = T * K, experts_hit(T, E, K), weight_bytes == 1
    rate = card.gemm * _GROUPED * (_FP8_SPEEDUP if fp8 and card in (H100, H200) else 1.0)
    row_bytes = 1 if fp8 else dtype_bytes  # of what a product reads
    fused = swiglu_fused and not fp8
    first_out, flops_first, flops_second = F if fused else 2 * F, 4 * M * D * F, 2 * M * F * D
    steps = (
        (0, dtype_bytes * T * D + row_bytes * M * D),
        (flops_first, weight_bytes * hit * 2 * F * D + row_bytes * M * D + dtype_bytes * M * first_out),
        (0, 0 if fused else dtype_bytes * M * 2 * F + row_bytes * M * F),
        (flops_second, weight_bytes * hit * F * D + row_bytes * M * F + dtype_bytes * M * D),
        (0, dtype_bytes * (M + T) * D),
    )
    seconds = sum(_roofline(flops, rate, moved, card) for flops, moved in steps)
    return ExpertsCost(seconds, flops_first + flops_second, sum(moved for _, moved in steps), hit, card.name)
