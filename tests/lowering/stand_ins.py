"""Stand-ins for torch's CUDA attention kernels that keep their contracts on the CPU.

They compute in plain PyTorch what the kernels are documented to, in float32 for 16-bit inputs as those do, and refuse
what the kernels would get wrong: layouts, paddings, mask types, infinities.
"""

import math
import types

import torch

from dscompile.lowering import torch_attention
from dscompile.lowering.ops import mla

FULL, CAUSAL_BOTTOM_RIGHT = 0, 2


def wide(*tensors):
    return [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def attend(q, k, v, bias, scale):
    """-> o, lse of q [B,H,S,D] over k, v; rows of -inf alone give p = 0."""
    dtype = q.dtype
    q, k, v, bias = wide(q, k, v, bias)
    scores = scale * (q @ k.transpose(-1, -2))
    p, lse = mla.softmax_and_lse(scores if bias is None else scores + bias)
    return (p @ v).to(dtype), lse


def differentiate(grad_o, q, k, v, o, lse, bias, scale):
    """A kernel's backward: p from the given lse, its row sums from the given o. -> dq, dk, dv."""
    dtype = q.dtype
    grad_o, q, k, v, o, bias = wide(grad_o, q, k, v, o, bias)
    scores = scale * (q @ k.transpose(-1, -2))
    p = torch.exp((scores if bias is None else scores + bias) - lse.unsqueeze(-1))
    ds = p * (grad_o @ v.transpose(-1, -2) - (grad_o * o).sum(-1, keepdim=True)) * scale
    return [g.to(dtype) for g in (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_o)]


def causal_bias(S, T, diagonal, like):
    return torch.zeros(S, T, dtype=like.dtype).masked_fill_(~torch.ones(S, T).tril(diagonal).bool(), -math.inf)


def laid_out(x_BHSD):
    """A view of contiguous rows [H,D], as the real kernels are given: only requests and rows may have any pitch."""
    assert x_BHSD[:, :, :1].transpose(1, 2)[:1].is_contiguous()
    return x_BHSD


class Cudnn:
    """aten's cuDNN pair: causal is top-left, T = 1 isn't taken, lse comes as [B,H,S,1], a bias has no infinity."""

    def bias(self, bias, q, k, causal):
        (B, H, S, _), T = q.shape, k.shape[2]
        if bias is None:
            return causal_bias(S, T, 0, q) if causal else None
        assert not causal and bias.dtype == q.dtype and bias.shape in ((B, 1, S, T), (B, H, S, T))
        assert bias.stride(3) == 1 and bias.stride(2) and all(stride % 8 == 0 for stride in bias.stride()[:3])
        assert torch.isfinite(bias).all()
        return bias

    def forward(self, q, k, v, bias, with_lse, dropout, causal, debug_mask, *, scale):
        assert with_lse and dropout == 0.0 and not debug_mask and k.shape[2] != 1
        o, lse = attend(*map(laid_out, (q, k, v)), self.bias(bias, q, k, causal), scale)
        return o, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None

    def backward(
        self, grad_o, q, k, v, o, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert cu_q is cu_k is None and (max_q, max_k) == (q.shape[2], k.shape[2]) and dropout == 0.0
        assert grad_o.transpose(1, 2).is_contiguous() and o.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous() and lse.shape[3] == 1 and torch.isfinite(lse).all()
        return differentiate(grad_o, q, k, v, o, lse.squeeze(3), self.bias(bias, q, k, causal), scale)


class Efficient:
    """aten's efficient pair: [B,S,H,D] tensors, lse padded to 32 with inf and 0 for a row that sees nothing."""

    def bias(self, bias, q_BSHD, k_BTHD, mask_type):
        S, T = q_BSHD.shape[1], k_BTHD.shape[1]
        if mask_type == CAUSAL_BOTTOM_RIGHT:
            assert bias is None
            return causal_bias(S, T, T - S, q_BSHD)
        assert mask_type == FULL
        if bias is not None:
            assert bias.shape == (q_BSHD.shape[0], q_BSHD.shape[2], S, T) and bias.dtype == q_BSHD.dtype
            assert bias.stride(3) == 1 and all(stride % 16 == 0 for stride in bias.stride()[:3])
        return bias

    def forward(self, q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, with_lse, *, scale):
        assert cu_q is cu_k is None and dropout == 0.0 and with_lse
        bias = self.bias(bias, q, k, mask_type)
        o, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), bias, scale)
        lse = torch.nn.functional.pad(lse.masked_fill(lse == -math.inf, 0.0), (0, -q.shape[1] % 32), value=math.inf)
        return o.transpose(1, 2), lse, None, None, q.shape[1], k.shape[1]

    def backward(
        self,
        grad_o,
        q,
        k,
        v,
        bias,
        o,
        cu_q,
        cu_k,
        max_q,
        max_k,
        lse,
        dropout,
        seed,
        offset,
        mask_type,
        bias_requires_grad,
        *,
        scale,
    ):
        assert cu_q is cu_k is None and (max_q, max_k) == (q.shape[1], k.shape[1]) and not bias_requires_grad
        assert lse.shape[2] % 32 == 0 and torch.all(lse[:, :, q.shape[1] :] == math.inf)
        bias, S = self.bias(bias, q, k, mask_type), q.shape[1]
        grads = differentiate(*(x.transpose(1, 2) for x in (grad_o, q, k, v, o)), lse[:, :, :S], bias, scale)
        return (*(g.transpose(1, 2) for g in grads), None)


def install(monkeypatch, cudnn=None):
    """Put the stand-ins (a changed cuDNN, if given) where the package calls torch's kernels."""
    cudnn, efficient = cudnn or Cudnn(), Efficient()
    monkeypatch.setattr(
        torch_attention,
        "_aten",
        types.SimpleNamespace(
            _scaled_dot_product_cudnn_attention=cudnn.forward,
            _scaled_dot_product_cudnn_attention_backward=cudnn.backward,
            _efficient_attention_forward=efficient.forward,
            _efficient_attention_backward=efficient.backward,
        ),
    )
