"""`dsinfra::mixed_linear` on the CPU: against float64, gradients, shapes, errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import select
from dscompile.lowering.errors import DtypeMismatch, ShapeMismatch
from tests.lowering.graphs import compile_counting

LINEAR = torch.ops.dsinfra.mixed_linear.default


def make(M=5, N=3, K=96, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(M)
    return torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(dtype)


@pytest.mark.parametrize("M", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_matches_float64(M, dtype):
    x, w = make(M, dtype=dtype)
    y = LINEAR(x, w)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.double() @ w.double().t(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(requires_grad):
    torch.library.opcheck(LINEAR, tuple(t.requires_grad_(requires_grad) for t in make()))


def test_gradients_are_those_of_the_casts():
    x, w = (t.requires_grad_() for t in make())
    dy = torch.randn(5, 3)
    ours = torch.autograd.grad(LINEAR(x, w), (x, w), dy)
    casts = torch.autograd.grad(x.float() @ w.float().t(), (x, w), dy)
    for a, b in zip(ours, casts, strict=True):
        assert torch.equal(a, b)
    (only,) = torch.autograd.grad(LINEAR(x, w.detach()), (x,), dy)
    assert torch.equal(only, ours[0])


def test_compiles_once_for_all_lengths():
    compiled, graphs = compile_counting(lambda x, w: LINEAR(x, w) + 1)
    for M in (4, 11, 20):
        x, w = make(M)
        assert torch.equal(compiled(x, w), LINEAR(x, w) + 1)
    assert len(graphs) == 1


def test_refuses():
    x, w = make()
    with pytest.raises(DtypeMismatch, match=r"x \[5, 96\] is torch.float32"):
        LINEAR(x.float(), w)
    with pytest.raises(DtypeMismatch, match=r"w \[3, 96\] is torch.float16"):
        LINEAR(x, w.half())
    with pytest.raises(ShapeMismatch, match=r"w \[3, 95\]"):
        LINEAR(x, w[:, 1:])
    with pytest.raises(ShapeMismatch, match="3 dimensions"):
        LINEAR(x[None], w)


def test_flops_and_table():
    x, w = make()
    with FlopCounterMode(display=False) as counter:
        LINEAR(x, w)
    assert counter.get_total_flops() == 2 * 5 * 96 * 3
    assert select.table("mixed_linear").names == ("cublas", "reference")
    assert select.choose("mixed_linear", (x, w))[1] == [("cublas", "the tensors are on cpu, not cuda")]
