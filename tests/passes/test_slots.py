"""A value is read with exactly its own extent: caches and buffers may be longer or deeper than what is attended."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.passes.tools import compiled

H, N, R, V, C = 4, 16, 8, 12, 24


def inputs(batch=2, queries=5, keys=12):
    torch.manual_seed(0)
    return (
        torch.randn(batch, H, queries, N + R),
        torch.randn(batch, keys, C),
        torch.randn(batch, keys, R),
        torch.nn.Parameter(torch.randn(H * (N + V), C)),
    )


def expand(latent, rope, weight):
    batch, keys, _ = latent.shape
    nope, value = F.linear(latent, weight).view(batch, keys, H, N + V).transpose(1, 2).split([N, V], -1)
    return torch.cat([nope, rope[:, None].expand(-1, H, -1, -1)], -1), value


def causal_over_the_first_keys(q, latent, rope, weight):
    key, value = expand(latent, rope, weight)
    key, value = key[:, :, : q.shape[2]], value[:, :, : q.shape[2]]
    return F.scaled_dot_product_attention(q, key, value, is_causal=True)


def keys_from_the_middle(q, latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return F.scaled_dot_product_attention(q, key[:, :, 3:9], value[:, :, 3:9])


def requests_of_a_larger_buffer(q, latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return F.scaled_dot_product_attention(q[:1], key[:1], value[:1])


def values_of_other_keys(q, latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return F.scaled_dot_product_attention(q, key[:, :, :6], value[:, :, 6:])


def heads_of_a_larger_projection(q, latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return F.scaled_dot_product_attention(q[:, 1:3], key[:, 1:3], value[:, 1:3])


FORMS = [
    (causal_over_the_first_keys, True),
    (keys_from_the_middle, True),
    (requests_of_a_larger_buffer, None),
    (values_of_other_keys, False),
    (heads_of_a_larger_projection, None),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form, matched", FORMS, ids=[f.__name__ for f, _ in FORMS])
def test_parts_of_longer_tensors(form, matched, dynamic):
    """Whatever is decided, the result is eager's; ``matched`` None: either decision is right."""
    args = inputs()
    with torch.no_grad():
        result, (report,) = compiled(form, *args, dynamic=dynamic)
        torch.testing.assert_close(result, form(*args), rtol=1e-5, atol=1e-5)
    if matched is not None and not dynamic:
        assert [s.matched for s in report.sites] == [matched], [s.reason for s in report.sites]
