"""A trial run of cuDNN attention before it is relied on: does it take these widths, and are masked rows right?

What cuDNN accepts depends on its version and the card in ways that no query tells, and how it treats extreme biases is
not written down. So a small problem is run once for each device, dtype, pair of widths and kind of mask, forward and
backward, and held against plain PyTorch; the answer is kept, and later calls pay a dictionary look-up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dscompile.lowering.torch_attention import CUDNN_ANY_LENGTH, cudnn_backward, cudnn_forward

_B, _H = 2, 2
# Entries are of order 1, results average many of them; 16-bit rounding stays below, a wrong row or key doesn't.
_TOLERANCE = 3e-2

_answers: dict[tuple, str] = {}


def cudnn_trial(device_index: int, dtype: torch.dtype, D: int, V: int, mask_dtype: torch.dtype | None) -> str:
    """-> why cuDNN attention isn't used for these widths and masks of this dtype (None: no mask), or an empty string.

    It reads results back once, which a stream that is being captured can't: untried there, cuDNN is passed over.
    """
    key = (device_index, dtype, D, V, mask_dtype)
    if key not in _answers:
        if torch.cuda.is_current_stream_capturing():
            return "cuDNN wasn't tried with these widths before the capture of a CUDA graph began; warm up first"
        with torch.inference_mode():
            _answers[key] = run_trial(torch.device("cuda", device_index), dtype, D, V, mask_dtype)
    return _answers[key]


def run_trial(device: torch.device, dtype: torch.dtype, D: int, V: int, mask_dtype: torch.dtype | None) -> str:
    """The trial itself: -> what went wrong, or an empty string."""
    what = f"widths {D}/{V} in {dtype}" + (f" with a mask of {mask_dtype}" if mask_dtype else "")
    # Odd lengths and a mask for one request: what a plan may refuse for the sake of a bias.
    S, T = (77, 131) if (torch.backends.cudnn.version() or 0) >= CUDNN_ANY_LENGTH else (128, 256)
    mask, causal = (None, True) if mask_dtype is None else (trial_mask(S, T, dtype, device), False)
    if mask is None:
        T = S
    elif mask_dtype is torch.bool:
        mask = mask > torch.finfo(dtype).min
    q, k, v, grad_o = (
        _wave(phase, length, width, dtype, device)
        for phase, (length, width) in enumerate(((S, D), (T, D), (T, V), (S, V)))
    )
    scale = 1 / math.sqrt(D)
    try:
        o, lse = cudnn_forward(q, k, v, mask, scale, causal)
        gradients = cudnn_backward(grad_o, q, k, v, mask, o, lse, scale, causal)
    except torch.OutOfMemoryError:
        raise  # says nothing about cuDNN
    except RuntimeError as error:
        return f"cuDNN refused a trial of {what}: {str(error).splitlines()[0]}"
    if causal:
        mask = torch.ones(S, T, dtype=torch.bool, device=device).tril()
    for ours, exact in zip((o, *gradients), _in_float32(q, k, v, grad_o, mask, scale)):
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


def _wave(phase: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values between -1 and 1 without a visible period, laid out as the kernels are given them; no random state."""
    n = torch.arange(_B * length * _H * width, dtype=torch.float32, device=device)
    return (n * 0.7 + n.sqrt() + phase).sin().view(_B, length, _H, width).to(dtype).transpose(1, 2)


def _in_float32(
    q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o and the gradients of q, k, v, written out."""
    q, k, v, grad_o = (x.float() for x in (q, k, v, grad_o))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    dead = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    dp = grad_o @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return p @ v, ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_o
