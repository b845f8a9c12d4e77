"""The gated activations of expert layers: `gate_up` [M,2F] -> h [M,F], and the gradient through them.

    silu, gelu, gelu_tanh:  h = act(gate) * up
    swiglu_oai:             gate' = min(gate, limit), up' = clamp(up, -limit, limit)
                            h = (up' + 1) * gate' * sigmoid(alpha * gate')

Gate and up are the halves of the columns, or even and odd columns when interleaved. All in float32 (float64 for
float64) and rounded once; the gradient is made of torch's own operators, so that a compiler fuses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def split(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """-> gate, up as views."""
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    F_ = gate_up.shape[-1] // 2
    return gate_up[..., :F_], gate_up[..., F_:]


def join(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """The inverse of `split`."""
    return torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)


def gated(gate_up: Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """h in the dtype of `gate_up`."""
    gate, up = split(_wide(gate_up), interleaved)
    if activation == "swiglu_oai":
        gate, up = _clamp(gate, up, limit)
        h = (up + 1) * (gate * torch.sigmoid(gate * alpha))
    else:
        h = _pointwise(gate, activation) * up
    return h.to(gate_up.dtype)


def gated_backward(
    gate_up: Tensor, grad_h: Tensor, activation: str, interleaved: bool, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    """The gradient of `gated` for `grad_h` (wide): -> grad_gate_up in the dtype of `gate_up`, and h, wide."""
    gate, up = split(_wide(gate_up), interleaved)
    if activation == "swiglu_oai":
        raw_gate, raw_up = gate, up
        gate, up = _clamp(gate, up, limit)
        s = torch.sigmoid(gate * alpha)
        h = (up + 1) * (gate * s)
        grad_gate = grad_h * (up + 1) * (s + alpha * gate * s * (1 - s))
        grad_up = grad_h * gate * s
        if limit > 0:
            grad_gate = torch.where(raw_gate <= limit, grad_gate, 0)
            grad_up = torch.where(raw_up.abs() <= limit, grad_up, 0)
    else:
        act = _pointwise(gate, activation)
        h, grad_up = act * up, act * grad_h
        grad_gate = _pointwise_backward(up * grad_h, gate, activation)
    return join(grad_gate, grad_up, interleaved).to(gate_up.dtype), h


def _clamp(gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit > 0 else (gate, up)


def _pointwise(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _pointwise_backward(grad: Tensor, gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")
