"""`dsinfra::grouped_linear` and `grouped_weight_grad` on the CPU: row by row, layouts, gradients of any order."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import grouped, select
from tests.lowering import experts_oracle
from tests.lowering.graphs import compile_counting

LINEAR, WEIGHT_GRAD = torch.ops.dsinfra.grouped_linear.default, torch.ops.dsinfra.grouped_weight_grad.default
# name: ends for 9 rows
ENDS = {
    "usual": [2, 5, 9],
    "empty-groups": [0, 4, 4, 9, 9],
    "rows-left": [1, 3, 6],
    "no-row": [0, 0],
    "one-group": [9],
}


def make(ends, M=9, N=5, K=7, dtype=torch.float32, layout="k-contiguous"):
    g = torch.Generator().manual_seed(len(ends))
    x = torch.randn(M, K + 2, generator=g).to(dtype)[:, :K]
    w = torch.randn(len(ends), N, K, generator=g).to(dtype)
    if layout == "n-contiguous":
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every-other-group":
        w = w.repeat_interleave(2, 0)[::2]
    return x, w, torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "in-a-graph"])
@pytest.mark.parametrize("layout", ["k-contiguous", "n-contiguous", "every-other-group"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_matches_oracle(ends, layout, capturing, monkeypatch):
    monkeypatch.setattr(grouped, "can_wait", lambda x: not capturing)
    x, w, ends_tensor = make(ends, layout=layout)
    x[ends[-1] :] = float("nan")
    y = LINEAR(x, w, ends_tensor)
    torch.testing.assert_close(y.double(), experts_oracle.grouped(x, list(w), ends), rtol=1e-5, atol=1e-5)
    assert torch.all(y[ends[-1] :] == 0) and y.is_contiguous()


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "in-a-graph"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_weight_gradient_matches_oracle(ends, capturing, monkeypatch):
    monkeypatch.setattr(grouped, "can_wait", lambda x: not capturing)
    x, w, ends_tensor = make(ends)
    dy = torch.randn(9, 5, generator=torch.Generator().manual_seed(7))
    x[ends[-1] :], dy[ends[-1] :] = float("nan"), float("nan")
    dw = WEIGHT_GRAD(dy, x, ends_tensor)
    for g, (start, end) in enumerate(zip([0, *ends], ends)):
        exact = dy[start:end].double().t() @ x[start:end].double()
        torch.testing.assert_close(dw[g].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_gradients_of_first_and_second_order(ends):
    x, w, ends_tensor = make(ends, M=9, N=2, K=3, dtype=torch.float64)
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    dy = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: LINEAR(x, w, ends_tensor), (x, w))
    assert torch.autograd.gradcheck(lambda dy, x: WEIGHT_GRAD(dy, x, ends_tensor), (dy, x))
    assert torch.autograd.gradgradcheck(lambda x, w: LINEAR(x, w, ends_tensor), (x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_accumulates_in_float32(dtype):
    x, w, ends = make([400, 1000], M=1000, N=3, K=600, dtype=dtype)
    exact = experts_oracle.grouped(x, list(w), [400, 1000])
    torch.testing.assert_close(LINEAR(x, w, ends).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    dw = WEIGHT_GRAD(x[:, :3], x, ends)
    exact = x[:400, :3].double().t() @ x[:400].double()
    torch.testing.assert_close(dw[0].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(requires_grad):
    x, w, ends = make(ENDS["rows-left"], layout="n-contiguous")
    torch.library.opcheck(
        LINEAR, (x.detach().requires_grad_(requires_grad), w.detach().requires_grad_(requires_grad), ends)
    )
    dy = torch.randn(9, 5).requires_grad_(requires_grad)
    torch.library.opcheck(WEIGHT_GRAD, (dy, x.detach(), ends))


def test_compiles_once_for_all_lengths():
    compiled, graphs = compile_counting(lambda x, w, ends: LINEAR(x, w, ends) + 1)
    for M in (4, 11, 20):
        x, w, ends = make([1, 2, 4], M=M)
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        ours, eager = compiled(x, w, ends), LINEAR(x, w, ends) + 1
        assert torch.equal(ours, eager)
        for a, b in zip(*(torch.autograd.grad(y.sum(), (x, w)) for y in (ours, eager))):
            assert torch.equal(a, b)
    assert len(graphs) == 1


def test_autocast_changes_nothing():
    x, w, ends = make(ENDS["usual"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LINEAR(x, w, ends), LINEAR.redispatch(KEYS, x, w, ends))


KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def test_flops_and_tables():
    x, w, ends = make(ENDS["usual"])
    with FlopCounterMode(display=False) as counter:
        LINEAR(x, w, ends)
        WEIGHT_GRAD(torch.ones(9, 5), x, ends)
    assert counter.get_total_flops() == 2 * (2 * 9 * 5 * 7)
    assert select.table("grouped_linear").names == ("hopper", "torch", "triton", "reference")
    assert select.table("grouped_weight_grad").names == ("torch", "reference")
    assert select.choose("grouped_weight_grad", (x, x, ends))[1] == [("torch", "the tensors are on cpu, not cuda")]


def test_what_torchs_grouped_mm_takes(monkeypatch):
    """Its rules, on metadata of tensors that needn't exist."""
    monkeypatch.setattr(grouped, "on_cuda", lambda x: select.YES)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rows, weight = torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(2, 24, 16, dtype=torch.bfloat16)
    assert grouped._torch_refusal(x=rows, w=weight) is None
    assert grouped._torch_refusal(x=rows, w=weight.transpose(1, 2)) is None
    assert "empty" in grouped._torch_refusal(x=rows[:0])
    assert "torch.float32" in grouped._torch_refusal(x=rows.float())
    assert "16 bytes" in grouped._torch_refusal(x=torch.zeros(8, 12, dtype=torch.bfloat16))
    assert "16 bytes" in grouped._torch_refusal(x=torch.zeros(8, 32, dtype=torch.bfloat16)[:, 3:19])
    assert "whole rows or columns" in grouped._torch_refusal(x=torch.zeros(8, 32, dtype=torch.bfloat16)[:, ::2])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "Hopper and Blackwell" in grouped._torch_refusal(x=rows)
