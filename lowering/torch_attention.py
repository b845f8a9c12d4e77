"""torch's own fused attention kernels, called by name, forward and backward, with the log-sum-exp they compute.

`F.scaled_dot_product_attention` chooses among the same kernels but returns no log-sum-exp, takes a mask that is only
causal for an arbitrary one (the slow kernel) and aligns `is_causal` at the top left. Here the choice is ours, causal is
aligned at the bottom right (query i of S sees keys j <= i + T - S), and forward and backward are plain calls, since an
operator's kernel runs below autograd.

All functions take q [B,H,S,D] with contiguous, aligned rows, k [B,H,T,D] and v [B,H,T,V] as transposes of contiguous
[B,T,H,.], and give o [B,H,S,V] as the transpose of a contiguous [B,S,H,V] and lse [B,H,S] float32, natural log; a row
that sees nothing gives 0 and -inf. A mask is bool or of q's dtype and broadcasts to [B,H,S,T]; see `masking`.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dscompile.lowering import masking
from dscompile.lowering.layouts import in_bshd

_aten = torch.ops.aten
# aten._efficient_attention_*: custom_mask_type.
_NO_MASK, _CAUSAL_BOTTOM_RIGHT = 0, 2
# The efficient kernel writes lse rows padded to this many.
_LSE_ALIGNMENT = 32
# Below 9.15.1 cuDNN gave wrong results for some lengths that are no multiple of 128 (torch prefers it from there on).
CUDNN_ANY_LENGTH = 91501
# The first cuDNN with kernels for 192-wide keys and 128-wide values.
_CUDNN_192_128 = 91100
_MAX_GRID = 65535


# ------------------------------------------------------------------ cuDNN


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """cuDNN attention, with a mask operand or causal without one.

    cuDNN's causal mask is aligned at the top left. For S < T the keys are cut in two: a prefix that every query sees,
    and the last S keys, which are square and causal; the two results are joined by their log-sum-exps.
    """
    S, T = q.shape[2], k.shape[2]
    if mask is not None:
        o, lse = _cudnn_forward(q, k, v, _cudnn_bias(mask, q, T), scale, False)
        tops = masking.row_tops(mask)
        return masking.clear_dead_rows(o, tops), masking.true_lse(lse, tops, q.dtype)
    if not causal or S == 1:
        return _cudnn_forward(q, k, v, None, scale, False)
    if S == T:
        return _cudnn_forward(q, k, v, None, scale, True)
    P = T - S
    o_prefix, lse_prefix = _cudnn_forward(q, k[:, :, :P], v[:, :, :P], None, scale, False)
    o_tail, lse_tail = _cudnn_forward(q, k[:, :, P:], v[:, :, P:], None, scale, True)
    tail_share = torch.sigmoid(lse_tail - lse_prefix).unsqueeze(-1)  # float32, so the join is in float32 too
    o = (o_prefix * (1 - tail_share) + o_tail * tail_share).to(q.dtype)
    return in_bshd(o), torch.logaddexp(lse_prefix, lse_tail)


def cudnn_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v; the mask gets none. The parts of a cut causal forward are differentiated with the whole
    row's o and lse, which is exact: p = exp(s - lse) and sum(grad_o * o) are the whole row's in either part."""
    S, T = q.shape[2], k.shape[2]
    if mask is not None:
        grad_o, lse = masking.for_backward(grad_o, lse, mask, T)
        return _cudnn_backward(grad_o, q, k, v, _cudnn_bias(mask, q, T), o, lse, scale, False)
    if not causal or S == 1:
        return _cudnn_backward(grad_o, q, k, v, None, o, lse, scale, False)
    if S == T:
        return _cudnn_backward(grad_o, q, k, v, None, o, lse, scale, True)
    P = T - S
    dq_prefix, dk_prefix, dv_prefix = _cudnn_backward(grad_o, q, k[:, :, :P], v[:, :, :P], None, o, lse, scale, False)
    dq_tail, dk_tail, dv_tail = _cudnn_backward(grad_o, q, k[:, :, P:], v[:, :, P:], None, o, lse, scale, True)
    return dq_prefix + dq_tail, _cat_rows(dk_prefix, dk_tail), _cat_rows(dv_prefix, dv_tail)


