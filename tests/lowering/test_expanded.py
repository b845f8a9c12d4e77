"""The expanded form around torch's CUDA attention, run on the CPU with stand-ins that keep the kernels' contracts.

The stand-ins compute in plain PyTorch what the kernels are documented to, and refuse what those would get wrong
(layouts, paddings, mask types). So everything of ours is tested here: building k and v, the cut of a causal mask, the
join by log-sum-exp, the bias, and the way back through the projections. The kernels themselves: test_mla_gpu.py.
"""
import math
import types

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import expanded, torch_attention
from dscompile.lowering.ops import mla
from tests.lowering.test_mla import SIZES, make, make_mask

FULL, CAUSAL_BOTTOM_RIGHT = 0, 2


def attend(q, k, v, bias, scale):
    """-> p, o, lse of q [B,H,S,D] over k, v; rows of -inf alone give p = 0."""
    scores = scale * (q @ k.transpose(-1, -2))
    p, lse = mla.softmax_and_lse(scores if bias is None else scores + bias)
    return p, p @ v, lse


def differentiate(grad_o, q, k, v, o, lse, bias, scale):
    """A kernel's backward: p from the given lse, its row sums from the given o. -> dq, dk, dv."""
    scores = scale * (q @ k.transpose(-1, -2))
    p = torch.exp((scores if bias is None else scores + bias) - lse.unsqueeze(-1))
    ds = p * (grad_o @ v.transpose(-1, -2) - (grad_o * o).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_o


def causal_bias(S, T, diagonal, like):
    return torch.zeros(S, T, dtype=like.dtype).masked_fill_(~torch.ones(S, T).tril(diagonal).bool(), -math.inf)


def laid_out(x_BHSD):
    """A view of contiguous rows [H,D], as the real kernels are given: only requests and rows may have any pitch."""
    assert x_BHSD[:, :, :1].transpose(1, 2)[:1].is_contiguous()
    return x_BHSD


class Cudnn:
    """aten's cuDNN pair: causal is top-left, T = 1 isn't taken, lse comes as [B,H,S,1]."""

    def forward(self, q, k, v, bias, with_lse, dropout, causal, debug_mask, *, scale):
        assert bias is None and with_lse and dropout == 0.0 and not debug_mask and k.shape[2] != 1
        bias = causal_bias(q.shape[2], k.shape[2], 0, q) if causal else None
        _, o, lse = attend(*map(laid_out, (q, k, v)), bias, scale)
        return o, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None

    def backward(
        self, grad_o, q, k, v, o, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert bias is cu_q is cu_k is None and (max_q, max_k) == (q.shape[2], k.shape[2]) and dropout == 0.0
        assert grad_o.transpose(1, 2).is_contiguous() and o.transpose(1, 2).is_contiguous() and lse.shape[3] == 1
        bias = causal_bias(q.shape[2], k.shape[2], 0, q) if causal else None
        return differentiate(grad_o, q, k, v, o, lse.squeeze(3), bias, scale)


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
        _, o, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), bias, scale)
        lse = torch.nn.functional.pad(lse.masked_fill(lse == -math.inf, 0.0), (0, -q.shape[1] % 32), value=math.inf)
        return o.transpose(1, 2), lse, None, None, q.shape[1], k.shape[1]

    def backward(self, grad_o, q, k, v, bias, o, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, mask_type,
                 bias_requires_grad, *, scale):
        assert cu_q is cu_k is None and (max_q, max_k) == (q.shape[1], k.shape[1]) and not bias_requires_grad
        assert lse.shape[2] % 32 == 0 and torch.all(lse[:, :, q.shape[1]:] == math.inf)
        bias, S = self.bias(bias, q, k, mask_type), q.shape[1]
        grads = differentiate(*(x.transpose(1, 2) for x in (grad_o, q, k, v, o)), lse[:, :, :S], bias, scale)
        return (*(g.transpose(1, 2) for g in grads), None)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    cudnn, efficient = Cudnn(), Efficient()
    monkeypatch.setattr(torch_attention, "_aten", types.SimpleNamespace(
        _scaled_dot_product_cudnn_attention=cudnn.forward,
        _scaled_dot_product_cudnn_attention_backward=cudnn.backward,
        _efficient_attention_forward=efficient.forward,
        _efficient_attention_backward=efficient.backward))


def check(backend, sizes, mask, causal):
    args = make(sizes, torch.float64)
    expected_o, expected_lse = mla.reference(*args, mask, 0.3, causal)
    o, lse = expanded.forward(backend, *args, mask, 0.3, causal)
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(lse.float(), expected_lse)
    assert o.transpose(1, 2).is_contiguous()
    grad_o = torch.randn(o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = mla.reference_backward(grad_o, *args, mask, expected_o, expected_lse, 0.3, causal)
    gradients = expanded.backward(backend, grad_o, *args, mask, o, lse, 0.3, causal)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride() or 1 in ours.shape or 0 in ours.shape


CUDNN_SIZES = {name: SIZES[name] for name in ("square", "longer-cache", "one-query", "no-rope", "odd")}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", CUDNN_SIZES.values(), ids=CUDNN_SIZES)
def test_cudnn_path_equals_reference(sizes, causal):
    assert torch_attention.cudnn_causal_refusal(sizes[2], sizes[3], causal) == ""
    check(expanded.CUDNN, sizes, None, causal)


@pytest.mark.parametrize("kind", ["full", "causal", "bool", "bool-2d", "bool-per-key", "float"])
@pytest.mark.parametrize("name", ["square", "longer-cache", "one-query", "no-rope", "odd"])
def test_efficient_path_equals_reference(name, kind):
    mask, causal = make_mask(kind, SIZES[name], torch.float64)
    check(expanded.EFFICIENT, SIZES[name], mask, causal)


@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
def test_efficient_path_of_a_row_that_sees_nothing(as_float):
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, 0, 3] = False
    if as_float:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, -math.inf)
    check(expanded.EFFICIENT, SIZES["square"], mask, False)


def test_mask_of_one_column_is_materialised():
    mask = torch.tensor([True, False, True, True, True]).view(1, 1, 5, 1)
    check(expanded.EFFICIENT, SIZES["square"], mask, False)


def test_expand_writes_keys_in_place_of_a_copy():
    """The up-projection's output is the key buffer itself: rows of H * (N + R), the rope part beside each head's."""
    _, _, latent, k_rope, w_uk, w_uv = make(SIZES["odd"], torch.float64)
    B, H, _, T, N, R, V, _ = SIZES["odd"]
    k, v = expanded.expand(latent, k_rope, w_uk, w_uv)
    assert k.transpose(1, 2).is_contiguous() and v.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(k[..., :N], torch.einsum("btc,hnc->bhtn", latent, w_uk))
    torch.testing.assert_close(v, torch.einsum("btc,hvc->bhtv", latent, w_uv))
    assert torch.equal(k[..., N:], k_rope.unsqueeze(1).expand(B, H, T, R))
