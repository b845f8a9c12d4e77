"""`dsinfra::fp8_linear`, `fp8_linear_bf16` and the two FP8 grouped products on the CPU, against float64 of the same FP8
values."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, grouped, select
from tests.lowering import experts_oracle
from tests.lowering.graphs import compile_counting

OPS = torch.ops.dsinfra
LINEAR, COMPOSITE = OPS.fp8_linear.default, OPS.fp8_linear_bf16.default
SORTED, MASKED = OPS.fp8_grouped_linear.default, OPS.fp8_grouped_linear_masked.default
# name: M, N, K
SIZES = {"usual": (5, 128, 256), "partial-blocks": (4, 200, 130), "small": (3, 8, 16), "one-row": (1, 256, 128)}
BF16 = torch.bfloat16
# Without test_schema: it compares its arguments before and after by a product that torch has not for FP8.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def make(M, N, K, groups=None, dtype=BF16):
    """-> x [M,K] unquantised, w [N,K] or [G,N,K] with its scales, bias [N]."""
    g = torch.Generator().manual_seed(M + N + K)
    lead = () if groups is None else (groups,)
    w, w_scale = experts_oracle.fp8_weight(*lead, N, K, generator=g)
    return torch.randn(M, K, generator=g).to(dtype), w, w_scale, torch.randn(N, generator=g).to(dtype)


def near(actual, exact, dtype):
    torch.testing.assert_close(
        actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6 * float(exact.abs().max())
    )


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matches_float64(sizes, with_bias, out_dtype):
    x, w, w_scale, bias = make(*sizes)
    bias = bias if with_bias else None
    y = LINEAR(*OPS.quantize_1x128(x), w, w_scale, bias, out_dtype)
    exact = experts_oracle.dequantized(x) @ experts_oracle.weight_of(w, w_scale).t()
    assert y.dtype == out_dtype and y.shape == (sizes[0], sizes[1])
    near(y, exact if bias is None else exact + bias.double(), out_dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
def test_composite_quantises_inside(dtype):
    x, w, w_scale, bias = make(*SIZES["partial-blocks"], dtype=dtype)
    expected = LINEAR(*OPS.quantize_1x128(x), w, w_scale, bias, dtype)
    assert torch.equal(COMPOSITE(x, w, w_scale, bias), expected)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(COMPOSITE(x, w, w_scale, bias), expected)


def test_composite_gradient_is_straight_through():
    """dx = dy W with W dequantised and dy as it comes, dbias the sum of dy."""
    x, w, w_scale, bias = make(*SIZES["partial-blocks"], dtype=torch.float32)
    x.requires_grad_()
    bias.requires_grad_()
    dy = torch.randn(4, 200, generator=torch.Generator().manual_seed(5))
    COMPOSITE(x, w, w_scale, bias).backward(dy)
    exact = dy.double() @ experts_oracle.weight_of(w, w_scale)
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, dy.sum(0))


def test_composite_gradient_compiles_with_any_length():
    _, w, w_scale, bias = make(*SIZES["usual"])
    compiled, graphs = compile_counting(lambda x: COMPOSITE(x, w, w_scale, bias) * 2)
    for M in (3, 5, 12):
        x = make(M, 128, 256)[0].requires_grad_()
        ours, eager = compiled(x), COMPOSITE(x, w, w_scale, bias) * 2
        assert torch.equal(ours, eager)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, eager)))
    assert len(graphs) == 1


def test_what_has_no_gradient_says_so():
    x, w, w_scale, bias = make(*SIZES["usual"])
    with pytest.raises(errors.NotDifferentiable, match=r"fp8_linear: .* Use dsinfra::fp8_linear_bf16"):
        LINEAR(*OPS.quantize_1x128(x), w, w_scale, bias.requires_grad_(), BF16)
    with pytest.raises(errors.NotDifferentiable, match=r"frozen"):
        COMPOSITE(x, w, w_scale.requires_grad_(), None)
    with pytest.raises(errors.NotDifferentiable, match=r"fp8_linear_bf16, which differentiates around"):
        OPS.quantize_1x128(x.requires_grad_())


# ------------------------------------------------------------------ groups


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "in-a-graph"])
@pytest.mark.parametrize(
    "ends", [[3, 3, 7], [0, 0, 0], [7, 7, 7], [2, 5, 6]], ids=["empty-group", "all-empty", "first-only", "rows-left"]
)
@pytest.mark.parametrize("sizes", [(7, 128, 256), (7, 200, 130)], ids=["usual", "partial-blocks"])
def test_groups_match_float64(sizes, ends, capturing, monkeypatch):
    monkeypatch.setattr(grouped, "can_wait", lambda x: not capturing)
    x, w, w_scale, _ = make(*sizes, groups=3)
    x[ends[-1] :] = float("nan")
    y = SORTED(*OPS.quantize_1x128(x), w, w_scale, torch.tensor(ends, dtype=torch.int32), BF16)
    weights = [experts_oracle.weight_of(w[g], w_scale[g]) for g in range(3)]
    exact = experts_oracle.grouped(experts_oracle.dequantized(x), weights, ends)
    near(y, exact, BF16)
    assert torch.all(y[ends[-1] :] == 0)


@pytest.mark.parametrize("rows", [6, 8])
def test_masked_groups_match_float64_and_skip_the_rest(rows):
    x, w, w_scale, _ = make(3 * rows, 130, 200, groups=3)
    x, counts = x.view(3, rows, 200), torch.tensor([rows, 0, 3], dtype=torch.int32)
    x[2, 3:], x[1] = float("nan"), float("nan")
    q, scales = zip(*(OPS.quantize_1x128(part) for part in x))
    y = MASKED(torch.stack(q), torch.stack(scales), w, w_scale, counts, BF16)
    for group, count in enumerate(counts.tolist()):
        exact = experts_oracle.dequantized(x[group, :count]) @ experts_oracle.weight_of(w[group], w_scale[group]).t()
        torch.testing.assert_close(y[group, :count].double(), exact, rtol=2**-7, atol=1e-5)
    assert y.shape == (3, rows, 130)


# ------------------------------------------------------------------ all of them


def calls():
    x, w, w_scale, bias = make(5, 200, 130)
    q, scale = OPS.quantize_1x128(x)
    _, w3, w3_scale, _ = make(5, 200, 130, groups=3)
    ends = torch.tensor([1, 4, 4], dtype=torch.int32)
    masked = torch.stack([q, q, q]), torch.stack([scale, scale, scale])
    return {
        "fp8_linear": (LINEAR, (q, scale, w, w_scale, bias, BF16), 2 * 5 * 200 * 130),
        "fp8_linear_bf16": (COMPOSITE, (x, w, w_scale, bias), 2 * 5 * 200 * 130),
        "fp8_grouped_linear": (SORTED, (q, scale, w3, w3_scale, ends, BF16), 2 * 5 * 200 * 130),
        "fp8_grouped_linear_masked": (MASKED, (*masked, w3, w3_scale, ends, BF16), 3 * 2 * 5 * 200 * 130),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck_and_flops(name):
    op, args, flops = calls()[name]
    torch.library.opcheck(op, args, test_utils=OPCHECKS)
    with FlopCounterMode(display=False) as counter:
        op(*args)
    assert counter.get_total_flops() == flops


def test_composite_opcheck_with_gradient():
    x, w, w_scale, bias = make(5, 200, 130, dtype=torch.float32)
    torch.library.opcheck(COMPOSITE, (x.requires_grad_(), w, w_scale, bias.requires_grad_()), test_utils=OPCHECKS)


def test_compile_once_for_all_lengths():
    _, w, w_scale, _ = make(*SIZES["usual"], groups=2)
    compiled, graphs = compile_counting(lambda x, ends: SORTED(*QUANTIZED(x), w, w_scale, ends, BF16) + 1)
    for M in (3, 5, 12):
        x, ends = make(M, 128, 256)[0], torch.tensor([1, M], dtype=torch.int32)
        assert torch.equal(compiled(x, ends), SORTED(*QUANTIZED(x), w, w_scale, ends, BF16) + 1)
    assert len(graphs) == 1


QUANTIZED = OPS.quantize_1x128.default


def test_tables():
    for op in ("fp8_linear", "fp8_grouped_linear", "fp8_grouped_linear_masked"):
        assert select.table(op).names == ("hopper", "triton", "reference")
    q, scale, w, w_scale, *rest = calls()["fp8_linear"][1]
    assert select.choose("fp8_linear", (q, scale, w, w_scale, *rest))[1][0] == (
        "hopper",
        "the tensors are on cpu, not cuda",
    )