def _cat_rows(first_BHTD: Tensor, second_BHTD: Tensor) -> Tensor:
    return torch.cat([first_BHTD.transpose(1, 2), second_BHTD.transpose(1, 2)], 1).transpose(1, 2)


def _cudnn_bias(mask: Tensor, q: Tensor, T: int) -> Tensor:
    # [B,1,S,T] or [B,H,S,T]: cuDNN takes a stride of 0 between requests and one plane for all heads.
    bias = masking.kernel_bias(mask, q.dtype, T, masking.hidden_value(mask, q.dtype), rows=q.shape[2])
    return bias.expand(q.shape[0], -1, -1, -1)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, False, scale=scale)
    return in_bshd(o), lse.reshape(q.shape[:3])


def _cudnn_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # torch caches the plan by the strides of q, k, v and bias alone: o, grad_o and lse must come in one layout always.
    random_state = torch.empty((), dtype=torch.int64, device=q.device)  # read by dropout only
    return _aten._scaled_dot_product_cudnn_attention_backward(
        in_bshd(grad_o),
        q,
        k,
        v,
        in_bshd(o),
        lse.contiguous().unsqueeze(-1),
        random_state,
        random_state,
        bias,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )


def cudnn_refusal(
    device: torch.device, dtype: torch.dtype, B: int, H: int, S: int, T: int, D: int, V: int, causal: bool
) -> str:
    """Why cuDNN attention can't take these sizes, or an empty string. Reads no tensor and launches nothing."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"cuDNN attention computes in bfloat16 and float16, not {dtype}"
    refusal = _device_refusal(device, (8, 0)) or _grid_refusal(B, H, S, T)
    if refusal:
        return refusal
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN attention is switched off (torch.backends.cuda.enable_cudnn_sdp)"
    version = torch.backends.cudnn.version() or 0
    capability = device_capability(device)
    wide = (D, V) == (192, 128) and capability[0] in (9, 10) and version >= _CUDNN_192_128
    if D % 8 or V % 8 or not (wide or (D <= 128 and V <= 128)):
        return f"cuDNN {version} has no kernel for widths {D}/{V} on compute capability {capability}"
    if version < CUDNN_ANY_LENGTH and (S % 128 or T % 128):
        return f"cuDNN {version} is trusted with lengths that are multiples of 128 only, not {S} x {T}"
    return cudnn_causal_refusal(S, T, causal)


def cudnn_mask_refusal(mask: Tensor | None, dtype: torch.dtype) -> str:
    """Why cuDNN attention can't take this mask, or an empty string. It would read another dtype's bits as q's."""
    if mask is None or mask.dtype in (torch.bool, dtype):
        return ""
    return f"cuDNN attention needs a mask operand of bool or {dtype}, not {mask.dtype}"


def cudnn_backward_refusal(S: int, T: int, causal: bool) -> str:
    """Why cuDNN's backward can't be trusted with these lengths, or an empty string.

    On Hopper it scores the empty half of a last tile of 128 keys, or 127 empty queries beside a single one, as 0 where
    nothing is masked causally. exp(0 - lse) overflows once lse < -88, and infinity times their zeros is NaN
    (pytorch#196678, NVIDIA/cudnn-frontend#1072; versions up to 9.30). Scores that low are rare, not excluded.
    """
    if S == 1:
        return "the backward of cuDNN attention gives NaN for a single query of very low scores"
    uncausal_keys = T - S if causal else T
    if uncausal_keys % 128 == 64:
        return f"the backward of cuDNN attention gives NaN for {uncausal_keys} keys (64 above 128 n) of very low scores"
    return ""


