"""real_rotation: rotary embeddings by complex products, in real arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from dscompile.passes import real_rotation
from tests.passes.tools import rewritten

B, H, S, R = 2, 3, 5, 8


def angles(length: int = S) -> torch.Tensor:
    turn = torch.arange(length)[:, None] * torch.logspace(0, -2, R // 2)
    return torch.polar(torch.ones_like(turn), turn)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def two(q, k, table):
    return rotate(q, table), rotate(k, table)


def transposed(x, table):
    return rotate(x.transpose(1, 2), table)


def unsqueezed(x, table):
    return rotate(x.transpose(1, 2), table[None].unsqueeze(2))


def method(x, table):
    return torch.view_as_real(torch.view_as_complex(x.view(B, H, S, -1, 2)).mul(table))


def complex_table(x, real):
    return rotate(x, torch.view_as_complex(real))


def written_between(x, table):
    pairs = x.clone().view(B, H, S, -1, 2)
    turned = torch.view_as_complex(pairs)
    pairs.mul_(2)
    first = torch.view_as_real(turned * table)
    pairs.add_(1)
    return first, torch.view_as_real(turned * table)


def result_written(x, table):
    turned = torch.view_as_complex(x.view(B, H, S, -1, 2)) * table
    one, other = torch.view_as_real(turned), torch.view_as_real(turned)
    one.mul_(2)
    return one, other


X = torch.randn(B, H, S, R, generator=torch.Generator().manual_seed(0))
MATCHES = [
    (two, (X, X[:, :1], angles()), 2),
    (two, (X.bfloat16(), X[:, :1].bfloat16(), angles()), 2),
    (transposed, (X.transpose(1, 2).contiguous(), angles()), 1),
    (unsqueezed, (X, angles(S)), 1),
    (method, (X, angles()), 1),
    (method, (X.double(), angles().to(torch.complex128)), 1),
    (complex_table, (X, torch.view_as_real(angles())), 1),
    (written_between, (X, angles()), 2),
    (result_written, (X, angles()), 1),
]


@pytest.mark.parametrize("fn, args, found", MATCHES, ids=lambda v: getattr(v, "__name__", ""))
def test_matches(fn, args, found):
    """As many products as there are, the same bits but for fused multiply-adds, the same strides."""
    if fn is unsqueezed:
        args = (args[0].transpose(1, 2).contiguous().transpose(1, 2), args[1])
    expected = fn(*args)
    actual, record, module = rewritten(real_rotation.run, fn, *args)
    assert record.matched == len(record.sites) == found
    for got, want in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, check_stride=True)
    assert products_read(module) == 0


def products_read(module: fx.GraphModule) -> int:
    """Complex products of which something is still read."""
    products = [n for n in module.graph.nodes if n.name.startswith("mul") and n.meta["example_value"].is_complex()]
    return sum(bool(reader.users) for n in products for reader in n.users)


def read_as_complex(x, table):
    turned = torch.view_as_complex(x.view(B, H, S, -1, 2)) * table
    return torch.view_as_real(turned), turned.abs()


def in_place(x, table):
    turned = torch.view_as_complex(x.clone().view(B, H, S, -1, 2))
    turned *= table
    return torch.view_as_real(turned)


def conjugate(x, table):
    return rotate(x, table.conj())


def real_factor(x, table):
    return torch.view_as_real(torch.view_as_complex(x.view(B, H, S, -1, 2)) * table.real)


@pytest.mark.parametrize("fn", [read_as_complex, in_place, conjugate, real_factor], ids=lambda f: f.__name__)
def test_leaves_alone(fn):
    expected = fn(X, angles())
    actual, record, _ = rewritten(real_rotation.run, fn, X, angles())
    assert not record.sites
    torch.testing.assert_close(actual, expected, check_stride=True)


def test_no_product():
    _, record, _ = rewritten(real_rotation.run, lambda x: x * x, X)
    assert not record.sites


def test_lengths_share_one_graph():
    """Symbolic lengths: equal to eager at each, without a guard of ours."""
    graphs = []

    def backend(module, inputs):
        graphs.append(real_rotation.run(module).matched)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(transposed, backend=backend, dynamic=True)
    for length in (5, 9, 17):
        x, table = torch.randn(B, length, H, R), angles(length)
        torch.testing.assert_close(compiled(x, table), transposed(x, table), rtol=2e-6, atol=2e-6)
    assert graphs == [1]


def test_gradients():
    x = X.clone().requires_grad_()
    weight = torch.randn(B, H, S, R)
    (want,) = torch.autograd.grad((rotate(x, angles()) * weight).sum(), x)
    actual, record, _ = rewritten(real_rotation.run, rotate, x, angles())
    (got,) = torch.autograd.grad((actual * weight).sum(), x)
    assert record.matched == 1
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
