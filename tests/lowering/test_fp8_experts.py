"""`dsinfra::fp8_experts` on the CPU, against float64 of the same FP8 values."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, select
from dscompile.lowering.ops import experts as experts_module
from tests.lowering import experts_oracle
from tests.lowering.graphs import compile_counting

EXPERTS = torch.ops.dsinfra.fp8_experts.default
# name: T, D, F, E, K
SIZES = {"usual": (6, 128, 128, 4, 2), "partial-blocks": (5, 136, 72, 3, 2), "no-token": (0, 128, 128, 2, 1)}


def make(sizes, dtype=torch.bfloat16, sentinels=True):
    T, D, F, E, K = sizes
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=g).to(dtype)
    idx = torch.rand(T, E, generator=g).topk(K, -1).indices
    if sentinels:
        idx[torch.rand(T, K, generator=g) < 0.2] = E
    w_gate_up, w_down = (experts_oracle.fp8_weight(*shape, generator=g) for shape in ((E, 2 * F, D), (E, D, F)))
    return [x, idx, torch.rand(T, K, generator=g), *w_gate_up, *w_down]


def exact(x, idx, weight, w_gate_up, s_gate_up, w_down, s_down, activation):
    """Float64 but for the two roundings to FP8."""
    x = experts_oracle.dequantized(x)
    y = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(x.shape[0]) for k in range(idx.shape[1])):
        e = int(idx[t, k])
        if 0 <= e < w_down.shape[0]:
            gate_up = experts_oracle.weight_of(w_gate_up[e], s_gate_up[e]) @ x[t]
            h = experts_oracle.dequantized(experts_oracle.gated(gate_up, activation, False, 1.0, 0.0)[None])[0]
            y[t] += weight[t, k] * (experts_oracle.weight_of(w_down[e], s_down[e]) @ h)
    return y


def relative_error(y, expected):
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matches_oracle(sizes, activation):
    args = make(sizes)
    y = EXPERTS(*args, activation)
    assert y.dtype == torch.bfloat16 and y.shape == args[0].shape
    # A value of h in the middle between two FP8 values may round to either: a few of them, each off by 2^-4.
    assert relative_error(y, exact(*args, activation)) < 4e-3


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_pieces_agree_with_the_reference(activation):
    """What runs on a CUDA device where the fused form doesn't apply rounds gate_up to x's dtype in between."""
    args = make(SIZES["usual"], torch.float32)
    pieces = select.table("fp8_experts").get("pieces").run(*args, activation)
    assert relative_error(pieces, EXPERTS(*args, activation).double()) < 4e-3


@pytest.mark.parametrize("name", ["reference", "pieces"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_quantised_rows_give_the_bits_of_rows(sizes, activation, name):
    x, *others = make(sizes)
    q, scale = torch.ops.dsinfra.quantize_1x128(x)
    run = select.table("fp8_experts").get(name).run
    y = run(q, *others, activation, scale, x.dtype)
    assert y.dtype is x.dtype and torch.equal(y, run(x, *others, activation))


def test_quantised_rows_that_do_not_fit():
    x, *others = make(SIZES["usual"])
    q, scale = torch.ops.dsinfra.quantize_1x128(x)
    for given, error, found in (
        ((q, *others, "silu"), errors.DtypeMismatch, r"x \[6, 128\] is torch.float8_e4m3fn"),
        ((x, *others, "silu", scale, x.dtype), errors.DtypeMismatch, r"x \[6, 128\] is torch.bfloat16"),
        ((q, *others, "silu", scale), errors.DtypeMismatch, r"out_dtype is torch.float8_e4m3fn"),
        ((q, *others, "silu", scale[:, :4], x.dtype), errors.ScaleError, r"x_scale \[1, 4\].*\[1, 8\]"),
        ((x, *others, "silu", None, torch.float32), errors.DtypeMismatch, r"out_dtype is torch.float32"),
    ):
        with pytest.raises(error, match=found):
            EXPERTS(*given)


def test_opcheck():
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # see test_fp8_linear
    x, *others = make(SIZES["usual"])
    q, scale = torch.ops.dsinfra.quantize_1x128(x)
    for given in ((x, *others, "silu"), (q, *others, "silu", scale, x.dtype)):
        torch.library.opcheck(EXPERTS, given, test_utils=utils)


def test_compiles_once_for_all_lengths():
    weights = make(SIZES["usual"])[3:]
    compiled, graphs = compile_counting(lambda x, idx, weight: EXPERTS(x, idx, weight, *weights, "silu") + 1)
    for T in (3, 5, 12):
        args = make((T, *SIZES["usual"][1:]))[:3]
        assert torch.equal(compiled(*args), EXPERTS(*args, *weights, "silu") + 1)
    assert len(graphs) == 1


def test_gradients_are_refused():
    args = make(SIZES["usual"])
    args[0].requires_grad_()
    with pytest.raises(errors.NotDifferentiable, match=r"fp8_experts: .*train with dsinfra::experts"):
        EXPERTS(*args, "silu")
    with torch.no_grad():
        assert torch.isfinite(EXPERTS(*args, "silu")).all()


def test_debug_checks(monkeypatch):
    args = make(SIZES["usual"], sentinels=False)
    args[1][3, 1] = 99
    monkeypatch.setattr(experts_module, "debug_checks", True)
    with pytest.raises(errors.ExpertIdsError, match=r"fp8_experts: row 3 .* 99\]"):
        EXPERTS(*args, "silu")


def test_flops_and_table():
    T, D, F, E, K = SIZES["usual"]
    with FlopCounterMode(display=False) as counter:
        EXPERTS(*make(SIZES["usual"]), "silu")
    assert counter.get_total_flops() == 6 * T * K * D * F
    assert select.table("fp8_experts").names == ("fused", "pieces", "reference")
    assert select.choose("fp8_experts", (*make(SIZES["usual"]), "gelu"))[1][0] == (
        "fused",
        "only silu(gate) * up is fused into a quantisation",
    )