def cudnn_causal_refusal(S: int, T: int, causal: bool) -> str:
    """Why the cut of `cudnn_forward` can't express this causal mask, or an empty string."""
    if causal and S > T:
        return f"causal with more queries than keys ({S} > {T}) leaves rows that see nothing"
    if T == 1 or (causal and S > 1 and T - S == 1):
        return "cuDNN attention doesn't take a single key"
    return ""


# ------------------------------------------------------------------ efficient attention (CUTLASS)


def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """torch's memory-efficient attention: with a mask operand (bool or q's dtype), or causal without one."""
    B, H, S, _ = q.shape
    o, lse, *_ = _aten._efficient_attention_forward(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        _efficient_bias(mask, q, k.shape[2]),
        None,
        None,
        None,
        None,
        0.0,
        _CAUSAL_BOTTOM_RIGHT if causal else _NO_MASK,
        True,
        scale=scale,
    )
    lse = lse[:, :, :S]
    if mask is not None:  # in dead rows the kernel writes o = 0, lse = 0
        lse = masking.true_lse(lse, masking.row_tops(mask), q.dtype)
    return in_bshd(o.transpose(1, 2)), lse.contiguous()


def efficient_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v; the mask gets none."""
    S, T = q.shape[2], k.shape[2]
    if mask is not None:
        grad_o, lse = masking.for_backward(grad_o, lse, mask, T)
    lse = F.pad(lse, (0, -S % _LSE_ALIGNMENT), value=math.inf)
    random_state = torch.empty((), dtype=torch.int64, device=q.device)  # read by dropout only
    dq, dk, dv, _ = _aten._efficient_attention_backward(
        in_bshd(grad_o).transpose(1, 2),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        _efficient_bias(mask, q, T),
        o.transpose(1, 2),
        None,
        None,
        S,
        T,
        lse,
        0.0,
        random_state,
        random_state,
        _CAUSAL_BOTTOM_RIGHT if causal else _NO_MASK,
        False,
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _efficient_bias(mask: Tensor | None, q: Tensor, T: int) -> Tensor | None:
    return None if mask is None else masking.kernel_bias(mask, q.dtype, T, -math.inf).expand(*q.shape[:3], T)


def efficient_refusal(
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None,
    B: int,
    H: int,
    S: int,
    T: int,
    D: int,
    V: int,
    causal: bool,
) -> str:
    """Why efficient attention can't take these sizes and this mask, or an empty string."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"efficient attention doesn't compute in {dtype}"
    refusal = _device_refusal(device, (8, 0)) or _grid_refusal(B, H, S, T)
    if refusal:
        return refusal
    if not torch.backends.cuda.mem_efficient_sdp_enabled():
        return "efficient attention is switched off (torch.backends.cuda.enable_mem_efficient_sdp)"
    alignment = 4 if dtype == torch.float32 else 8
    if D % alignment or V % alignment:
        return f"efficient attention needs widths that are multiples of {alignment}, not {D}/{V}"
    if mask is not None and mask.dtype not in (torch.bool, dtype):
        return f"efficient attention needs a mask of bool or {dtype}, not {mask.dtype}"
    if causal and S > T:
        return f"causal with more queries than keys ({S} > {T}) leaves rows that see nothing"
    return ""


# ------------------------------------------------------------------ the device


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, asked once; (0, 0) for other devices or where no CUDA device is present."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def _device_refusal(device: torch.device, at_least: tuple[int, int]) -> str:
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not cuda"
    capability = device_capability(device)
    return "" if capability >= at_least else f"compute capability {capability} is below {at_least}"


def _grid_refusal(B: int, H: int, S: int, T: int) -> str:
    if 0 in (B, H, S, T):
        return f"an empty problem (B {B}, H {H}, S {S}, T {T})"
    return f"more than {_MAX_GRID} requests or heads (B {B}, H {H})" if max(B, H) > _MAX_GRID else ""
