"""A trial run of cuDNN attention before it is relied on: does it take these widths, and are masked rows right?

What cuDNN accepts depends on its version and the card in ways that no query tells, and how it treats extreme biases is
not written down. So a small problem is run once for each device, dtype, pair of widths and kind of mask, forward and
backward, and held against plain PyTorch; the answer is kept, and later calls pay a dictionary look-up.
"""
from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from dscompile.lowering.layouts import in_bshd
from dscompile.lowering.torch_attention import cudnn_backward, cudnn_forward

# Odd lengths, and more requests than the mask has: what a plan may refuse for the sake of a bias.
_B, _H, _S, _T = 2, 2, 77, 131
# Entries are of order 1, results average many of them; 16-bit rounding stays below, a wrong row or key doesn't.
_TOLERANCE = 3e-2

_answers: dict[tuple, str] = {}
_lock = threading.Lock()


def cudnn_trial(device_index: int, dtype: torch.dtype, D: int, V: int, mask_dtype: torch.dtype | None) -> str:
    """-> why cuDNN attention isn't used for these widths and masks of this dtype (None: no mask), or an empty string.

    It reads results back once, which a stream that is being captured can't: untried there, cuDNN is passed over.
    """
    key = (device_index, dtype, D, V, mask_dtype)
    answer = _answers.get(key)
    if answer is None:
        if torch.cuda.is_current_stream_capturing():
            return "cuDNN wasn't tried with these widths before the capture of a CUDA graph began; warm up first"
        with _lock, torch.inference_mode():
            answer = _answers[key] = _try(torch.device("cuda", device_index), dtype, D, V, mask_dtype)
    return answer


def _try(device: torch.device, dtype: torch.dtype, D: int, V: int, mask_dtype: torch.dtype | None) -> str:
    what = f"widths {D}/{V} in {dtype}" + (f" with a mask of {mask_dtype}" if mask_dtype else "")
    q, k = (_wave(length, D, dtype, device) for length in (_S, _T))
    v, grad_o = (_wave(length, V, dtype, device) for length in (_T, _S))
    mask = None if mask_dtype is None else trial_mask(_S, _T, dtype, device)
    if mask is not None and mask_dtype is torch.bool:
        mask = mask > torch.finfo(dtype).min
    scale = 1 / math.sqrt(D)
    try:
        o, lse = cudnn_forward(q, k, v, mask, scale, False)
        gradients = cudnn_backward(grad_o, q, k, v, mask, o, lse, scale, False)
    except RuntimeError as error:
        return f"cuDNN refused a trial of {what}: {str(error).splitlines()[0]}"
    expected = _in_float32(q, k, v, grad_o, mask, scale)
    for ours, exact in zip((o, *gradients), expected):
        if not torch.allclose(ours.float(), exact, rtol=_TOLERANCE, atol=_TOLERANCE):
            return f"cuDNN gave wrong results in a trial of {what}"
    return ""


def trial_mask(S: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An additive mask [1,1,S,T] with every kind of row: in part hidden by -inf and by the lowest value, wholly by
    either (rows 1 and 2), by both (row 3)."""
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(1, 1, S, T, dtype=dtype, device=device)
    mask[..., ::3] = lowest
    mask[..., 5::7] = -math.inf
    mask[:, :, 1] = -math.inf
    mask[:, :, 2] = lowest
    mask[:, :, 3, ::2], mask[:, :, 3, 1::2] = lowest, -math.inf
    return mask


def _wave(length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values between -1 and 1 without a visible period, laid out as the kernels are given them; no random state."""
    n = torch.arange(_B * length * _H * width, dtype=torch.float32, device=device)
    return (n * 0.7 + n.sqrt()).sin().view(_B, length, _H, width).to(dtype).transpose(1, 2)


def _in_float32(
    q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o and the gradients of q, k, v, written out."""
    q, k, v, grad_o = (x.float() for x in (q, k, v, grad_o))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    dead = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    dp = grad_o @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return in_bshd(p @ v), ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_o
