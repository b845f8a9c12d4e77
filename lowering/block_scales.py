"""FP8 values with a scale a block: what the numbers mean, in plain PyTorch.

Rows (activations) have one scale for 128 columns: q [M,K] float8_e4m3fn and scale float32 [ceil(K/128), ceil4(M)], the
rows of one column block side by side and padded to a multiple of 4 with zeros, so that a GEMM reads the scales of its
tile in one piece and no transpose is needed. Weights have one scale for 128 x 128: w [..., N,K] and
scale [..., ceil(N/128), ceil(K/128)]. Last blocks may be partial. A value is `q * scale`.

No kernel is imported here, and nothing reads a value on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK = 128
FP8_MAX = 448.0
# Below this a scale would leave float32's normal numbers, and its division overflow. An all-zero block has it too.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_ROW_PAD = 4


def blocks(columns: int) -> int:
    """How many blocks of 128 cover that many columns; the size may be symbolic."""
    return (columns + BLOCK - 1) // BLOCK


def padded_rows(rows: int) -> int:
    """The row count of a scale tensor: the next multiple of 4; the size may be symbolic."""
    return (rows + _ROW_PAD - 1) // _ROW_PAD * _ROW_PAD


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [M,K] -> q, scale. scale = max|x| / 448 over a block; a block that holds NaN or inf stays not finite."""
    M, K = x_MK.shape
    x_MBL = F.pad(x_MK, (0, -K % BLOCK)).view(M, blocks(K), BLOCK)
    largest_MB = x_MBL.abs().amax(-1)
    # By a tensor: CUDA divides by a number as it multiplies with its reciprocal, which rounds twice.
    scale_MB = (largest_MB / torch.full_like(largest_MB, FP8_MAX)).clamp_min(SMALLEST_SCALE)
    q_MK = (x_MBL / scale_MB.unsqueeze(-1)).to(FP8).flatten(1)[:, :K].contiguous()
    scale = x_MK.new_zeros(blocks(K), padded_rows(M))
    scale[:, :M] = scale_MB.t()
    return q_MK, scale


def dequantize_rows(q_MK: Tensor, scale: Tensor) -> Tensor:
    """-> float32 [M,K]."""
    M, K = q_MK.shape
    q_MBL = F.pad(q_MK.float(), (0, -K % BLOCK)).view(M, blocks(K), BLOCK)
    return (q_MBL * scale[:, :M].t().unsqueeze(-1)).flatten(1)[:, :K]


def dequantize_weight(w: Tensor, scale: Tensor) -> Tensor:
    """[..., N,K] and its scales -> float32 [..., N,K], of operators that autograd and compilers can trace."""
    *lead, N, K = w.shape
    *_, NB, KB = scale.shape
    spread = scale[..., :, None, :, None].expand(*lead, NB, BLOCK, KB, BLOCK).reshape(*lead, NB * BLOCK, KB * BLOCK)
    return w.float() * spread[..., :N, :K]
