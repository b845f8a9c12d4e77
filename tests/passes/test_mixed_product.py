"""mixed_product: float32 products of upcast 16-bit tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dscompile.passes import mixed_product
from tests.passes.tools import rewritten

T, K, N = 7, 64, 6


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the pass does nothing: the reference would be no faster."""
    monkeypatch.setattr(mixed_product, "_supported", lambda result: True)


def router(x, w):
    return F.linear(x.view(-1, K).type(torch.float32), w.type(torch.float32))


def deep(x, w):
    return F.linear(x.float(), w.to(torch.float32), None).softmax(-1)


def many(x, w):
    return deep(x, w) + router(x, w).view(*x.shape[:-1], N)


def draw(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, K, generator=generator).to(dtype), torch.randn(N, K, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", [(T,), (1,), (2, T), (2, 3, T)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fn, found", [(router, 1), (deep, 1), (many, 2)], ids=lambda v: getattr(v, "__name__", ""))
def test_matches(fn, found, dtype, shape):
    x, w = draw(dtype, *shape)
    actual, record, module = rewritten(mixed_product.run, fn, x, w)
    assert record.matched == found
    calls = [n for n in module.graph.nodes if n.target is torch.ops.dsinfra.mixed_linear.default]
    assert len(calls) == found
    torch.testing.assert_close(actual, fn(x.double().float(), w.double().float()), rtol=1e-5, atol=1e-5)


def biased(x, w):
    return F.linear(x.float(), w.float(), w.float()[:, 0])


def read_twice(x, w):
    wide = x.float()
    return F.linear(wide, w.float()) + wide.sum()


def scaled_in_place(x, w):
    wide = x.float()
    wide *= 1.0001
    return F.linear(wide, w.float())


def scaled_behind_a_view(x, w):
    wide = x.float()
    wide.view(-1).mul_(1.0001)
    return F.linear(wide, w.float())


def computed(x, w):
    return F.linear(x.float() * 1.0001, w.float())


def one_float32(x, w):
    return F.linear(x.float(), w.float().neg())


def two_dtypes(x, w):
    return F.linear(x.float(), w.half().float())


def sixteen_bits(x, w):
    return F.linear(x, w)


REFUSED = [biased, read_twice, scaled_in_place, scaled_behind_a_view, computed, one_float32, two_dtypes, sixteen_bits]


@pytest.mark.parametrize("fn", REFUSED, ids=lambda f: f.__name__)
def test_leaves_alone(fn):
    x, w = draw(torch.bfloat16, T)
    actual, record, _ = rewritten(mixed_product.run, fn, x, w)
    assert not record.sites
    torch.testing.assert_close(actual, fn(x, w))


def test_only_on_cuda(monkeypatch):
    monkeypatch.undo()
    x, w = draw(torch.bfloat16, T)
    assert not rewritten(mixed_product.run, router, x, w)[1].sites


def test_autocast_is_left_alone():
    """Under autocast the product is rounded to 16 bits, whatever it was cast to before."""

    def fn(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return router(x, w)

    x, w = draw(torch.bfloat16, T)
    actual, record, _ = rewritten(mixed_product.run, fn, x, w)
    assert not record.sites
    torch.testing.assert_close(actual, fn(x, w))


def test_gradients():
    x, w = (t.requires_grad_() for t in draw(torch.bfloat16, 2, T))
    weight = torch.randn(2 * T, N)
    want = torch.autograd.grad((router(x, w) * weight).sum(), (x, w))
    actual, record, _ = rewritten(mixed_product.run, router, x, w)
    got = torch.autograd.grad((actual * weight).sum(), (x, w))
    assert record.matched == 1
    for g, e in zip(got, want, strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, rtol=1e-2, atol=1e-2)  # both are rounded to bfloat16 once


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cublas(rows, dtype):
    """Tensor cores truncate where they add, once for each 16 of K: below 1e-5, and far below a result in 16 bits."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, 2048, device="cuda", generator=generator).to(dtype)
    w = torch.randn(64, 2048, device="cuda", generator=generator).to(dtype)
    exact = x.double() @ w.double().t()
    ours = torch.ops.dsinfra.mixed_linear(x, w)
    rounded = x @ w.t()
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 2048 / 16 * 2**-24 * exact.norm()
    assert (ours - exact).norm() <= (rounded - exact).norm() / 50
