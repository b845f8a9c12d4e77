"""lower: the written-out form computes what the operator does, for fused, swapped, separate and transposed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dscompile.passes import lower
from tests.passes.tools import compiled

B, S, H, N, R, V, C = 2, 5, 4, 16, 8, 12, 24


def attend(q, latent, rope, nope, value):
    key = torch.cat([nope, rope[:, None].expand(-1, H, -1, -1)], -1)
    return F.scaled_dot_product_attention(q, key, value, is_causal=True)


def fused(q, latent, rope, w):
    nope, value = F.linear(latent, w).view(B, S, H, N + V).transpose(1, 2).split([N, V], -1)
    return attend(q, latent, rope, nope, value)


def value_first(q, latent, rope, w):
    value, nope = F.linear(latent, w).view(B, S, H, N + V).transpose(1, 2).split([V, N], -1)
    return attend(q, latent, rope, nope, value)


def stacked(q, latent, rope, w):
    nope = F.linear(latent, w[: H * N]).view(B, S, H, N).transpose(1, 2)
    value = F.linear(latent, w[H * N :]).view(B, S, H, V).transpose(1, 2)
    return attend(q, latent, rope, nope, value)


def transposed(q, latent, rope, w):
    nope, value = (latent @ w.t().contiguous().t().t()).view(B, S, H, N + V).transpose(1, 2).split([N, V], -1)
    return attend(q, latent, rope, nope, value)


@pytest.mark.parametrize("form", [fused, value_first, stacked, transposed], ids=lambda f: f.__name__)
def test_written_out(form, monkeypatch):
    monkeypatch.setattr(lower, "_written_out", lambda site: True)  # on a CPU it would stay one operator
    torch.manual_seed(0)
    args = (torch.randn(B, H, S, N + R), torch.randn(B, S, C), torch.randn(B, S, R), torch.randn(H * (N + V), C))
    with torch.no_grad():
        result, (report,) = compiled(form, *args)
        torch.testing.assert_close(result, form(*args), rtol=1e-5, atol=1e-5)
    assert report.op_counts == {"scaled_dot_product_attention": 1}
    assert [s.kernel for s in report.sites] == ["torch's attention"]
    assert report.error == ""
