"""The operators around expert layers on one CUDA device: each implementation against the reference on the CPU or in
float64, and captured graphs that serve other ends, counts and ids."""

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import select
from dscompile.lowering.ops import (
    fp8_grouped_linear,
    fp8_linear,
    grouped_linear,
    permute,
    quantize,
    route,
)
from tests.lowering import experts_oracle
from tests.lowering.test_experts_gpu import captured, error, ids_of, implementations
from tests.lowering.test_route import FORMS

pytestmark = pytest.mark.gpu

OPS, BF16 = torch.ops.dsinfra, torch.bfloat16
# One rounding of the result; the sums are float32.
TOLERANCE = {BF16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
# Hopper's tensor cores keep some 13 bits behind the point while they sum FP8 products of one block of K.
FP8_SUMS = 2**-12


def each(op, *args):
    """(name, result) by each implementation that takes the arguments."""
    for name in implementations(op, args):
        with select.force(op, name):
            yield name, getattr(OPS, op)(*args)


def normal(*shape, dtype=BF16, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def ends_of(*ends):
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


# ------------------------------------------------------------------ 16-bit groups

ENDS = {"usual": (100, 260, 300), "empty": (0, 300, 300), "rows-left": (64, 65, 190), "none": (0, 0, 0)}


@pytest.mark.parametrize("layout", ["k-contiguous", "n-contiguous", "unaligned"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_linear(ends, dtype, layout):
    N, K = (130, 203) if layout == "unaligned" else (192, 256)
    x, w = normal(300, K, dtype=dtype), normal(3, N, K, dtype=dtype)
    if layout == "n-contiguous":
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    x[ends[-1] :] = float("nan")
    exact = grouped_linear.reference(x.double(), w.double(), ends_of(*ends))
    for name, y in each("grouped_linear", x, w, ends_of(*ends)):
        assert torch.all(y[ends[-1] :] == 0) and error(y, exact) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_weight_grad(ends, dtype):
    x, dy = normal(300, 256, dtype=dtype), normal(300, 192, dtype=dtype, seed=1)
    x[ends[-1] :], dy[ends[-1] :] = float("nan"), float("nan")
    exact = grouped_linear.reference_weight_grad(dy.double(), x.double(), ends_of(*ends))
    table = select.table("grouped_weight_grad")
    names = [name for name in table.names if table.get(name).supports(dy, x, ends_of(*ends))]
    for name in names:
        with select.force("grouped_weight_grad", name):
            dw = OPS.grouped_weight_grad(dy, x, ends_of(*ends))
        assert torch.isfinite(dw).all() and error(dw, exact) < TOLERANCE[dtype], name
    assert "torch" in names or dtype != BF16 or torch.cuda.get_device_capability()[0] not in (9, 10)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
def test_captured_groups_serve_other_ends(dtype):
    x, w, dy, ends = (
        normal(300, 256, dtype=dtype),
        normal(3, 192, 256, dtype=dtype),
        normal(300, 192, dtype=dtype),
        ends_of(1, 2, 300),
    )
    graph, (y, dw) = captured(lambda: (OPS.grouped_linear(x, w, ends), OPS.grouped_weight_grad(dy, x, ends)))
    for other in ENDS.values():
        ends.copy_(ends_of(*other))
        graph.replay()
        assert error(y, grouped_linear.reference(x.double(), w.double(), ends)) < TOLERANCE[dtype]
        assert error(dw, grouped_linear.reference_weight_grad(dy.double(), x.double(), ends)) < TOLERANCE[dtype]


# ------------------------------------------------------------------ FP8


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("sizes", [(1, 128), (5, 7168), (133, 200), (2049, 512)], ids=str)
def test_quantisations_are_the_references(sizes, dtype):
    x = normal(*sizes, dtype=dtype)
    expected_q, expected_scale = quantize.reference(x.cpu())
    for name, (q, scale) in each("quantize_1x128", x):
        assert torch.equal(scale.cpu(), expected_scale), name
        assert torch.equal(q.cpu().view(torch.uint8), expected_q.view(torch.uint8)), name
    ends = ends_of(sizes[0] // 2, sizes[0] * 2 // 3)
    for end in (None, ends):
        results = dict(each("silu_mul_quantize_1x128", x, end))
        exact_q, exact_scale = results.pop("reference")
        for name, (q, scale) in results.items():
            torch.testing.assert_close(scale, exact_scale, rtol=1e-5, atol=0)
            # exp differs in the last bit: a value in the middle between two of FP8 may round to either.
            assert error(q.float(), exact_q.float()) < 2e-3, name


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("sizes", [(1, 576, 7168), (70, 512, 200), (300, 192, 256), (1000, 2112, 1536)], ids=str)
def test_fp8_linear(sizes, with_bias):
    M, N, K = sizes
    w, w_scale = (t.cuda() for t in experts_oracle.fp8_weight(N, K, generator=torch.Generator().manual_seed(0)))
    q, scale = OPS.quantize_1x128(normal(M, K))
    bias = normal(N) if with_bias else None
    exact = fp8_linear.reference(q, scale, w, w_scale, bias, torch.float32)
    for out_dtype in (BF16, torch.float32):
        for name, y in each("fp8_linear", q, scale, w, w_scale, bias, out_dtype):
            assert y.dtype == out_dtype and error(y, exact) < max(TOLERANCE[out_dtype], FP8_SUMS), name
    x = normal(M, K).requires_grad_()
    y = OPS.fp8_linear_bf16(x, w, w_scale, bias)
    assert error(y, exact) < TOLERANCE[BF16]
    (grad,) = torch.autograd.grad(y, x, normal(M, N, seed=2))
    assert error(grad, normal(M, N, seed=2).double() @ experts_oracle.weight_of(w.cpu(), w_scale.cpu()).cuda()) < 8e-3


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("sizes", [(512, 256), (200, 328)], ids=str)
def test_fp8_groups(sizes, ends):
    N, K = sizes
    w, w_scale = (t.cuda() for t in experts_oracle.fp8_weight(3, N, K, generator=torch.Generator().manual_seed(0)))
    x = normal(300, K)
    x[ends[-1] :] = float("nan")
    q, scale = OPS.quantize_1x128(x)
    exact = fp8_grouped_linear.reference(q, scale, w, w_scale, ends_of(*ends), torch.float32)
    for name, y in each("fp8_grouped_linear", q, scale, w, w_scale, ends_of(*ends), BF16):
        assert torch.all(y[ends[-1] :] == 0) and error(y, exact) < TOLERANCE[BF16], name


@pytest.mark.parametrize("rows", [6, 64, 130])
def test_fp8_masked_groups(rows):
    w, w_scale = (t.cuda() for t in experts_oracle.fp8_weight(3, 256, 384, generator=torch.Generator().manual_seed(0)))
    parts = [OPS.quantize_1x128(normal(rows, 384, seed=l)) for l in range(3)]
    q, scale = (torch.stack(t) for t in zip(*parts))
    counts = ends_of(rows, 0, rows // 2)
    q.view(torch.uint8)[2, rows // 2 :] = 0x7F  # NaN
    exact = fp8_grouped_linear.reference_masked(q, scale, w, w_scale, counts, torch.float32)
    for name, y in each("fp8_grouped_linear_masked", q, scale, w, w_scale, counts, BF16):
        for l, count in enumerate(counts.tolist()):
            assert error(y[l, :count], exact[l, :count]) < TOLERANCE[BF16], name


# ------------------------------------------------------------------ routing and permutation


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_route(form, dtype):
    logits, bias = normal(300, 16, dtype=dtype), normal(16, dtype=torch.float32, seed=3) / 8
    results = dict(each("route", logits, bias, *form))
    expected_idx, expected_weight = results.pop("reference")
    for name, (idx, weight) in results.items():
        # A score may differ in its last bit, so that two experts of nearly equal score change places.
        same_rows = (idx == expected_idx).all(-1)
        assert same_rows.float().mean() > 0.98, name
        torch.testing.assert_close(weight[same_rows], expected_weight[same_rows], rtol=1e-5, atol=1e-7)


def test_route_has_its_gradient():
    logits = normal(50, 16, dtype=torch.float32).requires_grad_()
    on_cpu = logits.detach().cpu().requires_grad_()
    for x in (logits, on_cpu):
        _, weight = OPS.route(x, None, *FORMS["sigmoid-groups-top2"])
        weight.square().sum().backward()
    torch.testing.assert_close(logits.grad.cpu(), on_cpu.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("T", [1, 33, 700])
def test_permutation(T):
    idx, x, weight = ids_of(T, 16, 4), normal(T, 256), torch.rand(T, 4, device="cuda")
    expected = permute.reference_plan(idx, 16)
    for name, plan in each("moe_plan", idx, 16):
        assert all(map(torch.equal, plan, expected)), name
    order, position, ends = expected
    rows = permute.reference_gather(x, order, position)
    for name, got in each("moe_gather", x, order, position):
        assert torch.equal(got, rows), name
    rows[int(ends[-1]) :] = float("nan")
    for w in (weight, None):
        exact = permute.reference_combine(rows, position, w, idx, 16, torch.float32)
        for name, y in each("moe_combine", rows, position, w, idx, 16, BF16):
            assert error(y, exact) < TOLERANCE[BF16], name
    y = OPS.moe_combine(rows, position, weight, idx, 16, torch.float32)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp8_grouped_linear", "moe_plan", "route"])
def test_no_implementation_waits_for_the_device(name):
    """Captured: what reads a value on the host fails there. The references are captured too."""
    idx, w = (
        ids_of(9, 4, 2),
        [t.cuda() for t in experts_oracle.fp8_weight(3, 128, 256, generator=torch.Generator().manual_seed(0))],
    )
    q, scale = OPS.quantize_1x128(normal(9, 256))
    args = {
        "fp8_grouped_linear": (q, scale, *w, ends_of(1, 4, 9), BF16),
        "moe_plan": (idx, 4),
        "route": (normal(9, 16), None, *FORMS["sigmoid-groups-top2"]),
    }[name]
    for implementation in implementations(name, args):
        with select.force(name, implementation):
            captured(lambda: getattr(OPS, name)(*args))[0].replay()
    torch.cuda.synchronize()


def test_reference_route_is_what_ties_promise():
    logits = torch.zeros(70, 16, device="cuda")
    for _, (idx, _weight) in each("route", logits, None, *FORMS["softmax"]):
        assert torch.equal(idx.cpu(), torch.tensor([[0, 1]]).expand(70, 2))
    assert torch.equal(route.first_top_k(logits, 3)[0].cpu(), torch.tensor([0, 1, 2]))
